package retry

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"google.golang.org/grpc/codes"
)

// MaxAttemptsCap is the most attempts a call makes, whatever its configuration
// says. gRFC A6, "Limits on Retries and Hedges".
const MaxAttemptsCap = 5

// Config is the retryPolicy of a gRPC service config (gRFC A6), and what it lacks.
type Config struct {
	// MaxAttempts counts the first attempt. At least 2; above [MaxAttemptsCap] it is
	// taken as that, as A6 says. No default.
	MaxAttempts int

	// Backoff is how long to wait before each retry. No default.
	Backoff Backoff

	// RetryableCodes are the status codes after which a call may be tried again. OK
	// is not allowed in it; nor is it empty, unless AttemptTimeout is given or
	// UnsentOnly set. No default.
	RetryableCodes []codes.Code

	// AttemptTimeout ends an attempt that has not answered (of a stream: not brought
	// its first message) in this time; that is retryable, whatever RetryableCodes says. 0,
	// the default, is none: then an attempt may take all the time that the call has, and
	// a backend that never answers is never left.
	AttemptTimeout time.Duration

	// UnsentOnly limits retries to attempts that provably never reached a server: no
	// backend could be connected to. It is for methods of which nobody has said that
	// they may be executed twice. Without it such attempts are retried too, whether
	// UNAVAILABLE is retryable or not.
	UnsentOnly bool

	// Budget pays for the attempts after the first; nil is no bound, as in A6. Then an
	// outage multiplies the load by MaxAttempts.
	Budget *Budget
	// Throttle is A6's retryThrottling; nil is none.
	Throttle *Throttle

	// Shadow decides and reports everything and sends no extra attempt. Nor does
	// AttemptTimeout end one then, which nothing would follow.
	Shadow bool

	// Report, if not nil, is told once about each call, on the caller's goroutine, before
	// the call returns, or a stream its first message. It must not keep the context, nor
	// use the stream.
	Report func(context.Context, Report)
}

// Reason says why a call whose attempt had failed was not tried again.
type Reason string

// The reasons for which a failed attempt is the last.
const (
	// NotRetryable: the code is none of RetryableCodes, the caller's context has ended,
	// or the request of a stream is no proto message and cannot be sent twice.
	NotRetryable Reason = "code"
	// Exhausted: that was attempt MaxAttempts.
	Exhausted Reason = "attempts"
	// NoBudget: the budget had no token.
	NoBudget Reason = "budget"
	// NoTime: the wait, and then half of the method's attempts, would take longer than
	// the call has.
	NoTime Reason = "deadline"
	// Pushback: the server asked for no further attempts.
	Pushback Reason = "pushback"
	// Throttled: too many attempts fail (A6 retryThrottling).
	Throttled Reason = "throttle"
	// InShadow: the mode is shadow.
	InShadow Reason = "shadow"
	// Nested: the call is made while serving an attempt that is itself extra.
	Nested Reason = "nested"
	// Refused: something below refused the call locally, a circuit breaker say; it
	// would do so again.
	Refused Reason = "refused"
	// CallEnded: the caller's context ended while the call waited to be tried again.
	CallEnded Reason = "ended"
)

// Report is what became of one call.
type Report struct {
	// Method is the full method name; empty from [Do].
	Method string
	// Attempts is how many were made.
	Attempts int
	// Waited is the time between attempts, in all.
	Waited time.Duration
	// Stopped is why there was no further attempt, "" if the last one succeeded.
	Stopped Reason
	// Code is the status code of the call.
	Code codes.Code
}

// Validate reports every fault of the configuration, joined.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("retry: "+format, args...)) }
	if c.MaxAttempts < 2 {
		bad("max attempts %d, want at least 2", c.MaxAttempts)
	}
	if err := c.Backoff.Validate(); err != nil {
		errs = append(errs, err)
	}
	if len(c.RetryableCodes) == 0 && c.AttemptTimeout == 0 && !c.UnsentOnly {
		bad("no retryable codes, want at least one, or an attempt timeout")
	}
	for _, code := range c.RetryableCodes {
		if code == codes.OK || code > codes.Unauthenticated {
			bad("retryable code %v, want a code other than OK", code)
		}
	}
	if c.AttemptTimeout < 0 {
		bad("attempt timeout %v, want at least 0", c.AttemptTimeout)
	}
	return errors.Join(errs...)
}

// attemptTimeout is what ends an attempt; 0: nothing.
func (c *Config) attemptTimeout() time.Duration {
	if c.Shadow {
		return 0
	}
	return c.AttemptTimeout
}

// Jitter says how a backoff is randomised, so that clients that failed together do
// not come back together. v is min(Max, Initial x Multiplier^n), n the number of
// retries before.
//
// Source: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015,
// whose simulation TestOptimisticConcurrency repeats.
type Jitter uint8

const (
	// FullJitter, the default, is U(0, v): fewest attempts for the time, by the
	// source's simulation.
	FullJitter Jitter = iota
	// EqualJitter is v/2 + U(0, v/2): never shorter than half of the wait.
	EqualJitter
	// DecorrelatedJitter is s = min(Max, U(Initial, 3 x the s before)), the first time
	// 3 x Initial. It does not use Multiplier.
	DecorrelatedJitter
	// GRPCJitter is v x U(0.8, 1.2): gRFC A6's, in its present form.
	GRPCJitter
)

// jitterNames are those of the policy document, by Jitter.
var jitterNames = [...]string{FullJitter: "full", EqualJitter: "equal", DecorrelatedJitter: "decorrelated", GRPCJitter: "grpc"}

// String returns the name in a policy document: "full", "equal", "decorrelated" or
// "grpc".
func (j Jitter) String() string {
	if int(j) < len(jitterNames) {
		return jitterNames[j]
	}
	return "unknown"
}

// ParseJitter returns the Jitter of a name in a policy document.
func ParseJitter(name string) (Jitter, error) {
	for j, n := range jitterNames {
		if n == name {
			return Jitter(j), nil
		}
	}
	return 0, fmt.Errorf("retry: jitter %q, want \"full\", \"equal\", \"decorrelated\" or \"grpc\"", name)
}

// Backoff is a capped exponential backoff with jitter.
type Backoff struct {
	// Initial is the wait before the first retry, but for jitter. More than 0.
	Initial time.Duration
	// Max caps the wait. More than 0; below Initial it is the wait, as in A6. (With
	// GRPCJitter the wait is up to 1.2 x Max, as A6 has it.)
	Max time.Duration
	// Multiplier is the growth from one retry to the next. More than 0. Below 1 the
	// wait shrinks, which hardly anybody wants, and A6 allows.
	Multiplier float64
	// Jitter is [FullJitter] by default.
	Jitter Jitter
}

// Validate reports every fault, joined.
func (b Backoff) Validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("retry: backoff "+format, args...))
	}
	if b.Initial <= 0 {
		bad("initial %v, want more than 0s", b.Initial)
	}
	if b.Max <= 0 {
		bad("max %v, want more than 0s", b.Max)
	}
	if !(b.Multiplier > 0) || math.IsInf(b.Multiplier, 1) {
		bad("multiplier %v, want (0, +Inf)", b.Multiplier)
	}
	if int(b.Jitter) >= len(jitterNames) {
		bad("jitter %d, want one of the constants", b.Jitter)
	}
	return errors.Join(errs...)
}
