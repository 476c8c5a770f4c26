package breaker

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// ErrThrottled is what errors.Is finds in the error of a call that a [Throttle] refused.
var ErrThrottled = errors.New("breaker: throttled")

const (
	defaultK              = 2
	defaultThrottleWindow = 2 * time.Minute

	minK, maxK        = 1.1, 100
	minThrottleWindow = time.Second

	// maxRefused is the most that p can be. By the formula alone an outage would take it
	// to 1-1/requests, and nobody would find out that it is over.
	maxRefused = 0.95
	// floor is after how long without a call let through one is, in any case.
	floor = time.Second

	// What is recent: the least that the newest slots are, and the least requests in them.
	// Fewer requests would make p a matter of luck; 5 slots are 10 s by default.
	recentSlots    = 5
	recentRequests = 100

	// throttleSlots is how many parts the window has; the oldest is forgotten as a whole.
	// By default one is 2 s.
	throttleSlots = 60
)

// ThrottleConfig says how much a [Throttle] refuses. Its zero value is that of the SRE book.
type ThrottleConfig struct {
	// K is how many requests may be sent for each that the server accepts, in [1.1, 100].
	// Default 2: a server that can do no more then refuses about one request for each that
	// it accepts. At 1.1 it refuses one for ten, which costs it less, and clients learn
	// later that it can do more. Nothing is throttled while the server accepts 1/K of the
	// requests; so below 1.1 a usual share of failures would be throttled, and at 1 and
	// below a healthy server.
	K float64

	// Window is how far back requests count, in [1s, 1h], to a 60th of it. Default 2m,
	// because that is the source's. After a window of success an outage shorter
	// than Window x (1-1/K) throttles nobody; and the time to recover is in proportion to it as well.
	Window time.Duration

	// Method is the full name of the method, such as "/kv.KV/Get", for refusals. It may be
	// empty. The interceptors set it themselves.
	Method string
}

// Validate reports every fault of the configuration, joined.
func (c ThrottleConfig) Validate() error {
	var errs []error
	// Written so that NaN is a fault too.
	if c.K != 0 && !(c.K >= minK && c.K <= maxK) {
		errs = append(errs, fmt.Errorf("breaker: throttle k %v, want [%v, %v]", c.K, minK, maxK))
	}
	if c.Window != 0 && (c.Window < minThrottleWindow || c.Window > maxWindow) {
		errs = append(errs, fmt.Errorf("breaker: throttle window %v, want [%v, %v]", c.Window, minThrottleWindow, maxWindow))
	}
	return errors.Join(errs...)
}

// Throttle refuses a share of the calls to a server that does not accept enough of them, so
// that it spends its time on those it can serve. Over a rolling window it counts requests,
// and accepts: those that succeeded. It refuses a call with probability
//
//	p = max(0, (requests - K x accepts) / (requests + 1)),
//
// and what it refuses counts as a request, too. So however many callers there are, a server
// that can do no more gets K requests for each that it accepts.
//
// A request counts when it ends. Counted when it begins, those in flight would look
// refused, and a server that takes a second for each call would be throttled for it.
//
// So that it always recovers, p is at most 0.95, and one call in each second is let through
// in any case. That is what a dead server still has to bear: a twentieth of the calls, or one
// in a second. With K 2 the 0.95 is out of the way of overload up to 40 times the capacity.
//
// So that it recovers soon, p is also at most what the formula says of the most recent
// requests: those of the last 5/60 of the window, or of more if these are fewer than 100.
// And of fewer than 100 in the whole window it says nothing: p is 0.
//
// By default and at 100 calls/s, after two minutes of success, an outage of up to Window x
// (1-1/K), a minute, refuses no call; after a longer one the last call is refused about 20 s
// after the server is back, and likewise after any outage that begins with the client, which
// has seen nothing better. By the formula alone that would be 4.5 minutes after an outage of
// ten, and with K 1.1, where it is about 2 minutes, more than 20.
//
// The methods take the time and a random number as arguments, and read no clock. A time
// before the latest one counts as part of the latest slot. A Throttle is made by
// [NewThrottle] and is safe for concurrent use; its methods do not allocate. Its memory is
// about 1 KiB.
//
// Source: Beyer et al., Site Reliability Engineering, chapter 21, "Client-Side Throttling",
// https://sre.google/sre-book/handling-overload/
type Throttle struct {
	k       float64
	start   time.Time
	slot    time.Duration
	refusal error // always the same, because under overload it must be cheap

	// calmUntil is the end of the newest slot, in nanoseconds since start, if p is 0 in it;
	// else 0. An atomic so that a call takes no lock to be let in while all is well.
	calmUntil atomic.Int64

	mu    sync.Mutex // guards what follows and serialises the writers of calmUntil
	slots [throttleSlots]tally
	epoch int64         // of the newest slot
	sum   tally         // of all slots
	let   time.Duration // when a call was last let through though p was above 0
}

// tally is a number of requests, and of those that were accepted.
type tally struct{ requests, accepts uint64 }

// NewThrottle returns a Throttle that has seen nothing and starts at start. A fault of cfg
// is an error that names the field, its value and its bound.
func NewThrottle(cfg ThrottleConfig, start time.Time) (*Throttle, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return buildThrottle(cfg, start), nil
}

// buildThrottle is NewThrottle for a configuration without a fault.
func buildThrottle(cfg ThrottleConfig, start time.Time) *Throttle {
	if cfg.K == 0 {
		cfg.K = defaultK
	}
	if cfg.Window == 0 {
		cfg.Window = defaultThrottleWindow
	}
	return &Throttle{
		k: cfg.K, start: start, slot: cfg.Window / throttleSlots,
		refusal: &outcome.Refusal{Cause: ErrThrottled, Code: codes.Unavailable, Reason: "THROTTLED", Method: cfg.Method},
	}
}

// Admit lets a call in, or returns the error to refuse it with, for which errors.Is(err,
// [ErrThrottled]) holds. u is a random number in [0, 1). Record the end of a call that was
// let in.
func (t *Throttle) Admit(now time.Time, u float64) error {
	if int64(now.Sub(t.start)) < t.calmUntil.Load() {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	at := t.advance(now)
	p := t.settle()
	if p == 0 {
		return nil
	}
	if u >= p || at-t.let >= floor {
		t.let = max(t.let, at)
		return nil
	}
	t.count(tally{requests: 1})
	return t.refusal
}

// Record counts a call that was let in and returned err, as the package documentation says
// what counts.
func (t *Throttle) Record(now time.Time, err error) {
	one := tally{requests: 1}
	switch outcome.Of(err) {
	case outcome.Success:
		one.accepts = 1
	case outcome.Ignored:
		// A refusal of ours may have any code.
		if outcome.IsRefusal(err) || status.Code(err) != codes.ResourceExhausted {
			return
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.advance(now)
	t.count(one)
	t.settle()
}

// Probability returns p, the share of calls that is refused at now.
func (t *Throttle) Probability(now time.Time) float64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.advance(now)
	return t.settle()
}

// probability is p. t.mu is held.
func (t *Throttle) probability() float64 {
	if t.sum.requests < recentRequests {
		return 0 // a first call that failed is no overload
	}
	p := t.formula(t.sum)
	if p == 0 {
		return 0
	}
	var recent tally
	for i := range int64(throttleSlots) {
		s := t.slots[(t.epoch-i+throttleSlots)%throttleSlots]
		recent.requests, recent.accepts = recent.requests+s.requests, recent.accepts+s.accepts
		if i+1 >= recentSlots && recent.requests >= recentRequests {
			return min(p, t.formula(recent))
		}
	}
	return p
}

func (t *Throttle) formula(n tally) float64 {
	requests, accepts := float64(n.requests), float64(n.accepts)
	return min(maxRefused, max(0, (requests-t.k*accepts)/(requests+1)))
}

// count adds to the newest slot. t.mu is held.
func (t *Throttle) count(n tally) {
	s := &t.slots[t.epoch%throttleSlots]
	s.requests, s.accepts = s.requests+n.requests, s.accepts+n.accepts
	t.sum.requests, t.sum.accepts = t.sum.requests+n.requests, t.sum.accepts+n.accepts
}

// advance forgets the slots that have left the window by now, and returns the time since
// the start. t.mu is held.
func (t *Throttle) advance(now time.Time) time.Duration {
	at := now.Sub(t.start)
	epoch := int64(at / t.slot)
	// Of a pause longer than the window only the last round matters.
	for e := max(t.epoch+1, epoch-throttleSlots+1); e <= epoch; e++ {
		s := &t.slots[e%throttleSlots]
		t.sum.requests, t.sum.accepts = t.sum.requests-s.requests, t.sum.accepts-s.accepts
		*s = tally{}
	}
	t.epoch = max(t.epoch, epoch)
	return at
}

// settle returns p, and notes until when it is 0. t.mu is held.
func (t *Throttle) settle() float64 {
	p, until := t.probability(), int64(0)
	if p == 0 {
		until = (t.epoch + 1) * int64(t.slot)
	}
	// Every call reads it: written only if it changes.
	if until != t.calmUntil.Load() {
		t.calmUntil.Store(until)
	}
	return p
}
