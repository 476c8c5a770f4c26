package hedging

import (
	"math"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/bobtail-rpc/bobtail/internal/latency"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// Window is the span over which a [Hedger] remembers latencies.
const Window = 30 * time.Second

const (
	// steerWidth is how many times the square root of the allowance the budget keeps
	// in reserve. Over 10 seeds of 20,000 calls at p95 and 5%, 0.5 let the p99.9
	// scatter up to 15 ms, 1 and 2 up to 7.6; 2 left a tenth of the budget unspent.
	steerWidth = 1.0
	// firstReserve is how many times that root is kept from first asks: 5 tokens of an
	// allowance of 500, none below 16.
	firstReserve = 0.25
	// minShare keeps an empty budget from moving the delay out of all reach.
	minShare = 0.1
	// knownFor is how long an adaptive delay holds. What it is made from moves ten
	// times a second.
	knownFor = time.Millisecond
)

// Hedger hedges the calls of one method to one server: a policy, and what has
// been learned of the method's latency. Make one with [New]. It is safe for
// concurrent use and owns no goroutine.
type Hedger struct {
	cfg      Config
	attempts int
	nonFatal uint32 // a bit for each code
	latency  *latency.Tracker
	distance *distance
	start    time.Time
	// known is the adaptive delay as last worked out, good until knownUntil, in
	// nanoseconds since start. Atomics because every call reads them; one may be
	// newer than the other, and either delay is good.
	known, knownUntil atomic.Int64
	// shareBits is the float64 that share returns, 0 before any hedge was due. An
	// atomic because calls that are due write it while calls that begin read it.
	shareBits atomic.Uint64
}

// New returns a Hedger. A fault of cfg is an error that names the field, its
// value and its bound.
func New(cfg Config) (*Hedger, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	now := time.Now()
	return build(cfg, latency.New(Window, now), &distance{}, now), nil
}

// With returns a Hedger with another configuration that keeps, and goes on
// sharing, what h has learned of the method's latency.
func (h *Hedger) With(cfg Config) (*Hedger, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return build(cfg, h.latency, h.distance, h.start), nil
}

func build(cfg Config, t *latency.Tracker, d *distance, start time.Time) *Hedger {
	h := &Hedger{cfg: cfg, attempts: min(cfg.MaxAttempts, MaxAttemptsCap), latency: t, distance: d, start: start}
	for _, code := range cfg.NonFatalCodes {
		h.nonFatal |= 1 << code
	}
	return h
}

// now is time.Now for half the price: it reads the monotonic clock alone.
func (h *Hedger) now() time.Time { return h.start.Add(time.Since(h.start)) }

// Delay returns the hedging delay in force now; ok is false while an adaptive
// delay is not known yet and no fixed one stands in for it.
func (h *Hedger) Delay(now time.Time) (d time.Duration, ok bool) {
	d = h.delay(now)
	return max(d, 0), d >= 0
}

// delay is what the core takes: negative while no hedge is sent by time.
func (h *Hedger) delay(now time.Time) time.Duration {
	if h.cfg.Percentile == 0 {
		if h.cfg.Tied && h.cfg.Delay == 0 {
			return -1 // there is the tie delay: A6's "all at once" is not what is meant
		}
		return h.cfg.Delay
	}
	at := int64(now.Sub(h.start))
	if at < h.knownUntil.Load() {
		return time.Duration(h.known.Load())
	}
	d := h.adapt(now)
	h.known.Store(int64(d))
	h.knownUntil.Store(at + int64(knownFor))
	return d
}

// adapt works out the adaptive delay.
func (h *Hedger) adapt(now time.Time) time.Duration {
	late := 1 - h.cfg.Percentile/100
	d, ok := h.latency.Quantile(now, 1-late*h.share())
	if !ok {
		d, ok = h.latency.Quantile(now, 1-late)
	}
	if !ok {
		// A cold start does not hedge blind: all that is known is what the
		// configuration says.
		if h.cfg.Delay > 0 {
			return h.cfg.Delay
		}
		return -1
	}
	d = max(d, h.cfg.minDelay())
	if h.cfg.MaxDelay > 0 {
		d = min(d, h.cfg.MaxDelay)
	}
	return d
}

// share is the fraction of the calls beyond the percentile that the budget had room
// to hedge when one was last due.
func (h *Hedger) share() float64 {
	if bits := h.shareBits.Load(); bits != 0 {
		return math.Float64frombits(bits)
	}
	return 1
}

// deposit records a first attempt.
func (h *Hedger) deposit(now time.Time) {
	if h.cfg.Budget != nil {
		h.cfg.Budget.Deposit(now)
	}
}

// afford takes the token of an extra attempt, if the budget has one for it. A budget
// that refuses whoever happens to come refuses the very slowest call as often as one
// that is just past its time, so while it runs low two things make it last for those
// who have waited longest:
//
//   - The adaptive delay moves back. At the p95 one call in twenty asks for a hedge, as
//     many as a budget of 5% pays for on average; half of the time more do. It is
//     better to wait a little longer with all of them: fewer ask, and those are slow.
//   - The last tokens are kept from hedges that ask for the first time. They ask again
//     after twice the delay; most have their answer by then.
//
// Both reserves are in proportion to the square root of the allowance, as the noise of
// the demand is.
func (h *Hedger) afford(at time.Time, first bool) bool {
	b := h.cfg.Budget
	if b == nil {
		return true
	}
	if l, ok := b.(Leveler); ok {
		balance, allowance := l.Level(at)
		noise := math.Sqrt(allowance)
		share := balance / (1 + steerWidth*noise)
		h.shareBits.Store(math.Float64bits(min(1, max(minShare, share))))
		if first && balance < 1+math.Floor(firstReserve*noise) {
			return false
		}
	}
	return b.TryWithdraw(at)
}

// pointless reports whether an attempt sent now would probably be too late:
// fewer than half of the attempts end within the time that remains.
func (h *Hedger) pointless(now time.Time, remains time.Duration) bool {
	if remains > noTime/2 {
		return false // the call has no deadline
	}
	median, ok := h.latency.Quantile(now, 0.5)
	return ok && remains < median
}

// record puts one attempt's time into the tracker. Only an attempt that was
// answered tells how long an answer takes. One that was cancelled or that failed
// tells that an answer takes longer than this: the time of a quick failure, or of
// the sibling that won, would drag the percentile down until everything is
// hedged.
func (h *Hedger) record(now time.Time, d time.Duration, code codes.Code) {
	h.latency.Record(now, d, outcome.OfCode(code) != outcome.Success)
}

// Counts reports whether an attempt that ended with code counts as a failure for
// Throttle: for those who make a call of the method without h.
func (h *Hedger) Counts(code codes.Code) bool { return h.class(code) == nonFatal }

// class says what an attempt's status code means to its call.
func (h *Hedger) class(code codes.Code) class {
	switch {
	case code == codes.OK:
		return success
	case code < 32 && h.nonFatal&(1<<code) != 0:
		return nonFatal
	}
	return fatal
}
