package latency

import "sync/atomic"

const (
	// liveSlots is how many parts the window is cut into. Six lose at most a
	// sixth of the window at a time, for 6 KiB each.
	liveSlots = 6

	// ringSlots has one more than are live. The slot that a writer reuses is thus
	// one that no caller less than a slot behind it still wants to read.
	ringSlots = liveSlots + 1

	// zeroing is the epoch of a slot that a writer has claimed and not yet
	// cleared.
	zeroing = -1

	// A bucket is one word, so that one addition counts a sample and one load
	// reads both counts: completed ones in the low half, censored ones in the
	// high half. A window would have to see 140 million samples per second for
	// the halves to meet.
	oneCompleted = 1
	oneCensored  = 1 << 32
)

// split returns the two counts of a bucket.
func split(word uint64) (completed, censored uint64) {
	return word % oneCensored, word / oneCensored
}

// counts are the samples of the window by time and duration: a ring of slots,
// of which the one for epoch e, the e-th stretch of width, is ring[e%ringSlots].
type counts struct {
	width int64 // of a slot, ns, > 0
	ring  [ringSlots]slot
}

// slot holds the samples of one epoch.
type slot struct {
	// epoch says whose counts these are. An atomic because it is how the first
	// writer of an epoch claims the slot, without a lock, from the epoch that
	// used it a turn of the ring ago.
	epoch   atomic.Int64
	buckets [buckets]atomic.Uint64
}

// epoch returns the epoch of time at, in ns since the tracker's start. Epochs
// count from ringSlots so that a slot never used, whose epoch is 0, is as
// expired as it can be. What comes before the start counts as the start.
func (c *counts) epoch(at int64) int64 {
	return ringSlots + max(at, 0)/c.width
}

// add counts one sample of bucket b at time at.
func (c *counts) add(at int64, b int, censored bool) {
	e := c.epoch(at)
	s := &c.ring[e%ringSlots]
	if s.epoch.Load() != e {
		if s = c.turn(e); s == nil {
			return
		}
	}
	// The slot can be given to a later epoch before this addition, if the
	// goroutine sleeps here for a window: one sample will then count once more.
	if censored {
		s.buckets[b].Add(oneCensored)
	} else {
		s.buckets[b].Add(oneCompleted)
	}
}

// turn returns the slot to count a sample of epoch e in, when the ring has not
// arrived at e. The first writer claims the slot and clears it. Those who come
// meanwhile do not wait; they count in the slot before, as if their sample had
// come a little sooner (and leave a slot sooner), and after a long silence, when that one is out of date
// too, they clear it in turn. It returns nil for a sample that is older than the
// window (or when all live slots are being cleared at once, by as many
// goroutines, each of them suspended in the microsecond that this takes).
func (c *counts) turn(e int64) *slot {
	for k := e; k > e-liveSlots; k-- {
		s := &c.ring[k%ringSlots]
		have := s.epoch.Load()
		if have == k {
			return s
		}
		if have > k {
			return nil
		}
		// What is there is a whole turn older than k and so no longer live.
		if have != zeroing && s.epoch.CompareAndSwap(have, zeroing) {
			for b := range s.buckets {
				s.buckets[b].Store(0)
			}
			s.epoch.Store(k)
			return s
		}
	}
	return nil
}

// sum adds up, per bucket, the slots that are live at time at and returns the
// number of samples in them. It is false when a slot was reused under its hands,
// which takes a caller whose time is more than a slot behind the others'.
func (c *counts) sum(at int64, into *[buckets]uint64) (n uint64, ok bool) {
	clear(into[:])
	e := c.epoch(at)
	for i := range c.ring {
		s := &c.ring[i]
		have := s.epoch.Load()
		// Slots of the future are live: their writers' clocks are a bit ahead.
		if have <= e-liveSlots {
			continue
		}
		for b := range s.buckets {
			into[b] += s.buckets[b].Load()
		}
		if s.epoch.Load() != have {
			return 0, false
		}
	}
	for _, word := range into {
		completed, censored := split(word)
		n += completed + censored
	}
	return n, true
}
