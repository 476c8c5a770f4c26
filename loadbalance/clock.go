package loadbalance

import (
	"sync/atomic"
	"time"
)

const (
	// slack is how old a time may be that was not read for its pick. It is little beside
	// any call over a network.
	slack = 200 * time.Microsecond
	// ticks: one pick in 2^ticks reads the time for the others.
	ticks = 4
	// steady is how many readings in a row must come within slack to set a clock going. By
	// chance that is so at 400,000 picks a second, and hardly ever at half of that, where
	// to read the time for each is half a percent of a processor.
	steady = 64
)

// A clock is the time that one pick in 16 reads, for those that need not read it themselves: that
// takes 25 ns, a fourth of a pick and its end. It goes only while picks come so often that
// there is a reading in each slack, and no latency is taken by it.
//
// After a pause it stands still until the next reading. That is no harm to the few picks before
// it: to them the endpoints are as they were before the pause. But an attempt seems to have been
// sent before the pause, so the end of one is remembered: see elapsed.
//
// The zero value stands. All methods are safe for concurrent use, and take no lock.
type clock struct {
	_ [64]byte // on a cache line of its own, as what else picks read is never written

	// Atomics because all picks read them, and one in 16 writes them.
	going  atomic.Bool
	read   atomic.Int64 // the newest reading
	woke   atomic.Int64 // the reading that ended the last pause, or set the clock going
	streak atomic.Int64 // readings in a row, while it stands

	_ [64]byte
}

// at returns a time for a pick with some random bits; false if the pick has to read it.
func (c *clock) at(bits uint64) (time.Duration, bool) {
	if !passes(bits, ticks) || !c.going.Load() {
		return 0, false
	}
	return time.Duration(c.read.Load()), true
}

// tick takes a reading by a pick with some random bits.
func (c *clock) tick(now time.Duration, bits uint64) {
	if passes(bits, ticks) {
		return
	}
	late := now-time.Duration(c.read.Load()) > slack
	switch going := c.going.Load(); {
	case going && late:
		c.stop(now)
	case late:
		c.streak.Store(0)
	case !going && c.streak.Add(1) >= steady:
		c.streak.Store(0)
		c.woke.Store(int64(now))
		c.going.Store(true)
	}
	c.read.Store(int64(now))
}

// stop ends a pause. It does so before there is a reading to go by, so that who sees that sees
// the end of the pause.
func (c *clock) stop(now time.Duration) {
	c.woke.Store(int64(now))
	c.going.Store(false)
}

// elapsed returns the least time for which an attempt can have been out that ends now, and was
// sent at a time from at.
func (c *clock) elapsed(sent, now time.Duration) time.Duration {
	// If nobody has read the time since a pause the attempt may have been sent after that.
	if c.going.Load() && now-time.Duration(c.read.Load()) > slack {
		c.stop(now)
	}
	return max(0, now-max(sent, time.Duration(c.woke.Load())))
}
