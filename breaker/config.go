package breaker

import (
	"errors"
	"fmt"
	"time"
)

const (
	defaultFailureRatio  = 0.5 // resilience4j's, too
	defaultMinimumCalls  = 20
	defaultWindow        = 10 * time.Second
	defaultOpenFor       = 5 * time.Second
	defaultSlowCallRatio = 0.8

	// maxMinimumCalls is far below what gobreaker's 32-bit counts can hold.
	maxMinimumCalls = 1_000_000
	// Below minWindow one of its ten parts is shorter than a scheduling hiccup.
	minWindow, maxWindow   = 100 * time.Millisecond, time.Hour
	minOpenFor, maxOpenFor = 10 * time.Millisecond, time.Hour
)

// Config says when a [Breaker] opens, and for how long. Its zero value is good for any
// method that is called often and answers in less than 5 s.
type Config struct {
	// Method is the full name of the method, such as "/kv.KV/Get", for refusals and
	// changes. It may be empty. The interceptors set it themselves.
	Method string

	// FailureRatio is the share of failures at which the breaker opens, in (0, 1].
	// Default 0.5. It should be well above the share of one backend: at 0.3 a third of the
	// backends that is bad cuts off the rest.
	FailureRatio float64

	// MinimumCalls is how many calls must have ended in the window before the breaker
	// can open, in [1, 1000000]. Default 20, because of 20 calls to a server that fails
	// one in ten, ten fail once in 140,000 times; of 4, two do every 19th time. With fewer
	// calls per Window than this the breaker never opens.
	MinimumCalls int

	// Window is how far back calls count, in [100ms, 1h], to a tenth of it. Default 10s,
	// because it is also what it takes at most to notice.
	Window time.Duration

	// OpenFor is how long the breaker first stays open, in [10ms, 1h]. Default 5s. It is
	// doubled each time that the breaker opens again soon, up to 8 x OpenFor, and 0 to 25%
	// are added at random, so that the clients of a server do not all come back at once.
	//
	// OpenFor is also the lease of a probe: what has not ended by then counts for
	// nothing. So it must be longer than a good call takes, or the breaker stays half-open
	// and lets a few calls through for each OpenFor.
	OpenFor time.Duration

	// SlowCallDuration is the time above which a call is slow, whatever its outcome. 0,
	// the default, is none. Streams are never slow. It should be what makes an answer
	// worthless; what makes it bad is a matter for hedging.
	SlowCallDuration time.Duration

	// SlowCallRatio is the share of slow calls at which the breaker opens, in (0, 1], after
	// MinimumCalls in Window like FailureRatio. Default 0.8 with a SlowCallDuration, and a
	// fault without one.
	SlowCallRatio float64

	// OnStateChange, if not nil, is told of each change: in order, once, one at a time,
	// and with no lock held, so it may call the breaker. It runs on the goroutine of a
	// call, which waits for it.
	OnStateChange func(Change)
}

// Validate reports every fault of the configuration, joined.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("breaker: "+format, args...)) }
	// Written so that NaN is a fault too.
	if c.FailureRatio != 0 && !(c.FailureRatio > 0 && c.FailureRatio <= 1) {
		bad("failure ratio %v, want (0, 1]", c.FailureRatio)
	}
	if c.MinimumCalls != 0 && (c.MinimumCalls < 1 || c.MinimumCalls > maxMinimumCalls) {
		bad("minimum calls %d, want [1, %d]", c.MinimumCalls, maxMinimumCalls)
	}
	if c.Window != 0 && (c.Window < minWindow || c.Window > maxWindow) {
		bad("window %v, want [%v, %v]", c.Window, minWindow, maxWindow)
	}
	if c.OpenFor != 0 && (c.OpenFor < minOpenFor || c.OpenFor > maxOpenFor) {
		bad("open for %v, want [%v, %v]", c.OpenFor, minOpenFor, maxOpenFor)
	}
	if c.SlowCallDuration < 0 {
		bad("slow call duration %v, want at least 0", c.SlowCallDuration)
	}
	if c.SlowCallRatio != 0 && !(c.SlowCallRatio > 0 && c.SlowCallRatio <= 1) {
		bad("slow call ratio %v, want (0, 1]", c.SlowCallRatio)
	}
	if c.SlowCallRatio != 0 && c.SlowCallDuration == 0 {
		bad("slow call ratio %v, want a slow call duration beside it", c.SlowCallRatio)
	}
	return errors.Join(errs...)
}

// withDefaults is c with its zero values filled in.
func (c Config) withDefaults() Config {
	if c.FailureRatio == 0 {
		c.FailureRatio = defaultFailureRatio
	}
	if c.MinimumCalls == 0 {
		c.MinimumCalls = defaultMinimumCalls
	}
	if c.Window == 0 {
		c.Window = defaultWindow
	}
	if c.OpenFor == 0 {
		c.OpenFor = defaultOpenFor
	}
	if c.SlowCallRatio == 0 {
		c.SlowCallRatio = defaultSlowCallRatio
	}
	return c
}

// State is that of a [Breaker].
type State uint8

// The states of a [Breaker].
const (
	// Closed: calls pass.
	Closed State = iota
	// HalfOpen: a few calls pass, as probes.
	HalfOpen
	// Open: no call passes.
	Open
)

// String returns "closed", "half-open" or "open".
func (s State) String() string {
	switch s {
	case Closed:
		return "closed"
	case HalfOpen:
		return "half-open"
	case Open:
		return "open"
	}
	return fmt.Sprintf("State(%d)", uint8(s))
}

// Reason says why the state of a [Breaker] changed.
type Reason string

// The reasons of a [Change].
const (
	// TooManyFailures: the failure ratio was reached.
	TooManyFailures Reason = "failures"
	// TooManySlow: the slow call ratio was reached.
	TooManySlow Reason = "slow calls"
	// ProbeDue: the open time is over.
	ProbeDue Reason = "probe due"
	// ProbeFailed: a probe failed.
	ProbeFailed Reason = "probe failed"
	// ProbeSlow: a probe succeeded, but was slow.
	ProbeSlow Reason = "probe slow"
	// ProbesSucceeded: enough probes succeeded.
	ProbesSucceeded Reason = "probes succeeded"
)

// Change is one change of state.
type Change struct {
	// Method is that of the configuration.
	Method   string
	From, To State
	At       time.Time
	Reason   Reason
	// Calls and Bad say how many calls had ended in the window, and how many of them
	// failed, or were slow, when it was one of these ratios that opened the breaker; else 0.
	Calls, Bad int
	// Next is when the first probe is due, if To is Open; else it is zero.
	Next time.Time
}
