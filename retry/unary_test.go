package retry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

func budget(t *testing.T, limit float64) *Budget {
	t.Helper()
	b, err := NewBudget(BudgetConfig{Max: limit}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What the caller's options point at is that of the attempt whose result it gets, and
// OnFinish runs once, with the result of the call.
func TestCallOptions(t *testing.T) {
	for _, kind := range kinds {
		for _, tc := range []struct {
			name  string
			parts []part
			code  codes.Code
			push  []string // in the trailer
		}{
			{"answered by the second", []part{{Code: codes.Unavailable, Push: "3"}, {}}, codes.OK, nil},
			{"failed for good at the second", []part{{Code: codes.Unavailable}, {Code: codes.Internal, Push: "9"}}, codes.Internal, []string{"9"}},
		} {
			t.Run(kind+"/"+tc.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s, kv, _ := over(t, Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable}, 0.5, tc.parts)
					var header, trailer metadata.MD
					var p peer.Peer
					var ends []error
					opts := []grpc.CallOption{grpc.Header(&header), grpc.Trailer(&trailer), grpc.Peer(&p),
						grpc.OnFinish(func(err error) { ends = append(ends, err) })}
					var err error
					if kind == "unary" {
						_, err = makeCall(t.Context(), kv, kind, opts...)
					} else {
						var st grpc.ServerStreamingClient[kvpb.Response]
						if st, err = kv.Scan(t.Context(), &kvpb.Request{}, opts...); err != nil {
							t.Fatal(err)
						}
						n := 0
						for ; err == nil; n++ {
							_, err = st.Recv()
						}
						if tc.code == codes.OK {
							if n != 4 {
								t.Errorf("%d messages, want 3", n-1)
							}
							err = nil
						}
					}
					synctest.Wait()
					if status.Code(err) != tc.code {
						t.Fatalf("%v, want %v", err, tc.code)
					}
					if len(ends) != 1 || !errors.Is(ends[0], err) {
						t.Errorf("OnFinish ran with %v, want once with %v", ends, err)
					}
					if by := s.By[2]; !slices.Equal(header["served-by"], []string{by}) {
						t.Errorf("header %v, want that of %s", header, by)
					}
					if got := trailer["grpc-retry-pushback-ms"]; !slices.Equal(got, tc.push) {
						t.Errorf("trailer %v, want pushback %v", trailer, tc.push)
					}
					if p.Addr == nil {
						t.Error("no peer")
					}
				})
			})
		}
	}
}

// A last attempt that never reached a server leaves nothing of the one before behind.
func TestStaleOptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f *grpctest.Fleet
		f = grpctest.NewFleet(t, 1, grpctest.Handlers{Unary: func(ctx context.Context, _ *grpctest.Backend, _ *kvpb.Request) (*kvpb.Response, error) {
			if err := grpc.SetTrailer(ctx, metadata.Pairs("grpc-retry-pushback-ms", "1000")); err != nil {
				return nil, err
			}
			go f.Stop(0)
			return nil, status.Error(codes.Unavailable, "the last words")
		}})
		kv := dial(f, Config{MaxAttempts: 2, Backoff: doubling, RetryableCodes: unavailable})
		var trailer, header metadata.MD
		var p peer.Peer
		_, err := kv.Get(t.Context(), &kvpb.Request{}, grpc.Trailer(&trailer), grpc.Header(&header), grpc.Peer(&p))
		if status.Code(err) != codes.Unavailable || status.Convert(err).Message() == "the last words" {
			t.Fatalf("%v, want that there is no connection", err)
		}
		if len(trailer) > 0 || len(header) > 0 || p.Addr != nil {
			t.Errorf("trailer %v, header %v, peer %v: of an attempt before", trailer, header, p)
		}
	})
}

// dial connects to all of f through the interceptors of cfg.
func dial(f *grpctest.Fleet, cfg Config, opts ...grpc.DialOption) kvpb.KVClient {
	cc := f.Dial(append([]grpc.DialOption{grpc.WithDisableRetry(),
		grpc.WithChainUnaryInterceptor(UnaryClientInterceptor(cfg)), grpc.WithChainStreamInterceptor(StreamClientInterceptor(cfg))}, opts...)...)
	return kvpb.NewKVClient(cc)
}

// What never reached a server is tried again whatever the code list and the method say;
// what did is not. Every story is told twice: over our balancer and over grpc's.
func TestUnsent(t *testing.T) {
	for _, balancer := range []string{"bobtail_p2c", "round_robin"} {
		for _, kind := range kinds {
			t.Run(balancer+"/"+kind, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := grpctest.NewStage(part{Code: codes.Unavailable})
					f := grpctest.NewFleet(t, 2, s.Handlers())
					f.Stop(0)
					f.Stop(1)
					var reports []Report
					cfg := Config{
						MaxAttempts: 3, Backoff: Backoff{Initial: time.Minute, Max: time.Minute, Multiplier: 1, Jitter: GRPCJitter}, UnsentOnly: true, RetryableCodes: unavailable,
						Report: func(_ context.Context, r Report) { reports = append(reports, r) },
					}
					kv := dial(f, cfg, grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"`+balancer+`":{}}]}`))

					// Nobody is there, then somebody is: attempt 2 arrives, and fails for good,
					// since it was executed.
					time.AfterFunc(30*time.Second, func() { f.Start(0); f.Start(1) })
					_, err := makeCall(t.Context(), kv, kind)
					if status.Convert(err).Message() != "attempt 2" || len(s.Arrived) != 1 {
						t.Fatalf("%v after %v, want attempt 2 to arrive and to fail", err, s.Arrivals())
					}
					want := Report{Attempts: 2, Stopped: NotRetryable, Code: codes.Unavailable}
					want.Method, want.Waited = reports[0].Method, reports[0].Waited
					if len(reports) != 1 || reports[0] != want {
						t.Errorf("reports %+v, want %+v", reports, want)
					}
				})
			})
		}
	}
}

// A server that dies while it works has been reached: who knows what it has done.
func TestDiedAtWork(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var f *grpctest.Fleet
				die := func(ctx context.Context) error {
					go f.Stop(0)
					<-ctx.Done()
					return ctx.Err()
				}
				f = grpctest.NewFleet(t, 1, grpctest.Handlers{
					Unary: func(ctx context.Context, _ *grpctest.Backend, _ *kvpb.Request) (*kvpb.Response, error) {
						return nil, die(ctx)
					},
					Scan: func(_ *grpctest.Backend, _ *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
						return die(s.Context())
					},
				})
				var report Report
				cfg := Config{MaxAttempts: 3, Backoff: doubling, UnsentOnly: true, RetryableCodes: unavailable, Report: func(_ context.Context, r Report) { report = r }}
				_, err := makeCall(t.Context(), dial(f, cfg), kind)
				if status.Code(err) != codes.Unavailable || report.Attempts != 1 || report.Stopped != NotRetryable {
					t.Errorf("%v, %+v, want one attempt", err, report)
				}
			})
		})
	}
}

// When the caller leaves while a call waits for its next attempt, the token goes back
// and no attempt is counted.
func TestCallerLeaves(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := budget(t, 0.001)
				var report Report
				cfg := Config{MaxAttempts: 3, Backoff: Backoff{Initial: time.Second, Max: time.Second, Multiplier: 1, Jitter: GRPCJitter}, RetryableCodes: unavailable,
					Budget: b, Report: func(_ context.Context, r Report) { report = r }}
				s, kv, _ := over(t, cfg, 0.5, []part{{Code: codes.Unavailable}})
				ctx, cancel := context.WithCancel(t.Context())
				time.AfterFunc(300*ms, cancel)
				_, err := makeCall(ctx, kv, kind)
				if status.Code(err) != codes.Canceled || time.Since(s.Begin) != 300*ms {
					t.Errorf("%v after %v, want CANCELLED after 300ms", err, time.Since(s.Begin))
				}
				if want := (Report{report.Method, 1, 300 * ms, CallEnded, codes.Canceled}); report != want {
					t.Errorf("report %+v, want %+v", report, want)
				}
				if got := b.Balance(time.Now()); got < 1 {
					t.Errorf("balance %v: the token was not given back", got)
				}
			})
		})
	}
}

// Calls made while serving a retry get none of their own.
func TestNested(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var report Report
		cfg := Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable, Report: func(_ context.Context, r Report) { report = r }}
		for _, md := range []metadata.MD{
			metadata.Pairs("bobtail-attempt", "retry"), metadata.Pairs("bobtail-attempt", "hedge"), metadata.Pairs("grpc-previous-rpc-attempts", "1"),
		} {
			s, kv, _ := over(t, cfg, 0.5, []part{{Code: codes.Unavailable}})
			_, err := kv.Get(metadata.NewIncomingContext(t.Context(), md), &kvpb.Request{})
			if status.Code(err) != codes.Unavailable || len(s.Arrived) != 1 || report.Stopped != Nested {
				t.Errorf("%v: %v after %d attempts, %q, want one", md, err, len(s.Arrived), report.Stopped)
			}
		}
	})
}

// Gives up at once when what remains is less than the wait and the method's median: the
// tracker has learned 20 ms, 25 remain, the wait is 10.
func TestMedian(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fail bool
		f := grpctest.NewFleet(t, 3, grpctest.Handlers{Unary: func(_ context.Context, _ *grpctest.Backend, r *kvpb.Request) (*kvpb.Response, error) {
			if fail {
				return nil, status.Error(codes.Unavailable, "no")
			}
			time.Sleep(20 * ms)
			return &kvpb.Response{}, nil
		}})
		var report Report
		kv := dial(f, Config{MaxAttempts: 2, Backoff: Backoff{Initial: 10 * ms, Max: 10 * ms, Multiplier: 1, Jitter: GRPCJitter}, RetryableCodes: unavailable,
			Report: func(_ context.Context, r Report) { report = r }})
		for range 100 {
			if _, err := kv.Get(t.Context(), &kvpb.Request{}); err != nil {
				t.Fatal(err)
			}
		}
		fail = true
		for _, tc := range []struct {
			remains time.Duration
			why     Reason
		}{{25 * ms, NoTime}, {40 * ms, Exhausted}} { // the jitter is 0.8 to 1.2
			ctx, cancel := context.WithTimeout(t.Context(), tc.remains)
			begin := time.Now()
			kv.Get(ctx, &kvpb.Request{})
			cancel()
			if report.Stopped != tc.why || tc.why == NoTime && time.Since(begin) != 0 {
				t.Errorf("%v remain: stopped %q after %v, want %q", tc.remains, report.Stopped, time.Since(begin), tc.why)
			}
		}
	})
}

// A refusal by something below (a breaker, say) is returned as it is, once, costs no
// token, no throttle token and teaches nothing.
func TestRefusedBelow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th, err := NewThrottle(ThrottleConfig{MaxTokens: 10, TokenRatio: 1})
		if err != nil {
			t.Fatal(err)
		}
		open := errors.New("open")
		var report Report
		cfg := Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable, Throttle: th, Report: func(_ context.Context, r Report) { report = r }}
		refuse := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
			return fmt.Errorf("below: %w", &outcome.Refusal{Cause: open, Code: codes.Unavailable, Reason: "BREAKER_OPEN", After: ms})
		}
		err = UnaryClientInterceptor(cfg)(t.Context(), "/kv.KV/Get", &kvpb.Request{}, &kvpb.Response{}, nil, refuse)
		if !errors.Is(err, open) || report.Stopped != Refused || report.Attempts != 1 || th.Tokens() != 10 {
			t.Errorf("%v, %+v, %v tokens, want the refusal at once", err, report, th.Tokens())
		}
	})
}

// A6 throttling counts each attempt: retryable failures and those with a pushback not to
// retry, and successes; no other failure, nothing that the caller has ended.
func TestThrottleIsTold(t *testing.T) {
	for _, kind := range kinds {
		for _, tc := range []struct {
			name  string
			parts []part
			want  float64 // of 100 tokens at 1
		}{
			{"two retryable failures, a success", []part{{Code: codes.Unavailable}, {Code: codes.Unavailable}, {}}, 99},
			{"a code that is not retryable", []part{{Code: codes.NotFound}}, 100},
			{"that code with a pushback not to retry", []part{{Code: codes.NotFound, Push: "-1"}}, 99},
			{"the caller's deadline", []part{{After: time.Hour}}, 100},
		} {
			t.Run(kind+"/"+tc.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					th, err := NewThrottle(ThrottleConfig{MaxTokens: 100, TokenRatio: 1})
					if err != nil {
						t.Fatal(err)
					}
					codes := []codes.Code{codes.Unavailable, codes.DeadlineExceeded}
					_, kv, _ := over(t, Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: codes, Throttle: th}, 0.5, tc.parts)
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					defer cancel()
					makeCall(ctx, kv, kind)
					if got := th.Tokens(); got != tc.want {
						t.Errorf("%v tokens, want %v", got, tc.want)
					}
				})
			})
		}
	}
}

// A panic in an interceptor below is the caller's, and leaves nothing behind.
func TestPanicPasses(t *testing.T) {
	b := budget(t, 0.5)
	in := UnaryClientInterceptor(Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable, Budget: b, AttemptTimeout: time.Hour})
	defer func() {
		if p := recover(); p != "below" {
			t.Errorf("recovered %v, want the panic of below", p)
		}
		if n := b.Balance(time.Now()); n < 1 {
			t.Errorf("balance %v", n)
		}
	}()
	in(t.Context(), "/kv.KV/Get", &kvpb.Request{}, &kvpb.Response{}, nil,
		func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { panic("below") })
}

// A faulty configuration fails every call and says why; methods beyond the bound share.
func TestInterceptorFaults(t *testing.T) {
	err := UnaryClientInterceptor(Config{MaxAttempts: 1})(t.Context(), "/s/m", nil, nil, nil, nil)
	if status.Code(err) != codes.Internal || status.Convert(err).Message() == "" {
		t.Errorf("unary: %v", err)
	}
	_, err = StreamClientInterceptor(Config{MaxAttempts: 1})(t.Context(), &grpc.StreamDesc{ServerStreams: true}, nil, "/s/m", nil)
	if status.Code(err) != codes.Internal {
		t.Errorf("stream: %v", err)
	}
}

// With keeps what was learned.
func TestWith(t *testing.T) {
	r, err := New(Config{MaxAttempts: 2, Backoff: doubling, RetryableCodes: unavailable})
	if err != nil {
		t.Fatal(err)
	}
	other, err := r.With(Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable})
	if err != nil || other.latency != r.latency || other.attempts != 3 {
		t.Errorf("%v, want another number of attempts and the same tracker", err)
	}
	if _, err := r.With(Config{}); err == nil {
		t.Error("a faulty configuration is accepted")
	}
}

// A call that succeeds at once allocates two objects: its state, and the function that grpc
// tells the end of the attempt.
func TestAllocations(t *testing.T) {
	r, err := New(Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable, Budget: budget(t, 0.05)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, req, res := context.Background(), &kvpb.Request{}, &kvpb.Response{}
	noop := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return nil }
	n := testenv.Allocs(100, func() { r.InvokeUnary(ctx, "/kv.KV/Get", req, res, nil, noop) })
	if n > 2 {
		t.Errorf("%v allocations, want 2", n)
	}
}

func BenchmarkInvokeUnary(b *testing.B) {
	bud, err := NewBudget(BudgetConfig{Max: 0.05}, time.Now())
	if err != nil {
		b.Fatal(err)
	}
	r, err := New(Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable, Budget: bud})
	if err != nil {
		b.Fatal(err)
	}
	ctx, req, res := context.Background(), &kvpb.Request{}, &kvpb.Response{}
	noop := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return nil }
	b.ReportAllocs()
	for b.Loop() {
		r.InvokeUnary(ctx, "/kv.KV/Get", req, res, nil, noop)
	}
}
