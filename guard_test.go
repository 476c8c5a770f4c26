package bobtail_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/breaker"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// byKey is a fleet that answers by the request's key: "fail" and the name of a code fail,
// "wait" waits for an hour; all else is answered at once.
func byKey(t *testing.T, n int) *grpctest.Fleet {
	serve := func(ctx context.Context, req *kvpb.Request) error {
		switch {
		case req.Key == "wait":
			select {
			case <-time.After(time.Hour):
			case <-ctx.Done():
				return status.FromContextError(ctx.Err()).Err()
			}
		case req.Key == "fail":
			return status.Error(codes.Unavailable, "no")
		case req.Key != "":
			var c codes.Code
			if err := c.UnmarshalJSON([]byte(`"` + req.Key + `"`)); err != nil {
				return err
			}
			return status.Error(c, "no")
		}
		return nil
	}
	return grpctest.NewFleet(t, n, grpctest.Handlers{
		Unary: func(ctx context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
			return &kvpb.Response{Id: req.Id, Backend: b.Name}, serve(ctx, req)
		},
		Scan: func(b *grpctest.Backend, req *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
			if err := s.Send(&kvpb.Response{}); err != nil {
				return err
			}
			return serve(s.Context(), req)
		},
	})
}

func arrived(f *grpctest.Fleet) int64 {
	return f.Total(func(b *grpctest.Backend) int64 { return b.Started.Load() })
}

// reason returns what the ErrorInfo of a refusal says, and the delay of its RetryInfo.
func reason(err error) (string, time.Duration) {
	name, after := "", time.Duration(0)
	for _, d := range status.Convert(err).Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			name = d.Domain + " " + d.Reason + " " + d.Metadata["method"]
		case *errdetails.RetryInfo:
			after = d.RetryDelay.AsDuration()
		}
	}
	return name, after
}

func get(ctx context.Context, kv kvpb.KVClient, key string, opts ...grpc.CallOption) error {
	_, err := kv.Get(ctx, &kvpb.Request{Key: key}, opts...)
	return err
}

// Each part that may refuse a call: when it does, what the caller sees, that nothing is
// sent and that it ends; in mode shadow that nobody is refused, and everything told.
func TestRefusals(t *testing.T) {
	for _, tc := range []struct {
		name, keys string
		// spend brings the part to the point of refusing.
		spend  func(t *testing.T, kv kvpb.KVClient)
		is     error
		code   codes.Code
		reason string
		after  func(time.Duration) bool
	}{{
		"circuitBreaker", `"circuitBreaker": {"minimumCalls": 4, "openFor": "10s"}`,
		func(t *testing.T, kv kvpb.KVClient) {
			for range 4 {
				get(t.Context(), kv, "fail")
			}
		}, breaker.ErrOpen, codes.Unavailable, "BREAKER_OPEN", func(d time.Duration) bool { return d >= 10*time.Second && d < 15*time.Second },
	}, {
		"adaptiveThrottling", `"adaptiveThrottling": {}`,
		func(t *testing.T, kv kvpb.KVClient) {
			for range 200 {
				get(t.Context(), kv, "fail")
			}
		}, breaker.ErrThrottled, codes.Unavailable, "THROTTLED", func(d time.Duration) bool { return d == 0 },
	}, {
		"rateLimit", `"rateLimit": {"perSecond": 0.1, "burst": 3}`,
		func(t *testing.T, kv kvpb.KVClient) {
			for range 3 {
				get(t.Context(), kv, "")
			}
		}, shedding.ErrRateLimited, codes.ResourceExhausted, "RATE_LIMITED", func(d time.Duration) bool { return d > 9*time.Second && d <= 10*time.Second },
	}, {
		"maxInFlight", `"maxInFlight": 2`,
		func(t *testing.T, kv kvpb.KVClient) {
			for range 2 {
				ctx, cancel := context.WithCancel(t.Context())
				t.Cleanup(cancel)
				go get(ctx, kv, "wait")
			}
			synctest.Wait()
		}, shedding.ErrBulkheadFull, codes.ResourceExhausted, "BULKHEAD_FULL", func(d time.Duration) bool { return d == 0 },
	}} {
		for _, mode := range []string{"on", "shadow", "off"} {
			t.Run(tc.name+"/"+mode, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var mu sync.Mutex
					var told []bobtail.Refusal
					f := byKey(t, 3)
					kv, _ := client(t, f, policy(t, fmt.Sprintf(`{"mode": %q, "methodConfig": [{"name": [{}], %s}]}`, mode, tc.keys)),
						bobtail.WithRefusalReports(func(_ context.Context, r bobtail.Refusal) {
							mu.Lock()
							told = append(told, r)
							mu.Unlock()
						}))
					tc.spend(t, kv)
					told = nil
					ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
					defer cancel()
					// The throttle refuses at random; 30 calls in a row have never all been let through.
					var err error
					var ends []error
					before := arrived(f)
					sent := int64(0)
					for range 30 {
						sent++
						ends = nil
						if err = get(ctx, kv, "", grpc.OnFinish(func(err error) { ends = append(ends, err) })); err != nil || mode != "on" {
							break
						}
					}
					if mode != "on" {
						if err != nil || arrived(f)-before != 1 {
							t.Errorf("%v, %d sent, want the call let through", err, arrived(f)-before)
						}
						for range 30 {
							get(ctx, kv, "")
						}
						if (len(told) > 0) != (mode == "shadow") {
							t.Fatalf("%d refusals told in mode %s", len(told), mode)
						}
						for _, r := range told {
							if !r.Shadow || r.Reason != tc.reason || r.Code != tc.code || !errors.Is(r.Err, tc.is) {
								t.Errorf("told %+v", r)
							}
						}
						return
					}
					name, after := reason(err)
					if !errors.Is(err, tc.is) || status.Code(err) != tc.code || name != "bobtail "+tc.reason+" /kv.KV/Get" || !tc.after(after) {
						t.Errorf("%v: %q, again after %v", err, name, after)
					}
					if arrived(f)-before != sent-1 {
						t.Errorf("%d calls sent, want all but the one refused", arrived(f)-before)
					}
					if len(ends) != 1 || ends[0] != err {
						t.Errorf("OnFinish was told %v, want the refusal once", ends)
					}
					if len(told) != 1 || told[0].Shadow || told[0].Reason != tc.reason || told[0].Method != "/kv.KV/Get" {
						t.Errorf("told %+v, want the refusal once", told)
					}
					// Other methods are none of its business, and an operator's call goes past it.
					if err := calls["Put"](ctx, kv); err != nil {
						t.Errorf("another method: %v", err)
					}
					if err := get(ctx, kv, "", bobtail.NoRefusal()); err != nil {
						t.Errorf("NoRefusal: %v", err)
					}
				})
			})
		}
	}
}

// What a stream holds it holds until its end, however it ends: here one place for all.
func TestStreamsHoldTheirPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := byKey(t, 3)
		kv, _ := client(t, f, policy(t, `{"methodConfig": [{"name": [{}], "timeout": "60s", "maxInFlight": 1}]}`))
		full := func() bool {
			_, err := kv.Scan(t.Context(), &kvpb.Request{})
			return errors.Is(err, shedding.ErrBulkheadFull)
		}
		for _, tc := range []struct {
			name string
			end  func(s grpc.ServerStreamingClient[kvpb.Response], cancel func())
		}{
			{"read to its end", func(s grpc.ServerStreamingClient[kvpb.Response], _ func()) {
				for {
					if _, err := s.Recv(); err != nil {
						return
					}
				}
			}},
			{"left by its caller, who never received", func(_ grpc.ServerStreamingClient[kvpb.Response], cancel func()) { cancel() }},
			{"left by its caller, who had received", func(s grpc.ServerStreamingClient[kvpb.Response], cancel func()) {
				s.Recv()
				cancel()
			}},
			{"the policy's timeout", func(grpc.ServerStreamingClient[kvpb.Response], func()) { time.Sleep(61 * time.Second) }},
		} {
			key := "wait"
			if tc.name == "read to its end" {
				key = ""
			}
			ctx, cancel := context.WithCancel(t.Context())
			s, err := kv.Scan(ctx, &kvpb.Request{Key: key})
			if err != nil {
				t.Fatalf("%s: %v", tc.name, err)
			}
			if !full() {
				t.Errorf("%s: the place is free while the stream is open", tc.name)
			}
			tc.end(s, cancel)
			synctest.Wait()
			ctx2, cancel2 := context.WithCancel(t.Context())
			if _, err := kv.Scan(ctx2, &kvpb.Request{Key: "wait"}); err != nil {
				t.Errorf("%s: %v, want the place given back", tc.name, err)
			}
			cancel2()
			cancel()
			synctest.Wait()
		}
	})
}

// A panic below takes nothing with it.
func TestPanicBelow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := byKey(t, 1)
		c, err := bobtail.NewClient(policy(t, `{"methodConfig": [{"name": [{}], "maxInFlight": 1, "circuitBreaker": {"minimumCalls": 1}, "adaptiveThrottling": {}}]}`), bobtail.WithLogger(nil))
		if err != nil {
			t.Fatal(err)
		}
		boom := true
		cc := f.Dial(append(c.DialOptions(),
			grpc.WithChainUnaryInterceptor(func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, inv grpc.UnaryInvoker, o ...grpc.CallOption) error {
				if boom {
					panic("boom")
				}
				return inv(ctx, m, req, reply, cc, o...)
			}),
			grpc.WithChainStreamInterceptor(func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, m string, st grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
				if boom {
					panic("boom")
				}
				return st(ctx, d, cc, m, o...)
			}))...)
		kv := kvpb.NewKVClient(cc)
		for _, call := range []func(){func() { get(t.Context(), kv, "") }, func() { kv.Scan(t.Context(), &kvpb.Request{}) }} {
			func() {
				defer func() {
					if recover() != "boom" {
						t.Error("the panic is lost")
					}
				}()
				call()
			}()
		}
		boom = false
		if err := get(t.Context(), kv, ""); err != nil {
			t.Errorf("unary: %v", err)
		}
		if err := calls["Scan"](t.Context(), kv); err != nil {
			t.Errorf("stream: %v", err)
		}
	})
}

// One call's own wishes, by options and by context.
func TestCallOptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := stalling(t, 3)
		hedged, _ := client(t, f, policy(t, `{"methodConfig": [{"name": [{"service": "kv.KV"}], "timeout": "0.1s",
			"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.010s"}}]}`))
		g := byKey(t, 3)
		retried, _ := client(t, g, policy(t, `{"methodConfig": [{"name": [{"service": "kv.KV"}], "timeout": "10s",
			"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`))
		attempts := func(kv kvpb.KVClient, f *grpctest.Fleet, key string, ctx context.Context, opts ...grpc.CallOption) int64 {
			before := arrived(f)
			get(ctx, kv, key, opts...)
			return arrived(f) - before
		}
		ctx := t.Context()
		for _, tc := range []struct {
			name string
			got  int64
			want int64
		}{
			{"hedged", attempts(hedged, f, "", ctx), 2},
			{"NoHedge", attempts(hedged, f, "", ctx, bobtail.NoHedge()), 1},
			{"NoHedge by context", attempts(hedged, f, "", bobtail.WithCallPolicy(ctx, bobtail.NoHedge())), 1},
			{"NoRetry is no NoHedge", attempts(hedged, f, "", ctx, bobtail.NoRetry()), 2},
			{"a timeout before the hedge", attempts(hedged, f, "", ctx, bobtail.CallTimeout(5*ms)), 1},
			{"retried", attempts(retried, g, "fail", ctx), 3},
			{"NoRetry", attempts(retried, g, "fail", ctx, bobtail.NoRetry()), 1},
			{"NoRetry by context, nested in another", attempts(retried, g, "fail", bobtail.WithCallPolicy(bobtail.WithCallPolicy(ctx, bobtail.NoRetry()), bobtail.NoHedge())), 1},
		} {
			if tc.got != tc.want {
				t.Errorf("%s: %d attempts, want %d", tc.name, tc.got, tc.want)
			}
		}
		for _, tc := range []struct {
			opt  grpc.CallOption
			want time.Duration
		}{{bobtail.CallTimeout(5 * time.Second), 5 * time.Second}, {bobtail.CallTimeout(time.Minute), time.Minute}, {bobtail.CallTimeout(0), time.Hour}, {bobtail.CallTimeout(-time.Hour), time.Nanosecond}} {
			begin := time.Now()
			get(ctx, retried, "wait", tc.opt)
			if d := time.Since(begin); d != tc.want {
				t.Errorf("%#v: took %v, want %v", tc.opt, d, tc.want)
			}
		}
		// What is given with the call wins over the context.
		begin := time.Now()
		get(bobtail.WithCallPolicy(ctx, bobtail.CallTimeout(time.Second)), retried, "wait", bobtail.CallTimeout(3*time.Second))
		if d := time.Since(begin); d != 3*time.Second {
			t.Errorf("took %v, want 3s", d)
		}
	})
}

// Update under load loses no call, and what a policy leaves unchanged goes on where it
// was: an open breaker stays open, a spent rate limit spent, places taken.
func TestUpdateKeeps(t *testing.T) {
	const keys = `"circuitBreaker": {"minimumCalls": 4, "openFor": "100s"}, "maxInFlight": 2, "rateLimit": {"perSecond": 0.001, "burst": 7}`
	doc := func(keys, timeout string) string {
		return fmt.Sprintf(`{"methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}], "timeout": %q, %s}]}`, timeout, keys)
	}
	synctest.Test(t, func(t *testing.T) {
		f := byKey(t, 3)
		p := policy(t, doc(keys, "1s"))
		kv, c := client(t, f, p)
		for range 4 {
			get(t.Context(), kv, "fail")
		}
		for i, next := range []string{doc(keys, "2s"), `{"mode": "off"}`, `{}`, doc(keys, "1s")} {
			if err := c.Update(policy(t, next)); err != nil {
				t.Fatal(err)
			}
			want := strings.Contains(next, "circuitBreaker")
			if err := get(t.Context(), kv, ""); errors.Is(err, breaker.ErrOpen) != want {
				t.Errorf("after update %d: %v, want open %v", i+1, err, want)
			}
		}
		// Another configuration of the breaker begins anew; of the rate limit's 7 tokens
		// the 4 failures and the 2 refused by the breaker took 6.
		if err := c.Update(policy(t, strings.Replace(doc(keys, "1s"), "100s", "99s", 1))); err != nil {
			t.Fatal(err)
		}
		if err := get(t.Context(), kv, ""); err != nil {
			t.Errorf("a new breaker: %v", err)
		}
		if err := get(t.Context(), kv, ""); !errors.Is(err, shedding.ErrRateLimited) {
			t.Errorf("%v, want the rate limit as spent as it was", err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 3, grpctest.Handlers{
			Unary: func(context.Context, *grpctest.Backend, *kvpb.Request) (*kvpb.Response, error) {
				time.Sleep(3 * ms)
				return &kvpb.Response{}, nil
			},
		})
		docs := []string{doc(`"maxInFlight": 1000`, "1s"), `{}`, doc(`"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.002s"}`, "1s"),
			doc(`"retryPolicy": {"maxAttempts": 2, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["INTERNAL"]}`, "1s"),
			doc(`"circuitBreaker": {}, "adaptiveThrottling": {}, "rateLimit": {"perSecond": 1000000}`, "1s")}
		kv, c := client(t, f, policy(t, docs[0]))
		var wg sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		for range 20 {
			wg.Go(func() {
				for ctx.Err() == nil {
					if err := get(t.Context(), kv, ""); err != nil {
						t.Error(err)
						return
					}
					time.Sleep(ms / 2)
				}
			})
		}
		for i := range 200 {
			if err := c.Update(policy(t, docs[i%len(docs)])); err != nil {
				t.Fatal(err)
			}
			time.Sleep(ms)
		}
		cancel()
		wg.Wait()
	})
}

// What DefaultPolicy does when calls fail: methods without side effects try elsewhere at
// once, idempotent ones after a backoff, others not at all, unless nothing was sent.
func TestDefaultPolicyFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := byKey(t, 3)
		kv, _ := client(t, f, bobtail.DefaultPolicy())
		for _, tc := range []struct {
			name string
			call func() error
			want int64
		}{
			{"NO_SIDE_EFFECTS", func() error { return get(t.Context(), kv, "fail") }, 2},
			{"IDEMPOTENT", func() error { _, err := kv.Put(t.Context(), &kvpb.Request{Key: "fail"}); return err }, 3},
			{"unknown", func() error { _, err := kv.Increment(t.Context(), &kvpb.Request{Key: "fail"}); return err }, 1},
		} {
			time.Sleep(time.Minute) // the budget's 1 per second
			before := arrived(f)
			if err := tc.call(); status.Code(err) != codes.Unavailable {
				t.Errorf("%s: %v", tc.name, err)
			}
			if n := arrived(f) - before; n != tc.want {
				t.Errorf("%s: %d attempts, want %d", tc.name, n, tc.want)
			}
		}
		for i := range 3 {
			f.Stop(i)
		}
		time.Sleep(time.Minute)
		time.AfterFunc(5*ms, func() {
			for i := range 3 {
				f.Start(i)
			}
		})
		ok := 0
		for range 5 {
			if _, err := kv.Increment(t.Context(), &kvpb.Request{}); err == nil {
				ok++
			}
			time.Sleep(time.Minute)
		}
		if ok < 4 {
			t.Errorf("%d of 5 calls that could not be sent at first succeeded", ok)
		}
	})
}

// The rule that a refusal is no failure of what stands before it: with everything armed, an
// open breaker's refusals neither throttle nor spend tokens.
func TestRefusalsCountForNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := byKey(t, 3)
		var reasons []string
		kv, _ := client(t, f, policy(t, `{"methodConfig": [{"name": [{}], "circuitBreaker": {"minimumCalls": 10, "openFor": "10s"}, "adaptiveThrottling": {}}]}`),
			bobtail.WithRefusalReports(func(_ context.Context, r bobtail.Refusal) { reasons = append(reasons, r.Reason) }))
		for range 100 {
			get(t.Context(), kv, "")
		}
		for range 1000 {
			get(t.Context(), kv, "fail")
		}
		if slices.Contains(reasons, "THROTTLED") {
			t.Error("refusals of the breaker were counted as the server's")
		}
		if n := len(reasons); n < 800 {
			t.Errorf("%d refusals, want the breaker open after about 100 failures", n)
		}
	})
}

// Streams that live for longer than a probe has time close a breaker all the same: the first
// message of each is its success. Those that fail count when they end.
func TestStreamsAsProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := byKey(t, 3)
		kv, _ := client(t, f, policy(t, `{"methodConfig": [{"name": [{}], "circuitBreaker": {"minimumCalls": 4, "openFor": "10s"}}]}`))
		open := func(key string) error {
			s, err := kv.Scan(t.Context(), &kvpb.Request{Key: key})
			if err != nil {
				return err
			}
			for err == nil && key != "wait" {
				_, err = s.Recv()
			}
			if key == "wait" {
				_, err = s.Recv()
			}
			return err
		}
		for range 4 {
			if err := open("fail"); status.Code(err) != codes.Unavailable || errors.Is(err, breaker.ErrOpen) {
				t.Fatalf("%v, want the server's own failure, after its message", err)
			}
		}
		if err := open("wait"); !errors.Is(err, breaker.ErrOpen) {
			t.Fatalf("%v, want the breaker open", err)
		}
		time.Sleep(20 * time.Second)
		for i := range 20 {
			if err := open("wait"); err != nil {
				t.Fatalf("stream %d: %v: each is a success with its first message", i+1, err)
			}
		}
	})
}

// However a stream ends, its place is free: the connection is closed, or its caller leaves
// while an interceptor keeps the options to itself.
func TestStreamsThatEndElsewhere(t *testing.T) {
	const retries = `, "retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.01s", "maxBackoff": "0.1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}`
	const hedges = `, "idempotent": true, "hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "1s"}`
	drop := grpc.WithChainStreamInterceptor(func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, m string, st grpc.Streamer, _ ...grpc.CallOption) (grpc.ClientStream, error) {
		return st(ctx, d, cc, m)
	})
	for _, extra := range []string{"", retries, hedges} {
		for _, closed := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) {
				f := byKey(t, 3)
				c, err := bobtail.NewClient(policy(t, `{"methodConfig": [{"name": [{}], "maxInFlight": 1`+extra+`}]}`), bobtail.WithLogger(nil))
				if err != nil {
					t.Fatal(err)
				}
				opts := c.DialOptions()
				if !closed {
					opts = append(opts, drop)
				}
				cc := f.Dial(opts...)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				s, err := kvpb.NewKVClient(cc).Scan(ctx, &kvpb.Request{Key: "wait"})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := s.Recv(); err != nil {
					t.Fatal(err)
				}
				if closed {
					cc.Close()
				} else {
					cancel()
				}
				synctest.Wait()
				if _, err := kvpb.NewKVClient(f.Dial(c.DialOptions()...)).Scan(t.Context(), &kvpb.Request{}); err != nil {
					t.Errorf("%q, connection closed %v: %v, want the place free", extra, closed, err)
				}
			})
		}
	}
}

// A hook that panics takes no place with it.
func TestReportPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := byKey(t, 3)
		boom := true
		kv, _ := client(t, f, policy(t, `{"methodConfig": [{"name": [{}], "maxInFlight": 1, "rateLimit": {"perSecond": 1, "burst": 1}}]}`),
			bobtail.WithRefusalReports(func(context.Context, bobtail.Refusal) {
				if boom {
					panic("hook")
				}
			}))
		if err := get(t.Context(), kv, ""); err != nil {
			t.Fatal(err)
		}
		func() {
			defer func() {
				if recover() != "hook" {
					t.Error("the panic is lost")
				}
			}()
			ctx, cancel := context.WithTimeout(t.Context(), ms)
			defer cancel()
			get(ctx, kv, "")
		}()
		boom = false
		time.Sleep(time.Minute)
		if err := get(t.Context(), kv, ""); err != nil {
			t.Error(err)
		}
	})
}

// A bound that is lowered counts those who are in flight, and a rate that is changed what
// was used.
func TestUpdateTightens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := byKey(t, 3)
		kv, c := client(t, f, policy(t, `{"methodConfig": [{"name": [{}], "maxInFlight": 20}]}`))
		ctx, cancel := context.WithCancel(t.Context())
		for range 20 {
			go get(ctx, kv, "wait")
		}
		synctest.Wait()
		if err := c.Update(policy(t, `{"methodConfig": [{"name": [{}], "maxInFlight": 10, "rateLimit": {"perSecond": 0.001, "burst": 5}}]}`)); err != nil {
			t.Fatal(err)
		}
		for range 30 {
			if err := get(ctx, kv, ""); !errors.Is(err, shedding.ErrBulkheadFull) {
				t.Fatalf("%v, with 20 in flight of 10", err)
			}
		}
		cancel()
		synctest.Wait()
		short, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		for range 5 {
			if err := get(short, kv, ""); err != nil {
				t.Error(err)
			}
		}
		if err := c.Update(policy(t, `{"methodConfig": [{"name": [{}], "maxInFlight": 10, "rateLimit": {"perSecond": 0.002, "burst": 4}}]}`)); err != nil {
			t.Fatal(err)
		}
		if err := get(short, kv, ""); !errors.Is(err, shedding.ErrRateLimited) {
			t.Errorf("%v, want the tokens as spent as they were", err)
		}
	})
}

// A call that opts out of retries still tells A6 throttling how the server is.
func TestOptingOutCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := byKey(t, 3)
		kv, _ := client(t, f, policy(t, `{"retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1}, "methodConfig": [{"name": [{}],
			"retryPolicy": {"maxAttempts": 2, "initialBackoff": "0.01s", "maxBackoff": "0.1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`))
		for range 6 {
			get(t.Context(), kv, "fail", bobtail.NoRetry())
		}
		before := arrived(f)
		if get(t.Context(), kv, "fail"); arrived(f)-before != 1 {
			t.Errorf("%d attempts, want retries throttled after 6 failures", arrived(f)-before)
		}
	})
}

// While the breaker is open the throttle is not asked, so it does not count refusals of its
// own that nobody could contradict. (Asked first, it refuses hundreds of calls here.)
func TestBreakerBeforeThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := byKey(t, 3)
		reasons := map[string]int{}
		kv, _ := client(t, f, policy(t, `{"methodConfig": [{"name": [{}], "adaptiveThrottling": {}, "circuitBreaker": {}}]}`),
			bobtail.WithRefusalReports(func(_ context.Context, r bobtail.Refusal) { reasons[r.Reason]++ }))
		start := time.Now()
		const healthy, out = time.Minute, 2 * time.Minute
		for at := time.Duration(0); at < healthy+out+time.Minute; at += 50 * ms {
			time.Sleep(time.Until(start.Add(at)))
			key := ""
			if at >= healthy && at < healthy+out {
				key = "fail"
			}
			get(t.Context(), kv, key)
		}
		t.Logf("refused: %v", reasons)
		if n := reasons["THROTTLED"]; n > 50 || reasons["BREAKER_OPEN"] < 1000 {
			t.Errorf("refused: %v, want it to be the breaker that refuses", reasons)
		}
	})
}

// In mode shadow an open breaker refuses nobody, and wakes nobody; the mode is that of now.
func TestBreakerInShadowIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		const doc = `{"mode": %q, "methodConfig": [{"name": [{}], "circuitBreaker": {"minimumCalls": 4, "openFor": "10s"}}]}`
		f := byKey(t, 3)
		kv, c := client(t, f, policy(t, fmt.Sprintf(doc, "on")), bobtail.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
		get(t.Context(), kv, "")
		if err := c.Update(policy(t, fmt.Sprintf(doc, "shadow"))); err != nil {
			t.Fatal(err)
		}
		for range 4 {
			get(t.Context(), kv, "fail")
		}
		if want := `level=INFO msg="bobtail: circuit breaker open" target=fleet:///kv method=/kv.KV/Get from=closed reason=failures shadow=true`; !strings.Contains(log.String(), want) {
			t.Errorf("want %s in\n%s", want, log.String())
		}
	})
}

// The log tells each change of a breaker: of which method of which target, and why.
func TestBreakerIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		f := byKey(t, 3)
		kv, _ := client(t, f, policy(t, `{"methodConfig": [{"name": [{}], "circuitBreaker": {"minimumCalls": 4, "openFor": "10s"}}]}`),
			bobtail.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
		for range 4 {
			get(t.Context(), kv, "fail")
		}
		time.Sleep(20 * time.Second)
		for range 5 {
			get(t.Context(), kv, "")
		}
		for _, want := range []string{
			`level=WARN msg="bobtail: circuit breaker open" target=fleet:///kv method=/kv.KV/Get from=closed reason=failures shadow=false`,
			`level=INFO msg="bobtail: circuit breaker half-open" target=fleet:///kv method=/kv.KV/Get from=open reason="probe due"`,
			`level=INFO msg="bobtail: circuit breaker closed" target=fleet:///kv method=/kv.KV/Get from=half-open reason="probes succeeded"`,
		} {
			if strings.Count(log.String(), want) != 1 {
				t.Errorf("want once %s in\n%s", want, log.String())
			}
		}
	})
}
