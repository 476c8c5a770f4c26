package load

import (
	"math/rand/v2"
	"time"
)

// Arrivals says when requests begin: a schedule fixed by the seed before
// anything is sent, so that a slow answer delays no later request.
//
// Poisson arrivals are those of many independent users; uniform ones come at
// equal distances. Not safe for concurrent use.
type Arrivals struct {
	rng     *rand.Rand // nil: uniform
	gap     float64    // mean, in nanoseconds
	elapsed float64    // moment of the next arrival, in nanoseconds from the block's start
}

// NewArrivals begins the schedule of rate requests per second. kind is
// "poisson" or "uniform".
func NewArrivals(seed uint64, rate float64, kind string) *Arrivals {
	a := &Arrivals{gap: float64(time.Second) / rate}
	if kind != "uniform" {
		// The second word keeps the schedule independent of the service times,
		// which are drawn from the same seed.
		a.rng = rand.New(rand.NewPCG(seed, 0x5c4ed01e))
	}
	a.elapsed = a.next()
	return a
}

// Next returns the arrivals in the next span of the given length, as distances
// from its start, in order.
func (a *Arrivals) Next(length time.Duration) []time.Duration {
	var at []time.Duration
	for a.elapsed < float64(length) {
		at = append(at, time.Duration(a.elapsed))
		a.elapsed += a.next()
	}
	a.elapsed -= float64(length)
	return at
}

func (a *Arrivals) next() float64 {
	if a.rng == nil {
		return a.gap
	}
	return a.rng.ExpFloat64() * a.gap
}
