package latency

import (
	"math"
	"sync/atomic"
	"time"
)

const (
	// scale is one in the fixed-point form of a probability.
	scale = 1 << 32

	// unbounded is -ln(0.025): with n samples the quantile q has a finite upper
	// 95% bound once q^n < 0.025, or n x -ln(q) > unbounded. Below that, the
	// chance that the true quantile lies beyond every sample exceeds 2.5%.
	unbounded = 3.6888794541139363

	// enoughKept is the share of information that must survive censoring for a
	// quantile to be taken as it is. Half, because the percentile that sets the
	// hedging delay keeps nearly all of it; for exponential durations p95 keeps
	// 0.59 while the delay is wrongly at p85, and p99 0.38 under a delay at p95.
	enoughKept = 0.5

	// Below that share the estimate must prove itself: within tolerance, at
	// standardErrors. Four rather than two because Greenwood's formula is
	// optimistic where few are left at risk, and because the quantile is read
	// over and over, so that the rare miss is met. It implies that effective n
	// x (1-q) >= 16, whatever the shape of the curve.
	tolerance      = 0.10
	standardErrors = 4
)

// curve is the estimated distribution of durations at one moment, in a form that
// a reader searches while the next is written elsewhere. Its fields are atomics
// because a reader overtaken by two refreshes sees them change; it then discards
// what it read.
type curve struct {
	at      atomic.Int64  // when it was made, ns since the tracker's start
	samples atomic.Uint64 // in it, censored ones included

	// points has for each bucket one word. Its high half is the probability of a
	// duration up to the end of this bucket, in units of 1/scale, and never falls
	// from one bucket to the next; its low half is the effective sample size of
	// that estimate.
	points [buckets]atomic.Uint64
}

// fit makes c the product-limit estimate over n samples, counted per bucket:
//
//	S(b) = product over i <= b of (1 - h_i),   h_i = d_i / (r_i - c_i/2)
//
// where r_i are still at risk when bucket i begins, d_i complete in it and c_i
// are censored in it. The latter are taken to run through half of it (the
// actuarial method: Cutler and Ederer 1958), as they are spread over the bucket.
//
// Greenwood's variance (1926) is S^2 G, with G the sum of h_i / (r'_i (1 - h_i)),
// which without censoring is S (1-S) / n. The n that makes it so is the
// effective sample size (1-S) / (S G). The loop carries w = S G rather than G,
// because G is infinite where the curve ends and w is not.
func (c *curve) fit(counted *[buckets]uint64, n uint64) {
	c.samples.Store(n)
	survival, w, atRisk := 1.0, 0.0, float64(n)
	var point uint64
	for b, word := range counted {
		completed, censored := split(word)
		if completed > 0 {
			r := atRisk - float64(censored)/2
			h := float64(completed) / r
			w = w*(1-h) + survival*h/r
			survival *= 1 - h
			point = fixed(1-survival)<<32 | uint64(min((1-survival)/w+0.5, scale-1))
		}
		atRisk -= float64(completed + censored)
		c.points[b].Store(point)
	}
}

// fixed returns a probability in units of 1/scale. It rounds, so that F = k/n
// and q = k/n meet although one of them was computed as a long product.
func fixed(p float64) uint64 {
	return min(uint64(p*scale+0.5), scale-1)
}

// upTo returns the probability of a duration up to the end of bucket b, or 0 for
// a bucket before the first.
func (c *curve) upTo(b int) uint64 {
	if b < 0 {
		return 0
	}
	return c.points[b].Load() >> 32
}

// fraction returns the probability of a duration of at most d, taking the durations of a
// bucket for evenly spread.
func (c *curve) fraction(d time.Duration) float64 {
	b := bucketOf(d)
	before, after := c.upTo(b-1), c.upTo(b)
	return (float64(before) + offset(b, d)*float64(after-before)) / scale
}

// quantile returns the q-quantile and whether the samples support it, by the
// rules that [Tracker.Quantile] states.
func (c *curve) quantile(q float64) (time.Duration, bool) {
	target := max(fixed(q), 1)
	b, end := 0, buckets
	for b < end {
		if mid := (b + end) / 2; c.upTo(mid) < target {
			b = mid + 1
		} else {
			end = mid
		}
	}
	if b == buckets {
		return 0, false
	}
	point := c.points[b].Load()
	effective := float64(point % scale)
	// 1-q <= -ln(q), so that this test saves the logarithm almost always.
	if effective*(1-q) < unbounded && effective*-math.Log(q) < unbounded {
		return 0, false
	}
	before, after := c.upTo(b-1), point>>32
	d := within(b, float64(target-before)/float64(after-before))
	if effective < enoughKept*float64(c.samples.Load()) && !c.tight(q, d, effective) {
		return 0, false
	}
	return d, true
}

// tight reports whether the interval of standardErrors about the q-quantile d
// lies within tolerance of d. Instead of looking for the ends of the interval it
// asks how much of the curve lies beyond the tolerated durations: on the side of
// caution, up to the end of the bucket below and the start of the one above.
func (c *curve) tight(q float64, d time.Duration, effective float64) bool {
	margin := standardErrors * math.Sqrt(q*(1-q)/effective)
	low := c.upTo(bucketOf(time.Duration((1 - tolerance) * float64(d))))
	high := c.upTo(bucketOf(time.Duration((1+tolerance)*float64(d))) - 1)
	return float64(low)/scale <= q-margin && float64(high)/scale >= q+margin
}
