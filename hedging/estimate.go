package hedging

import "time"

// Estimate is what hedging would do to the tail of a method, or does.
type Estimate struct {
	// Unhedged is the 99th percentile of the attempts: that of the calls, were none hedged.
	Unhedged time.Duration
	// Hedged is what it is with one hedge after the delay in force, for as many of the calls
	// as the extra load allows.
	Hedged time.Duration
	// Extra is the share of the calls that are then hedged, in [0, 1].
	Extra float64
	// Best is the least that any single delay would give within the same extra load, and
	// BestDelay is that delay: SingleR's optimum.
	Best, BestDelay time.Duration
}

const (
	estimated = 0.99
	// bisections find a duration of up to 69 s to a microsecond or so, which is less than the
	// tracker knows.
	bisections = 26
	// estimateDelays is how many delays are tried for the best one.
	estimateDelays = 128
)

// Estimate estimates what hedging gives at the 99th percentile, from the latencies of the
// attempts of the last [Window]; in mode shadow that is where to see what it would give. extra
// is the share of calls that may be hedged, in (0, 1]; outside of that it is taken as 1. It is
// false while too few calls have been seen to know the percentile, or no delay is known: under
// hedging the losers' latencies are cut off, which takes more calls.
//
// It takes the two attempts of a call for independent, as they are where one backend in many
// is slow for a while. Where both copies wait for the same slow thing, hedging gives less.
// It counts one hedge, and a second one, if MaxAttempts allows it, makes it a little better.
//
// Source: Kaler, He and Elnikety, "Optimal Reissue Policies for Reducing Tail Latency",
// SPAA 2017 (SingleR): P(done <= t) = F(t) + q (1-F(t)) F(t-d), with q (1-F(d)) the extra load.
func (h *Hedger) Estimate(now time.Time, extra float64) (Estimate, bool) {
	if !(extra > 0 && extra < 1) { // NaN, too
		extra = 1
	}
	var e Estimate
	var ok bool
	if e.Unhedged, ok = h.latency.Quantile(now, estimated); !ok {
		return Estimate{}, false
	}
	delay := h.delay(now)
	if delay < 0 {
		return Estimate{}, false
	}
	f := func(d time.Duration) float64 {
		if d < 0 {
			return 0
		}
		p, _ := h.latency.UpTo(now, d)
		return p
	}
	e.Hedged, e.Extra = single(f, e.Unhedged, delay, extra)
	e.Best, e.BestDelay = e.Hedged, delay
	for k := range estimateDelays {
		d := e.Unhedged * time.Duration(k) / estimateDelays
		if t, _ := single(f, e.Unhedged, d, extra); t < e.Best {
			e.Best, e.BestDelay = t, d
		}
	}
	return e, true
}

// single returns the percentile that one hedge after d gives, which is unhedged at most, and
// the share of the calls that are hedged, extra at most. f is the distribution of attempts.
func single(f func(time.Duration) float64, unhedged, d time.Duration, extra float64) (time.Duration, float64) {
	due := 1 - f(d)
	q := 1.0
	if due > extra {
		q = extra / due
	}
	low, high := time.Duration(0), unhedged
	for range bisections {
		t := (low + high) / 2
		if done := f(t); done+q*(1-done)*f(t-d) >= estimated {
			high = t
		} else {
			low = t
		}
	}
	return high, q * due
}
