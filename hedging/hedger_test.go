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
