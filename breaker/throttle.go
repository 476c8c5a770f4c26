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

// ErrThrottled is what errors.Is finds in the refusal of a [Throttle].
var ErrThrottled = errors.New("breaker: throttled")

const reasonThrottled = "THROTTLED"

const (
	defaultK     = 2
	defThrWindow = 120 * time.Second

	// Below minK a server that fails none of ten calls is refused some.
	minK, maxK = 1.1, 100

	minThrottleWindow = time.Second

	// maxRefusal is the largest share of calls that is refused. The formula's own limit is
	// 1, and then nobody would find out that the server is back: at 0.95 one call in twenty
	// does, which a server that is down can bear. With K 2 an overloaded server only meets
	// it at 40 times its capacity.
	maxRefusal = 0.95
	// probeEvery is after how long a call is let through in any case, for clients of few
	// calls.
	probeEvery = time.Second

	throttleSlots = 60
)

// ThrottleConfig configures a [Throttle]. The zero value is good: it stands for the
// defaults.
type ThrottleConfig struct {
	// K is how many requests are sent for each that the server accepts, in [1.1, 100].
	// Default 2, the source's: then a server that can do no more refuses about one request
	// for each that it accepts; with 1.1, one for ten. The larger K, the sooner clients
	// learn that it can do more.
	K float64
	// Window is how far back requests count, in [1s, 1h]. Default 2 minutes, the source's.
	Window time.Duration
	// Method is the full name of the method, for refusals. It may be "".
	Method string
}

func (c ThrottleConfig) withDefaults() ThrottleConfig {
	if c.K == 0 {
		c.K = defaultK
	}
	if c.Window == 0 {
		c.Window = defThrWindow
	}
	return c
}

// Validate reports every fault of the configuration, joined.
func (c ThrottleConfig) Validate() error {
	var errs []error
	c = c.withDefaults()
	if !(c.K >= minK && c.K <= maxK) {
		errs = append(errs, fmt.Errorf("breaker: throttle k %v, want [%v, %v]", c.K, minK, maxK))
	}
	if c.Window < minThrottleWindow || c.Window > maxWindow {
		errs = append(errs, fmt.Errorf("breaker: throttle window %v, want [%v, %v]", c.Window, minThrottleWindow, maxWindow))
	}
	return errors.Join(errs...)
}

// Throttle refuses a share of the calls to a server that turns calls away, so that it
// spends its time on those that it can serve. Over a rolling window it counts requests and
// those that the server accepted, and refuses with probability
//
//	p = max(0, (requests - K x accepts) / (requests + 1)),
//
// where what it refuses itself counts as a request, too. So the refusals of the server
// settle at K-1 for each call that it accepts, however many callers want. At least one call
// in twenty, and one in a second, is let through, so that it always finds out that the
// server is back.
//
// Requests count when they end, not when they begin, or those under way would look refused.
//
// Its methods take the time as an argument and read no clock. A Throttle is made by
// [NewThrottle], is safe for concurrent use, and takes 2 KiB.
//
// Source: Beyer et al., Site Reliability Engineering, chapter 21, "Client-Side Throttling",
// https://sre.google/sre-book/handling-overload/
type Throttle struct {
	cfg   ThrottleConfig // with its defaults
	start time.Time
	slot  time.Duration

	// refusing is whether p was above 0 when a request last ended. An atomic, so that while
	// all is well, which is nearly always, letting a call in takes no lock.
	refusing atomic.Bool

	mu    sync.Mutex // guards what follows
	slots [throttleSlots]tally
	epoch int64         // of the newest slot
	sum   tally         // of all slots
	let   time.Duration // when a call was last let through while p was above 0
}

// tally is a number of requests, and of those accepted.
type tally struct{ requests, accepts uint64 }

// NewThrottle returns a throttle that starts at start. A fault of cfg is an error that
// names the field, its value and its bound.
func NewThrottle(cfg ThrottleConfig, start time.Time) (*Throttle, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	return &Throttle{cfg: cfg, start: start, slot: cfg.Window / throttleSlots}, nil
}

// Admit lets a call in, or returns the refusal: UNAVAILABLE with the reason THROTTLED, in
// which errors.Is finds [ErrThrottled]. u is a random number in [0, 1).
func (t *Throttle) Admit(now time.Time, u float64) error {
	if !t.refusing.Load() {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	at := t.advance(now)
	if u >= t.probability() || at-t.let >= probeEvery {
		t.let = at
		return nil
	}
	t.count(tally{requests: 1})
	return &outcome.Refusal{Cause: ErrThrottled, Code: codes.Unavailable, Reason: reasonThrottled, Method: t.cfg.Method}
}

// Record tells how a call ended that was let in, nil for success. UNAVAILABLE,
// DEADLINE_EXCEEDED, INTERNAL, UNKNOWN, DATA_LOSS and RESOURCE_EXHAUSTED are requests that
// the server did not accept; CANCELLED and local refusals count for nothing; all else it
// has accepted.
func (t *Throttle) Record(now time.Time, err error) {
	one := tally{requests: 1}
	switch outcome.Of(err) {
	case outcome.Success:
		one.accepts = 1
	case outcome.Ignored:
		if status.Code(err) != codes.ResourceExhausted || outcome.IsRefusal(err) {
			return
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.advance(now)
	t.count(one)
	if refusing := t.probability() > 0; refusing != t.refusing.Load() {
		t.refusing.Store(refusing)
	}
}

// Probability returns the share of calls that is refused at now.
func (t *Throttle) Probability(now time.Time) float64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.advance(now)
	return t.probability()
}

// probability is the formula. t.mu is held.
func (t *Throttle) probability() float64 {
	requests, accepts := float64(t.sum.requests), float64(t.sum.accepts)
	return min(max(0, (requests-t.cfg.K*accepts)/(requests+1)), maxRefusal)
}

// count adds to the newest slot. t.mu is held.
func (t *Throttle) count(n tally) {
	s := &t.slots[t.epoch%throttleSlots]
	s.requests, s.accepts = s.requests+n.requests, s.accepts+n.accepts
	t.sum.requests, t.sum.accepts = t.sum.requests+n.requests, t.sum.accepts+n.accepts
}

// advance forgets the slots that have left the window by now, and returns the time since
// the start. A time before the newest slot counts in it. t.mu is held.
func (t *Throttle) advance(now time.Time) time.Duration {
	at := max(now.Sub(t.start), 0)
	epoch := int64(at / t.slot)
	for e := max(t.epoch+1, epoch-throttleSlots+1); e <= epoch; e++ {
		s := &t.slots[e%throttleSlots]
		t.sum.requests, t.sum.accepts = t.sum.requests-s.requests, t.sum.accepts-s.accepts
		*s = tally{}
	}
	t.epoch = max(t.epoch, epoch)
	return at
}
