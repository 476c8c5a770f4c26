package retry

import (
	"context"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

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
	latency   *latency.Tracker
	start     time.Time
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
	with.latency, with.start = r.latency, r.start
	return with, nil
}

func build(cfg Config) *Retrier {
	now := time.Now()
	r := &Retrier{cfg: cfg, attempts: min(cfg.MaxAttempts, MaxAttemptsCap),
		latency: latency.New(latency.DefaultWindow, now), start: now, random: rand.Float64}
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
	if !c.unmeasured {
		c.r.latency.Record(c.now, c.now.Sub(c.begun), false)
	}
	if c.r.cfg.Throttle != nil {
		c.r.cfg.Throttle.Success()
	}
	c.report("", codes.OK)
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
		if !e.unsent && !c.unmeasured {
			r.latency.Record(c.now, c.now.Sub(c.begun), outcome.OfCode(e.code) != outcome.Success)
		}
		p := outcome.ReadPushback(e.trailer)
		f.stop, f.hasWait, f.wait = p.Stop, p.Given && !p.Stop, p.Delay
		f.atLeast, _ = outcome.RetryDelay(e.err)
		listed := e.timedOut || e.code < 32 && r.retryable&(1<<e.code) != 0
		// What ends because the caller's own context has ended is the caller's doing,
		// whatever the code.
		if c.ctx.Err() == nil {
			f.retryable = !e.single && (e.unsent || listed && !r.cfg.UnsentOnly)
			if t := r.cfg.Throttle; t != nil && (f.retryable || f.stop) {
				t.Failure()
			}
		}
	}
	remains := noTime
	if d, ok := c.ctx.Deadline(); ok {
		remains = d.Sub(c.now)
	}
	median, _ := r.latency.Quantile(c.now, 0.5)
	return c.failed(f, remains, median, r.random(), c)
}

// permit implements gate.
func (c *call) permit() Reason {
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
	case !cfg.Budget.TryReserve(c.now):
		return NoBudget
	}
	return ""
}

// again waits and prepares the next attempt; false if the caller's context ended first.
func (c *call) again(wait time.Duration) bool {
	paid := c.r.cfg.Budget != nil
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
	if c.ctx.Err() != nil {
		c.number-- // it is not made
		if paid {
			c.r.cfg.Budget.Release()
		}
		return false
	}
	if paid {
		c.r.cfg.Budget.SendReserved(c.now)
	}
	c.begun, c.unmeasured = c.now, false
	next := &running{}
	next.attempt.Init(&c.attempts, c.number, attempt.Retry)
	next.attempt.Streaming = c.first.attempt.Streaming
	next.Context = next.attempt.Outgoing(c.ctx)
	c.current = next
	return true
}

// report tells the configuration's hook what became of the call.
func (c *call) report(why Reason, code codes.Code) {
	if c.r.cfg.Report != nil {
		c.r.cfg.Report(c.ctx, Report{Method: c.attempts.Method, Attempts: c.number, Waited: c.waited, Stopped: why, Code: code})
	}
}
