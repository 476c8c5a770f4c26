package retry

import (
	"math"
	"time"
)

// core decides, for one call, whether and when to try again. It implements the retries
// of gRFC A6 and knows no clock, no random source and no gRPC: the same ends give the same
// decisions.
type core struct {
	max     int // attempts in all, the first included
	number  int // of the newest attempt
	backoff Backoff
	// n counts the retries since the start or the server's last pushback, and last is
	// the newest wait of DecorrelatedJitter.
	n    int
	last time.Duration
}

// noTime stands for a time that does not come.
const noTime = time.Duration(math.MaxInt64)

// failure is the end of an attempt that did not succeed.
type failure struct {
	// refused is set if the call was refused locally, below us.
	refused bool
	// retryable is set if the code is, or the attempt timed out, or was never sent.
	retryable bool
	// stop and wait are the server's pushback: no further attempt, or one after
	// exactly this long. hasWait tells a pushback of 0 from none.
	stop    bool
	hasWait bool
	wait    time.Duration
	// atLeast is the server's RetryInfo: it asks for no less.
	atLeast time.Duration
}

// gate is asked last, when everything else speaks for another attempt after the given
// wait. It reserves the budget's token if it returns "".
type gate interface {
	permit(wait time.Duration) Reason
}

// failed decides what follows the failure of the newest attempt: another attempt after
// wait, or none, for the given reason. remains is the time that the call has left, noTime
// without a deadline; median what half of the method's attempts take, 0 if unknown; u
// a random number in [0, 1).
func (c *core) failed(f failure, remains, median time.Duration, u float64, g gate) (wait time.Duration, why Reason) {
	switch {
	case f.refused:
		return 0, Refused
	case f.stop:
		// A6: "the server asking the client not to retry at all". It says so even of a
		// code that would not have been.
		return 0, Pushback
	case !f.retryable:
		return 0, NotRetryable
	case c.number >= c.max:
		// A6: "If the client has already exhausted its maxAttempts, the call will not be
		// retried even if the server says to retry after a given delay."
		return 0, Exhausted
	case f.hasWait:
		// "retry attempt is scheduled after exactly that delay ... the backoff is reset".
		wait, c.n, c.last = f.wait, 0, 0
	default:
		wait = max(c.next(u), f.atLeast)
	}
	// A wait that leaves no time for an answer is a wait for nothing.
	if wait >= remains || remains-wait < median {
		return 0, NoTime
	}
	if why := g.permit(wait); why != "" {
		return 0, why
	}
	c.number++
	return wait, ""
}

// next is the wait before the next retry, by Backoff.
func (c *core) next(u float64) time.Duration {
	b := c.backoff
	if b.Jitter == DecorrelatedJitter {
		low, high := float64(b.Initial), 3*float64(max(c.last, b.Initial))
		c.last = time.Duration(min(float64(b.Max), low+u*(high-low)))
		return c.last
	}
	v := b.cap(c.n)
	c.n++
	switch b.Jitter {
	case EqualJitter:
		v = v/2 + u*v/2
	case GRPCJitter:
		v *= 0.8 + 0.4*u
	default:
		v *= u
	}
	return time.Duration(min(v, math.MaxInt64/2))
}

// cap is min(Max, Initial x Multiplier^n), in nanoseconds.
func (b Backoff) cap(n int) float64 {
	return min(float64(b.Max), float64(b.Initial)*math.Pow(b.Multiplier, float64(n)))
}
