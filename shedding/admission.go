package shedding

import (
	"errors"
	"time"
)

// AdmissionConfig says how a server admits requests.
type AdmissionConfig struct {
	Limiter LimiterConfig

	// Queue says who may wait for a slot. Nil: nobody; at the limit all are refused,
	// whatever their class, because without waits there is no sign that the server is
	// overloaded, and nobody to be displaced.
	Queue *QueueConfig
}

// Validate reports every fault of the configuration, joined.
func (c AdmissionConfig) Validate() error {
	err := c.Limiter.Validate()
	if c.Queue != nil {
		err = errors.Join(err, c.Queue.Validate())
	}
	return err
}

// Admission decides which requests a server runs, and when. It is a [Limiter], a [Queue]
// for those who find no slot free, and a cursor over levels, [LevelOf], that follows
// demand and capacity while the server is overloaded (DAGOR, SoCC'18; Cinnamon, Uber
// 2023).
//
// Overload is told by the wait in the queue, never by the time that requests take: it has
// begun when the oldest has waited longer than Target for the whole of 100 ms. It has ended
// when that was not so for as long, demand being what can be done. A burst is not one: it
// is queued, and served in the order of arrival. For 1.6 s after its end a quarter of the time
// is enough for it to begin again, as CoDel goes on where it was when it has to drop within 16
// intervals (RFC 8289, section 5): a load that just fits is over the target now and then, and half of
// its longest waits were those of which nobody knew yet whether they were a burst.
//
// In an overload demand is counted by level, those refused included, and the cursor
// stands at the lowest level that is needed to use the server up: demand at it and above
// is at least 1 + m times the capacity, m in [0.05, 0.5] being what the queue needs to be
// never empty by chance. So a load that cannot be divided (all of one cohort) is never
// refused as a whole: what is too much of it is refused by the queue. That is cut to the
// length
//
//	n = s/(2 e) ln(1 + e/0.01), s = 1 + cv^2, e = demand above the cursor / capacity - 1
//
// and to no less than 1.6 x Target x capacity. It is the length at which a random walk with
// that drift and variance, reflected at 0 and n, loses 1% of its steps at 0 (Harrison,
// Brownian Motion and Stochastic Flow Systems, 1985): with a shorter one slots are idle, with
// a longer one all only wait. A load that just fits has n = s/(2 x 0.0225), which refuses
// 2.25% of it by chance. Nobody waits longer than 1.25 times what that length takes, and no
// longer than that if the cursor is at the bottom. All this is for the lanes that do not fit: those of which
// the demand, with all above them, is less than 0.92 of the capacity may fill the queue and
// wait as long as they can.
//
// When the queue has been short for 100 ms in an overload, a tenth more is let in than the server
// is known to do, and so on until the queue is not short, or nothing is refused any more. What it
// is known to do, by which queue and waits are planned, changes only by what it does.
//
// While the cursor is at the bottom, which is while the load fits or about fits, the two sheddable
// classes are served as one: all waiting falls on what is served last, and would be twice as long if
// that were half of the load.
//
// When e is more than m + 0.2, which is when the cursor cannot divide the load, the newest
// are served first. Not otherwise: of a load that just fits, the oldest would wait until the
// queue is empty once, and that takes so long that 10 to 20% run into their bound.
//
// The owner of an Admission holds a mutex around each call, has a timer that calls
// [Admission.Tick] at [Admission.NextWake], and after each call fetches
// [Admission.Settled] and publishes [Admission.Verdict]. No call blocks, reads a clock or
// allocates in the steady state; each costs O(log n) of the length of the queue, and of shards
// their number, and every
// 100 ms one costs a pass over 512 levels. Times must not go back; one that does counts as the
// latest.
type Admission struct {
	cfg      AdmissionConfig
	limiter  *Limiter
	queue    *Queue // nil: none
	spare    *Queue // one that was, empty: so that no ticket is ever given out twice
	inFlight int
	lasting  int       // of those in flight: for whom the limit is raised
	now      time.Time // the latest that was brought

	overloaded   bool
	above, below time.Time // since when the wait is over the target, or not; or zero
	ended        time.Time // when the last overload did; or zero
	length       int       // how many may wait now
	fits         Level     // a lane's: it and those above may be more than length
	cursor       Level
	flow         flow

	settled, settledBefore []Settlement
	events, eventsBefore   []Event
}

// NewAdmission returns an admission with nobody in it. All faults of cfg are reported
// together.
func NewAdmission(cfg AdmissionConfig) (*Admission, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	a := &Admission{cfg: cfg}
	a.limiter, _ = NewLimiter(cfg.Limiter)
	if cfg.Queue != nil {
		a.queue, _ = NewQueue(*cfg.Queue)
		a.plan(time.Time{})
	}
	return a, nil
}

// Reconfigure changes the configuration. Handlers run on; those who wait go on waiting, as
// far as the new bounds let them. A limiter of which only the bounds change keeps what it has
// found.
func (a *Admission) Reconfigure(now time.Time, cfg AdmissionConfig) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	now = a.begin(now)
	from := a.limiter.Limit()
	will := cfg.Limiter.withDefaults()
	if a.limiter.cfg.Algorithm == will.Algorithm && a.cfg.Limiter.Initial == cfg.Limiter.Initial && will.Algorithm != Static {
		a.limiter.reconfigure(now, will, a.busy())
	} else {
		a.limiter, _ = NewLimiter(cfg.Limiter)
		a.limiter.inherit(now, a.busy())
	}
	switch {
	case cfg.Queue == nil && a.queue != nil:
		a.shed(now, 0, levels, AtLimit)
		a.spare, a.queue = a.queue, nil
		a.calm(now)
	case cfg.Queue != nil && a.queue == nil:
		if a.queue = a.spare; a.queue == nil {
			a.queue, _ = NewQueue(*cfg.Queue)
		}
		a.flow = flow{start: now} // what came while nobody looked is of no use
		a.above, a.below = time.Time{}, time.Time{}
		fallthrough
	case cfg.Queue != nil:
		a.queue.configure(*cfg.Queue)
	}
	a.cfg = cfg
	a.limitMoved(now, from)
	a.plan(now)
	a.end(now)
	return nil
}

// Arrive decides about a request that arrives now.
func (a *Admission) Arrive(now time.Time, r Request) Decision {
	now = a.begin(now)
	level := LevelOf(r.Criticality, r.Extra, r.Cohort)
	a.flow.arrived(level, 1)
	d := a.decide(now, level, r)
	a.end(now)
	return d
}

func (a *Admission) decide(now time.Time, level Level, r Request) Decision {
	var until time.Time
	if !r.Deadline.IsZero() {
		if until = r.Deadline.Add(-r.Median); !until.After(now) {
			return a.refusal(Hopeless)
		}
	}
	if level < a.cursor {
		return a.refusal(BelowCursor)
	}
	a.flow.asked++
	if a.busy() < a.limiter.Limit() {
		// Nobody waits: whoever did has been let in when the slot became free.
		a.flow.foundFree++
		a.enter(now)
		return Decision{Verb: Admitted}
	}
	if a.queue == nil {
		return a.refusal(AtLimit)
	}
	if !until.IsZero() && now.Add(a.expected(level, r.Flow)).After(until) {
		return a.refusal(Hopeless)
	}
	if a.queue.Len() >= a.length {
		below := a.fits
		if a.queue.Full() {
			below = levels
		}
		if w, ok := a.queue.Displace(level, r.Flow, below); ok {
			a.settle(now, w, a.refusal(Displaced))
		} else if level < below {
			return a.refusal(QueueFull)
		}
	}
	ticket, ok := a.queue.Push(now, level, r.Flow, until, r.Owner)
	if !ok {
		return a.refusal(QueueFull)
	}
	return Decision{Verb: Queued, Ticket: ticket}
}

// Done tells that a handler has ended that had been admitted and has run for the given
// time. Call it exactly once for each.
func (a *Admission) Done(now time.Time, ran time.Duration, r Result) {
	now = a.begin(now)
	if a.inFlight > 0 {
		a.inFlight--
	}
	from := a.limiter.Limit()
	a.limiter.End(now, a.busy(), ran, r)
	a.limitMoved(now, from)
	a.flow.done(ran, r)
	a.end(now)
}

// Lasting tells that n more of those that run (fewer, if n is negative) are no load to speak
// of, such as streams that have been open for long. They are in flight until Done as before,
// and the limit is raised by their number.
func (a *Admission) Lasting(now time.Time, n int) {
	now = a.begin(now)
	a.lasting = max(0, a.lasting+n)
	a.end(now)
}

// busy is how many of those in flight the limit is for.
func (a *Admission) busy() int { return max(0, a.inFlight-a.lasting) }

// Leave tells that the client of one that waits has gone. It is not ok when the wait had
// already been settled: if it was admitted, a slot is to be given back by Done.
func (a *Admission) Leave(now time.Time, t Ticket) (ok bool) {
	now = a.begin(now)
	if a.queue != nil {
		_, ok = a.queue.Remove(t)
	}
	a.end(now)
	return ok
}

// Tick does what is due by now, as every other call does.
func (a *Admission) Tick(now time.Time) { a.end(a.begin(now)) }

// RefusedEarly tells of n requests of a level that were refused on the [Verdict] alone.
// Without it they are taken to have gone away, and the cursor comes down for them.
func (a *Admission) RefusedEarly(level Level, n int) {
	if n > 0 && level < levels {
		a.flow.arrived(level, n)
	}
}

// NextWake is when something will be due if nothing happens before. It is zero when
// nothing will.
func (a *Admission) NextWake() time.Time {
	if a.queue == nil {
		return time.Time{}
	}
	wake, _ := a.queue.NextEnd()
	if a.overloaded {
		// Requests that are refused on the verdict do not come by.
		due := a.flow.due()
		if !a.below.IsZero() {
			due = earlier(due, a.below.Add(interval))
		}
		wake = earlier(wake, due)
	}
	return wake
}

// earlier is the earlier of two times, of which zero is none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// Settled returns the waits that have ended since it was last called. The slice is good
// until the call after.
func (a *Admission) Settled() []Settlement {
	s := a.settled
	clear(a.settledBefore) // the owners in it are the collector's
	a.settled, a.settledBefore = a.settledBefore[:0], s
	return s
}

// Events returns the changes of state since it was last called, the first 64 of them. The
// slice is good until the call after.
func (a *Admission) Events() []Event {
	e := a.events
	a.events, a.eventsBefore = a.eventsBefore[:0], e
	return e
}

// Stats returns the state as of the latest call.
func (a *Admission) Stats() Stats {
	s := Stats{
		Limit: a.limiter.Limit() + min(a.lasting, a.inFlight), InFlight: a.inFlight, Cursor: a.cursor, Overloaded: a.overloaded,
		Demand: a.flow.demand, Capacity: a.flow.capacity,
	}
	if a.queue != nil {
		s.Queued, s.Wait = a.queue.Len(), a.queue.Wait(a.now)
	}
	return s
}

// Verdict returns what can be told of a request by its level alone.
func (a *Admission) Verdict() Verdict { return verdict(a.cursor, a.retryAfter()) }

// begin brings the state up to now.
func (a *Admission) begin(now time.Time) time.Time {
	if now.Before(a.now) {
		now = a.now
	}
	a.now = now
	from := a.limiter.Limit()
	if a.busy() >= from {
		a.limiter.Stuck(now, a.busy())
		a.limitMoved(now, from)
	}
	if a.queue == nil {
		return now
	}
	if a.limiter.Limit() > from {
		a.fill(now) // whoever waits goes before whoever comes now
	}
	a.watch(now)
	for {
		w, ok := a.queue.Expire(now)
		if !ok {
			break
		}
		a.settle(now, w, a.refusal(QueueTimeout))
	}
	if a.flow.start.IsZero() {
		a.flow.start = now
	}
	if !a.flow.due().After(now) {
		a.flow.roll(now)
		if a.overloaded {
			a.plan(now)
		}
	}
	return now
}

// end gives free slots to those who wait.
func (a *Admission) end(now time.Time) {
	if a.queue == nil {
		return
	}
	a.fill(now)
	a.watch(now)
}

// fill lets in those who wait for whom there is a slot.
func (a *Admission) fill(now time.Time) {
	for a.busy() < a.limiter.Limit() {
		w, ok := a.queue.Pop()
		if !ok {
			break
		}
		a.enter(now)
		a.settle(now, w, Decision{Verb: Admitted})
	}
}

func (a *Admission) limitMoved(now time.Time, from int) {
	if to := a.limiter.Limit(); to != from {
		if len(a.events) < maxEvents {
			a.events = append(a.events, Event{Kind: LimitMoved, At: now, From: from, To: to, Probe: a.limiter.probe > 0})
		}
	}
}

func (a *Admission) enter(now time.Time) {
	a.inFlight++
	from := a.limiter.Limit()
	a.limiter.Begin(now, a.busy())
	a.limitMoved(now, from) // it may have given up a probe
}

func (a *Admission) settle(now time.Time, w Waiter, d Decision) {
	d.Ticket = w.Ticket
	a.settled = append(a.settled, Settlement{Decision: d, Level: w.Level, Wait: now.Sub(w.Arrived), Owner: w.Owner})
}

func (a *Admission) event(kind EventKind, now time.Time, from, to int) {
	if len(a.events) < maxEvents {
		a.events = append(a.events, Event{Kind: kind, At: now, From: from, To: to})
	}
}
