package breaker

import (
	"io"
	"time"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// Permit is a call that a [Breaker] let in. End it once, by one of its methods: a second
// end of the same Permit is nothing. It is for one goroutine at a time. Move it, but do not
// end a copy beside it: while the breaker is closed that would count twice. (Half-open
// it would not: the breaker knows its probes.) One that is never ended counts for nothing.
// The zero Permit counts for nothing, too.
type Permit struct {
	phase *phase // nil once it has ended
	began time.Duration
	probe uint64 // the serial number of a probe, from 1; 0 is none
}

// Done ends a call that returned err, as the package documentation says what counts. It
// is for calls by gRPC: an error without a status is a failure.
func (p *Permit) Done(err error) { p.end(outcomeOf(err), true) }

// DoneStream is [Permit.Done] for a stream: io.EOF is its success. How long it lived is no
// latency, so it is never slow.
func (p *Permit) DoneStream(err error) {
	if err == io.EOF {
		err = nil
	}
	p.end(outcomeOf(err), false)
}

// outcomeOf is what a call's error says about the method. That its server is overloaded is
// for the throttle to heed: a breaker would refuse those that it could serve, too.
func outcomeOf(err error) outcome.Outcome {
	if outcome.Overloaded(err) {
		return outcome.Ignored
	}
	return outcome.Of(err)
}

// Success ends a call that the server answered.
func (p *Permit) Success() { p.end(outcome.Success, true) }

// Failure ends a call that the server, or the way to it, failed.
func (p *Permit) Failure() { p.end(outcome.Failure, true) }

// Ignore ends a call of which nobody knows what it says about the server. A probe gives
// its place to another at once.
func (p *Permit) Ignore() { p.end(outcome.Ignored, false) }

// Probe reports whether the call is a probe of a half-open breaker, and has not ended: it
// has OpenFor to do so. A stream that may live longer should be ended as a success
// with its first message, which proves what there is to prove.
func (p *Permit) Probe() bool { return p.phase != nil && p.probe != 0 }

// end counts the call; timed is set if its duration is a latency.
func (p *Permit) end(how outcome.Outcome, timed bool) {
	ph := p.phase
	if ph == nil {
		return
	}
	p.phase = nil
	b := ph.b
	if p.probe != 0 {
		limit := b.cfg.SlowCallDuration
		b.probed(ph, p.probe, how, timed && limit > 0 && b.now()-p.began > limit)
		return
	}
	if how == outcome.Ignored || b.phase.Load() != ph {
		return
	}
	ph.calls.record(how == outcome.Success)
	if timed && ph.slow != nil {
		ph.slow.record(b.now()-p.began <= b.cfg.SlowCallDuration)
	}
	// Whoever comes next after a counter tripped opens the breaker; it need not be the one
	// who made it trip.
	if _, tripped := ph.calls.tripped(); tripped {
		b.trip(ph)
	} else if _, tripped := ph.slow.tripped(); tripped {
		b.trip(ph)
	}
}

// lease is the place of a probe that is out.
type lease struct {
	serial uint64 // 0: free
	until  time.Duration
}

// lend gives a place to a probe, if fewer than limit are out, which is at most as many as
// there are places. b.mu is held.
func (b *Breaker) lend(now time.Duration, limit int) (serial uint64, ok bool) {
	free, out := 0, 0
	for i, l := range b.probes {
		if l.serial == 0 || now >= l.until {
			free = i
		} else {
			out++
		}
	}
	if out >= limit {
		return 0, false
	}
	b.serial++
	b.probes[free] = lease{serial: b.serial, until: now + b.cfg.OpenFor}
	return b.serial, true
}

// giveBack frees the place of a probe. It reports false if the probe had none any more.
// b.mu is held.
func (b *Breaker) giveBack(serial uint64, now time.Duration) bool {
	for i, l := range b.probes {
		if l.serial == serial {
			b.probes[i] = lease{}
			return now < l.until
		}
	}
	return false
}
