// Package latency keeps windowed percentiles of durations, some of which are
// known only as lower bounds.
//
// When a hedge wins, the other attempt is cancelled after some time c and what
// is known of it is "longer than c": its sample is censored. Both easy ways out
// are wrong. Dropping it leaves mostly fast attempts, which lowers the
// percentile, which hedges and drops more: in the simulations of feedback_test.go
// a p95 settles at up to 94% below the truth and hedges go from 5% to 12% of
// calls. Taking c for its duration makes p99 as much as 90% too low. A [Tracker]
// therefore estimates the survival curve by the product-limit method (Kaplan and
// Meier, "Nonparametric Estimation from Incomplete Observations", JASA 1958), in
// which a censored sample counts among those still running until the moment it
// was cut off and is silent afterwards.
//
// The method assumes that the cut does not depend on how long the attempt would
// have taken. It holds for a hedge sent elsewhere, whose luck is its own. It does
// not where both copies wait for the same slow thing: then percentiles beyond
// the hedging delay come out too low. The percentile that sets the delay lies
// where nothing has been cut yet, and stays right.
package latency

import (
	"math"
	"sync/atomic"
	"time"
)

// DefaultWindow is how far back a [Tracker] looks unless told otherwise: long
// enough for a p95 (72 samples) at 3 calls/s, short enough that a delay learnt
// before an incident is gone when the alert arrives.
const DefaultWindow = 30 * time.Second

const (
	// refreshesPerWindow sets the age at which the published curve is recomputed:
	// 100 ms of a 30 s window. Between two refreshes at most 1/300 of the window's
	// samples are new, less than its sampling noise, and a refresh (18-25 us measured)
	// stays below 0.03% of one core.
	refreshesPerWindow = 300

	// countedUpTo is the number of samples up to which a doubling brings the next
	// refresh forward. Beyond it the curve is good already, and leaving the
	// counter alone keeps Record from sharing a cache line that every call writes.
	countedUpTo = 4096

	// notCounting is the value of Tracker.until at which no doubling is awaited;
	// so far below zero that decrements in flight cannot bring it near.
	notCounting = math.MinInt64 / 2
)

// Tracker estimates percentiles of the durations recorded during the last
// window. Durations are counted in buckets whose width is at most 1/32 of their
// value, so a percentile is off by at most 2% from 10 us to 60 s, beside the
// noise of the sample itself. What is shorter than 8.192 us counts as 8.192 us,
// what is longer than 68.7 s as 68.7 s.
//
// All methods are safe for concurrent use. None blocks, allocates, reads a clock
// or sorts; once in every window/300 one caller of Quantile recomputes the curve
// while the others go on reading the old one. A Tracker occupies 64 KiB, however
// many samples it sees, and owns no goroutine. It must not be copied. The zero
// value is not ready: use [New].
type Tracker struct {
	start  time.Time
	window time.Duration

	counts counts

	// until is how many more samples double what the published curve was made
	// from. A zero or less asks for a refresh; notCounting asks for none. An
	// atomic because every Record may count it down.
	until atomic.Int64

	// refreshed is when, since start, the published curve was made. An atomic
	// because readers test it while a refresh moves it on.
	refreshed atomic.Int64

	// refreshing is true while one caller makes a new curve. It guards sums and
	// the curve that is not published. An atomic, not a mutex, because whoever
	// finds it taken reads the old curve rather than wait.
	refreshing atomic.Bool
	sums       [buckets]uint64

	// Curve number g lives in curves[g%2]. published is the newest complete one,
	// 0 at first; begun runs ahead of it while the next is being written. Atomics
	// because that is how a reader without a lock learns that the curve it read
	// was not overwritten meanwhile.
	begun, published atomic.Uint64
	curves           [2]curve
}

// New returns a Tracker that looks back over window, whose first sample will be
// recorded at start or later. Samples leave in sixths of the window, each between
// 5/6 and one window old (or a sixth sooner, if it came in the microsecond in
// which a new sixth began). A window of 0 or less is [DefaultWindow].
func New(window time.Duration, start time.Time) *Tracker {
	if window <= 0 {
		window = DefaultWindow
	}
	t := &Tracker{start: start, window: window}
	// Rounded up, so that a window of a few nanoseconds has slots too.
	t.counts.width = (int64(window) + liveSlots - 1) / liveSlots
	// The first slot is clear already. Were it left to the first writer to say so,
	// those who come at the same instant would have to count in the slot before.
	t.counts.ring[0].epoch.Store(t.counts.epoch(0))
	t.until.Store(1)
	t.refreshed.Store(math.MinInt64 / 2)
	return t
}

// Record adds one attempt that ended at now after d. It is censored if it ended
// otherwise than by completing, because it was cancelled or failed, so that its
// true duration is known only to be d or more.
//
// Callers may disagree about now by up to a sixth of the window without effect.
// A sample that is older than the window is ignored.
func (t *Tracker) Record(now time.Time, d time.Duration, censored bool) {
	t.counts.add(int64(now.Sub(t.start)), bucketOf(d), censored)
	if t.until.Load() > 0 {
		t.until.Add(-1)
	}
}

// Quantile returns the duration that a fraction q of attempts do not exceed, q
// in (0, 1): 0.95 for p95. It is false when the samples of the window do not
// support an answer:
//
//   - there are too few. With n samples the upper 95% confidence bound of the
//     quantile is finite once q^n < 0.025: for p50 n is 6, p95 72, p99 368,
//     p99.9 3,688. A censored sample counts only in part, see below;
//   - the longest attempts were all censored, so the curve ends below q;
//   - censoring has cost more than half of the information at q, and four
//     standard errors of what remains reach beyond 10% of the estimate. There a
//     few survivors of the hedging delay decide, and they err with confidence.
//
// Where little was lost to censoring ordinary sampling noise is accepted, since a
// hedging delay needs no precision.
//
// The n above is the effective one: the number of uncensored samples that would
// give the estimate the same variance (by Greenwood's formula). For q outside
// (0, 1) the result is false.
func (t *Tracker) Quantile(now time.Time, q float64) (d time.Duration, ok bool) {
	if !(q > 0 && q < 1) { // not q <= 0 || q >= 1, which lets NaN pass
		return 0, false
	}
	read := t.read(now, func(c *curve) { d, ok = c.quantile(q) })
	if !read {
		return 0, false
	}
	return d, ok
}

// UpTo returns the fraction of attempts that take at most d, in [0, 1]. It is the inverse of
// [Tracker.Quantile] without its judgement: false only when the window holds no sample. Beyond
// the longest attempt that completed it says no more than that one's fraction.
func (t *Tracker) UpTo(now time.Time, d time.Duration) (p float64, ok bool) {
	read := t.read(now, func(c *curve) { p, ok = c.fraction(d), c.samples.Load() > 0 })
	return p, read && ok
}

// read calls f with the curve of the window that ends at now, perhaps more than once: the
// last call counts. It is false when there is none.
func (t *Tracker) read(now time.Time, f func(*curve)) bool {
	at := int64(now.Sub(t.start))
	if t.stale(at) {
		t.refresh(at)
	}
	for {
		g := t.published.Load()
		if g == 0 {
			return false
		}
		c := &t.curves[g%2]
		// A curve as old as the window holds nothing that still counts. It is met
		// here after a long silence, while another caller makes the new one.
		expired := at-c.at.Load() >= int64(t.window)
		f(c)
		// Curve g+2 overwrites curve g. If it had begun, two refreshes went by
		// during this read, and progress was made; so this loop is lock-free.
		if t.begun.Load() < g+2 {
			return !expired
		}
	}
}

// stale reports whether the published curve should be replaced at time at: it
// has aged, or it was made from so few samples that they have doubled since, so
// that a fresh Tracker learns at once.
func (t *Tracker) stale(at int64) bool {
	if at-t.refreshed.Load() >= int64(t.window)/refreshesPerWindow {
		return true
	}
	until := t.until.Load()
	return until <= 0 && until > notCounting/2
}

// refresh publishes a curve of the window that ends at time at, unless another
// caller is doing so already.
func (t *Tracker) refresh(at int64) {
	if !t.refreshing.CompareAndSwap(false, true) {
		return
	}
	defer t.refreshing.Store(false)
	// Another caller may have finished between our look and our swap.
	if !t.stale(at) {
		return
	}
	n, ok := t.counts.sum(at, &t.sums)
	if !ok {
		return // at is so late that slots were reused while read; the next caller will do
	}
	g := t.published.Load() + 1
	t.begun.Store(g)
	c := &t.curves[g%2]
	c.at.Store(at)
	c.fit(&t.sums, n)
	t.published.Store(g)

	t.refreshed.Store(at)
	if n < countedUpTo {
		t.until.Store(int64(max(n, 1)))
	} else {
		t.until.Store(notCounting)
	}
}
