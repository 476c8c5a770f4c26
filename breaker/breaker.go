package breaker

import (
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"
	"google.golang.org/grpc/codes"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// ErrOpen is what errors.Is finds in the error of a call that a [Breaker] refused.
var ErrOpen = errors.New("breaker: open")

const (
	// closeAfter is how many probes must succeed before the breaker closes. A server
	// that fails every other call, which is what opens a breaker by default, passes five
	// in a row once in 32 times; and with the ramp it is three round trips.
	closeAfter = 5
	// maxDoublings caps the open time at 8 x OpenFor: by default 40 s, about as long as
	// a restart.
	maxDoublings = 3
	// jitter is the most that is added to an open time, as a fraction of it.
	jitter = 0.25
	// calmWindows is for how many windows a breaker must have stayed closed to forget
	// that it was open. What opened it takes up to one window to show again.
	calmWindows = 2
)

// Breaker is a circuit breaker: closed it lets all calls pass and counts how they end;
// open it refuses all; half-open it lets a few pass as probes.
//
//   - It opens at a failure for which failures/calls >= FailureRatio over the calls that
//     ended in the last Window, if there are at least MinimumCalls of them; likewise at a
//     slow call and SlowCallRatio.
//   - It stays open for OpenFor x 2^n x U(1, 1.25), where n <= 3 is how often it has opened
//     again since it was last closed for two whole Windows. A breaker that flaps backs off, too.
//   - Half-open, as many probes may be out at a time as have succeeded, and one. The fifth
//     success closes it; one failure, or one slow probe, opens it again. A probe that has not
//     ended within OpenFor has lost its place to another, and its end is dropped; so
//     a lost probe delays, and never wedges.
//
// A call that was let in before the latest change of state says nothing about the present,
// and does not count.
//
// The states and their counts are gobreaker's, fed with outcomes after the fact: every
// request that it sees ends at once, so none can hang in its half-open state. It fixes its
// open time at construction, so there is a new one for each opening. It reads the clock
// itself, and so does a Breaker: test it in a testing/synctest bubble.
//
// A Breaker is made by [New] and is safe for concurrent use. Closed, [Breaker.Admit] takes
// no lock, and a call costs no allocation.
type Breaker struct {
	cfg    Config
	start  time.Time // all times below are since then
	random func() float64

	// phase is replaced at each change of state. An atomic because every call reads it,
	// and a pointer because it tells one closed time from the next.
	phase atomic.Pointer[phase]

	mu       sync.Mutex // guards what follows and serialises the writers of phase
	openings int        // since it was last calm
	serial   uint64     // of the latest probe
	// probes are the places of those that are out. What is left in them when the breaker
	// opens has run out before the next probe: no open time is shorter than a lease.
	probes [closeAfter]lease
	// changes wait to be told; telling is set while somebody does.
	changes []Change
	telling bool
}

// phase is one stay in a state. It does not change, but for what its counters count.
type phase struct {
	b     *Breaker
	state State
	since time.Duration
	until time.Duration // of an open one
	calls *counter
	slow  *counter // of a closed one, where slow calls count
}

// New returns a closed Breaker. A fault of cfg is an error that names the field, its
// value and its bound.
func New(cfg Config) (*Breaker, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return build(cfg), nil
}

// build is New for a configuration without a fault.
func build(cfg Config) *Breaker {
	b := &Breaker{cfg: cfg.withDefaults(), start: time.Now(), random: rand.Float64}
	b.phase.Store(b.closed(0, newCounter(&b.cfg, b.cfg.FailureRatio, b.cfg.OpenFor)))
	return b
}

// now is half the price of time.Now: it reads the monotonic clock alone.
func (b *Breaker) now() time.Duration { return time.Since(b.start) }

// State returns the state. An open breaker whose time is over is half-open: the next
// call will be a probe.
func (b *Breaker) State() State {
	ph := b.phase.Load()
	if ph.state == Open && b.now() >= ph.until {
		return HalfOpen
	}
	return ph.state
}

// Admit lets a call in, or returns the error to refuse it with, for which errors.Is(err,
// [ErrOpen]) holds. End the permit of a call that was let in.
func (b *Breaker) Admit() (Permit, error) {
	ph := b.phase.Load()
	if ph.state == Closed {
		return ph.permit(), nil
	}
	// Nor is there a lock where all are refused.
	if now := b.now(); ph.state == Open && now < ph.until {
		return Permit{}, b.refusal(ph.until - now)
	}
	p, err := b.admit()
	if p.probe != 0 {
		p.began = b.now() // not before the callback has returned
	}
	return p, err
}

// admit is Admit where a probe may be due.
func (b *Breaker) admit() (Permit, error) {
	b.mu.Lock()
	defer b.unlock()
	ph, now := b.phase.Load(), b.now()
	switch ph.state {
	case Closed:
		return ph.permit(), nil
	case Open:
		if now < ph.until {
			return Permit{}, b.refusal(ph.until - now)
		}
		ph = b.halfOpen(ph, now)
	}
	serial, ok := b.lend(now, 1+ph.calls.successes())
	if !ok {
		// The next probe may go as soon as one that is out ends. Nobody knows when.
		return Permit{}, b.refusal(0)
	}
	return Permit{phase: ph, probe: serial}, nil
}

// permit is that of a call in a closed phase. The clock is read only if somebody will ask.
func (ph *phase) permit() Permit {
	p := Permit{phase: ph}
	if ph.slow != nil {
		p.began = ph.b.now()
	}
	return p
}

func (b *Breaker) refusal(after time.Duration) error {
	return &outcome.Refusal{Cause: ErrOpen, Code: codes.Unavailable, Reason: "BREAKER_OPEN", Method: b.cfg.Method, After: after}
}

// trip opens the breaker because the counters of a closed phase say so.
func (b *Breaker) trip(ph *phase) {
	b.mu.Lock()
	defer b.unlock()
	if b.phase.Load() != ph {
		return // somebody else was faster
	}
	if n, tripped := ph.calls.tripped(); tripped {
		b.open(ph, TooManyFailures, n)
	} else if n, tripped := ph.slow.tripped(); tripped {
		b.open(ph, TooManySlow, n)
	}
}

// probed ends a probe. A probe that has lost its lease, or that has ended before, is
// dropped.
func (b *Breaker) probed(ph *phase, serial uint64, end outcome.Outcome, slow bool) {
	b.mu.Lock()
	defer b.unlock()
	if b.phase.Load() != ph || !b.giveBack(serial, b.now()) {
		return
	}
	switch {
	case end == outcome.Ignored:
	case end == outcome.Failure:
		b.open(ph, ProbeFailed, gobreaker.Counts{})
	case slow:
		b.open(ph, ProbeSlow, gobreaker.Counts{})
	default:
		ph.calls.record(true)
		if ph.calls.state() == gobreaker.StateClosed {
			now := b.now()
			b.enter(ph, b.closed(now, ph.calls), Change{At: b.start.Add(now), Reason: ProbesSucceeded})
		}
	}
}

// open moves to an open phase. b.mu is held.
func (b *Breaker) open(from *phase, why Reason, n gobreaker.Counts) {
	if from.state == Closed && b.now()-from.since >= calmWindows*b.cfg.Window {
		b.openings = 0
	}
	wait := b.cfg.OpenFor << min(b.openings, maxDoublings)
	wait += time.Duration(jitter * b.random() * float64(wait))
	b.openings++
	// gobreaker is half-open only after, not at, the end of its timeout, and its clock is
	// read before ours: so it always is when we say so.
	calls := newCounter(&b.cfg, b.cfg.FailureRatio, wait-1)
	calls.open()
	now := b.now()
	b.enter(from, &phase{b: b, state: Open, since: now, until: now + wait, calls: calls}, Change{
		At: b.start.Add(now), Reason: why, Calls: int(n.TotalSuccesses + n.TotalFailures), Bad: int(n.TotalFailures),
		Next: b.start.Add(now + wait),
	})
}

// halfOpen moves to a half-open phase. b.mu is held.
func (b *Breaker) halfOpen(from *phase, now time.Duration) *phase {
	to := &phase{b: b, state: HalfOpen, since: now, calls: from.calls}
	b.enter(from, to, Change{At: b.start.Add(now), Reason: ProbeDue})
	return to
}

// closed is a closed phase that counts with calls.
func (b *Breaker) closed(now time.Duration, calls *counter) *phase {
	ph := &phase{b: b, state: Closed, since: now, calls: calls}
	if b.cfg.SlowCallDuration > 0 {
		ph.slow = newCounter(&b.cfg, b.cfg.SlowCallRatio, b.cfg.OpenFor)
	}
	return ph
}

// enter makes a change, and queues it to be told. b.mu is held.
func (b *Breaker) enter(from, to *phase, c Change) {
	b.phase.Store(to)
	if b.cfg.OnStateChange == nil {
		return
	}
	c.Method, c.From, c.To = b.cfg.Method, from.state, to.state
	b.changes = append(b.changes, c)
}

// unlock unlocks b.mu, and tells the changes that were made under it: now, when no lock
// is held any more. While another goroutine is telling, that one goes on with ours, or
// they would come out of order.
func (b *Breaker) unlock() {
	if len(b.changes) == 0 || b.telling {
		b.mu.Unlock()
		return
	}
	b.telling = true
	// Deferred, for the callback may panic; what is left is told after the next change.
	defer func() {
		b.telling = false
		b.mu.Unlock()
	}()
	for len(b.changes) > 0 {
		c := b.changes[0]
		b.changes = b.changes[1:]
		b.tell(c)
	}
}

func (b *Breaker) tell(c Change) {
	b.mu.Unlock()
	defer b.mu.Lock()
	b.cfg.OnStateChange(c)
}
