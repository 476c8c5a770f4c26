package hedging

import (
	"math"
	"time"
)

// core decides, for one call, what to launch, when to look again, and which
// answer to return. It implements the hedging of gRFC A6. It is a pure state
// machine: now comes in with each event, as the time since the call began;
// nothing in it reads a clock, starts a goroutine or knows gRPC, and the same
// events in the same order give the same steps. Its owner serialises the calls.
//
//	start ----> step{launch 1}
//	tick -----> the next attempt is due: step{launch 1}, or nothing yet
//	begin ----> the handler of a tied attempt has started: withdraw the others
//	end ------> success or fatal: step{winner k}; non-fatal: the next at once
//	unsent ---> the attempt had nowhere to go and was never launched
type core struct {
	// delay is the time between attempts; 0: all at once; negative: none by time. Of a
	// tied call it is the tie delay until a handler has started.
	delay time.Duration
	// deadline is the call's; noTime when it has none.
	deadline time.Duration
	// next is when an attempt is due by time; noTime when none is.
	next time.Duration
	// again is how long after a refusal for want of budget to ask once more. It
	// doubles with each refusal.
	again time.Duration

	// Small integers: a core is part of what every call allocates.
	max     int16 // attempts in all, the first included
	number  int16 // of the newest attempt
	sent    int16 // attempts launched and not unsent
	running int16 // attempts launched and not ended
	last    int16 // the attempt whose failure ended last; 0 before any has failed
	// pushed is set while next was named by the server: then it is worth waiting
	// for though nothing is running.
	pushed bool
	// owed is set when a failure found no attempt left to send, and an unsent one may
	// yet give its place back.
	owed   bool
	frozen bool // no further attempts, whatever happens
	over   bool
	// begun is set when the handler of a tied attempt has started, which happens once in
	// a call: an attempt sent later is a hedge or follows a failure.
	begun     bool
	withdrawn int8 // attempts launched and then cancelled for that reason
}

// noTime stands for a time that does not come.
const noTime = time.Duration(math.MaxInt64)

// step is what the owner has to do after an event.
type step struct {
	launch int16 // how many attempts to launch now, numbered up to core.number
	// withdraw says to cancel all attempts in flight but the one that has begun. They
	// are no longer core's: no end follows, but save if one has succeeded after all.
	withdraw bool
	wake     time.Duration // when to call tick; noTime: not at all
	winner   int16         // if not 0, return this attempt's result and cancel the others
}

// idle is the step of doing nothing.
var idle = step{wake: noTime}

// verdict is what a gate says of one more attempt.
type verdict uint8

const (
	send  verdict = iota
	later         // not now: there is no budget left; ask again
	never         // not in this call
)

// gate is asked before every attempt but the first. It takes the token when it
// says send. first is set when the attempt is due by time and asked for the first
// time: it may be told to wait while there are tokens, for the sake of those that
// have waited longer.
type gate interface {
	permit(now time.Duration, first bool) verdict
}

// class is what one attempt's answer means to the call.
type class uint8

const (
	success  class = iota
	fatal          // ends the call, as A6's fatal codes and the caller's own end do
	nonFatal       // a sibling may still succeed
)

// result is the end of one attempt.
type result struct {
	class class
	// stop and wait are the server's pushback: no further attempts, or the next
	// one after exactly this long. hasWait tells a pushback of 0 from none.
	stop    bool
	hasWait bool
	wait    time.Duration
}

// askAgain is the shortest time after which a hedge refused by the budget is
// asked for again; the delay itself is used when it is longer.
const askAgain = time.Millisecond

func (c *core) start(now time.Duration, g gate) step {
	c.number, c.sent, c.running = 1, 1, 1
	c.next = noTime
	s := step{launch: 1}
	switch {
	case c.delay < 0 || c.max <= 1:
	case c.delay == 0:
		// A6: a hedgingDelay that is absent or 0 sends all attempts at once.
		for c.more() && c.ask(now, true, g) {
			s.launch++
		}
	default:
		c.next = now + c.delay
	}
	s.wake = c.next
	return s
}

// tick is the passing of time.
func (c *core) tick(now time.Duration, g gate) step {
	if c.over || c.next == noTime {
		return idle
	}
	if now < c.next {
		return step{wake: c.next}
	}
	due := c.next
	c.next = noTime
	s := idle
	for c.more() && c.ask(now, c.again == 0 && c.running > 0, g) {
		s.launch++
		c.schedule(due)
		if c.delay != 0 {
			break
		}
	}
	if c.running == 0 {
		return c.finish(c.last)
	}
	s.wake = c.next
	return s
}

// end is the end of attempt k.
func (c *core) end(now time.Duration, k int16, r result, g gate) step {
	if c.over {
		return idle
	}
	c.running--
	if r.class != nonFatal {
		return c.finish(k)
	}
	c.last = k
	switch {
	case r.stop:
		// A6: "If the pushback says not to retry, no further hedged requests will
		// be sent." Those in flight go on.
		c.freeze()
	case r.hasWait && c.more():
		// A6: "Send next hedged request in n ms. Subsequent hedged requests will
		// resume at n + hedgingDelay."
		c.next, c.pushed = now+r.wait, true
		if c.next >= c.deadline {
			c.freeze() // never wait past the deadline
		} else if r.wait == 0 {
			return c.tick(now, g)
		}
	}
	if r.stop || r.hasWait {
		return c.rest()
	}
	return c.atOnce(now, g)
}

// begin is the start of the handler of a tied attempt: one still queued elsewhere could
// only repeat the work. It gives its place back, for another to be sent should the one
// that goes on fail. From now on hedges are for a handler that is slow; their delay, which
// may have changed, counts from here, since the wait until now says nothing of it.
func (c *core) begin(now, delay time.Duration) step {
	if c.over || c.begun {
		return step{wake: c.next}
	}
	c.begun, c.delay = true, delay
	n := c.running - 1
	c.running -= n
	c.sent -= n
	c.withdrawn += int8(n)
	if !c.pushed {
		c.schedule(now)
	}
	return step{withdraw: n > 0, wake: c.next}
}

// save is the success of an attempt that was withdrawn too late.
func (c *core) save(k int16) step {
	if c.over {
		return idle
	}
	return c.finish(k)
}

// unsent takes attempt k back: no endpoint was free for it, so it was never
// launched, it failed nobody, and no other is launched in its place.
func (c *core) unsent(now time.Duration, k int16, g gate) step {
	if c.over {
		return idle
	}
	c.running--
	c.sent--
	if k == c.number && k > 1 {
		c.number--
	}
	// Asking once more after the same delay would find the same endpoints taken;
	// a place becomes free when a sibling ends, and end asks then.
	if !c.pushed {
		c.next = noTime
	}
	if c.running > 0 {
		return step{wake: c.next}
	}
	switch {
	case c.last == 0:
		return c.finish(k)
	case c.owed:
		// The sibling that was in its way has failed in the meantime: its place is
		// free, and its failure is still owed an attempt.
		return c.atOnce(now, g)
	}
	return c.rest() // there is no backend for an attempt that waits for none
}

// atOnce sends the next attempt without waiting for its time. A6: "If a
// non-fatal status code is received from a hedged request, then the next hedged
// request in line is sent immediately, shortcutting its hedging delay."
func (c *core) atOnce(now time.Duration, g gate) step {
	if c.pushed {
		return c.rest() // the server named the time
	}
	c.owed = !c.frozen && c.sent >= c.max
	if c.more() && c.ask(now, false, g) {
		c.schedule(now)
		return step{launch: 1, wake: c.next}
	}
	return c.rest()
}

// rest is the step when nothing is launched: wait for those in flight or for the
// time that the server named, else the call has failed.
func (c *core) rest() step {
	if c.running == 0 && !(c.pushed && c.next != noTime) {
		return c.finish(c.last)
	}
	return step{wake: c.next}
}

// ask puts one more attempt to the gate and counts it if it may go.
func (c *core) ask(now time.Duration, first bool, g gate) bool {
	c.pushed = false
	switch g.permit(now, first) {
	case send:
		c.number++
		c.sent++
		c.running++
		return true
	case never:
		c.freeze()
	case later:
		// The budget refills with traffic. The calls that are still waiting by
		// then are the slowest ones, so the token does most good there.
		c.again = max(2*c.again, c.delay, askAgain)
		c.next = now + c.again
	}
	return false
}

// schedule sets the time of the attempt that follows one launched at t.
func (c *core) schedule(t time.Duration) {
	c.next = noTime
	if c.delay > 0 && c.more() {
		c.next = t + c.delay
	}
}

func (c *core) more() bool { return !c.frozen && c.sent < c.max }

func (c *core) freeze() {
	c.frozen, c.pushed = true, false
	c.next = noTime
}

func (c *core) finish(k int16) step {
	c.over = true
	c.next = noTime
	return step{wake: noTime, winner: k}
}
