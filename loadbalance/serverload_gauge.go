package loadbalance

import (
	"math"
	"math/bits"
	"sync/atomic"
	"time"
)

const (
	// gaugeLevels is how many levels of RIF are told apart: 0 to 7 each for itself, then
	// four to the octave, up to 2^20 and what is above that.
	gaugeLevels = 8 + 17*4
	// gaugeSamples is how many latencies each level remembers, the newest, and how many a
	// median rests on if so many are known. It makes 20 KiB for the whole gauge. With
	// 16 the p99 of the first case of TestSharedFleet is 2% higher, with 64 the same.
	gaugeSamples = 32
	// gaugeRecent is for how long a latency is preferred to older ones.
	gaugeRecent = 5 * time.Second
	// inviteEvery is how often a server that has ended nothing of late asks for a request: as
	// often as a probe that is not used grows too old.
	inviteEvery = probeAge
)

// A gauge is the load of a server: its requests in flight (RIF), and the latencies of
// recent requests, each kept under the RIF that it met when it arrived (Wydrowski et al.,
// "Load is not what you should balance: Introducing Prequal", NSDI 2024, section 4). It
// is a deterministic core: the time is an argument, a duration since an origin of the
// caller's.
//
// The zero value is ready. All methods are safe for concurrent use and take no lock.
type gauge struct {
	rif    atomic.Int64
	due    atomic.Int64 // when the next client may be invited
	last   atomic.Int64 // when the last latency was recorded, to a second
	levels [gaugeLevels]level
}

// A level is the latencies of requests that arrived at about the same RIF. A sample is
// one word, so that a reader never sees half of one: when it was taken in its high half,
// in milliseconds, and the latency in its low half, a float32 of nanoseconds; 0 is none.
// The milliseconds wrap after 49 days: a level that rests as long may pass for recent.
type level struct {
	next    atomic.Uint32
	samples [gaugeSamples]atomic.Uint64
}

// levelOf returns the level of a RIF.
func levelOf(rif int64) int {
	if rif < 8 {
		return int(max(0, rif))
	}
	octave := bits.Len64(uint64(rif)) - 1
	quarter := int(rif>>(octave-2)) & 3
	return min(8+(octave-3)*4+quarter, gaugeLevels-1)
}

// begin counts a request in and returns the RIF that it meets, itself not included.
func (g *gauge) begin() (met int64) { return g.rif.Add(1) - 1 }

// release takes back what begin counted.
func (g *gauge) release() { g.rif.Add(-1) }

// record notes the latency of a request that met so many others.
func (g *gauge) record(now, elapsed time.Duration, met int64) {
	l := &g.levels[levelOf(met)]
	if now-time.Duration(g.last.Load()) >= time.Second {
		g.last.Store(int64(now)) // seldom, so that requests do not contend for it
	}
	at := l.next.Add(1) % gaugeSamples
	l.samples[at].Store(uint64(millis(now))<<32 | uint64(math.Float32bits(float32(max(1, elapsed)))))
}

func millis(d time.Duration) uint32 { return uint32(d / time.Millisecond) }

// load returns the RIF, and the latency to expect of a request that arrives now: the
// median of the recent ones that met a RIF nearest to this, 32 if as many are known. If
// there is none that is recent, older ones serve; 0 if there is none at all.
func (g *gauge) load(now time.Duration) report {
	r := report{rif: max(0, g.rif.Load())}
	var found [gaugeSamples]float32
	n := g.nearest(now, levelOf(r.rif), gaugeRecent, &found)
	if n == 0 {
		n = g.nearest(now, levelOf(r.rif), math.MaxInt64, &found)
	}
	if n > 0 {
		r.latency = time.Duration(found[n/2])
	}
	return r
}

// invite reports whether to ask who gets this report for a request: nothing is in flight, none
// has ended of late, and nobody has been asked within inviteEvery.
func (g *gauge) invite(now time.Duration) bool {
	if g.rif.Load() > 0 || now-time.Duration(g.last.Load()) <= gaugeRecent {
		return false
	}
	due := g.due.Load()
	return now >= time.Duration(due) && g.due.CompareAndSwap(due, int64(now+inviteEvery))
}

// nearest gathers, in ascending order, samples that are not older than age, from the
// level at and then from those further and further from it; it returns how many.
func (g *gauge) nearest(now time.Duration, at int, age time.Duration, found *[gaugeSamples]float32) (n int) {
	oldest := uint32(min(age/time.Millisecond, math.MaxUint32))
	for d := range gaugeLevels {
		for _, i := range [...]int{at - d, at + d} {
			if i >= 0 && i < gaugeLevels && (d > 0 || i == at) {
				n = g.levels[i].gather(millis(now), oldest, found, n)
			}
			if d == 0 {
				break
			}
		}
		if n == gaugeSamples {
			break
		}
	}
	return n
}

// gather sorts samples into found, which holds n, until it is full.
func (l *level) gather(now, age uint32, found *[gaugeSamples]float32, n int) int {
	newest := l.next.Load()
	if newest == 0 {
		return n
	}
	for back := range uint32(gaugeSamples) {
		if n == gaugeSamples {
			break
		}
		w := l.samples[(newest-back)%gaugeSamples].Load()
		if w == 0 || now-uint32(w>>32) > age {
			if back < 2 {
				continue // it is being written
			}
			break // what follows is older still
		}
		x := math.Float32frombits(uint32(w))
		i := n
		for ; i > 0 && found[i-1] > x; i-- {
			found[i] = found[i-1]
		}
		found[i] = x
		n++
	}
	return n
}
