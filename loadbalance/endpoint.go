package loadbalance

import (
	"math"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// memory is how many attempts an estimate rests on when they follow each
	// other closely. With 20, one straggler of 50 ms kept an endpoint from its
	// share for 650 ms at 1000 calls/s; with 50 and with 100 for 100 ms. The fewer,
	// the sooner a change is known. See docs/adr/0004.
	memory = 50

	// patience is how long, in decay times, an endpoint that gets no attempts is
	// judged by what was known of it. Then it is worth one probe, however slow it
	// was: the decayed cost alone would keep one that took 500 times as long as
	// its peers out for 6 decay times.
	patience = 2

	// Of an endpoint where attempts end more often than 2,000 times a second only one in 2, 4, ...
	// 2^maxSparse is measured, so that 500 to 2,000 of a second are: 50 of them are still no more
	// than 100 ms. It is looked at every 64 of those that are measured, or after 128 ms.
	maxSparse            = 8
	round                = 64
	roundFast, roundSlow = 32 * time.Millisecond, 128 * time.Millisecond
	// stale is how old the newest end may be for an attempt to go unmeasured.
	stale = 10 * time.Millisecond

	// pending, in nanoseconds, is the cost of an endpoint that has yet to give its
	// first answer while an attempt is on its way there, or has just failed. It is
	// above any latency, and finite so that in-flight still tells two of them
	// apart.
	pending = 1e18
)

// verdict is what the end of an attempt says about its endpoint.
type verdict uint8

const (
	// answered: the elapsed time is a latency.
	answered verdict = iota
	// cut: cancelled by the caller or superseded by a sibling, so the latency is
	// at least the elapsed time.
	cut
	// failed: the work was not done, however long that took.
	failed
	// superseded is a cut by a sibling's answer. Unlike a caller, who leaves for reasons
	// of its own, it says that others were faster.
	superseded
)

// known is how much is known of an endpoint.
type known = uint32

const (
	nothing    known = iota // no attempt has ended yet
	unanswered              // attempts have ended, none with an answer
	measured
)

// An endpoint is what is known of one endpoint: how many attempts are in flight
// there and the latency to expect. It is the deterministic core of the package:
// the time is an argument, a duration since an origin of the caller's.
//
// The expected latency is
//
//	exposure / max(answers, 1)
//
// where exposure is the total time for which attempts were out, whether or not
// they came to an end of their own, and answers is how many did, both fading
// (below). For exponential service times that quotient is the maximum-likelihood
// estimate of the mean under right-censoring, and it is what an endpoint of a
// hedging client needs. There, an attempt at a replica ten times slower than its
// peers is cancelled when its hedge answers, after 6 ms say of the 20 it would
// have taken. Dropping such a sample leaves the slow replica unmeasured; taking
// 6 ms for its latency makes it look nearly healthy; and so does using the 6 ms
// as a floor. Here each one adds 6 ms of exposure and no answer, so the estimate
// grows with every hedge that had to be sent. A cancellation can never lower it,
// and one that came at once changes nothing, so that callers who give up starve
// nobody.
//
// A failure is no censoring: an endpoint that fails at once would look fast. It
// counts as an exposure of at least the mean, and no answer: a replica that
// fails half of its calls looks twice as slow, which is what it costs someone
// who tries again.
//
// The divisor is at least 1 so that a single unlucky probe does not condemn an
// endpoint without answers, while many do.
//
// Both sums fade with each attempt, by 1/memory, and with time: after a silence
// dt the past weighs at most keep/(1-keep), keep = (1-1/memory) e^(-dt/tau), where
// the present weighs 1. So after a silence of tau the newest attempt dominates.
// This is the time-aware weight of Finagle's peak EWMA; the peak is not taken,
// because on a heavy tail every endpoint's peak is its last straggler, and that
// hides a replica twice as slow. See docs/adr/0004 for the figures.
//
// The zero value is an endpoint of which nothing is known. All methods are safe
// for concurrent use; load takes no lock.
type endpoint struct {
	// What picks read stands together, on one cache line as a rule: with 1,000 endpoints each is
	// fetched from afar.

	// flights counts unary attempts in flight in its low half and streams in its
	// high one. An atomic because picks and ends are concurrent; one word, so that
	// a pick reads both at once.
	flights atomic.Int64
	// What load reads: atomics because picks must not wait for record. A pick that
	// falls between two of the stores mixes an old estimate with a new one, which
	// costs nothing.
	cost    atomic.Uint64 // expected latency in nanoseconds, a float64
	last    atomic.Int64  // when the last attempt ended
	silence atomic.Int64  // for how long after last the cost holds
	known   atomic.Uint32
	sparse  atomic.Uint32 // only one in 2^sparse attempts is measured
	// crowd is where begin and release count too, or nil.
	crowd *crowd
	// key names the endpoint: see keyOf.
	key string

	// When the next probe of an ejected endpoint is due, and how long after that another:
	// atomics because picks take it.
	probe, gap atomic.Int64

	mu sync.Mutex // guards what follows, and orders the stores above
	// weight is the faded number of attempts, exposure and answers as above; failures is
	// how many failed; left is how many the caller gave up, and given their exposure.
	weight, exposure, answers, failures, left, given float64
	trial                                            *trial // nil unless the endpoint is ejected
	// rounds counts attempts measured in this round, and began is when it did.
	rounds float64
	began  time.Duration

	_ [32]byte // to 192 bytes, which are allocated at the start of a cache line
}

// A trial is how an ejected endpoint does with its probes.
type trial struct {
	limit time.Duration // the latency of a good one
	good  int           // in a row
	took  time.Duration // by those
	bad   bool          // any of them, ever
	// gap is the time from one probe to the next: it doubles with each bad one, up to most.
	gap, least, most time.Duration
}

// A crowd is the number of attempts in flight at many endpoints. It stands on a cache
// line of its own (two, as processors fetch them in pairs), so that its writers
// disturb no reader of anything else.
type crowd struct {
	_ [128]byte
	n atomic.Int64
	_ [120]byte
}

const oneStream = 1 << 32

// begin counts an attempt that is sent to the endpoint.
func (e *endpoint) begin(streaming bool) {
	if streaming {
		e.flights.Add(oneStream)
	} else {
		e.flights.Add(1)
	}
	if e.crowd != nil {
		e.crowd.n.Add(1)
	}
}

// beginWithin is begin if fewer than full attempts are in flight; it reports whether.
func (e *endpoint) beginWithin(streaming bool, full int64) bool {
	one := int64(1)
	if streaming {
		one = oneStream
	}
	for {
		f := e.flights.Load()
		if f&(oneStream-1)+f>>32 >= full {
			return false
		}
		if e.flights.CompareAndSwap(f, f+one) {
			break
		}
	}
	if e.crowd != nil {
		e.crowd.n.Add(1)
	}
	return true
}

// release takes back what begin counted.
func (e *endpoint) release(streaming bool) {
	if streaming {
		e.flights.Add(-oneStream)
	} else {
		e.flights.Add(-1)
	}
	if e.crowd != nil {
		e.crowd.n.Add(-1)
	}
}

// inFlight returns how many attempts are in flight.
func (e *endpoint) inFlight() (unary, streams int64) {
	f := e.flights.Load()
	return f & (oneStream - 1), f >> 32
}

// sampling returns k where of the attempts sent now only one in 2^k is to be measured, as
// there are many and it is not known beforehand which of them say something.
func (e *endpoint) sampling(now time.Duration) uint32 {
	if k := e.sparse.Load(); k > 0 && now-time.Duration(e.last.Load()) < stale {
		return k
	}
	return 0
}

// passes reports whether, where one in 2^k is taken, an attempt with such random bits is
// passed over.
func passes(bits uint64, k uint32) bool { return bits>>40&(1<<k-1) != 0 }

// unknown is the cost of an endpoint of which a stream learns nothing.
const unknown = -1

// load returns the latency to expect of the endpoint for an attempt sent now, in
// nanoseconds, and how many attempts are in flight there.
//
// Curiosity: while nothing is in flight that will measure the endpoint, its cost
// decays by e^(-idle/tau), so that it earns a probe in the end; while the
// probe is on its way the cost is the undecayed one, so that one probe is no
// stampede. A zero says that a probe is due whatever it may cost.
//
// A stream measures nothing, so streams are no probes. They see the undecayed
// cost, or unknown where there is no recent one.
func (e *endpoint) load(now, tau time.Duration, streaming bool) (cost float64, n int64) {
	unary, streams := e.inFlight()
	n = unary + streams
	k := e.known.Load()
	idle := now - time.Duration(e.last.Load())
	due := k == nothing || idle >= time.Duration(e.silence.Load())
	cost = math.Float64frombits(e.cost.Load())
	switch {
	case streaming && due:
		return unknown, n
	case streaming:
		return cost, n
	case unary > 0 && k != measured:
		return pending, n
	case unary > 0:
		return cost, n
	case due:
		return 0, n
	case idle > tau>>10: // less changes nothing
		cost *= decay(idle, tau)
	}
	return cost, n
}

// record notes an attempt that ended now, elapsed after it was sent.
func (e *endpoint) record(now, elapsed, tau time.Duration, v verdict) {
	e.recordPart(now, elapsed, tau, v, 1)
}

// recordPart is record for an attempt that counts as a part of one, in (0, 1].
func (e *endpoint) recordPart(now, elapsed, tau time.Duration, v verdict, part float64) {
	e.mu.Lock()
	defer e.mu.Unlock()

	last := time.Duration(e.last.Load())
	limit := memory - part
	switch dt := now - last; {
	case dt > tau>>10: // less changes next to nothing
		keep := (1 - 1.0/memory) * decay(dt, tau)
		limit *= keep / (1 - keep) / (memory - 1)
		if v == answered && dt >= patience*tau {
			// The probe that patience has earned came back: believe it alone. A seventh
			// of what was known would outweigh it if that was a stall of seconds.
			limit = 0
		}
	case dt < 0:
		now = last // ends are reported out of order, by a hair
	}
	if e.weight > limit {
		fade := limit / e.weight
		e.weight = limit
		e.exposure *= fade
		e.answers *= fade
		e.failures *= fade
		e.left *= fade
		e.given *= fade
	}

	took := float64(max(elapsed, 0))
	k := max(e.known.Load(), unanswered)
	silence := patience * tau
	switch v {
	case answered:
		e.answers += part
		k = measured
	case failed:
		e.failures += part
		if e.weight > 0 {
			took = max(took, e.exposure/e.weight)
		}
	case cut:
		e.left += part
		e.given += part * took
	}
	e.weight += part
	e.exposure += part * took
	cost := e.exposure / max(e.answers, 1)
	if v == failed && k == unanswered {
		// Nothing but failures: no latency is known, and the time until a failure
		// is none. Ask again after a while that grows with their number, or one
		// failure at the start would cost a good endpoint its first 2 tau.
		cost = pending
		silence = time.Duration(float64(silence) * min(1, e.weight/8))
	}
	if e.trial != nil {
		if e.trial.note(elapsed, v); time.Duration(e.gap.Load()) != e.trial.gap {
			e.gap.Store(int64(e.trial.gap))
			e.probe.Store(int64(now + e.trial.gap))
		}
	}

	e.rounds += part
	if took := now - e.began; e.rounds >= round || took > roundSlow {
		e.pace(took)
		e.rounds, e.began = 0, now
	}

	e.cost.Store(math.Float64bits(cost))
	e.last.Store(int64(now))
	// These two rarely change, and a store costs more than a look.
	if e.silence.Load() != int64(silence) {
		e.silence.Store(int64(silence))
	}
	if e.known.Load() != k {
		e.known.Store(k)
	}
}

// pace adapts the sampling to how long this round has taken. e.mu is held.
func (e *endpoint) pace(took time.Duration) {
	k := e.sparse.Load()
	switch {
	case took > roundSlow:
		// As many fewer as are missing, at once: a client that called a hundred times as often a
		// moment ago would know next to nothing for seconds.
		for n := e.rounds; k > 0 && n < round; n *= 2 {
			k--
		}
	case took < roundFast && k < maxSparse:
		k++
	default:
		return
	}
	e.sparse.Store(k)
}

// note takes the end of a probe.
func (t *trial) note(took time.Duration, v verdict) {
	switch {
	case v == answered && took <= t.limit:
		t.good++
		t.took += took
		t.gap = t.least
	case v == cut && took <= t.limit:
		// The caller left before there was anything to see.
	default:
		t.good, t.took, t.bad = 0, 0, true
		t.gap = min(2*t.gap, t.most)
	}
}

// try begins a trial: probes of at most limit are good ones.
// They are least to most apart, and the first is after least.
func (e *endpoint) try(now, limit, least, most time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.trial = &trial{limit: limit, gap: least, least: least, most: most}
	e.gap.Store(int64(least))
	e.probe.Store(int64(now + least))
}

// probing reports whether it is time for a probe, and takes it: it is for the caller then.
func (e *endpoint) probing(now time.Duration) bool {
	at := e.probe.Load()
	if now < time.Duration(at) {
		return false
	}
	if unary, _ := e.inFlight(); unary > 0 {
		return false // so that a slow one gets few
	}
	return e.probe.CompareAndSwap(at, int64(now)+e.gap.Load())
}

// relax raises the latency of a good probe, if latency is what the trial is about.
func (e *endpoint) relax(limit time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.trial != nil {
		e.trial.limit = max(e.trial.limit, limit)
	}
}

// untried reports whether no probe of the trial was bad.
func (e *endpoint) untried() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.trial == nil || !e.trial.bad
}

// tried returns how many of the trial's latest probes were good, in a row.
func (e *endpoint) tried() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.trial == nil {
		return 0
	}
	return e.trial.good
}

// acquit ends a trial: what led to it is forgotten, and the good probes count.
func (e *endpoint) acquit() {
	e.mu.Lock()
	defer e.mu.Unlock()
	t := e.trial
	e.trial = nil
	if t == nil {
		return
	}
	e.weight, e.exposure, e.answers = float64(t.good), float64(t.took), float64(t.good)
	e.failures, e.left, e.given = 0, 0, 0
	if t.good == 0 {
		e.known.Store(nothing)
		return
	}
	e.cost.Store(math.Float64bits(e.exposure / e.answers))
}

// sample returns what the detector is to judge the endpoint by.
func (e *endpoint) sample() sample {
	e.mu.Lock()
	defer e.mu.Unlock()
	calls := e.weight - e.left
	return sample{
		calls:    calls,
		latency:  (e.exposure - e.given) / max(e.answers, 1),
		failures: e.failures / max(calls, 1),
	}
}

// decay returns e^(-dt/tau) for dt > 0. As a rule dt is milliseconds and tau
// seconds, where four terms of the series are right to 2e-10. Picks do not ask beyond
// patience, and where an endpoint is known to be slow, or is called seldom, they all ask for more
// than the series can: math.Exp was 7% of the profile of BenchmarkPick.
func decay(dt, tau time.Duration) float64 {
	x := float64(dt) / float64(tau)
	if x >= patience {
		return math.Exp(-x)
	}
	i := int(x * decaySteps)
	x -= float64(i) * (1.0 / decaySteps)
	return decayed[i] * (1 - x*(1-x*(1.0/2)*(1-x*(1.0/3))))
}

// decayed is e^(-i/decaySteps).
var decayed = func() (d [patience * decaySteps]float64) {
	for i := range d {
		d[i] = math.Exp(-float64(i) / decaySteps)
	}
	return d
}()

const decaySteps = 128
