package load

import (
	"math"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// The schedule is one stream: however it is cut, the same moments come out.
func TestArrivalsCut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		kind := rapid.SampledFrom([]string{"poisson", "uniform"}).Draw(t, "kind")
		whole := NewArrivals(seed, 1000, kind).Next(time.Second)
		a := NewArrivals(seed, 1000, kind)
		var cut []time.Duration
		for begun := time.Duration(0); begun < time.Second; {
			length := min(time.Duration(rapid.IntRange(1, 1e9).Draw(t, "length")), time.Second-begun)
			for _, at := range a.Next(length) {
				if at < 0 || at >= length {
					t.Fatalf("arrival at %v of a block of %v", at, length)
				}
				cut = append(cut, begun+at)
			}
			begun += length
		}
		if len(cut) != len(whole) {
			t.Fatalf("%d arrivals in pieces, %d in one", len(cut), len(whole))
		}
		for i := range cut {
			// Cutting rounds to nanoseconds.
			if d := cut[i] - whole[i]; d.Abs() > 10 {
				t.Fatalf("arrival %d at %v in pieces, at %v in one", i, cut[i], whole[i])
			}
		}
	})
}

func TestArrivals(t *testing.T) {
	const n = 100_000
	poisson := NewArrivals(1, 1000, "poisson").Next(n * time.Millisecond)
	if !slices.IsSorted(poisson) {
		t.Error("not in order")
	}
	// A Poisson count's variance is its mean: 100,000, to within five standard errors.
	if d := math.Abs(float64(len(poisson)) - n); d > 5*math.Sqrt(n) {
		t.Errorf("%d arrivals in %d ms at 1,000/s", len(poisson), n)
	}
	// and of the gaps, e^-1 are longer than the mean.
	long := 0
	for i := range poisson[1:] {
		if poisson[i+1]-poisson[i] > time.Millisecond {
			long++
		}
	}
	if share := float64(long) / n; math.Abs(share-1/math.E) > 5*math.Sqrt(0.24/n) {
		t.Errorf("a share of %.4f of the gaps is longer than the mean, want 1/e", share)
	}
	if slices.Equal(poisson, NewArrivals(2, 1000, "poisson").Next(n*time.Millisecond)) {
		t.Error("another seed, the same schedule")
	}
	uniform := NewArrivals(1, 4, "uniform").Next(time.Second)
	if want := []time.Duration{250e6, 500e6, 750e6}; !slices.Equal(uniform, want) {
		t.Errorf("uniform: %v, want %v", uniform, want)
	}
}
