package retry

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/latency"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// Retrier retries the calls of one method to one server: a policy, and what has been
// learned of the method's latency. Make one with [New]. It is safe for concurrent use
// and owns no goroutine.
type Retrier struct {
	cfg       Config
	attempts  int
	retryable uint32 // a bit for each code
	// latency is nil with UnsentOnly: what was never sent is worth sending whatever the
	// time, and a tracker takes 64 KiB for each method that somebody calls.
	latency *latency.Tracker
	start   time.Time
	// random is rand.Float64 but in tests.
	random func() float64
}

// New returns a Retrier. A fault of cfg is an error that names the field, its value
// and its bound.
func New(cfg Config) (*Retrier, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return build(cfg), nil
}

// With returns a Retrier with another configuration that keeps, and goes on sharing,
// what r has learned of the method's latency.
func (r *Retrier) With(cfg Config) (*Retrier, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	with := build(cfg)
	if r.latency != nil {
		with.latency, with.start = r.latency, r.start
	}
	return with, nil
}

// Counts reports whether an attempt that ended with code counts as a failure for
// Throttle: for those who make a call of the method without r.
func (r *Retrier) Counts(code codes.Code) bool {
	return !r.cfg.UnsentOnly && code < 32 && r.retryable&(1<<code) != 0
}

func build(cfg Config) *Retrier {
	now := time.Now()
	r := &Retrier{cfg: cfg, attempts: min(cfg.MaxAttempts, MaxAttemptsCap), start: now, random: rand.Float64}
	if !cfg.UnsentOnly {
		r.latency = latency.New(latency.DefaultWindow, now)
	}
	for _, code := range cfg.RetryableCodes {
		r.retryable |= 1 << code
	}
	return r
}

// now is time.Now for half the price: it reads the monotonic clock alone.
func (r *Retrier) now() time.Time { return r.start.Add(time.Since(r.start)) }

// deposit records a first attempt.
func (r *Retrier) deposit(now time.Time) {
	if r.cfg.Budget != nil {
		r.cfg.Budget.Deposit(now)
	}
}

// call is one call under way: what its attempts share. It is the gate of its core, and
// belongs to one goroutine at a time.
type call struct {
	core
	r   *Retrier
	ctx context.Context // the caller's
	now time.Time       // of the newest event

	begun time.Time // of the newest attempt
	// unmeasured is set when the time of this attempt is not the server's alone.
	unmeasured bool

	waited   time.Duration
	reserved bool // the budget keeps a token for the next attempt
	attempts attempt.Call
	// current is the newest attempt; first is where the first one lives, so that a call
	// that succeeds at once allocates no other.
	current *running
	first   running
}

// running is one attempt and the context that it runs under.
type running struct {
	context.Context
	attempt attempt.Attempt
	peer    peer.Peer // set by grpc if it opened a stream
	// over is set when grpc has ended the call that it made for this attempt. An atomic
	// because an interceptor below may make that call on another goroutine.
	over atomic.Bool
}

// unsent reports whether an attempt that failed with code provably never reached a server:
// grpc has made the call with the options that we gave it, has ended it, and had opened
// no stream; and no balancer of ours has named a backend. Where an interceptor below keeps
// the options to itself there is no proof.
func (a *running) unsent(code codes.Code) bool {
	return code == codes.Unavailable && a.over.Load() && a.peer.Addr == nil && a.attempt.Endpoint() == ""
}

// Value answers the picker that asks which attempt this is.
func (a *running) Value(key any) any {
	if _, ok := key.(attempt.Key); ok {
		return &a.attempt
	}
	return a.Context.Value(key)
}

// begin prepares the first attempt.
func (c *call) begin(r *Retrier, ctx context.Context, method string, streaming bool) {
	c.r, c.ctx, c.now = r, ctx, r.now()
	c.begun = c.now
	r.deposit(c.now)
	c.core = core{max: r.attempts, number: 1, backoff: r.cfg.Backoff}
	c.attempts.Method = method
	c.current = &c.first
	c.first.Context = ctx
	c.first.attempt.Init(&c.attempts, 1, attempt.First)
	c.first.attempt.Streaming = streaming
}

// end is how an attempt ended.
type end struct {
	err     error
	code    codes.Code // of err
	trailer metadata.MD
	// timedOut is set if its own time had run out, unsent if it provably never reached
	// a server, single if its request cannot be sent twice.
	timedOut, unsent, single bool
}

// succeeded records that the newest attempt was answered, at c.now.
func (c *call) succeeded() {
	c.current.attempt.End()
	c.record(false)
	if c.r.cfg.Throttle != nil {
		c.r.cfg.Throttle.Success()
	}
}

// record notes how long the newest attempt took, or, if it is censored, that it would have
// taken longer.
func (c *call) record(censored bool) {
	if c.r.latency != nil && !c.unmeasured {
		c.r.latency.Record(c.now, c.now.Sub(c.begun), censored)
	}
}

// ended records that the newest attempt failed, at c.now. It returns how long to wait
// for another, or why there is none.
func (c *call) ended(e end) (wait time.Duration, why Reason) {
	r := c.r
	c.current.attempt.End()
	f := failure{refused: outcome.IsRefusal(e.err)}
	if !f.refused {
		// Only an answer tells how long an answer takes; everything else, that it takes
		// longer.
		if !e.unsent {
			c.record(outcome.OfCode(e.code) != outcome.Success)
		}
		p := outcome.ReadPushback(e.trailer)
		f.stop, f.hasWait, f.wait = p.Stop, p.Given && !p.Stop, p.Delay
		f.atLeast, _ = outcome.RetryDelay(e.err)
		listed := e.timedOut && !r.cfg.UnsentOnly || r.Counts(e.code)
		// What ends because the caller's own context has ended is the caller's doing,
		// whatever the code.
		if c.ctx.Err() == nil {
			f.retryable = e.unsent || listed
			if t := r.cfg.Throttle; t != nil && (f.retryable || f.stop) {
				t.Failure()
			}
			f.retryable = f.retryable && !e.single
		}
	}
	remains := noTime
	if d, ok := c.ctx.Deadline(); ok {
		remains = d.Sub(c.now)
	}
	var median time.Duration
	if r.latency != nil {
		median, _ = r.latency.Quantile(c.now, 0.5)
	}
	return c.failed(f, remains, median, r.random(), c)
}

// permit implements gate.
func (c *call) permit(wait time.Duration) Reason {
	c.reserved = false
	cfg := &c.r.cfg
	switch {
	case attempt.IsExtra(c.ctx):
		return Nested
	case cfg.Throttle != nil && !cfg.Throttle.Allow():
		return Throttled
	case cfg.Budget == nil && cfg.Shadow:
		return InShadow
	case cfg.Budget == nil:
		return ""
	case cfg.Shadow:
		// Asked, and not charged: a method in shadow must not take the tokens of those
		// that are on.
		if cfg.Budget.Balance(c.now) < 1 {
			return NoBudget
		}
		return InShadow
	case wait > cfg.Budget.Window():
		// Some servers ask for hours. A token kept for so long would be missing from every
		// window until then: so it is asked for now, and again when it is due.
		if cfg.Budget.Balance(c.now) < 1 {
			return NoBudget
		}
	case !cfg.Budget.TryReserve(c.now):
		return NoBudget
	default:
		c.reserved = true
	}
	return ""
}

// again waits and prepares the next attempt. It returns why there is none after all.
func (c *call) again(wait time.Duration) Reason {
	failed := c.now
	if wait > 0 {
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-c.ctx.Done():
			t.Stop()
		}
	}
	c.now = c.r.now()
	c.waited += c.now.Sub(failed)
	if why := c.due(); why != "" {
		c.number-- // it is not made
		return why
	}
	c.begun, c.unmeasured = c.now, false
	next := &running{}
	next.attempt.Init(&c.attempts, c.number, attempt.Retry)
	next.attempt.Streaming = c.first.attempt.Streaming
	next.Context = next.attempt.Outgoing(c.ctx)
	c.current = next
	return ""
}

// due settles with the budget when the next attempt's time has come, or the caller has
// left.
func (c *call) due() Reason {
	b := c.r.cfg.Budget
	switch left := c.ctx.Err() != nil; {
	case left && c.reserved:
		b.Release()
		return CallEnded
	case left:
		return CallEnded
	case c.reserved:
		b.SendReserved(c.now)
	case b != nil && !b.TryWithdraw(c.now):
		return NoBudget
	}
	return ""
}

// report tells the configuration's hook what became of the call.
func (c *call) report(why Reason, code codes.Code) {
	if c.r.cfg.Report != nil {
		c.r.cfg.Report(c.ctx, Report{Method: c.attempts.Method, Attempts: c.number, Waited: c.waited, Stopped: why, Code: code})
	}
}
