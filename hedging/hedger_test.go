package hedging

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// What a superseded attempt took is a lower bound. Here every first attempt takes
// an hour and is cut off after 15 ms, and every hedge takes 5 ms: half of the
// attempts are longer than anybody has seen, so the p75 is unknown.
func TestSupersededAttemptsAreCensored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, err := New(Config{MaxAttempts: 2, Delay: 10 * ms})
		if err != nil {
			t.Fatal(err)
		}
		for range 500 {
			Do(t.Context(), h, func(ctx context.Context) (int, error) {
				d := 5 * ms
				if AttemptNumber(ctx) == 1 {
					d = time.Hour
				}
				select {
				case <-time.After(d):
					return 0, nil
				case <-ctx.Done():
					return 0, ctx.Err()
				}
			})
		}
		if d, ok := h.latency.Quantile(time.Now(), 0.25); !ok || d < 4*ms || d > 6*ms {
			t.Errorf("the p25 is %v, %v, want 5ms", d, ok)
		}
		if d, ok := h.latency.Quantile(time.Now(), 0.75); ok {
			t.Errorf("the p75 is %v, want unknown", d)
		}
	})
}

// gauge is a budget at a level.
type gauge struct{ balance, allowance float64 }

func (g *gauge) Deposit(time.Time)                      {}
func (g *gauge) TryWithdraw(time.Time) bool             { return g.balance >= 1 }
func (g *gauge) GiveBack(time.Time)                     {}
func (g *gauge) Level(time.Time) (balance, all float64) { return g.balance, g.allowance }

// While the budget runs low the adaptive delay moves to a later percentile, in
// proportion; an ample budget and a fixed delay leave it alone.
func TestSteering(t *testing.T) {
	for _, tc := range []struct {
		name               string
		percentile         float64
		fixed              time.Duration
		balance, allowance float64
		want               time.Duration // of 1..1000 ms, uniform
	}{
		{"an ample budget", 90, 0, 50, 100, 900 * ms},
		{"at the reserve of 1 + sqrt(allowance)", 90, 0, 11, 100, 900 * ms},
		{"half of the reserve: half as many ask", 90, 0, 5.5, 100, 950 * ms},
		{"a quarter", 90, 0, 2.75, 100, 975 * ms},
		{"empty: a tenth still ask", 90, 0, 0, 100, 990 * ms},
		{"a fixed delay is A6's", 0, 20 * ms, 0, 100, 20 * ms},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h, err := New(Config{MaxAttempts: 2, Percentile: tc.percentile, Delay: tc.fixed,
					Budget: &gauge{tc.balance, tc.allowance}})
				if err != nil {
					t.Fatal(err)
				}
				for i := range 3000 {
					h.latency.Record(time.Now(), time.Duration(i%1000+1)*ms, false)
				}
				h.afford(time.Now(), true)
				time.Sleep(time.Second) // past what is known already
				if d := h.delay(time.Now()); d < tc.want*98/100 || d > tc.want*102/100 {
					t.Errorf("delay %v, want %v", d, tc.want)
				}
			})
		})
	}
}

// The last tokens of a large budget are kept for those who ask again; a small one has
// no such reserve.
func TestFirstAsksLeaveAReserve(t *testing.T) {
	for _, tc := range []struct {
		balance, allowance float64
		first, again       bool
	}{{5, 400, false, true}, {6, 400, true, true}, {1, 15, true, true}, {0.9, 15, false, false}, {0.9, 400, false, false}} {
		h, err := New(Config{MaxAttempts: 2, Budget: &gauge{tc.balance, tc.allowance}})
		if err != nil {
			t.Fatal(err)
		}
		if first, again := h.afford(time.Now(), true), h.afford(time.Now(), false); first != tc.first || again != tc.again {
			t.Errorf("%v of %v: first %v, again %v, want %v, %v", tc.balance, tc.allowance, first, again, tc.first, tc.again)
		}
	}
}
