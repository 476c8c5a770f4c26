package shedding

import (
	"errors"
	"fmt"
	"math"
	"time"
)

// Algorithm is how a [Limiter] finds its limit.
type Algorithm string

// The algorithms. For what they do, see [Limiter].
const (
	Gradient Algorithm = "gradient"
	Vegas    Algorithm = "vegas"
	AIMD     Algorithm = "aimd"
	Static   Algorithm = "static"
)

// maxLimit is where a limit stops to be one.
const maxLimit = 1_000_000

// LimiterConfig says how many handlers may run at once. In each field, 0 is the default.
type LimiterConfig struct {
	// Algorithm is how the limit is found. Default Gradient.
	Algorithm Algorithm

	// Initial is the limit to begin with, in [Min, Max]. Default 20, moved into that range.
	Initial int

	// Min is the least limit, in [1, 1000000]. Default 1.
	Min int

	// Max is the greatest limit, in [Min, 1000000]. Default 1000, or Min if that is more.
	Max int

	// Limit is the limit of the Static algorithm, in [1, 1000000]; it has no default, and
	// the three fields above have no meaning there. With another algorithm it must be 0.
	Limit int
}

// Validate reports every fault of the configuration, joined.
func (c LimiterConfig) Validate() error {
	var errs []error
	fault := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("shedding: limiter "+format, args...))
	}
	switch c.Algorithm {
	case "", Gradient, Vegas, AIMD:
		if c.Limit != 0 {
			fault("limit %d, want it with algorithm %q only", c.Limit, Static)
		}
	case Static:
		if c.Limit < 1 || c.Limit > maxLimit {
			fault("limit %d, want [1, %d]", c.Limit, maxLimit)
		}
		for _, f := range []struct {
			name  string
			value int
		}{{"initial", c.Initial}, {"min", c.Min}, {"max", c.Max}} {
			if f.value != 0 {
				fault("%s %d, want none with algorithm %q", f.name, f.value, Static)
			}
		}
		return errors.Join(errs...)
	default:
		fault("algorithm %q, want %q, %q, %q or %q", c.Algorithm, Gradient, Vegas, AIMD, Static)
	}
	d := c.withDefaults()
	if d.Min < 1 || d.Min > maxLimit {
		fault("min %d, want [1, %d], or 0 for the default", c.Min, maxLimit)
	} else if d.Max < d.Min || d.Max > maxLimit {
		fault("max %d, want [min %d, %d], or 0 for the default", c.Max, d.Min, maxLimit)
	} else if d.Initial < d.Min || d.Initial > d.Max {
		fault("initial %d, want [min %d, max %d], or 0 for the default", c.Initial, d.Min, d.Max)
	}
	return errors.Join(errs...)
}

func (c LimiterConfig) withDefaults() LimiterConfig {
	if c.Algorithm == Static {
		c.Initial, c.Min, c.Max = c.Limit, c.Limit, c.Limit
		return c
	}
	if c.Algorithm == "" {
		c.Algorithm = Gradient
	}
	if c.Min == 0 {
		c.Min = 1
	}
	if c.Max == 0 {
		c.Max = max(1000, c.Min)
	}
	if c.Initial == 0 {
		c.Initial = min(max(20, c.Min), c.Max)
	}
	return c
}

// Result is how a handler ended, for the limit.
type Result uint8

const (
	// Served is a handler that ran to its end, with whatever status.
	Served Result = iota
	// Dropped is one that did not get its work done in time: DEADLINE_EXCEEDED, or
	// refused by what it depends on. Its time is a lower bound.
	Dropped
	// Ignored is one whose time says nothing about the server: the client cancelled it,
	// or it failed at once. It gives its slot back, and that is all.
	Ignored
)

// Limiter finds how many handlers a server should run at once. More than it has means to
// run (cores, connections, a lock) only wait for each other, and wait where nobody can
// take them out or serve the most important first.
//
// It looks at windows: at least 100 ms, and as many handlers as it takes to know their
// mean time to 10% (100 cv^2 of them, cv their coefficient of variation). short is that
// mean, base the mean without waiting, L the limit.
//
//   - [Gradient]: L' = L x clamp(tol x base/short, 0.5, 1.1), tol = 1.1. While short is at
//     most tol x base, L grows by up to a tenth a window (and doubles until that is over
//     for the first time); if it is more, as many wait inside the server as it is more,
//     and L falls to what does not. So L settles at 1.1 times what the server can run.
//     When times vary, L grows up to tol + 1 standard error of the means and falls from tol
//   - 2 on, by less the less they are known: a fall by chance costs throughput, and one
//     handler too many does not show among times that vary. The form is that of Gradient2 in
//     Netflix's concurrency-limits and of Envoy's adaptive_concurrency. Their queue terms
//     (4, or sqrt(L)) are left out: at a capacity of 4 they double the time.
//   - [Vegas]: q = L (1 - base/short) handlers wait inside (Brakmo and Peterson, 1994). L' =
//     L + s if q < s, L - s if q > 3 s, with s = max(1, log10 L) as in concurrency-limits.
//     It is slower than Gradient when capacity falls, and lets up to 3 s wait inside, which
//     at a capacity of 4 is as much as it runs.
//   - [AIMD]: L' = 0.9 L after a window of which more than 1% was [Dropped], else L + max(1,
//     L/20): one alone would take half a minute from 20 to 300. It sees no times, so it
//     lets the server fill up until handlers run out of time: for where times tell nothing.
//   - [Static]: L is [LimiterConfig].Limit.
//
// Where base comes from is what such limiters differ in. The least time ever seen is far
// too little when times vary; a slow average follows the overload, and L drifts up with
// it (Gradient2). So it is measured, as in Envoy: every 30 s L goes down by a fifth or so
// (to 0.9/tol of it, and not below 0.7) for one window of twice the samples, and base is the
// mean there, smoothed with those before unless it is clearly another. That is enough,
// although a fifth less may still be more than the server can run: then base is too great
// by as much, and L comes to 0.9 of what it was. As much throughput with fewer handlers tells
// that it is so; then, and when base was clearly another, and when L has fallen by a third
// (the server may not be smaller, only slower), probes follow each other at once and go down
// by half, until one finds the base that was known. A probe takes about 0.3 s: it costs
// 0.3% of the throughput at most.
//
// Two things bias a mean, and are avoided: a window does not end as soon as its own samples
// are alike, and after each move nothing counts until what was in flight before is out.
//
// While less than half of L is in flight, L stays, whatever the times: an idle server
// does not know what it can bear. The means of such windows are base for free. L grows
// only when the limit has been reached.
//
// A Limiter is made by [NewLimiter], reads no clock, and is not safe for concurrent use. It
// does not count: whoever keeps to the limit does ([Admission]). No operation allocates.
type Limiter struct {
	cfg   LimiterConfig
	limit float64 // in [Min, Max]

	base      float64 // ns; 0 until it is known
	baseError float64 // its standard error, as a fraction
	short     float64 // ns, of the last window that was no probe
	deviation float64 // its standard error, as a fraction
	spread    float64 // the square of the times' coefficient of variation, smoothed
	rushing   bool    // L doubles until times rise once
	settled   bool    // the last probe found the base that was known
	probe     int     // the limit during a probe, else 0
	probeAt   time.Time
	probedAt  float64 // L when base was last measured

	// draining is while more are in flight than a limit that was lowered. After that, and
	// after any move, nothing counts until opens: what ends before has waited inside with
	// more, or fewer, than the limit.
	draining bool
	opens    time.Time
	window   window
}

// window is what has ended since start.
type window struct {
	start      time.Time
	n, dropped int
	sum, sumSq float64 // ns
	peak       int     // of those in flight
}

const (
	windowMin  = 100 * time.Millisecond
	windowMax  = time.Second // then windowLeast are enough
	windowFew  = 20          // samples; of constant times
	windowMany = 1000        // samples; however much times vary

	windowLeast = 10

	tolerance = 1.1
	// likely and sure are in standard errors: up to the one L grows, from the other on it
	// falls.
	likely       = 1
	sure         = 2
	probeEvery   = 30 * time.Second
	spreadWeight = 0.3
	baseWeight   = 0.2  // of a new measurement that agrees with those before
	dropsMany    = 0.1  // of a window's handlers: the limit is too high, whatever the times
	dropsSome    = 0.01 // the same, for AIMD, to which drops are all there is
	dropsFactor  = 0.7
)

// NewLimiter returns a limiter at its initial limit. All faults of cfg are reported
// together.
func NewLimiter(cfg LimiterConfig) (*Limiter, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	return &Limiter{cfg: cfg, limit: float64(cfg.Initial), rushing: true}, nil
}

// Limit is how many handlers may run now.
func (l *Limiter) Limit() int {
	if l.probe > 0 {
		return l.probe
	}
	return int(l.limit)
}

// Base is the mean time of a handler that waits for nothing inside the server, as far as
// it is known; else 0.
func (l *Limiter) Base() time.Duration { return time.Duration(l.base) }

// Begin tells that a handler has begun; inFlight counts it.
func (l *Limiter) Begin(now time.Time, inFlight int) {
	if l.window.start.IsZero() {
		l.window.start = now
	}
	l.window.peak = max(l.window.peak, inFlight)
}

// End tells that a handler has ended that ran for the given time; inFlight does not count
// it any more. Call it once for each Begin. The limit may then be another.
func (l *Limiter) End(now time.Time, inFlight int, ran time.Duration, r Result) {
	if l.cfg.Algorithm == Static {
		return
	}
	w := &l.window
	if l.draining {
		if inFlight > l.Limit() {
			return
		}
		l.draining = false
		l.opens = now.Add(time.Duration(2 * l.short))
	}
	if now.Before(l.opens) {
		l.reopen(l.opens, inFlight)
		return
	}
	if r == Ignored {
		return
	}
	t := max(float64(ran), 1) // a clock that stands still must not divide by 0
	w.n++
	w.sum += t
	w.sumSq += t * t
	if r == Dropped {
		w.dropped++
	}
	if took := now.Sub(w.start); w.n < windowLeast || took < windowMin || w.n < l.enough() && took < windowMax {
		return
	}
	l.spread += spreadWeight * (w.spread() - l.spread)
	before := l.Limit()
	if l.probe > 0 {
		l.endProbe(now)
	} else {
		l.move(now)
	}
	if after := l.Limit(); after != before {
		l.draining = inFlight > after
		l.opens = now.Add(time.Duration(2 * l.short))
	}
	l.reopen(now, inFlight)
}

func (l *Limiter) reopen(now time.Time, inFlight int) {
	l.window = window{start: now, peak: inFlight}
}

// spread is the square of the coefficient of variation of the window's times.
func (w *window) spread() float64 {
	mean := w.sum / float64(w.n)
	return max(0, w.sumSq/float64(w.n)/(mean*mean)-1)
}

// deviation is the standard error of the window's mean, as a fraction of it.
func (w *window) deviation() float64 { return math.Sqrt(w.spread() / float64(w.n)) }

// enough is how many samples a window needs. A window that ended as soon as its own
// samples are alike would end when they are all short by chance, so those before count as
// much.
func (l *Limiter) enough() int {
	share := 100.0
	if l.probe > 0 {
		share = 200 // base serves for many windows
	}
	return int(min(max(windowFew, share*l.window.spread(), share*l.spread), windowMany))
}

// move ends a window at the limit.
func (l *Limiter) move(now time.Time) {
	w := &l.window
	l.short, l.deviation = w.sum/float64(w.n), w.deviation()
	drops := float64(w.dropped) / float64(w.n)
	switch floor := math.Floor(l.limit); {
	case l.cfg.Algorithm == AIMD:
		if drops > dropsSome {
			l.set(l.limit * 0.9)
		} else if w.peak >= int(floor) {
			l.set(l.limit + max(1, l.limit/20))
		}
		return
	case 2*w.peak < int(floor):
		if drops <= dropsMany {
			l.learn(l.short, w.deviation())
			l.probedAt = l.limit
			l.probeAt = now.Add(probeEvery)
		}
		return
	case drops > dropsMany:
		// Times that were cut off say nothing about how long they would have been.
		l.rushing = false
		l.set(floor * dropsFactor)
	case l.base == 0:
		l.beginProbe()
		return
	default:
		l.steer(floor, w.peak >= int(floor), w.deviation())
	}
	if !l.probeAt.After(now) || l.limit < 0.7*l.probedAt {
		l.beginProbe()
	}
}

// steer moves the limit by the times of a window whose mean is known to the given
// fraction. A limit that has not been reached does not grow.
func (l *Limiter) steer(floor float64, reached bool, deviation float64) {
	// All was faster than it ever is without waiting: it is another server now.
	if l.short < l.base*(0.9-3*deviation) {
		l.base, l.baseError = l.short, deviation
	}
	deviation = math.Hypot(deviation, l.baseError)
	g := (tolerance + sure*deviation) * l.base / l.short
	if g < 1 {
		l.rushing = false
	} else if (tolerance+likely*deviation)*l.base < l.short {
		return // it may be chance
	}
	switch {
	case g >= 1 && !reached:
	case g >= 1 && l.rushing:
		l.set(l.limit * 2)
	case l.cfg.Algorithm == Gradient && g < 1:
		// Those in flight were floor, not limit.
		l.set(floor * max(1-(1-g)/(1+10*deviation), 0.5))
	case l.cfg.Algorithm == Gradient:
		l.set(l.limit * min(g, 1.1))
	default:
		step := max(1, math.Log10(floor))
		waiting := floor * (1 - l.base*(1+sure*deviation)/l.short)
		if waiting > 3*step {
			l.set(floor - step)
		} else if waiting < step && reached {
			l.set(l.limit + step)
		}
	}
}

func (l *Limiter) set(limit float64) {
	l.limit = min(max(limit, float64(l.cfg.Min)), float64(l.cfg.Max))
}

// beginProbe lowers the limit for a window.
func (l *Limiter) beginProbe() {
	share := 0.5
	if l.settled {
		// Less than 1/(what is tolerated): else a limit that is too high would find a base
		// that bears it.
		share = max(0.7, 0.9/(tolerance+sure*math.Hypot(l.deviation, l.baseError)))
	} else if l.probedAt > 0 && l.limit < 1.2*l.probedAt {
		share = 0.55
	}
	l.probe = max(int(l.limit*share), l.cfg.Min)
}

// endProbe ends a window at the lower limit.
func (l *Limiter) endProbe(now time.Time) {
	if float64(l.window.dropped) > dropsMany*float64(l.window.n) {
		l.probe, l.settled, l.probeAt = 0, false, now // times that were cut off are no base
		return
	}
	mean, deviation := l.window.sum/float64(l.window.n), l.window.deviation()
	// By Little's law, throughput is what is in flight over the time that it takes.
	share := float64(l.probe) / math.Floor(l.limit)
	throughput := share * l.short / mean
	l.probe = 0
	switch {
	case share == 1 || throughput < 0.9 || mean > l.base || l.base == 0:
		l.settled = l.learn(mean, deviation)
	case !l.settled:
		// As much was done with so much fewer: even those were too many. Halfway, because
		// chance looks like that, too; if it is not, the next probe follows at once.
		l.base, l.baseError = (l.base+mean)/2, math.Hypot(l.baseError, deviation)/2
	case throughput > 0.97:
		l.settled = false // it looks as if; a deeper probe will tell
	default:
		l.learn(mean, deviation)
	}
	l.probedAt = l.limit
	l.probeAt = now
	if l.settled {
		l.probeAt = now.Add(probeEvery)
	}
}

// learn takes a mean time without waiting, known to the given fraction, into base, and
// tells whether it agrees with what was known.
func (l *Limiter) learn(mean, deviation float64) bool {
	if l.base == 0 || math.Abs(mean/l.base-1) > 0.03+3*math.Hypot(deviation, l.baseError) {
		l.base, l.baseError = mean, deviation
		return false
	}
	l.base += baseWeight * (mean - l.base)
	l.baseError = math.Hypot((1-baseWeight)*l.baseError, baseWeight*deviation)
	return true
}
