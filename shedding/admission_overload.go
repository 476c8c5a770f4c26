package shedding

import "time"

// watch tells an overload by the wait of the oldest.
func (a *Admission) watch(now time.Time) {
	over := a.queue.Wait(now) - a.queue.cfg.Target
	if over > 0 {
		a.below = time.Time{}
		if a.above.IsZero() {
			a.above = now.Add(-over)
		}
		again := !a.ended.IsZero() && now.Sub(a.ended) < afterglow
		if after := now.Sub(a.above); !a.overloaded && (after >= interval || again && after >= interval/4) {
			a.overloaded = true
			a.flow.room = 0
			a.event(OverloadBegan, now, 0, a.queue.Len())
			if !again {
				// The server has been busy all the interval: what it did is what it can do.
				a.flow.roll(now)
			}
			a.plan(now)
		}
		return
	}
	a.above = time.Time{}
	if a.below.IsZero() {
		a.below = now
	}
	if !a.overloaded || now.Sub(a.below) < interval {
		return
	}
	a.below = now
	// A queue that is cut short is short, however much is refused.
	if a.cursor == 0 && a.flow.excess() < overAt {
		a.calm(now)
		return
	}
	// Whether the server can do more now is found out by letting in more. What it is known to do
	// stays as it is: a queue planned for what is only hoped for would be too long.
	a.flow.room = (1+a.flow.room)*moreRoom - 1
	a.plan(now)
}

func (a *Admission) calm(now time.Time) {
	if !a.overloaded {
		return
	}
	waiting := 0
	if a.queue != nil {
		waiting = a.queue.Len()
	}
	a.overloaded = false
	a.ended = now
	a.event(OverloadEnded, now, 0, waiting)
	a.plan(now)
}

// plan sets the cursor, and the length and the order of the queue.
func (a *Admission) plan(now time.Time) {
	if a.queue == nil {
		a.moveCursor(now, 0)
		return
	}
	p := plan{length: a.queue.cfg.MaxLength, bound: a.queue.cfg.MaxWait, fits: levels, together: true}
	if a.overloaded {
		p = a.flow.plan(a.queue.cfg)
	}
	a.length, a.fits = p.length, p.fits
	a.queue.Bound(p.bound, p.fits)
	a.queue.NewestFirst(p.newestFirst)
	a.queue.Together(p.together)
	a.moveCursor(now, p.cursor)
	a.shed(now, a.length, p.fits, QueueTimeout)
	a.shed(now, a.queue.cfg.MaxLength, levels, QueueFull)
}

func (a *Admission) moveCursor(now time.Time, to Level) {
	if from := a.cursor; from != to {
		a.cursor = to
		a.event(CursorMoved, now, int(from), int(to))
	}
}

// shed leaves so many in the queue, and all from the given level up.
func (a *Admission) shed(now time.Time, leave int, from Level, why Reason) {
	for a.queue.Len() > leave {
		w, ok := a.queue.Shed(from)
		if !ok {
			return
		}
		a.settle(now, w, a.refusal(why))
	}
}

// expected is the wait of one that comes now: those before it, and the one whose slot it
// is to have.
func (a *Admission) expected(level Level, flow uint64) time.Duration {
	rate := a.flow.capacity
	if a.flow.mean > 0 {
		// A server that had little to do can do more than it has done.
		rate = max(rate, float64(a.limiter.Limit())/a.flow.mean*float64(time.Second))
	}
	return forRequests(float64(a.queue.Ahead(level, flow)+1), rate)
}

func (a *Admission) refusal(why Reason) Decision {
	d := Decision{Reason: why}
	if why != Hopeless {
		d.RetryAfter = a.retryAfter()
	}
	return d
}

// retryAfter is an interval, the time in which the cursor moves, as many times as demand
// is more than the capacity: if all that are refused come again after it, that doubles the
// load at most.
func (a *Admission) retryAfter() time.Duration {
	return time.Duration(float64(interval) * min(max(a.flow.excess()+1, 1), 100))
}
