package latency

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// total returns the number of samples in slots of epoch from or later.
func (c *counts) total(from int64) (n uint64) {
	for i := range c.ring {
		s := &c.ring[i]
		if s.epoch.Load() < from {
			continue
		}
		for b := range s.buckets {
			completed, censored := split(s.buckets[b].Load())
			n += completed + censored
		}
	}
	return n
}

// Samples leave a sixth of the window at a time, and what is older than the
// window does not come in.
func TestCountsMove(t *testing.T) {
	c := &counts{width: 5}
	var sums [buckets]uint64
	for i, step := range []struct {
		at   int64 // when samples are added
		add  int
		seen int64 // when they are counted
		want uint64
	}{
		{-700, 1, 0, 1}, // before the start counts as the start
		{4, 2, 4, 3},
		{5, 4, 5, 7},
		{29, 8, 29, 15},   // the sixth slot
		{29, 0, 30, 12},   // time alone moves the window: the first slot is out
		{30, 16, 30, 28},  // the seventh slot
		{35, 32, 35, 56},  // reuses the first slot; the second is out
		{34, 64, 35, 120}, // late, but in the window
		{34, 0, 34, 124},  // a reader a slot behind still finds the second slot
		{5, 128, 35, 120}, // a late sample for a slot that is out
		{0, 256, 35, 120}, // and for one that is in use again: dropped
		{35, 0, 70, 0},    // silence
		{9000, 1, 9000, 1},
		{-7, 1, 9000, 1}, // the start is long past
	} {
		for range step.add {
			c.add(step.at, 3, i%2 == 1)
		}
		if n, ok := c.sum(step.seen, &sums); !ok || n != step.want {
			t.Errorf("step %d: at %d %d samples (%v), want %d", i, step.seen, n, ok, step.want)
		}
	}
}

// A reader whose clock is so far behind that its slots are being reused is told.
func TestSumNoticesReuse(t *testing.T) {
	c := &counts{width: 1}
	c.add(0, 1, false)
	var sums [buckets]uint64
	// A slot reused between the two looks of sum is a slot whose epoch changes
	// while its buckets are read, so let another goroutine change it all the time.
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for at := int64(0); !stop.Load(); at++ {
			c.add(at, 1, false)
		}
	})
	noticed := false
	for range 100_000 {
		if _, ok := c.sum(0, &sums); !ok {
			noticed = true
			break
		}
	}
	stop.Store(true)
	wg.Wait()
	if !noticed {
		t.Error("sum never noticed that a slot was reused under its hands")
	}
}

// Many writers cross the boundaries of slots together, over slots that are full
// of old samples, after a long silence too. Each sample is counted once.
func TestRotationLosesNothing(t *testing.T) {
	const (
		width   = int64(time.Second)
		writers = 4
		samples = 600 // per round, over three slots
	)
	rounds := 10_000
	if testing.Short() {
		rounds = 200
	}
	c := &counts{width: width}
	for round := range rounds {
		begin := int64(round) * 1000 * width // a silence of 1000 slots
		var clock atomic.Int64
		var ready atomic.Int32
		var wg sync.WaitGroup
		for range writers {
			wg.Go(func() {
				// Started one after the other, the first would be done before the last.
				for ready.Add(1); ready.Load() < writers; {
					runtime.Gosched()
				}
				for i := clock.Add(1); i <= samples; i = clock.Add(1) {
					// The bucket that is cleared first or the one cleared last: few, so
					// that an addition that is not atomic loses some too.
					c.add(begin+i*3*width/samples-1, int(i)%2*overflow, i%3 == 0)
				}
			})
		}
		wg.Wait()
		// Right after a silence a sample may be counted in a slot before its own.
		if n := c.total(c.epoch(begin) - liveSlots + 1); n != samples {
			t.Fatalf("round %d: %d samples counted, want %d", round, n, samples)
		}
		// Leave dirt in every slot for the next round.
		for k := range int64(ringSlots) {
			for b := range buckets {
				c.add(begin+(10+k)*width, b, false)
			}
		}
	}
}
