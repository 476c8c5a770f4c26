package hedging_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// served is an invoker that takes as long as the attempt's number says.
func served(took ...time.Duration) grpc.UnaryInvoker {
	return func(ctx context.Context, _ string, _, reply any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
		k := number(ctx)
		select {
		case <-time.After(took[min(k, len(took))-1]):
			reply.(*kvpb.Response).Id = uint64(k)
			return nil
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

func hedger(t *testing.T, cfg hedging.Config) *hedging.Hedger {
	t.Helper()
	h, err := hedging.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// The delay follows the live percentile, within its bounds; until enough is known
// nothing is hedged blind.
func TestAdaptiveDelay(t *testing.T) {
	for _, tc := range []struct {
		name        string
		cfg         hedging.Config
		cold, known time.Duration // -1: none
	}{
		{"no fixed delay", hedging.Config{}, -1, 19 * ms},
		{"a fixed delay serves at first", hedging.Config{Delay: 50 * ms}, 50 * ms, 19 * ms},
		{"floor", hedging.Config{MinDelay: 40 * ms}, -1, 40 * ms},
		{"cap", hedging.Config{MaxDelay: 10 * ms}, -1, 10 * ms},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg := tc.cfg
				cfg.MaxAttempts, cfg.Percentile = 2, 95
				h := hedger(t, cfg)
				check := func(when string, want time.Duration) {
					t.Helper()
					d, ok := h.Delay(time.Now())
					if ok != (want >= 0) || ok && (d < want-want/50 || d > want+want/50) {
						t.Errorf("%s: delay %v, %v, want %v", when, d, ok, want)
					}
				}
				check("cold", tc.cold)
				for i := range 400 {
					took := time.Duration(i%20+1) * ms // uniform on 1..20 ms: p95 is 19
					err := h.InvokeUnary(t.Context(), get, &kvpb.Request{}, &kvpb.Response{}, nil, served(took, time.Hour))
					if err != nil {
						t.Fatal(err)
					}
				}
				check("known", tc.known)
				time.Sleep(hedging.Window * 2)
				check("forgotten", tc.cold)
			})
		})
	}
}

// A cancelled loser says "longer than this", not "this long": were it taken for
// its time, or dropped, the percentile would fall until everything is hedged.
func TestDelayDoesNotCollapse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := hedger(t, hedging.Config{MaxAttempts: 2, Percentile: 95})
		// One call in ten is slow, so p95 lies among the slow ones, and the hedge,
		// sent at the p95, often wins: half of the slow ones are never seen whole.
		for i := range 4000 {
			took := []time.Duration{2 * ms, 2 * ms}
			if i%10 == 0 {
				took[0] = time.Duration(100+i%100) * ms
			}
			if err := h.InvokeUnary(t.Context(), get, &kvpb.Request{}, &kvpb.Response{}, nil, served(took...)); err != nil {
				t.Fatal(err)
			}
		}
		if d, ok := h.Delay(time.Now()); !ok || d < 100*ms {
			t.Errorf("the p95 is %v, %v, want at least 100ms", d, ok)
		}
	})
}

// A failure is no latency: quick failures do not make the delay short.
func TestFailuresAreNoLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := hedger(t, hedging.Config{MaxAttempts: 2, Percentile: 50})
		for i := range 500 {
			h.InvokeUnary(t.Context(), get, &kvpb.Request{}, &kvpb.Response{}, nil,
				func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
					if i%5 != 0 {
						time.Sleep(ms)
						return status.Error(codes.Unavailable, "down")
					}
					time.Sleep(20 * ms)
					return nil
				})
		}
		if d, ok := h.Delay(time.Now()); !ok || d < 19*ms {
			t.Errorf("the median is %v, %v, want 20ms", d, ok)
		}
	})
}

// The primary stalls, the hedge wins, the loser is cancelled, the budget is
// charged once.
func TestBudgetIsChargedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &ledger{tokens: 5}
		s := newStage(part{After: time.Hour}, part{After: 5 * ms})
		c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms, Budget: b})
		if res, err := c.Get(t.Context(), &kvpb.Request{}); err != nil || res.Id != 2 {
			t.Fatalf("%v, %v", res, err)
		}
		synctest.Wait()
		if b.deposits != 1 || b.withdrawn != 1 || b.given != 0 {
			t.Errorf("budget %+v, want one deposit and one withdrawal", b)
		}
	})
}

// A hedge that the budget refuses is asked for again after twice the delay, four
// times, and so on: the token goes to the calls that are slowest.
func TestBudgetRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &ledger{}
		s := newStage(part{After: time.Hour}, part{After: 5 * ms})
		c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms, Budget: b})
		time.AfterFunc(25*ms, func() {
			b.mu.Lock()
			b.tokens = 1
			b.mu.Unlock()
		})
		if res, err := c.Get(t.Context(), &kvpb.Request{}); err != nil || res.Id != 2 {
			t.Fatalf("%v, %v", res, err)
		}
		if d := time.Since(s.Begin); d != 45*ms {
			t.Errorf("took %v, want a hedge at 40ms that takes 5ms", d)
		}
		if b.refused != 2 {
			t.Errorf("refused %d times, want at 10 and 20ms", b.refused)
		}
	})
}

// Why a hedge that was due was not sent.
func TestSuppressed(t *testing.T) {
	extra := metadata.NewIncomingContext(context.Background(), metadata.Pairs("bobtail-attempt", "retry"))
	foreign := metadata.NewIncomingContext(context.Background(), metadata.Pairs("grpc-previous-rpc-attempts", "1"))
	garbled := metadata.NewIncomingContext(context.Background(), metadata.Pairs("grpc-previous-rpc-attempts", "-x", "bobtail-attempt", "\x00"))
	for _, tc := range []struct {
		name string
		ctx  context.Context
		cfg  hedging.Config
		want hedging.Report
	}{
		{"not at all", context.Background(), hedging.Config{}, hedging.Report{Attempts: 2, Winner: 2}},
		{"shadow", context.Background(), hedging.Config{Shadow: true}, hedging.Report{Attempts: 1, Winner: 1, Suppressed: hedging.InShadow}},
		{"while serving a retry of ours", extra, hedging.Config{}, hedging.Report{Attempts: 1, Winner: 1, Suppressed: hedging.Nested}},
		{"while serving a retry of any gRPC client", foreign, hedging.Config{}, hedging.Report{Attempts: 1, Winner: 1, Suppressed: hedging.Nested}},
		{"garbled metadata is a first attempt", garbled, hedging.Config{}, hedging.Report{Attempts: 2, Winner: 2}},
		{"budget", context.Background(), hedging.Config{Budget: &ledger{}}, hedging.Report{Attempts: 1, Winner: 1, Suppressed: hedging.NoBudget}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var got []hedging.Report
				begin := time.Now()
				cfg := tc.cfg
				cfg.MaxAttempts, cfg.Delay = 2, 10*ms
				cfg.Report = func(_ context.Context, r hedging.Report) { got = append(got, r) }
				if err := invoke(tc.ctx, cfg, &kvpb.Request{}, &kvpb.Response{}, served(100*ms, 5*ms)); err != nil {
					t.Fatal(err)
				}
				want := tc.want
				want.Method, want.Delay = get, 10*ms
				switch want.Suppressed {
				case hedging.NoBudget:
					want.SuppressedAt = begin.Add(80 * ms) // asked for the fourth time
				case hedging.InShadow, hedging.Nested:
					want.SuppressedAt = begin.Add(10 * ms)
				}
				if len(got) != 1 || got[0] != want {
					t.Errorf("reports %+v, want once %+v", got, want)
				}
			})
		})
	}
}

// No hedge is sent that would probably be too late.
func TestNoHedgeBeyondTheDeadline(t *testing.T) {
	for _, tc := range []struct {
		timeout  time.Duration
		attempts int
	}{{40 * ms, 2}, {25 * ms, 1}} { // the median is 20 ms and the delay 10 ms
		synctest.Test(t, func(t *testing.T) {
			var got hedging.Report
			h := hedger(t, hedging.Config{MaxAttempts: 2, Delay: time.Hour})
			for range 100 {
				h.InvokeUnary(t.Context(), get, &kvpb.Request{}, &kvpb.Response{}, nil, served(20*ms))
			}
			h, err := h.With(hedging.Config{MaxAttempts: 2, Delay: 10 * ms,
				Report: func(_ context.Context, r hedging.Report) { got = r }})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), tc.timeout)
			defer cancel()
			err = h.InvokeUnary(ctx, get, &kvpb.Request{}, &kvpb.Response{}, nil, served(time.Hour))
			if status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("error %v", err)
			}
			if got.Attempts != tc.attempts {
				t.Errorf("with %v left: %+v, want %d attempts", tc.timeout-10*ms, got, tc.attempts)
			}
			if tc.attempts == 1 && got.Suppressed != hedging.NoTime {
				t.Errorf("suppressed %q, want %q", got.Suppressed, hedging.NoTime)
			}
		})
	}
}

// The first attempt keeps the caller's WaitForReady; a hedge never waits.
func TestHedgesDoNotWaitForReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fast [3]atomic.Int64
		invoke(t.Context(), hedging.Config{MaxAttempts: 2, Delay: 10 * ms}, &kvpb.Request{}, &kvpb.Response{},
			func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, opts ...grpc.CallOption) error {
				for _, o := range opts {
					if o, ok := o.(grpc.FailFastCallOption); ok && o.FailFast {
						fast[number(ctx)].Add(1)
					}
				}
				return served(100*ms, ms)(ctx, m, req, reply, cc, opts...)
			}, grpc.WaitForReady(true))
		if fast[1].Load() != 0 || fast[2].Load() != 1 {
			t.Errorf("fail fast: first attempt %d, hedge %d, want 0 and 1", fast[1].Load(), fast[2].Load())
		}
	})
}

func TestThrottleCounts(t *testing.T) {
	for _, tc := range []struct {
		name              string
		parts             []part
		success, failures int64
	}{
		{"an answer", []part{{}}, 1, 0},
		{"a fatal code is no failure of the server's", []part{{Code: codes.InvalidArgument}}, 0, 0},
		{"a non-fatal code, then an answer", []part{{Code: codes.Unavailable}, {}}, 1, 1},
		{"a fatal code with a pushback not to retry", []part{{Code: codes.InvalidArgument, Push: "-1"}}, 0, 1},
		{"a loser counts as nothing", []part{{After: time.Hour}, {}}, 1, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				th := &counting{}
				s := newStage(tc.parts...)
				c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms, Throttle: th, NonFatalCodes: []codes.Code{codes.Unavailable}})
				c.Get(t.Context(), &kvpb.Request{})
				synctest.Wait()
				if th.ok.Load() != tc.success || th.bad.Load() != tc.failures {
					t.Errorf("%d successes, %d failures, want %d, %d", th.ok.Load(), th.bad.Load(), tc.success, tc.failures)
				}
			})
		})
	}
}

type counting struct{ ok, bad atomic.Int64 }

func (c *counting) Allow() bool { return true }
func (c *counting) Success()    { c.ok.Add(1) }
func (c *counting) Failure()    { c.bad.Add(1) }

func TestValidate(t *testing.T) {
	for _, tc := range []struct {
		cfg  hedging.Config
		want string
	}{
		{hedging.Config{MaxAttempts: 1}, "hedging: max attempts 1, want at least 2"},
		{hedging.Config{MaxAttempts: 2, Delay: -1}, "hedging: delay -1ns, want at least 0"},
		{hedging.Config{MaxAttempts: 2, Percentile: 120}, "hedging: percentile 120, want (0, 100)"},
		{hedging.Config{MaxAttempts: 2, Percentile: 95, MinDelay: -1}, "hedging: min delay -1ns, want at least 0"},
		{hedging.Config{MaxAttempts: 2, Percentile: 95, MaxDelay: -1}, "hedging: max delay -1ns, want at least 0"},
		{hedging.Config{MaxAttempts: 2, Percentile: 95, MinDelay: 2 * ms, MaxDelay: ms}, "hedging: max delay 1ms, want at least the min delay 2ms"},
		{hedging.Config{MaxAttempts: 2, MinDelay: ms}, "hedging: min and max delay bound an adaptive delay, want a percentile beside them"},
		{hedging.Config{MaxAttempts: 2, NonFatalCodes: []codes.Code{codes.OK}}, "hedging: non-fatal code OK, want a code other than OK"},
		{hedging.Config{MaxAttempts: 2, NonFatalCodes: []codes.Code{99}}, "hedging: non-fatal code Code(99), want a code other than OK"},
		{hedging.Config{Delay: -1}, "hedging: max attempts 0, want at least 2\nhedging: delay -1ns, want at least 0"},
	} {
		if err := tc.cfg.Validate(); err == nil || err.Error() != tc.want {
			t.Errorf("%+v: %v, want %s", tc.cfg, err, tc.want)
		}
		err := invoke(context.Background(), tc.cfg, &kvpb.Request{}, &kvpb.Response{}, served(0))
		if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: a call says %v", tc.cfg, err)
		}
	}
}

func TestDo(t *testing.T) {
	down := errors.New("down")
	bad := fmt.Errorf("wrapped: %w", status.Error(codes.InvalidArgument, "bad"))
	for _, tc := range []struct {
		name string
		f    func(ctx context.Context) (string, error)
		want string
		err  error
		took time.Duration
	}{
		{"quick enough", func(context.Context) (string, error) { time.Sleep(5 * ms); return "one", nil }, "one", nil, 5 * ms},
		{"the hedge wins", func(ctx context.Context) (string, error) {
			if hedging.AttemptNumber(ctx) == 1 {
				<-ctx.Done()
				return "", ctx.Err()
			}
			time.Sleep(5 * ms)
			return "two", nil
		}, "two", nil, 15 * ms},
		{"plain errors are UNKNOWN", func(context.Context) (string, error) { time.Sleep(ms); return "partial", down }, "partial", down, 3 * ms},
		{"a wrapped status counts", func(context.Context) (string, error) { return "", bad }, "", bad, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := hedger(t, hedging.Config{MaxAttempts: 3, Delay: 10 * ms, NonFatalCodes: []codes.Code{codes.Unknown}})
				begin := time.Now()
				got, err := hedging.Do(t.Context(), h, tc.f)
				if got != tc.want || err != tc.err || time.Since(begin) != tc.took {
					t.Errorf("%q, %v after %v, want %q, %v after %v", got, err, time.Since(begin), tc.want, tc.err, tc.took)
				}
			})
		})
	}
	t.Run("the context ends while nothing runs on the caller's goroutine", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := hedger(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms, NonFatalCodes: []codes.Code{codes.Unknown}})
			ctx, cancel := context.WithTimeout(t.Context(), 30*ms)
			defer cancel()
			begin := time.Now()
			_, err := hedging.Do(ctx, h, func(ctx context.Context) (int, error) {
				if hedging.AttemptNumber(ctx) == 1 {
					time.Sleep(15 * ms)
					return 0, down
				}
				time.Sleep(time.Second) // deaf to its context
				return 0, nil
			})
			if !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != 30*ms {
				t.Errorf("%v after %v", err, time.Since(begin))
			}
			time.Sleep(2 * time.Second)
		})
	})
}
