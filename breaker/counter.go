package breaker

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"
)

// windowParts is how many parts the rolling window has. The oldest is forgotten as a whole.
const windowParts = 10

// counter is one gobreaker, which counts what is good and what is bad, and what has been
// read off it when it tripped. Every request that it is given has ended.
type counter struct {
	cb *gobreaker.CircuitBreaker[struct{}]
	// has says that the ratio was reached. An atomic because it is set under gobreaker's
	// lock and read without. at is written once, before it.
	has    atomic.Bool
	at     gobreaker.Counts
	forced bool // set only while nobody else knows the counter
}

// newCounter returns a counter that trips at a ratio of bad ones, and is half-open after
// timeout.
func newCounter(cfg *Config, ratio float64, timeout time.Duration) *counter {
	c := &counter{}
	minimum := uint32(cfg.MinimumCalls)
	c.cb = gobreaker.NewCircuitBreaker[struct{}](gobreaker.Settings{
		MaxRequests: closeAfter,
		Interval:    cfg.Window,
		// Rounded up: gobreaker makes the interval a multiple of it.
		BucketPeriod: (cfg.Window + windowParts - 1) / windowParts,
		Timeout:      timeout,
		// Called under gobreaker's lock, at each bad one.
		ReadyToTrip: func(n gobreaker.Counts) bool {
			if c.forced || c.has.Load() {
				return true
			}
			// Not n.Requests, which has those that are being recorded at this moment.
			calls := n.TotalSuccesses + n.TotalFailures
			// A quotient, because it rounds as the ratio did when it was read: 0.07 x 100 is more than 7.
			if calls < minimum || float64(n.TotalFailures)/float64(calls) < ratio {
				return false
			}
			c.at = n
			c.has.Store(true)
			return true
		},
	})
	return c
}

var errBad = errors.New("bad")

// Package-level, or each call would allocate one.
func good() (struct{}, error) { return struct{}{}, nil }
func bad() (struct{}, error)  { return struct{}{}, errBad }

// record counts one. If it is refused, the counter has tripped.
func (c *counter) record(ok bool) {
	if ok {
		_, _ = c.cb.Execute(good)
	} else {
		_, _ = c.cb.Execute(bad)
	}
}

// tripped reports whether the ratio was reached, and with what counts. A nil counter is
// never.
func (c *counter) tripped() (gobreaker.Counts, bool) {
	if c == nil || !c.has.Load() {
		return gobreaker.Counts{}, false
	}
	return c.at, true
}

// open makes a new counter open.
func (c *counter) open() {
	c.forced = true
	c.record(false)
	c.forced = false
}

func (c *counter) state() gobreaker.State { return c.cb.State() }

// successes are those of a half-open counter, all in a row: a failure would have opened it.
func (c *counter) successes() int { return int(c.cb.Counts().ConsecutiveSuccesses) }
