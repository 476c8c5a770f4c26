package bobtail_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const ms = time.Millisecond

func policy(t *testing.T, text string) bobtail.Policy {
	t.Helper()
	p, err := bobtail.ParsePolicy([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// client dials a fleet with a policy and waits until its backends are ready.
func client(t *testing.T, f *grpctest.Fleet, p bobtail.Policy, opts ...bobtail.Option) (kvpb.KVClient, *bobtail.Client) {
	t.Helper()
	c, err := bobtail.NewClient(p, append([]bobtail.Option{bobtail.WithLogger(nil)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	cc := f.Dial(c.DialOptions()...)
	cc.Connect()
	time.Sleep(time.Second)
	return kvpb.NewKVClient(cc), c
}

// stalling is a fleet whose first attempts take an hour and whose others take 1 ms.
func stalling(t *testing.T, n int) *grpctest.Fleet {
	serve := func(ctx context.Context) error {
		d := time.Hour
		if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("bobtail-attempt")) > 0 {
			d = ms
		}
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
	return grpctest.NewFleet(t, n, grpctest.Handlers{
		Unary: func(ctx context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
			return &kvpb.Response{Id: req.Id, Backend: b.Name}, serve(ctx)
		},
		Scan: func(b *grpctest.Backend, req *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
			if err := serve(s.Context()); err != nil {
				return err
			}
			return s.Send(&kvpb.Response{Id: req.Id, Backend: b.Name})
		},
	})
}

// calls are the methods of kv.KV that can be hedged, by name.
var calls = map[string]func(context.Context, kvpb.KVClient) error{
	"Get": func(ctx context.Context, c kvpb.KVClient) error {
		_, err := c.Get(ctx, &kvpb.Request{})
		return err
	},
	"Put": func(ctx context.Context, c kvpb.KVClient) error {
		_, err := c.Put(ctx, &kvpb.Request{})
		return err
	},
	"Increment": func(ctx context.Context, c kvpb.KVClient) error {
		_, err := c.Increment(ctx, &kvpb.Request{})
		return err
	},
	"Scan": func(ctx context.Context, c kvpb.KVClient) error {
		s, err := c.Scan(ctx, &kvpb.Request{})
		if err != nil {
			return err
		}
		_, err = s.Recv()
		return err
	},
}

// Who is hedged: a method named in full, one that its proto or its entry vouches
// for, and nobody else. The log says once who was skipped.
func TestConsent(t *testing.T) {
	const hedge = `"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.010s"}`
	for _, tc := range []struct {
		name, text string
		hedged     string // methods
		told       string
	}{
		{"named in full", `{"methodConfig": [{"name": [{"service": "kv.KV", "method": "Increment"}], ` + hedge + `}]}`, "Increment", ""},
		{"service-wide", `{"methodConfig": [{"name": [{"service": "kv.KV"}], ` + hedge + `}]}`, "Get Put Scan", "Increment"},
		{"default", `{"methodConfig": [{"name": [{}], ` + hedge + `}]}`, "Get Put Scan", "Increment"},
		{"the entry vouches", `{"methodConfig": [{"name": [{"service": "kv.KV"}], "idempotent": true, ` + hedge + `}]}`, "Get Put Increment Scan", ""},
		{"off", `{"mode": "off", "methodConfig": [{"name": [{"service": "kv.KV"}], ` + hedge + `}]}`, "", ""},
		{"off above, on in the entry", `{"mode": "off", "methodConfig": [{"name": [{}], "mode": "on", ` + hedge + `}]}`, "Get Put Scan", "Increment"},
		{"shadow", `{"methodConfig": [{"name": [{}], "mode": "shadow", ` + hedge + `}]}`, "", "Increment"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				f := stalling(t, 3)
				c, _ := client(t, f, policy(t, tc.text), bobtail.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
				for range 2 {
					for name, call := range calls {
						ctx, cancel := context.WithTimeout(t.Context(), 100*ms)
						err := call(ctx, c)
						cancel()
						want := codes.DeadlineExceeded
						if strings.Contains(tc.hedged, name) {
							want = codes.OK
						}
						if status.Code(err) != want {
							t.Errorf("%s: %v, want %v", name, err, want)
						}
					}
				}
				told := strings.Count(log.String(), "not hedged")
				if want := min(len(tc.told), 1); told != want || !strings.Contains(log.String(), tc.told) {
					t.Errorf("told %d times, want %d of %q:\n%s", told, want, tc.told, log.String())
				}
			})
		})
	}
}

// DefaultPolicy hedges what has no side effects, once it knows how long that takes,
// and nothing else.
func TestDefaultPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var stall atomic.Bool
		f := grpctest.NewFleet(t, 3, grpctest.Handlers{
			Unary: func(ctx context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
				d := 5 * ms
				if md, _ := metadata.FromIncomingContext(ctx); stall.Load() && len(md.Get("bobtail-attempt")) == 0 {
					d = time.Hour
				}
				select {
				case <-time.After(d):
					return &kvpb.Response{}, nil
				case <-ctx.Done():
					return nil, status.FromContextError(ctx.Err()).Err()
				}
			},
		})
		c, _ := client(t, f, bobtail.DefaultPolicy())
		for _, name := range []string{"Get", "Put", "Increment"} {
			stall.Store(false)
			for range 200 {
				if err := calls[name](t.Context(), c); err != nil {
					t.Fatal(err)
				}
			}
			stall.Store(true)
			begin := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			err := calls[name](ctx, c)
			cancel()
			d := time.Since(begin)
			if name == "Get" && (err != nil || d < 10*ms-ms/4 || d > 10*ms+ms/4) {
				t.Errorf("Get: %v after %v, want a hedge after 5ms that takes 5ms", err, d)
			}
			if name != "Get" && status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("%s: %v after %v, want no hedge", name, err, d)
			}
		}
	})
}

// extraLoad counts first attempts of every method, hedged or not, and bounds the
// hedges of all together.
func TestExtraLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := stalling(t, 3)
		c, _ := client(t, f, policy(t, `{
			"extraLoad": {"max": 0.1},
			"methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}], "timeout": "0.1s",
				"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.010s"}},
				{"name": [{}], "timeout": "0.001s"}]}`))
		for range 30 { // deposits of a method that is not hedged, and of streams
			calls["Put"](t.Context(), c)
			calls["Scan"](t.Context(), c)
			s, err := c.Sync(t.Context())
			if err == nil {
				s.CloseSend()
				s.Recv()
			}
		}
		won := 0
		for range 20 {
			if calls["Get"](t.Context(), c) == nil {
				won++
			}
		}
		// 90 + 20 first attempts at 0.1, and one: at most 12, and at least 10 were
		// there before the first Get.
		if won < 10 || won > 12 {
			t.Errorf("%d hedges, want 10 to 12", won)
		}
	})
}

// retryThrottling is fed by every method and stops the hedges of all.
func TestRetryThrottling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 3, grpctest.Handlers{
			Unary: func(_ context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
				if req.Key == "fail" {
					return nil, status.Error(codes.Unavailable, "no")
				}
				return &kvpb.Response{}, nil
			},
		})
		c, _ := client(t, f, policy(t, `{
			"retryThrottling": {"maxTokens": 4, "tokenRatio": 0.5},
			"methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}],
				"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "1s", "nonFatalStatusCodes": ["UNAVAILABLE"]}}]}`))
		attempts := func(key string) int64 {
			before := f.Total(func(b *grpctest.Backend) int64 { return b.Started.Load() })
			c.Get(t.Context(), &kvpb.Request{Key: key})
			return f.Total(func(b *grpctest.Backend) int64 { return b.Started.Load() }) - before
		}
		// 4 tokens; above 2 a failure is followed up.
		if n := attempts("fail"); n != 2 {
			t.Errorf("at 4 tokens: %d attempts, want 2", n)
		}
		if n := attempts("fail"); n != 1 {
			t.Errorf("at 2 tokens, the threshold: %d attempts, want 1", n)
		}
		for range 6 { // another method's successes count, its own policy or none
			if err := calls["Put"](t.Context(), c); err != nil {
				t.Fatal(err)
			}
		}
		if n := attempts("fail"); n != 2 {
			t.Errorf("after 6 successes: %d attempts, want 2", n)
		}
	})
}

// With our balancer a hedge is never sent beside an attempt of its own call: where
// there is nowhere else to go, it is not sent, and costs nothing.
func TestNowhereToGo(t *testing.T) {
	for _, backends := range []int{1, 2} {
		t.Run(fmt.Sprint(backends, " backends"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var reports []hedging.Report
				f := stalling(t, backends)
				c, _ := client(t, f, policy(t, `{
					"extraLoad": {"max": 0.1},
					"methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}],
						"hedgingPolicy": {"maxAttempts": 3, "hedgingDelay": "0.010s"}}]}`),
					bobtail.WithHedgeReports(func(_ context.Context, r hedging.Report) { reports = append(reports, r) }))
				for range 3 {
					ctx, cancel := context.WithTimeout(t.Context(), 100*ms)
					calls["Get"](ctx, c)
					cancel()
				}
				if n := f.Total(func(b *grpctest.Backend) int64 { return b.Started.Load() }); backends == 1 && n != 3 {
					t.Errorf("%d attempts reached the only backend, want 3", n)
				}
				for i, r := range reports {
					want := hedging.NoBackend
					if backends == 2 {
						want = "" // the hedge found the other backend, and won
						if i > 0 {
							want = hedging.NoBudget // 1 + 0.1 x 2 is spent; a token given back would not be
						}
					}
					if r.Suppressed != want {
						t.Errorf("call %d: suppressed %q, want %q", i+1, r.Suppressed, want)
					}
				}
			})
		})
	}
}

// timeout is the whole call's, and a stream's too; the caller's own is kept if it
// is shorter.
func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := stalling(t, 3)
		c, _ := client(t, f, policy(t, `{"methodConfig": [{"name": [{}], "timeout": "0.050s"}]}`))
		for name, call := range calls {
			begin := time.Now()
			if err := call(t.Context(), c); status.Code(err) != codes.DeadlineExceeded || time.Since(begin) != 50*ms {
				t.Errorf("%s: %v after %v", name, err, time.Since(begin))
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*ms)
			begin = time.Now()
			if err := call(ctx, c); status.Code(err) != codes.DeadlineExceeded || time.Since(begin) != 20*ms {
				t.Errorf("%s, with 20ms of its own: %v after %v", name, err, time.Since(begin))
			}
			cancel()
		}
	})
}

// Update changes live connections, keeps what was learned, and refuses what is
// fixed.
func TestUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const adaptive = `{"methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}], "mode": %q,
			"hedgingPolicy": {"maxAttempts": 2, "hedgingPercentile": 95}}]}`
		var delay time.Duration
		f := grpctest.NewFleet(t, 3, grpctest.Handlers{
			Unary: func(context.Context, *grpctest.Backend, *kvpb.Request) (*kvpb.Response, error) {
				time.Sleep(7 * ms)
				return &kvpb.Response{}, nil
			}})
		c, cl := client(t, f, policy(t, fmt.Sprintf(adaptive, "shadow")),
			bobtail.WithHedgeReports(func(_ context.Context, r hedging.Report) { delay = r.Delay }))
		for range 100 {
			calls["Get"](t.Context(), c)
		}
		if err := cl.Update(policy(t, fmt.Sprintf(adaptive, "on"))); err != nil {
			t.Fatal(err)
		}
		calls["Get"](t.Context(), c)
		if delay < 6*ms || delay > 8*ms {
			t.Errorf("after the update the delay is %v, want the 7ms that was learned", delay)
		}

		delay = 0
		if err := cl.Update(policy(t, `{"mode": "off"}`)); err != nil {
			t.Fatal(err)
		}
		if calls["Get"](t.Context(), c); delay != 0 {
			t.Error("the kill switch did not work")
		}

		err := cl.Update(policy(t, `{"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [{"name": [{}], "waitForReady": true}]}`))
		want := `bobtail: update: loadBalancingConfig [{"round_robin":{}}], want [{"bobtail_p2c":{}}]: it is fixed when a connection is dialed` + "\n" +
			`bobtail: update: keys handed to grpc {"methodConfig":[{"name":[{}],"waitForReady":true}]}, want none: they are fixed when a connection is dialed`
		if err == nil || err.Error() != want {
			t.Errorf("%v\nwant %s", err, want)
		}
	})
}

// Updates under load lose no call.
func TestUpdateUnderLoad(t *testing.T) {
	f := grpctest.NewFleet(t, 3, grpctest.Handlers{})
	on := policy(t, `{"extraLoad": {"max": 0.5}, "methodConfig": [{"name": [{}], "hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.0001s"}}]}`)
	off := policy(t, `{"retryThrottling": {"maxTokens": 10, "tokenRatio": 1}, "mode": "off"}`)
	c, err := bobtail.NewClient(on, bobtail.WithLogger(nil))
	if err != nil {
		t.Fatal(err)
	}
	kv := kvpb.NewKVClient(f.Dial(c.DialOptions()...))
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			p := on
			if i%2 == 0 {
				p = off
			}
			if err := c.Update(p); err != nil {
				t.Error(err)
			}
		}
	})
	var callers sync.WaitGroup
	for g := range 4 {
		callers.Go(func() {
			for i := range 200 {
				id := uint64(g*1000 + i)
				if res, err := kv.Get(t.Context(), &kvpb.Request{Id: id}); err != nil || res.Id != id {
					t.Errorf("%v, %v", res, err)
				}
			}
		})
	}
	callers.Wait()
	close(done)
	wg.Wait()
}

// A user's own interceptors stay; ours come after those given before.
func TestDialOptionsCompose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var outer, inner atomic.Int64
		count := func(n *atomic.Int64) grpc.UnaryClientInterceptor {
			return func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, inv grpc.UnaryInvoker, o ...grpc.CallOption) error {
				n.Add(1)
				return inv(ctx, m, req, reply, cc, o...)
			}
		}
		c, err := bobtail.NewClient(policy(t, `{"methodConfig": [{"name": [{}], "idempotent": true,
			"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.010s"}}]}`), bobtail.WithLogger(nil))
		if err != nil {
			t.Fatal(err)
		}
		opts := append([]grpc.DialOption{grpc.WithUnaryInterceptor(count(&outer))}, c.DialOptions()...)
		opts = append(opts, grpc.WithChainUnaryInterceptor(count(&inner)))
		if err := calls["Get"](t.Context(), kvpb.NewKVClient(stalling(t, 3).Dial(opts...))); err != nil {
			t.Fatal(err)
		}
		if outer.Load() != 1 || inner.Load() != 2 {
			t.Errorf("outer saw %d calls, inner %d attempts, want 1 and 2", outer.Load(), inner.Load())
		}
	})
}

// What an operator would want to be told, once.
func TestWarnings(t *testing.T) {
	const hedge = `"methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}], "hedgingPolicy": {"maxAttempts": 2}}]`
	for _, tc := range []struct{ text, want string }{
		{`{` + hedge + `}`, "without extraLoad"},
		{`{"extraLoad": {"max": 0.1}, "loadBalancingConfig": [{"round_robin": {}}], ` + hedge + `}`, "a balancer of grpc's own"},
		{`{"extraLoad": {"max": 0.1}, ` + hedge + `}`, ""},
		{`{"extraLoad": {"max": 0.1}, "methodConfig": [{"name": [{}], "hedgingPolicy": {"maxAttempts": 2, "hedgingPercentile": 0.95}}]}`, "hedgingPercentile=0.95"},
		{`{}`, ""},
	} {
		var log bytes.Buffer
		c, err := bobtail.NewClient(policy(t, tc.text), bobtail.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Update(policy(t, tc.text)); err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(log.String(), "level=WARN"); n != min(len(tc.want), 1) || !strings.Contains(log.String(), tc.want) {
			t.Errorf("%s: logged %q, want %q once", tc.text, log.String(), tc.want)
		}
	}
}

func ExampleParsePolicy() {
	_, err := bobtail.ParsePolicy([]byte(`{
		"methodConfig": [{
			"name": [{"service": "kv.KV", "method": "Get"}],
			"timeout": "250ms",
			"hedgingPolicy": {"maxAttempt": 2}
		}]
	}`))
	fmt.Println(err)
	// Output:
	// bobtail: policy: methodConfig[0].timeout: "250ms", want a duration in seconds such as "0.250s"
	// bobtail: policy: methodConfig[0].hedgingPolicy.maxAttempts: missing
	// bobtail: policy: methodConfig[0].hedgingPolicy.maxAttempt: unknown key, did you mean "maxAttempts"?
}

// While no backend is ready a call that is willing to wait waits, hedged or not.
func TestNothingReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got hedging.Report
		f := grpctest.NewFleet(t, 2, grpctest.Handlers{})
		c, _ := client(t, f, policy(t, `{"extraLoad": {"max": 1}, "methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}],
			"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.010s"}}]}`),
			bobtail.WithHedgeReports(func(_ context.Context, r hedging.Report) { got = r }))
		f.Stop(0)
		f.Stop(1)
		synctest.Wait() // the client has seen its connections end
		time.AfterFunc(time.Second, func() { f.Start(0); f.Start(1) })
		if _, err := c.Get(t.Context(), &kvpb.Request{}, grpc.WaitForReady(true)); err != nil {
			t.Errorf("%v, want an answer when the backends are back", err)
		}
		if got.Attempts != 1 || got.Suppressed != hedging.NoBackend {
			t.Errorf("report %+v, want one attempt, no other backend", got)
		}
	})
}

// Switching a policy off and on again does not refill its budget.
func TestKillSwitchKeepsTheBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const doc = `{"mode": %q, "extraLoad": {"max": 0.1}, "methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}], "timeout": "0.1s",
			"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.010s"}}]}`
		c, cl := client(t, stalling(t, 3), policy(t, fmt.Sprintf(doc, "on")))
		if err := calls["Get"](t.Context(), c); err != nil {
			t.Fatalf("the first call is hedged: %v", err)
		}
		for _, p := range []string{`{}`, fmt.Sprintf(doc, "off"), fmt.Sprintf(doc, "on")} {
			if err := cl.Update(policy(t, p)); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 50*ms)
			if err := calls["Get"](ctx, c); err == nil {
				t.Errorf("after %s: a hedge, though its token is spent", p)
			}
			cancel()
		}
	})
}

// A call that is made within an attempt of another is not taken for it.
func TestCallWithinAnAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 1, grpctest.Handlers{})
		cl, err := bobtail.NewClient(policy(t, `{"methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}],
			"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.010s"}}]}`), bobtail.WithLogger(nil))
		if err != nil {
			t.Fatal(err)
		}
		var kv kvpb.KVClient
		token := func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, inv grpc.UnaryInvoker, o ...grpc.CallOption) error {
			if strings.HasSuffix(m, "/Get") { // each attempt asks for a token first
				if _, err := kv.Put(ctx, &kvpb.Request{}); err != nil {
					return err
				}
				time.Sleep(20 * ms)
			}
			return inv(ctx, m, req, reply, cc, o...)
		}
		kv = kvpb.NewKVClient(f.Dial(append(cl.DialOptions(), grpc.WithChainUnaryInterceptor(token))...))
		if _, err := kv.Get(t.Context(), &kvpb.Request{}); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Second)
		// The token of the hedge was fetched from the one backend, although an
		// attempt of Get may be in flight there.
		if n := f.Backends[0].Started.Load(); n < 3 {
			t.Errorf("%d handlers, want two tokens and a Get", n)
		}
	})
}
