package shedding

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// ErrRateLimited is found by errors.Is in the error of a call whose turn would have come
// too late for its deadline. Its status is RESOURCE_EXHAUSTED, its reason RATE_LIMITED,
// its RetryInfo the time until that turn.
var ErrRateLimited = errors.New("shedding: rate limited")

// maxPerSecond and maxBurst are where the bucket still counts: at 1e9 a second, turns are
// a nanosecond apart, which is the clock's last digit.
const (
	maxPerSecond = 1e9
	maxBurst     = 1_000_000_000
)

// RateLimitConfig says how many calls may be made.
type RateLimitConfig struct {
	// PerSecond is the rate in the long run, in (0, 1e9]. No default.
	PerSecond float64

	// Burst is how many calls may go at once after a pause, in [1, 1e9]: in any span of
	// time t at most Burst + PerSecond x t calls go. The default, 0, is a tenth of
	// PerSecond, rounded up, because callers are uneven: what comes within a tenth of a
	// second is not spread out, and no second has more than 1.1 times the rate.
	Burst int

	// Method is the full method name that refusals carry, "" for none.
	Method string
}

// Validate reports every fault of the configuration, joined.
func (c RateLimitConfig) Validate() error {
	var errs []error
	// Written so that NaN is a fault too.
	if !(c.PerSecond > 0 && c.PerSecond <= maxPerSecond) {
		errs = append(errs, fmt.Errorf("shedding: rate limit perSecond %v, want (0, %d]", c.PerSecond, int(maxPerSecond)))
	}
	if c.Burst < 0 || c.Burst > maxBurst {
		errs = append(errs, fmt.Errorf("shedding: rate limit burst %d, want [1, %d], or 0 for the default", c.Burst, maxBurst))
	}
	return errors.Join(errs...)
}

func (c RateLimitConfig) burst() int {
	if c.Burst > 0 {
		return c.Burst
	}
	return int(math.Ceil(c.PerSecond / 10))
}

// RateLimit gives each call a turn at a steady rate. It is a token bucket that begins full,
// and a queue before it: a call that finds no token waits behind those that came before it,
// and as many go in any span of time as the bucket has tokens for. When one of those who
// wait gives up, all behind it move up.
//
// The bucket is a rate.Limiter; its Reservations are not used. One that is cancelled while
// later ones stand is lost, so callers who give up together would leave a debt behind that
// nobody is waiting for, and that all who come next must work off.
//
// A RateLimit is made by [NewRateLimit] and is safe for concurrent use. [RateLimit.Wait]
// obeys it; [RateLimit.Shadow] tells what it would do.
type RateLimit struct {
	method    string
	perSecond float64

	mu     sync.Mutex // guards the rest
	bucket *rate.Limiter
	queue  list.List // of *waiter; while there are any, the bucket has no whole token
	// latest is the latest time that anybody has brought: the queue has been served, and
	// the bucket filled, until then.
	latest time.Time
}

// waiter is a call that waits for its turn.
type waiter struct {
	place  *list.Element
	called bool // its turn has come; guarded by the limit's mu
	// news says that it has, or that nobody is before it any more. It holds one, because
	// whoever tells does so under the lock.
	news chan struct{}
}

func (w *waiter) tell() {
	select {
	case w.news <- struct{}{}:
	default:
	}
}

// NewRateLimit returns a rate limit with all its tokens. All faults of cfg are reported
// together.
func NewRateLimit(cfg RateLimitConfig) (*RateLimit, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &RateLimit{
		method: cfg.Method, perSecond: cfg.PerSecond,
		bucket: rate.NewLimiter(rate.Limit(cfg.PerSecond), cfg.burst()),
	}, nil
}

// Reconfigure changes rate and burst. Calls that wait go on waiting, at the new rate; what
// has been used of the burst stays used.
func (l *RateLimit) Reconfigure(cfg RateLimitConfig) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.settle(time.Now())
	l.bucket.SetLimitAt(now, rate.Limit(cfg.PerSecond))
	l.bucket.SetBurstAt(now, cfg.burst())
	l.perSecond = cfg.PerSecond
	if first := l.queue.Front(); first != nil {
		first.Value.(*waiter).tell() // its turn comes at another time
	}
	return nil
}

// decision is what becomes of a call.
type decision uint8

const (
	admit   decision = iota // it goes now
	hold                    // it goes after turn.wait, or sooner
	refuse                  // it would go after turn.wait, at its deadline or later
	expired                 // its deadline has passed
)

// turn is the answer to one call.
type turn struct {
	decision
	wait   time.Duration
	waiter *waiter // of a call that is held
}

// reserve decides about a call that arrives now; a zero deadline is none. Only a call that
// is admitted takes a token, and only one that is held joins the queue.
func (l *RateLimit) reserve(now, deadline time.Time) turn {
	l.mu.Lock()
	defer l.mu.Unlock()
	now = l.settle(now)
	patience := rate.InfDuration // three centuries
	if !deadline.IsZero() {
		if patience = deadline.Sub(now); patience <= 0 {
			return turn{decision: expired}
		}
	}
	if l.take(now) {
		return turn{decision: admit}
	}
	wait := l.until(l.queue.Len() + 1)
	if wait >= patience {
		return turn{decision: refuse, wait: wait}
	}
	w := &waiter{news: make(chan struct{}, 1)}
	w.place = l.queue.PushBack(w)
	return turn{decision: hold, wait: wait, waiter: w}
}

// take takes a token if one is there that nobody waits for. The caller holds mu and has
// settled.
func (l *RateLimit) take(now time.Time) bool {
	return l.queue.Len() == 0 && l.bucket.AllowN(now, 1)
}

// settle brings the limit up to now: it calls those of the queue whose turn has come, each
// at its own time, however late anybody looks. It returns now, or the latest time that was
// brought: a caller that was held up between the clock and the lock brings one that has
// passed, and the bucket would go back to it and count the time since a second time. The
// caller holds mu.
func (l *RateLimit) settle(now time.Time) time.Time {
	for l.queue.Len() > 0 {
		at := l.latest.Add(l.until(1))
		if at.After(now) {
			break
		}
		// Not AllowN: at may be half a nanosecond early.
		l.bucket.ReserveN(at, 1)
		l.latest = at
		l.leave(l.queue.Front().Value.(*waiter)).called = true
	}
	if now.After(l.latest) {
		l.latest = now
	}
	return l.latest
}

// until is how long after latest the bucket will have had the given number of tokens, all
// that it has now among them. The caller holds mu.
func (l *RateLimit) until(tokens int) time.Duration {
	d := math.Round((float64(tokens) - l.bucket.TokensAt(l.latest)) / l.perSecond * float64(time.Second))
	if d >= float64(rate.InfDuration) {
		return rate.InfDuration
	}
	return time.Duration(d)
}

// leave takes a waiter out of the queue, if it is in it, and tells it and whoever is now at
// the head. The caller holds mu.
func (l *RateLimit) leave(w *waiter) *waiter {
	first := l.queue.Front() == w.place
	l.queue.Remove(w.place)
	w.tell()
	if next := l.queue.Front(); first && next != nil {
		next.Value.(*waiter).tell()
	}
	return w
}

// asks tells a waiter whether its turn has come, and, if it is the first in the queue, how
// long it might take; the others are told when they are.
func (l *RateLimit) asks(w *waiter, now time.Time) (called, first bool, wait time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.settle(now)
	return w.called, l.queue.Front() == w.place, l.until(1)
}

// givesUp takes a waiter out whose call has ended. One that has been called is out already,
// and its turn is gone.
func (l *RateLimit) givesUp(w *waiter) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.leave(w)
}

// Wait waits until it is the call's turn, and returns nil then. When the turn would come
// at the deadline of ctx or later, it returns at once, with an error that is
// [ErrRateLimited]. When ctx ends before the turn comes, or has ended, the error is the
// status of that end, CANCELLED or DEADLINE_EXCEEDED. A call that does not live to see its
// turn costs nobody one.
//
// Without a deadline it waits as long as it takes, and those who wait are not bounded in
// number: give calls a deadline, or put a [Bulkhead] before the limit.
func (l *RateLimit) Wait(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return status.FromContextError(err).Err()
	}
	deadline, _ := ctx.Deadline()
	t := l.reserve(time.Now(), deadline)
	switch t.decision {
	case admit:
		return nil
	case refuse:
		return l.Refusal(t.wait)
	case expired:
		return status.FromContextError(context.DeadlineExceeded).Err()
	}
	return l.stand(ctx, t)
}

// stand stands in the queue until the turn comes or ctx ends.
func (l *RateLimit) stand(ctx context.Context, t turn) error {
	timer := time.NewTimer(t.wait)
	defer timer.Stop()
	for {
		select {
		case <-t.waiter.news:
		case <-timer.C:
		case <-ctx.Done():
		}
		// Asked in all cases: when several are ready, select chooses by lot.
		if err := ctx.Err(); err != nil {
			l.givesUp(t.waiter)
			return status.FromContextError(err).Err()
		}
		called, first, wait := l.asks(t.waiter, time.Now())
		if called {
			return nil
		}
		if first {
			timer.Reset(wait)
		}
	}
}

// Shadow decides about a call as [RateLimit.Wait] does and does not wait: it returns how
// long the call would have waited and the error with which it would have been refused. It
// is for a limit that is tried out, whose calls all go at once.
//
// For its figures to be those of Wait, a call with a deadline that would have waited takes
// its turn, so that the next one meets a queue; one that would have been refused takes
// none. A call without a deadline takes a token only if one is there: it would never be
// refused, and its caller, made to wait, would come no more often than the limit lets it.
// So the queue is never longer than the longest deadline, and a limit that is put in force
// after its trial has nothing worse to work off. What Shadow cannot know is that a call
// might have ended while it waited, and given its turn back.
func (l *RateLimit) Shadow(ctx context.Context) (wait time.Duration, err error) {
	if ctx.Err() != nil {
		return 0, nil // it fails without us
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		return l.Probe(time.Now()), nil
	}
	t := l.reserve(time.Now(), deadline)
	if t.decision == refuse {
		err = l.Refusal(t.wait)
	}
	return t.wait, err
}

// Probe takes a token if one is there and returns 0; else it takes nothing and returns
// how long a call would wait that came now. It does not queue: however many are told to
// wait, each is told the same. So it tells which calls would have waited at all; which of
// them would have been refused, [RateLimit.Shadow] does.
func (l *RateLimit) Probe(now time.Time) (wait time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now = l.settle(now)
	if l.take(now) {
		return 0
	}
	return l.until(l.queue.Len() + 1)
}

// Refusal returns the error with which Wait refuses a call whose turn would come after
// the given time.
func (l *RateLimit) Refusal(after time.Duration) error {
	return &outcome.Refusal{
		Cause: ErrRateLimited, Code: codes.ResourceExhausted, Reason: "RATE_LIMITED",
		Method: l.method, After: after,
	}
}
