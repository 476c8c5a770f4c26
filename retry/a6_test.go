package retry

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	_ "github.com/bobtail-rpc/bobtail/loadbalance"
)

// a6Cases are the rules of gRFC A6 on retries, and ours beyond it, as a caller and three
// servers see them. All times are exact: they are virtual.
var a6Cases = []struct {
	name    string
	max     int // 4 if 0
	codes   []codes.Code
	each    time.Duration // AttemptTimeout
	timeout time.Duration // of the call
	tokens  string        // "throttled", "no budget", "one token"
	shadow  bool
	parts   []part

	arrivals []time.Duration
	took     time.Duration
	code     codes.Code
	by       uint64 // the attempt that answered, or whose failure is returned
	why      Reason
}{{
	name:     "a success is not retried",
	parts:    []part{{After: 9 * ms}},
	arrivals: []time.Duration{0}, took: 9 * ms, by: 1,
}, {
	name:     "a retryable failure is retried after the backoff, which grows and is capped",
	max:      5,
	parts:    []part{{Code: codes.Unavailable}, {Code: codes.Unavailable}, {After: ms, Code: codes.Unavailable}, {Code: codes.Unavailable}, {After: ms}},
	arrivals: []time.Duration{0, 10 * ms, 30 * ms, 71 * ms, 151 * ms}, took: 152 * ms, by: 5,
}, {
	name:     "a code that is not listed ends the call",
	parts:    []part{{Code: codes.Unavailable}, {After: ms, Code: codes.Internal}},
	arrivals: []time.Duration{0, 10 * ms}, took: 11 * ms, code: codes.Internal, by: 2, why: NotRetryable,
}, {
	name: "every listed code is retried", codes: []codes.Code{codes.Aborted, codes.ResourceExhausted},
	parts:    []part{{Code: codes.Aborted}, {Code: codes.ResourceExhausted}, {}},
	arrivals: []time.Duration{0, 10 * ms, 30 * ms}, took: 30 * ms, by: 3,
}, {
	name: "maxAttempts counts the first, and the last failure is returned as the server sent it", max: 3,
	parts:    []part{{Code: codes.Unavailable}},
	arrivals: []time.Duration{0, 10 * ms, 30 * ms}, took: 30 * ms, code: codes.Unavailable, by: 3, why: Exhausted,
}, {
	name: "above 5 attempts are taken as 5", max: 9,
	parts:    []part{{Code: codes.Unavailable}},
	arrivals: []time.Duration{0, 10 * ms, 30 * ms, 70 * ms, 150 * ms}, took: 150 * ms, code: codes.Unavailable, by: 5, why: Exhausted,
}, {
	name:     "pushback is exact, and resets the backoff",
	parts:    []part{{Code: codes.Unavailable}, {Code: codes.Unavailable, Push: "123"}, {Code: codes.Unavailable}, {}},
	arrivals: []time.Duration{0, 10 * ms, 133 * ms, 143 * ms}, took: 143 * ms, by: 4,
}, {
	name:     "pushback of 0 retries at once",
	parts:    []part{{Code: codes.Unavailable, Push: "0"}, {}},
	arrivals: []time.Duration{0, 0}, took: 0, by: 2,
}, {
	name:     "negative pushback stops",
	parts:    []part{{Code: codes.Unavailable, Push: "-1"}, {}},
	arrivals: []time.Duration{0}, took: 0, code: codes.Unavailable, by: 1, why: Pushback,
}, {
	name:     "unparseable pushback stops",
	parts:    []part{{Code: codes.Unavailable, Push: "soon"}, {}},
	arrivals: []time.Duration{0}, took: 0, code: codes.Unavailable, by: 1, why: Pushback,
}, {
	name:     "pushback makes no code retryable",
	parts:    []part{{Code: codes.Internal, Push: "5"}, {}},
	arrivals: []time.Duration{0}, took: 0, code: codes.Internal, by: 1, why: NotRetryable,
}, {
	name: "pushback gives no attempt beyond maxAttempts", max: 2,
	parts:    []part{{Code: codes.Unavailable}, {Code: codes.Unavailable, Push: "5"}},
	arrivals: []time.Duration{0, 10 * ms}, took: 10 * ms, code: codes.Unavailable, by: 2, why: Exhausted,
}, {
	name:     "RetryInfo is a minimum: longer than the backoff it is waited for",
	parts:    []part{{Code: codes.Unavailable, Info: 50 * ms}, {Code: codes.Unavailable}, {}},
	arrivals: []time.Duration{0, 50 * ms, 70 * ms}, took: 70 * ms, by: 3,
}, {
	name:     "RetryInfo is a minimum: shorter than the backoff it changes nothing",
	parts:    []part{{Code: codes.Unavailable, Info: 3 * ms}, {}},
	arrivals: []time.Duration{0, 10 * ms}, took: 10 * ms, by: 2,
}, {
	name:     "pushback wins over RetryInfo",
	parts:    []part{{Code: codes.Unavailable, Info: 50 * ms, Push: "20"}, {}},
	arrivals: []time.Duration{0, 20 * ms}, took: 20 * ms, by: 2,
}, {
	name:     "RetryInfo makes no code retryable",
	parts:    []part{{Code: codes.Internal, Info: 5 * ms}, {}},
	arrivals: []time.Duration{0}, took: 0, code: codes.Internal, by: 1, why: NotRetryable,
}, {
	name: "no wait reaches the deadline: the failure is returned at once", timeout: 25 * ms,
	parts:    []part{{Code: codes.Unavailable}, {Code: codes.Unavailable}, {}},
	arrivals: []time.Duration{0, 10 * ms}, took: 10 * ms, code: codes.Unavailable, by: 2, why: NoTime,
}, {
	name: "pushback beyond the deadline is not waited for", timeout: time.Second,
	parts:    []part{{Code: codes.Unavailable, Push: "1000"}, {}},
	arrivals: []time.Duration{0}, took: 0, code: codes.Unavailable, by: 1, why: NoTime,
}, {
	name: "the deadline is over all attempts", timeout: 25 * ms,
	parts:    []part{{Code: codes.Unavailable}, {After: time.Second}},
	arrivals: []time.Duration{0, 10 * ms}, took: 25 * ms, code: codes.DeadlineExceeded, why: NotRetryable,
}, {
	name: "an attempt's own timeout is retryable though it is not listed", each: 30 * ms,
	parts:    []part{{After: time.Hour}, {After: 29 * ms}},
	arrivals: []time.Duration{0, 40 * ms}, took: 69 * ms, by: 2,
}, {
	name: "an attempt's own timeout ends the last one too", each: 30 * ms, max: 2,
	parts:    []part{{After: time.Hour}},
	arrivals: []time.Duration{0, 40 * ms}, took: 70 * ms, code: codes.DeadlineExceeded, why: Exhausted,
}, {
	name: "a server's own DEADLINE_EXCEEDED is no timeout of the attempt", each: 30 * ms,
	parts:    []part{{After: 5 * ms, Code: codes.DeadlineExceeded}, {}},
	arrivals: []time.Duration{0}, took: 5 * ms, code: codes.DeadlineExceeded, by: 1, why: NotRetryable,
}, {
	name: "throttled: the failure is returned", tokens: "throttled",
	parts:    []part{{Code: codes.Unavailable}, {}},
	arrivals: []time.Duration{0}, took: 0, code: codes.Unavailable, by: 1, why: Throttled,
}, {
	name: "no budget: the failure is returned at once", tokens: "no budget",
	parts:    []part{{Code: codes.Unavailable}, {}},
	arrivals: []time.Duration{0}, took: 0, code: codes.Unavailable, by: 1, why: NoBudget,
}, {
	name: "each retry takes one token", tokens: "one token",
	parts:    []part{{Code: codes.Unavailable}, {Code: codes.Unavailable}, {}},
	arrivals: []time.Duration{0, 10 * ms}, took: 10 * ms, code: codes.Unavailable, by: 2, why: NoBudget,
}, {
	name: "shadow decides and sends nothing", shadow: true, tokens: "one token",
	parts:    []part{{Code: codes.Unavailable}, {}},
	arrivals: []time.Duration{0}, took: 0, code: codes.Unavailable, by: 1, why: InShadow,
}, {
	name: "shadow says what the budget would have refused", shadow: true, tokens: "no budget",
	parts:    []part{{Code: codes.Unavailable}, {}},
	arrivals: []time.Duration{0}, took: 0, code: codes.Unavailable, by: 1, why: NoBudget,
}}

func TestA6OverGRPC(t *testing.T) {
	for _, kind := range kinds {
		for _, tc := range a6Cases {
			t.Run(kind+"/"+tc.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var reports []Report
					cfg := Config{
						MaxAttempts: tc.max, Backoff: doubling, RetryableCodes: tc.codes, AttemptTimeout: tc.each, Shadow: tc.shadow,
						Report: func(_ context.Context, r Report) { reports = append(reports, r) },
					}
					if cfg.MaxAttempts == 0 {
						cfg.MaxAttempts = 4
					}
					if cfg.RetryableCodes == nil {
						cfg.RetryableCodes = unavailable
					}
					switch tc.tokens {
					case "throttled":
						th, err := NewThrottle(ThrottleConfig{MaxTokens: 3, TokenRatio: 0.1})
						if err != nil {
							t.Fatal(err)
						}
						th.Failure() // 2 of 3; the call's own failure brings it to 1
						cfg.Throttle = th
					case "no budget", "one token":
						b, err := NewBudget(BudgetConfig{Max: 0.001}, time.Now())
						if err != nil {
							t.Fatal(err)
						}
						if tc.tokens == "no budget" && !b.TryWithdraw(time.Now()) {
							t.Fatal("a new budget is empty")
						}
						cfg.Budget = b
					}
					s, kv, _ := over(t, cfg, 0.5, tc.parts)
					ctx, cancel := t.Context(), func() {}
					if tc.timeout > 0 {
						ctx, cancel = context.WithTimeout(ctx, tc.timeout)
					}
					defer cancel()

					by, err := makeCall(ctx, kv, kind)
					took := time.Since(s.Begin)
					synctest.Wait()
					if status.Code(err) != tc.code {
						t.Errorf("error %v, want code %v", err, tc.code)
					}
					if err != nil && tc.by != 0 {
						// As the server sent it: not wrapped, not rewritten.
						if want := "attempt " + string('0'+rune(tc.by)); status.Convert(err).Message() != want {
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
					for k := 1; k <= len(tc.arrivals); k++ {
						want := "[retry]"
						if k == 1 {
							want = "[]"
						}
						if s.Kinds[k] != want || s.IDs[k] != 7 {
							t.Errorf("attempt %d carries bobtail-attempt %s and request %d, want %s and 7", k, s.Kinds[k], s.IDs[k], want)
						}
						// Three backends: a retry goes where none has failed yet.
						if k > 1 && k <= 3 && (s.By[k] == s.By[k-1] || s.By[k] == s.By[1]) {
							t.Errorf("attempt %d went to %s again", k, s.By[k])
						}
					}
					want := Report{Attempts: len(tc.arrivals), Stopped: tc.why, Code: tc.code}
					if len(reports) != 1 {
						t.Fatalf("%d reports, want 1", len(reports))
					}
					want.Method, want.Waited = reports[0].Method, reports[0].Waited
					if reports[0] != want {
						t.Errorf("report %+v, want %+v", reports[0], want)
					}
				})
			})
		}
	}
}
