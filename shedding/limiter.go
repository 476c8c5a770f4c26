package shedding

import "time"

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
	// Untimed is one that ran to its end, but its time is the client's as much as the
	// server's: a stream of which the client sends messages.
	Untimed
	// UntimedDrop is such a one that did not get its work done in time.
	UntimedDrop
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
// At the start the mean at the initial limit is all that is known. L doubles each window while
// it is reached and times stay that; if it has doubled, they are base, for they were the same at
// twice as much. If times rise at once, L goes back and the first probe tells.
//
// Two things bias a mean, and are avoided: a window does not end as soon as its own samples
// are alike, and after each move nothing counts until what was in flight before is out.
//
// While less than half of L is in flight, L stays, whatever the times: an idle server
// does not know what it can bear. The means of such windows are base for free. Otherwise L
// goes by those during whom at least 0.9 L were in flight, if they are the fewer: at 0.9
// of what the server can do L is reached now and then, and the mean of all says that there is
// room. L grows only when the limit has been reached.
//
// A limit at which nothing ends is no limit: handlers that hang, or wait for something else,
// would keep it as it is for ever. When it has been reached and nobody has begun or ended for
// twice the usual time, and at least 1 s, a probe is given up, or L grows by one: what hangs is
// then left out of what later probes lower. And where nothing ends but [Untimed], L grows by
// a tenth a second while it is reached, and falls when more than a tenth of them are [UntimedDrop].
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
	// first is the mean at the initial limit, while base is not known, and doubled that at twice
	// as much it was the same.
	first, firstError float64
	doubled           bool
	settled           bool // the last probe found the base that was known
	probe             int  // the limit during a probe, else 0
	probeAt           time.Time
	probedAt          float64 // L when base was last measured

	// draining is while more are in flight than a limit that was lowered. After that, and
	// after any move, nothing counts until opens: what ends before has waited inside with
	// more, or fewer, than the limit.
	draining bool
	opens    time.Time
	window   window

	filled  time.Time // when the limit was last reached, or nearly so
	moved   time.Time // when somebody last began or ended
	hanging int       // of those in flight: as many as were when a probe was given up, or fewer
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
	dropsLate    = 2 // times base: the handler itself was slow

	nearly    = 0.9 // of the limit: it is as good as reached
	untimedUp = 1.1
	// hangsAfter is the least, and hangsLate the most, for which nothing may move at the limit.
	hangsAfter = time.Second
	hangsLate  = 10 * time.Second
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

// inherit begins with so many in flight that another limiter has let in.
func (l *Limiter) inherit(now time.Time, inFlight int) {
	l.moved = now
	l.draining = inFlight > l.Limit()
	l.reopen(now, inFlight)
}

// reconfigure changes the bounds, and keeps what was found. A probe is given up: it is of
// the old bounds.
func (l *Limiter) reconfigure(now time.Time, cfg LimiterConfig, inFlight int) {
	l.cfg = cfg
	l.probe = 0
	l.set(l.limit)
	l.inherit(now, inFlight)
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
	l.moved = now
	if l.window.start.IsZero() {
		l.window.start = now
	}
	if l.probe > 0 && now.Sub(l.window.start) > 2*l.patience() {
		// There were too few calls for it. It would be the limit of whoever comes now.
		l.giveUpProbe(now)
		l.draining, l.opens = false, now
		l.reopen(now, inFlight)
	}
	l.window.peak = max(l.window.peak, inFlight)
	if l.full(inFlight) {
		l.filled = now
	}
}

// Stuck tells that the limit is reached, by inFlight handlers, and that somebody would like
// to begin. Call it then at any time, and look at the limit again.
func (l *Limiter) Stuck(now time.Time, inFlight int) {
	switch {
	case l.cfg.Algorithm == Static || l.moved.IsZero() || now.Sub(l.moved) < l.patience():
		return
	case l.probe > 0:
		l.hanging = inFlight
		l.giveUpProbe(now)
	default:
		l.set(l.limit + 1)
	}
	l.moved = now
	l.draining, l.opens = false, now
	l.reopen(now, inFlight)
}

// patience is for how long nothing moves before it is odd.
func (l *Limiter) patience() time.Duration {
	return min(max(time.Duration(2*max(l.base, l.short)), hangsAfter), hangsLate)
}

// giveUpProbe ends a probe that nothing can be learnt from.
func (l *Limiter) giveUpProbe(now time.Time) {
	if l.base == 0 {
		l.base, l.baseError = l.short, l.deviation // better than a probe after every window
	}
	l.probe = 0
	l.probeAt = now.Add(probeEvery)
}

// End tells that a handler has ended that ran for the given time; inFlight does not count
// it any more. Call it once for each Begin. The limit may then be another.
func (l *Limiter) End(now time.Time, inFlight int, ran time.Duration, r Result) {
	if l.cfg.Algorithm == Static {
		return
	}
	l.moved = now
	l.hanging = min(l.hanging, inFlight)
	w := &l.window
	if l.draining {
		if inFlight > l.Limit() {
			return
		}
		l.draining = false
		l.opens = now.Add(l.settling())
	}
	if now.Before(l.opens) {
		l.reopen(l.opens, inFlight)
		return
	}
	switch r {
	case Ignored:
		return
	case Untimed, UntimedDrop:
		w.untimed++
		if r == UntimedDrop {
			w.dropped++
		}
		l.endUntimed(now, inFlight)
		return
	}
	t := max(float64(ran), 1) // a clock that stands still must not divide by 0
	if r == Dropped && t > dropsLate*l.base {
		// One that had little time left when it came out of the queue says nothing of the limit:
		// at a limit that is too low they are many, and would lower it further.
		w.dropped++
	}
	w.all.add(t)
	if l.full(inFlight + 1) {
		l.filled = now
	}
	if l.filled.Add(ran).After(now) {
		w.near.add(t)
	}
	if took := now.Sub(w.start); w.all.n < windowLeast || took < windowMin || w.all.n < l.enough() && took < windowMax {
		return
	}
	l.spread += spreadWeight * (w.all.spread() - l.spread)
	before := l.Limit()
	if l.probe > 0 {
		l.endProbe(now)
	} else {
		l.move(now)
	}
	if after := l.Limit(); after != before {
		l.draining = inFlight > after
		l.opens = now.Add(l.settling())
	}
	l.reopen(now, inFlight)
}

// endUntimed ends a window in which there was nothing to be timed.
func (l *Limiter) endUntimed(now time.Time, inFlight int) {
	w := &l.window
	took := now.Sub(w.start)
	switch {
	case w.untimed < windowLeast || took < windowMax || w.all.n > 0 && took < hangsLate:
		return // of the few that are timed there may be enough yet
	case l.probe > 0 || w.all.n > 0:
	case w.drops() > dropsMany:
		l.set(l.limit * dropsFactor)
	case w.dropped == 0 && w.peak >= int(l.limit):
		l.set(l.limit * untimedUp)
	}
	l.reopen(now, inFlight)
}
