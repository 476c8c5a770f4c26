package hedging

import (
	"math"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// mixture returns n latencies, evenly through the distribution of which 98% are 5+Exp(5) ms
// and 2% are 50+Exp(200) ms.
func mixture(n int) []time.Duration {
	cdf := func(t float64) float64 {
		p := 0.0
		if t > 5 {
			p += 0.98 * (1 - math.Exp(-(t-5)/5))
		}
		if t > 50 {
			p += 0.02 * (1 - math.Exp(-(t-50)/200))
		}
		return p
	}
	all := make([]time.Duration, n)
	for i := range all {
		want, low, high := (float64(i)+0.5)/float64(n), 0.0, 10_000.0
		for range 60 {
			if mid := (low + high) / 2; cdf(mid) < want {
				low = mid
			} else {
				high = mid
			}
		}
		all[i] = time.Duration(high * float64(time.Millisecond))
	}
	return all
}

// seen returns a Hedger that has seen the latencies, and the time after them.
func seen(t *testing.T, cfg Config, latencies []time.Duration) (*Hedger, time.Time) {
	t.Helper()
	h, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	now := h.start.Add(time.Second)
	for _, d := range latencies {
		h.record(now, d, codes.OK)
	}
	return h, now.Add(time.Second)
}

func near(got time.Duration, ms float64) bool {
	return math.Abs(got.Seconds()*1e3-ms) <= 0.04*ms // the tracker is right to 2%, on both sides
}

// The best single hedge of a known distribution, solved elsewhere by bisection and scan.
func TestEstimate(t *testing.T) {
	latencies := mixture(20_000)
	for _, tt := range []struct {
		percentile, extra         float64
		hedged, best, delay, sent float64
	}{
		// A hedge at the p99 moves no p99.
		{99, 0.01, 190, 64.7, 42.5, 0.01},
		{98, 0.02, 59.9, 40.9, 28.5, 0.02},
		{95, 0.05, 32.1, 32.1, 22.2, 0.05},
		// Half of those that are due find no budget.
		{90, 0.05, 54.7, 32.1, 22.2, 0.05},
	} {
		h, now := seen(t, Config{MaxAttempts: 2, Percentile: tt.percentile}, latencies)
		e, ok := h.Estimate(now, tt.extra)
		if !ok || !near(e.Unhedged, 190) || !near(e.Hedged, tt.hedged) || math.Abs(e.Extra-tt.sent) > 0.002 {
			t.Errorf("p%v, %v extra: %+v, %v, want 190 -> %v ms with %v", tt.percentile, tt.extra, e, ok, tt.hedged, tt.sent)
		}
		best, delay, ok := h.Optimum(now, tt.extra)
		if !ok || !near(best, tt.best) || math.Abs(delay.Seconds()*1e3-tt.delay) > 4 {
			t.Errorf("%v extra: best %v after %v, %v, want %v ms after %v ms", tt.extra, best, delay, ok, tt.best, tt.delay)
		}
	}
}

// Without a bound every call that is due is hedged, whatever is said for one.
func TestEstimateUnbounded(t *testing.T) {
	h, now := seen(t, Config{MaxAttempts: 2, Delay: 10 * time.Millisecond}, mixture(20_000))
	want, ok := h.Estimate(now, 1)
	if !ok || !near(want.Hedged, 23.1) || math.Abs(want.Extra-0.381) > 0.01 {
		t.Errorf("%+v, want 23.1 ms with 0.381 hedged", want)
	}
	for _, extra := range []float64{0, -1, 2, math.NaN(), math.Inf(1)} {
		if e, ok := h.Estimate(now, extra); !ok || e != want {
			t.Errorf("extra %v: %+v, want %+v", extra, e, want)
		}
	}
}

func TestEstimateUnknown(t *testing.T) {
	h, now := seen(t, Config{MaxAttempts: 2, Percentile: 95}, mixture(300))
	if e, ok := h.Estimate(now, 0.05); ok {
		t.Errorf("%+v from 300 calls, want none: a p99 takes 368", e)
	}
	if best, _, ok := h.Optimum(now, 0.05); ok {
		t.Errorf("%v from 300 calls, want none", best)
	}
	h, now = seen(t, Config{MaxAttempts: 2, Tied: true}, mixture(20_000))
	if e, ok := h.Estimate(now, 0.05); ok {
		t.Errorf("%+v without a hedging delay, want none", e)
	}
	h, now = seen(t, Config{MaxAttempts: 2, Percentile: 95}, mixture(20_000))
	if e, ok := h.Estimate(now.Add(2*Window), 0.05); ok {
		t.Errorf("%+v when all has been forgotten, want none", e)
	}
}
