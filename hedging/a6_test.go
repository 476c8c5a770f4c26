package hedging_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/retry"
)

// a6Cases are the rules of gRFC A6 on hedging as a caller and three servers see
// them. All times are exact: they are virtual.
var a6Cases = []struct {
	name     string
	max      int
	delay    time.Duration
	nonFatal []codes.Code
	throttle bool // the throttle is at its threshold
	timeout  time.Duration
	parts    []part

	arrivals []time.Duration
	took     time.Duration
	code     codes.Code
	by       uint64 // the attempt that answered
}{{
	name: "a call that is quick enough is not hedged", max: 3, delay: 10 * ms,
	parts:    []part{{After: 9 * ms}},
	arrivals: []time.Duration{0}, took: 9 * ms, by: 1,
}, {
	name: "attempt k goes out at (k-1) x delay", max: 4, delay: 10 * ms,
	parts:    []part{{After: time.Second}, {After: time.Second}, {After: time.Second}, {After: 5 * ms}},
	arrivals: []time.Duration{0, 10 * ms, 20 * ms, 30 * ms}, took: 35 * ms, by: 4,
}, {
	name: "above 5 attempts are taken as 5", max: 9, delay: ms,
	parts:    []part{{After: 50 * ms}},
	arrivals: []time.Duration{0, ms, 2 * ms, 3 * ms, 4 * ms}, took: 50 * ms, by: 1,
}, {
	name: "a delay of 0 sends all at once", max: 3, delay: 0,
	parts:    []part{{After: 30 * ms}, {After: 10 * ms}, {After: 20 * ms}},
	arrivals: []time.Duration{0, 0, 0}, took: 10 * ms, by: 2,
}, {
	name: "a fatal code ends the call though siblings run", max: 3, delay: 10 * ms,
	nonFatal: []codes.Code{codes.Unavailable},
	parts:    []part{{After: time.Second}, {After: 3 * ms, Code: codes.InvalidArgument}},
	arrivals: []time.Duration{0, 10 * ms}, took: 13 * ms, code: codes.InvalidArgument, by: 2,
}, {
	name: "a non-fatal code sends the next at once, the delay then resumes", max: 3, delay: 10 * ms,
	nonFatal: []codes.Code{codes.Unavailable},
	parts:    []part{{After: 3 * ms, Code: codes.Unavailable}, {After: 40 * ms}, {After: 5 * ms}},
	arrivals: []time.Duration{0, 3 * ms, 13 * ms}, took: 18 * ms, by: 3,
}, {
	name: "a non-fatal failure waits for its siblings", max: 2, delay: 10 * ms,
	nonFatal: []codes.Code{codes.Unavailable},
	parts:    []part{{After: 50 * ms}, {After: ms, Code: codes.Unavailable}},
	arrivals: []time.Duration{0, 10 * ms}, took: 50 * ms, by: 1,
}, {
	name: "all fail: the failure that ended last is returned as the server sent it", max: 2, delay: 10 * ms,
	nonFatal: []codes.Code{codes.Unavailable, codes.Aborted},
	parts:    []part{{After: 50 * ms, Code: codes.Aborted}, {After: ms, Code: codes.Unavailable}},
	arrivals: []time.Duration{0, 10 * ms}, took: 50 * ms, code: codes.Aborted, by: 1,
}, {
	name: "negative pushback stops further hedges, those in flight go on", max: 4, delay: 10 * ms,
	nonFatal: []codes.Code{codes.Unavailable},
	parts:    []part{{After: 50 * ms}, {After: ms, Code: codes.Unavailable, Push: "-1"}},
	arrivals: []time.Duration{0, 10 * ms}, took: 50 * ms, by: 1,
}, {
	name: "unparseable pushback stops further hedges", max: 4, delay: 10 * ms,
	nonFatal: []codes.Code{codes.Unavailable},
	parts:    []part{{After: 50 * ms}, {After: ms, Code: codes.Unavailable, Push: "soon"}},
	arrivals: []time.Duration{0, 10 * ms}, took: 50 * ms, by: 1,
}, {
	name: "pushback of n ms delays the next hedge, the rest resume at n + delay", max: 4, delay: 10 * ms,
	nonFatal: []codes.Code{codes.Unavailable},
	parts:    []part{{After: 2 * ms, Code: codes.Unavailable, Push: "25"}, {After: time.Second}, {After: time.Second}, {After: ms}},
	arrivals: []time.Duration{0, 27 * ms, 37 * ms, 47 * ms}, took: 48 * ms, by: 4,
}, {
	name: "pushback of 0 sends the next at once", max: 2, delay: 10 * ms,
	nonFatal: []codes.Code{codes.Unavailable},
	parts:    []part{{After: 2 * ms, Code: codes.Unavailable, Push: "0"}, {After: ms}},
	arrivals: []time.Duration{0, 2 * ms}, took: 3 * ms, by: 2,
}, {
	name: "a throttled hedge is not sent", max: 3, delay: 10 * ms, throttle: true,
	parts:    []part{{After: 50 * ms}, {}},
	arrivals: []time.Duration{0}, took: 50 * ms, by: 1,
}, {
	name: "throttled, nothing in flight: the failure is returned", max: 3, delay: 10 * ms, throttle: true,
	nonFatal: []codes.Code{codes.Unavailable},
	parts:    []part{{After: 5 * ms, Code: codes.Unavailable}, {}},
	arrivals: []time.Duration{0}, took: 5 * ms, code: codes.Unavailable, by: 1,
}, {
	name: "the deadline is over all attempts", max: 3, delay: 10 * ms, timeout: 25 * ms,
	parts:    []part{{After: time.Second}},
	arrivals: []time.Duration{0, 10 * ms, 20 * ms}, took: 25 * ms, code: codes.DeadlineExceeded,
}}

func TestA6OverGRPC(t *testing.T) {
	for _, kind := range []string{"unary", "server streaming"} {
		for _, tc := range a6Cases {
			t.Run(kind+"/"+tc.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					cfg := hedging.Config{MaxAttempts: tc.max, Delay: tc.delay, NonFatalCodes: tc.nonFatal}
					if tc.throttle {
						th, err := retry.NewThrottle(retry.ThrottleConfig{MaxTokens: 2, TokenRatio: 0.1})
						if err != nil {
							t.Fatal(err)
						}
						th.Failure()
						cfg.Throttle = th
					}
					s := newStage(tc.parts...)
					c, _ := s.dial(t, cfg)
					ctx, cancel := t.Context(), func() {}
					if tc.timeout > 0 {
						ctx, cancel = context.WithTimeout(ctx, tc.timeout)
					}
					defer cancel()

					by, err := call(ctx, c, kind)
					took := time.Since(s.Begin)
					synctest.Wait()
					if status.Code(err) != tc.code {
						t.Errorf("error %v, want code %v", err, tc.code)
					}
					if err != nil && tc.by != 0 {
						// As the server sent it: not wrapped, not rewritten.
						want := status.Newf(tc.code, "attempt %d", tc.by).Err().Error()
						if err.Error() != want {
							t.Errorf("error %q, want %q", err, want)
						}
					}
					if err == nil && by != tc.by {
						t.Errorf("answered by attempt %d, want %d", by, tc.by)
					}
					if took != tc.took {
						t.Errorf("took %v, want %v", took, tc.took)
					}
					if got := s.Arrivals(); !slices.Equal(got, tc.arrivals) {
						t.Errorf("attempts arrived at %v, want %v", got, tc.arrivals)
					}
					// Whoever lost was cancelled on the server when the call was decided.
					for k, at := range s.Cancelled {
						if at != tc.took {
							t.Errorf("attempt %d was cancelled at %v, want %v", k, at, tc.took)
						}
					}
					for k, kind := range s.Kinds {
						want := "[hedge]"
						if k == 1 {
							want = "[]"
						}
						if kind != want {
							t.Errorf("attempt %d carries bobtail-attempt %s, want %s", k, kind, want)
						}
					}
				})
			})
		}
	}
}

// call makes one call and returns which attempt answered.
func call(ctx context.Context, c kvpb.KVClient, kind string) (uint64, error) {
	if kind == "unary" {
		res, err := c.Get(ctx, &kvpb.Request{})
		return res.GetId(), err
	}
	s, err := c.Scan(ctx, &kvpb.Request{})
	if err != nil {
		return 0, err
	}
	res, err := s.Recv()
	return res.GetId(), err
}
