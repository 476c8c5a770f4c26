package loadbalance

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// Shares follow weights at any load, for few endpoints too, where each pair holds a heavy
// one and its light peer is always at hand.
func TestSharesFollowWeightsAtAnyLoad(t *testing.T) {
	for _, weights := range [][]float64{{9, 1}, {.1, 1}, {1000, 1}, {5, 1, 1}, {.1, 1, 1, 1, 1}} {
		var sum float64
		for _, w := range weights {
			sum += w
		}
		for _, inFlight := range []float64{.5, 2, 10} {
			s := &sim{n: len(weights), rate: inFlight * 100, policy: &underTest{p: *weighing(weights...)}, until: 60 * time.Second,
				service: func(r *rand.Rand, _ int, _ time.Duration) time.Duration { return time.Duration(10e6 * r.ExpFloat64()) }}
			s.run(1)
			for i, w := range weights {
				if got, want := s.share(i, 0, 60), 100*w/sum; math.Abs(got-want) > .25*want+1 {
					t.Errorf("%v with %v in flight: endpoint %d has %.1f%%, want about %.1f%%", weights, inFlight, i, got, want)
				}
			}
		}
	}
}
