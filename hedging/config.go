package hedging

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
)

// MaxAttemptsCap is the most attempts a call makes, whatever its configuration
// says. gRFC A6, "Limits on Retries and Hedges".
const MaxAttemptsCap = 5

// DefaultMinDelay is the floor of an adaptive delay where none is given. Below
// it a hedge races the scheduling noise of both machines rather than the server.
const DefaultMinDelay = time.Millisecond

// Config says when a call is hedged. MaxAttempts alone is the A6 policy with no
// delay, which sends all attempts at once; most services want Percentile.
type Config struct {
	// MaxAttempts counts the first attempt. At least 2; above
	// [MaxAttemptsCap] it is taken as that, as A6 says. No default.
	MaxAttempts int

	// Delay is how long an attempt may take before the next one is sent: attempt
	// k goes out at (k-1) x Delay. At least 0. Without Percentile, 0 (the
	// default) sends all attempts at once. With Percentile, Delay serves until
	// enough calls have been seen, and 0 means to hedge by time none till then.
	Delay time.Duration

	// Percentile makes the delay adaptive: it is the live percentile of the
	// latency of the method's attempts, in (0, 100). 95 hedges the slowest
	// twentieth. 0, the default, is off. While a Budget that is a [Leveler] runs
	// low, the percentile is a later one: 1-(1-P) x max(0.1, b/(1+sqrt(A))) for a
	// balance b below the reserve 1+sqrt(A), A being the allowance.
	Percentile float64
	// MinDelay and MaxDelay bound the adaptive delay. MinDelay is 1 ms by
	// default ([DefaultMinDelay]); MaxDelay 0, the default, is no bound. A bound
	// above keeps hedging alive when a bad replica drags the percentile up.
	MinDelay, MaxDelay time.Duration

	// Tied makes unary calls tied ones ("The Tail at Scale"): a copy of a call that no
	// server has begun to serve after TieDelay goes to another, and when one of them
	// starts its handler the copies still queued elsewhere are cancelled. So a call waits
	// in the shortest of several queues and yet is served once. Once a handler has
	// started, Delay or Percentile, if given, hedge it should it be slow; the delay
	// counts from that start. A Delay of 0 then hedges nothing.
	//
	// The servers must say when they start, as those of package shedding do, and the
	// connection needs [StatsHandler]. Without either the copy is a hedge, sent at the tie
	// delay, which the Budget has to bound. Streams, and calls of [Do], are not tied.
	Tied bool
	// TieDelay is the time between the copies of a tied call, at least 0. 0, the
	// default, is twice the smoothed one-way delay to a server that need not queue the
	// call, with four times its deviation on top, in [1 ms, 100 ms]: 1 ms until it is
	// known, from 8 calls. Much below it both of two idle servers start.
	TieDelay time.Duration

	// NonFatalCodes are the status codes after which a sibling may still
	// succeed: such a failure sends the next attempt at once, and the call fails
	// only when all attempts have. Any other code ends the call, unless it is the
	// refusal of an overloaded bobtail server and another attempt is in flight. OK is
	// not allowed in it. Default none.
	NonFatalCodes []codes.Code

	// Budget pays for the attempts after the first. nil is no bound, as in A6:
	// then a slow spell of the server doubles its load.
	Budget Budget
	// Throttle is A6's retryThrottling; nil is none.
	Throttle Throttle

	// Shadow decides and reports everything and sends no extra attempt.
	Shadow bool

	// Report, if not nil, is told once about each call that was eligible, on the
	// caller's goroutine and under no lock, when the call is decided. It must
	// not keep the context.
	Report func(context.Context, Report)
}

// Budget is a bound on extra attempts, shared by all that make them; package
// retry has the one to use.
type Budget interface {
	// Deposit records a first attempt.
	Deposit(now time.Time)
	// TryWithdraw takes the token of one extra attempt, if there is one.
	TryWithdraw(now time.Time) bool
	// GiveBack returns a token taken at the given time whose attempt was never
	// sent.
	GiveBack(withdrawn time.Time)
}

// Leveler is a [Budget] that can tell how near it is to its bound, as that of package
// retry does. Hedging then makes the last tokens last: see [Config.Percentile]; and
// hedges that are due for the first time leave a quarter of sqrt(allowance), rounded
// down, to those that are asked for again.
type Leveler interface {
	Budget
	// Level returns how many extra attempts could be sent now, and how many the
	// window that ends now pays for in all.
	Level(now time.Time) (balance, allowance float64)
}

// Throttle is A6's retryThrottling, shared by all calls to one server name.
type Throttle interface {
	// Allow reports whether extra attempts may be sent at all.
	Allow() bool
	// Success records an attempt that succeeded.
	Success()
	// Failure records one that failed with a non-fatal code, or that was told by
	// the server not to try again.
	Failure()
}

// Reason says why a hedge that was due was not sent.
type Reason string

// The reasons for which a hedge is not sent.
const (
	// NoBudget: the budget had no token; the hedge is asked for again later.
	NoBudget Reason = "budget"
	// NoBackend: every backend had an attempt of this call in flight.
	NoBackend Reason = "no other backend"
	// NoTime: less time remained than half of the method's attempts take.
	NoTime Reason = "deadline"
	// Pushback: the server asked for no further attempts.
	Pushback Reason = "pushback"
	// Throttled: too many attempts fail (A6 retryThrottling).
	Throttled Reason = "throttle"
	// InShadow: the mode is shadow.
	InShadow Reason = "shadow"
	// Nested: the call is made while serving an attempt that is itself extra.
	Nested Reason = "nested"
)

// Report is what hedging did for one call.
type Report struct {
	// Method is the full method name; empty from [Do].
	Method string
	// Attempts is how many attempts had been sent when the call was decided.
	Attempts int
	// Withdrawn is how many of them were cancelled because another attempt of the tied
	// call had been started by its server.
	Withdrawn int
	// Winner is the number of the attempt whose result was returned, from 1; 0
	// if the caller's context ended the call first.
	Winner int
	// Delay is the hedging delay in force; negative if it was not known yet. Of a tied
	// call it is the tie delay until a handler has started.
	Delay time.Duration
	// Suppressed is why the last hedge that was due was not sent, or "".
	Suppressed Reason
	// SuppressedAt is when that was; the zero time if Suppressed is "".
	SuppressedAt time.Time
}

// Validate reports every fault of the configuration, joined.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("hedging: "+format, args...)) }
	if c.MaxAttempts < 2 {
		bad("max attempts %d, want at least 2", c.MaxAttempts)
	}
	if c.Delay < 0 {
		bad("delay %v, want at least 0", c.Delay)
	}
	// Written so that NaN is a fault too.
	if c.Percentile != 0 && !(c.Percentile > 0 && c.Percentile < 100) {
		bad("percentile %v, want (0, 100)", c.Percentile)
	}
	if c.MinDelay < 0 {
		bad("min delay %v, want at least 0", c.MinDelay)
	}
	if c.MaxDelay < 0 {
		bad("max delay %v, want at least 0", c.MaxDelay)
	}
	if c.MaxDelay > 0 && c.minDelay() > c.MaxDelay {
		bad("max delay %v, want at least the min delay %v", c.MaxDelay, c.minDelay())
	}
	if c.Percentile == 0 && (c.MinDelay != 0 || c.MaxDelay != 0) {
		bad("min and max delay bound an adaptive delay, want a percentile beside them")
	}
	if c.TieDelay < 0 {
		bad("tie delay %v, want at least 0", c.TieDelay)
	}
	if c.TieDelay > 0 && !c.Tied {
		bad("tie delay %v, want tied beside it", c.TieDelay)
	}
	for _, code := range c.NonFatalCodes {
		if code == codes.OK || code > codes.Unauthenticated {
			bad("non-fatal code %v, want a code other than OK", code)
		}
	}
	return errors.Join(errs...)
}

func (c Config) minDelay() time.Duration {
	if c.MinDelay > 0 {
		return c.MinDelay
	}
	return DefaultMinDelay
}
