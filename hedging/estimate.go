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
}

const (
	estimated = 0.99
	// bisections find a duration to 1/65536 of the percentile, which is less than the tracker
	// knows.
	bisections = 16
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
	e.Hedged, e.Extra = single(h.upTo(now), e.Unhedged, delay, extra)
	return e, true
}

// Optimum returns the delay that gives the least 99th percentile within the same extra load as
// [Hedger.Estimate], and what it gives: the yardstick for the delay in force. It tries 128 delays,
// each of which costs as much as an Estimate.
func (h *Hedger) Optimum(now time.Time, extra float64) (hedged, delay time.Duration, ok bool) {
	if !(extra > 0 && extra < 1) {
		extra = 1
	}
	unhedged, ok := h.latency.Quantile(now, estimated)
	if !ok {
		return 0, 0, false
	}
	f := h.upTo(now)
	hedged, delay = unhedged, unhedged
	for k := range estimateDelays {
		d := unhedged * time.Duration(k) / estimateDelays
		if t, _ := single(f, unhedged, d, extra); t < hedged {
			hedged, delay = t, d
		}
	}
	return hedged, delay, true
}

// upTo is the distribution of the attempts' latencies.
func (h *Hedger) upTo(now time.Time) func(time.Duration) float64 {
	return func(d time.Duration) float64 {
		if d < 0 {
			return 0
		}
		p, _ := h.latency.UpTo(now, d)
		return p
	}
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
