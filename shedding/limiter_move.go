package shedding

import (
	"math"
	"time"
)

// move ends a window at the limit.
func (l *Limiter) move(now time.Time) {
	w := &l.window
	l.short, l.deviation = w.all.mean(), w.all.deviation()
	drops := w.drops()
	switch floor := math.Floor(l.limit); {
	case l.cfg.Algorithm == AIMD:
		if drops > dropsSome {
			l.set(l.limit * 0.9)
		} else if w.peak >= int(floor) {
			l.set(l.limit + max(1, l.limit/20))
		}
		return
	case l.base == 0 && l.first > 0 && !l.doubled && w.peak < int(floor):
		// The load has gone before it was seen what so many do to the times.
		l.set(l.limit / 2)
		l.first = 0
		return
	case 2*w.peak < int(floor):
		if drops <= dropsMany {
			l.learn(l.short, l.deviation)
			l.probedAt = l.limit
			l.probeAt = now.Add(probeEvery)
		}
		return
	case drops > dropsMany:
		// Times that were cut off say nothing about how long they would have been.
		l.rushing = false
		l.set(floor * dropsFactor)
	case l.base == 0 && l.rushing:
		if !l.rush(floor) {
			return
		}
		l.steer(floor)
		l.probedAt = l.limit
		l.probeAt = now.Add(probeEvery)
	case l.base == 0:
		l.beginProbe()
		return
	default:
		l.steer(floor)
	}
	if !l.probeAt.After(now) || l.limit < 0.7*l.probedAt {
		l.beginProbe()
	}
}

// rush doubles the limit at the start, while the times at the lowest limit are all that is known,
// until times change or it is not reached any more. Times that did not rise as it doubled, of a
// load that has room then, are base, which it tells. If they do rise, L goes back and a probe
// tells: even the first limit may have been too high.
func (l *Limiter) rush(floor float64) (known bool) {
	w := &l.window
	seen := &w.all
	if l.first > 0 && w.peak >= int(floor) && 2*w.near.n < w.all.n {
		if seen = &w.near; seen.n < windowLeast {
			return false // too few have seen it
		}
	}
	alike := l.first == 0
	if !alike {
		// Times that fell with twice as many say that the load has, and that the first had waited.
		ratio, most := seen.mean()/l.first, tolerance+sure*math.Hypot(seen.deviation(), l.firstError)
		alike = ratio <= most && ratio >= 1/most
	}
	switch {
	case alike && w.peak >= int(floor):
		if l.first == 0 {
			l.first, l.firstError = l.short, l.deviation
		} else {
			l.doubled = true
		}
		l.set(l.limit * 2)
		return false
	case alike && l.first > 0:
		l.learn(l.first, l.firstError)
		l.settled = true
		return true
	}
	if l.first > 0 {
		l.set(l.limit / 2)
		l.rushing = false
	}
	l.beginProbe()
	return false
}

// steer moves the limit by the times of the window. A limit that has not been reached does
// not grow.
func (l *Limiter) steer(floor float64) {
	w := &l.window
	reached := w.peak >= int(floor)
	// All was faster than it ever is without waiting: it is another server now.
	if l.short < l.base*(0.9-3*l.deviation) {
		l.base, l.baseError = l.short, l.deviation
	}
	seen, chance := &w.all, float64(likely)
	if 2*w.near.n < w.all.n {
		// Most have seen a server with room. Of the few who have not, a growth by chance would
		// not be taken back soon.
		if seen, chance = &w.near, 0; seen.n < windowLeast {
			return
		}
	}
	short := seen.mean()
	deviation := math.Hypot(seen.deviation(), l.baseError)
	g := (tolerance + sure*deviation) * l.base / short
	if g < 1 {
		l.rushing = false
	} else if (tolerance+chance*deviation)*l.base < short {
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
		waiting := floor * (1 - l.base*(1+sure*deviation)/short)
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
	// What hangs cannot be told to go: it is no part of what is lowered.
	hanging := min(float64(l.hanging), l.limit)
	l.probe = max(int(hanging+(l.limit-hanging)*share), min(l.hanging+1, int(l.limit)), l.cfg.Min)
}

// endProbe ends a window at the lower limit.
func (l *Limiter) endProbe(now time.Time) {
	w := &l.window
	if w.drops() > dropsMany {
		l.probe, l.settled, l.probeAt = 0, false, now // times that were cut off are no base
		return
	}
	mean, deviation := w.all.mean(), w.all.deviation()
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
