package bobtail

import (
	"math"
	"time"

	"github.com/bobtail-rpc/bobtail/breaker"
	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/retry"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// The readers of the objects of a policy document, one for each feature. Each returns
// nil if the object has a fault, which is then recorded.

// whole is the range of the integers in [lo, hi].
func whole(lo, hi float64) func(float64) bool {
	return func(v float64) bool { return v >= lo && v <= hi && v == math.Trunc(v) }
}

// within is a range of durations, ends included.
func within(lo, hi time.Duration) func(time.Duration) bool {
	return func(d time.Duration) bool { return d >= lo && d <= hi }
}

func isRatio(v float64) bool { return v > 0 && v <= 1 }

func (r *reader) throttling() *retry.ThrottleConfig {
	defer r.End()
	var c retry.ThrottleConfig
	var ok1, ok2 bool
	c.MaxTokens, ok1 = r.number("maxTokens", "(0, 1000]", func(v float64) bool { return v > 0 && v <= 1000 })
	c.TokenRatio, ok2 = r.number("tokenRatio", "at least 0.001", func(v float64) bool { return v >= 0.001 })
	r.Need("maxTokens", "tokenRatio")
	if !ok1 || !ok2 {
		return nil
	}
	if _, err := retry.NewThrottle(c); err != nil {
		r.Fault("", "%w", err) // finer than it can count
		return nil
	}
	return &c
}

func (r *reader) extraLoad() *retry.BudgetConfig {
	defer r.End()
	var c retry.BudgetConfig
	var ok bool
	c.Max, ok = r.number("max", "[0.000001, 1]", func(v float64) bool { return v >= 1e-6 && v <= 1 })
	c.MinPerSecond, _ = r.number("minPerSecond", "[0, 1000000]", func(v float64) bool { return v >= 0 && v <= 1e6 })
	c.Window, _ = r.duration("window", "[0.010s, 3600s]", func(d time.Duration) bool {
		return d >= 10*time.Millisecond && d <= time.Hour
	})
	r.Need("max")
	if !ok {
		return nil
	}
	if _, err := retry.NewBudget(c, time.Time{}); err != nil {
		r.Fault("", "%w", err) // finer than it can count
		return nil
	}
	return &c
}

func (r *reader) hedging() *hedging.Config {
	defer r.End()
	before := r.Faults()
	var c hedging.Config
	n, _ := r.number("maxAttempts", "an integer of at least 2", func(v float64) bool {
		return v >= 2 && v == math.Trunc(v)
	})
	r.Need("maxAttempts")
	c.MaxAttempts = int(min(n, hedging.MaxAttemptsCap))
	c.Delay, _ = r.duration("hedgingDelay", "at least 0s", atLeast0)
	c.NonFatalCodes = r.codes("nonFatalStatusCodes")
	c.Percentile, _ = r.number("hedgingPercentile", "(0, 100)", func(v float64) bool { return v > 0 && v < 100 })
	var hasMin, hasMax bool
	c.MinDelay, hasMin = r.duration("minHedgingDelay", "more than 0s", above0)
	c.MaxDelay, hasMax = r.duration("maxHedgingDelay", "more than 0s", above0)
	if !r.Has("hedgingPercentile") {
		if hasMin {
			r.Fault("minHedgingDelay", "bounds an adaptive delay, want hedgingPercentile beside it")
		}
		if hasMax {
			r.Fault("maxHedgingDelay", "bounds an adaptive delay, want hedgingPercentile beside it")
		}
	}
	if floor := max(c.MinDelay, 0); hasMax && floor == 0 && c.MaxDelay < hedging.DefaultMinDelay {
		r.Fault("maxHedgingDelay", "%s, want at least the default minHedgingDelay %s", seconds(c.MaxDelay), seconds(hedging.DefaultMinDelay))
	} else if hasMax && c.MaxDelay < floor {
		r.Fault("maxHedgingDelay", "%s, want at least minHedgingDelay %s", seconds(c.MaxDelay), seconds(floor))
	}
	c.Tied, _ = r.Key("tied").Bool()
	c.TieDelay, _ = r.duration("tieDelay", "more than 0s", above0)
	if r.Has("tieDelay") && !c.Tied {
		r.Fault("tieDelay", "of what? want \"tied\": true beside it")
	}
	if r.Faults() > before {
		return nil
	}
	return &c
}

func (r *reader) retrying() *retry.Config {
	before := r.Faults()
	var c retry.Config
	n, _ := r.number("maxAttempts", "an integer of at least 2", whole(2, math.MaxInt32))
	c.MaxAttempts = int(min(n, retry.MaxAttemptsCap))
	c.Backoff.Initial, _ = r.duration("initialBackoff", "more than 0s", above0)
	c.Backoff.Max, _ = r.duration("maxBackoff", "more than 0s", above0)
	c.Backoff.Multiplier, _ = r.number("backoffMultiplier", "more than 0", func(v float64) bool { return v > 0 })
	c.RetryableCodes = r.codes("retryableStatusCodes")
	if s, ok := r.text("jitter"); ok {
		j, err := retry.ParseJitter(s)
		if err != nil {
			r.Fault("jitter", "%q, want \"full\", \"equal\", \"decorrelated\" or \"grpc\"", s)
		}
		c.Backoff.Jitter = j
	}
	limit, limited := r.duration("perAttemptTimeout", "more than 0s", above0)
	// What grpc-java calls it.
	java, also := r.duration("perAttemptRecvTimeout", "more than 0s", above0)
	if r.Has("perAttemptTimeout") && r.Has("perAttemptRecvTimeout") {
		r.Fault("perAttemptRecvTimeout", "another name of perAttemptTimeout, want one of them")
	}
	c.AttemptTimeout = max(limit, java)
	r.Need("maxAttempts", "initialBackoff", "maxBackoff", "backoffMultiplier")
	switch {
	case !r.Has("retryableStatusCodes") && !limited && !also:
		r.Need("retryableStatusCodes")
	case len(c.RetryableCodes) == 0 && c.AttemptTimeout == 0 && r.Faults() == before:
		r.Fault("retryableStatusCodes", "empty, want at least one code, or perAttemptTimeout beside it")
	}
	r.End()
	return sound(r, before, &c)
}

func (r *reader) breaking() *breaker.Config {
	before := r.Faults()
	var c breaker.Config
	c.FailureRatio, _ = r.number("failureRatio", "(0, 1]", isRatio)
	n, _ := r.number("minimumCalls", "an integer in [1, 1000000]", whole(1, 1e6))
	c.MinimumCalls = int(n)
	c.Window, _ = r.duration("window", "[0.1s, 3600s]", within(100*time.Millisecond, time.Hour))
	c.OpenFor, _ = r.duration("openFor", "[0.01s, 3600s]", within(10*time.Millisecond, time.Hour))
	c.SlowCallDuration, _ = r.duration("slowCallDuration", "more than 0s", above0)
	c.SlowCallRatio, _ = r.number("slowCallRatio", "(0, 1]", isRatio)
	if r.Has("slowCallRatio") && !r.Has("slowCallDuration") {
		r.Fault("slowCallRatio", "of calls slower than what? want slowCallDuration beside it")
	}
	r.End()
	return sound(r, before, &c)
}

func (r *reader) adaptive() *breaker.ThrottleConfig {
	before := r.Faults()
	var c breaker.ThrottleConfig
	c.K, _ = r.number("k", "[1.1, 100]", func(v float64) bool { return v >= 1.1 && v <= 100 })
	c.Window, _ = r.duration("window", "[1s, 3600s]", within(time.Second, time.Hour))
	r.End()
	return sound(r, before, &c)
}

func (r *reader) limiting() *shedding.RateLimitConfig {
	before := r.Faults()
	var c shedding.RateLimitConfig
	c.PerSecond, _ = r.number("perSecond", "(0, 1000000000]", func(v float64) bool { return v > 0 && v <= 1e9 })
	n, _ := r.number("burst", "an integer in [1, 1000000000]", whole(1, 1e9))
	c.Burst = int(n)
	r.Need("perSecond")
	r.End()
	return sound(r, before, &c)
}

// sound returns c if nothing was found wrong with its object since before, and the
// package that will use it agrees.
func sound[C interface{ Validate() error }](r *reader, before int, c *C) *C {
	if r.Faults() == before {
		if err := (*c).Validate(); err != nil {
			r.Fault("", "%w", err)
		}
	}
	if r.Faults() > before {
		return nil
	}
	return c
}
