package latency

import (
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"pgregory.net/rapid"

	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

var epoch0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// Without censoring the Tracker agrees with a sorted slice to 2%, and says ok
// exactly when there are as many samples as it documents.
func TestQuantileAgainstSortedSlice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rnd := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		n := rapid.IntRange(1, 5000).Draw(t, "n")
		// The middle of the distribution, from 100 us to 1 s, in ns.
		middle := math.Pow(10, rapid.Float64Range(5, 9).Draw(t, "log10 middle"))
		law := rapid.SampledFrom([]string{"lognormal", "exponential", "uniform", "bimodal", "constant"}).Draw(t, "law")
		sigma := rapid.Float64Range(0.1, 2).Draw(t, "sigma")
		model := make([]time.Duration, n)
		for i := range model {
			var x float64
			switch law {
			case "lognormal":
				x = middle * math.Exp(sigma*rnd.NormFloat64())
			case "exponential":
				x = middle * rnd.ExpFloat64()
			case "uniform":
				x = middle * 2 * rnd.Float64()
			case "bimodal":
				x = middle * (1 + rnd.Float64()/10)
				if rnd.Float64() < 0.05 {
					x *= 30
				}
			case "constant":
				x = middle
			}
			model[i] = time.Duration(min(max(x, 10e3), 60e9))
		}
		tracker := New(DefaultWindow, epoch0)
		for _, d := range model {
			tracker.Record(epoch0, d, false)
		}
		slices.Sort(model)
		now := epoch0.Add(time.Second)
		for _, q := range []float64{0.001, 0.05, 0.5, rapid.Float64Range(0.001, 0.999).Draw(t, "q"), 0.95, 0.99, 0.999} {
			d, ok := tracker.Quantile(now, q)
			if want := math.Pow(q, float64(n)) < 0.025; ok != want {
				t.Fatalf("p%v of %d samples: ok is %v, want %v", 100*q, n, ok, want)
			}
			if !ok {
				continue
			}
			// The sample of rank qn, rounded up. Where qn is whole to within the
			// resolution of a probability, the next one is as good.
			rank := int(math.Ceil(q*float64(n) - 1e-6))
			next := min(int(math.Ceil(q*float64(n)+1e-6)), n)
			if e := relative(d, model[rank-1]); math.Abs(e) > 0.02 && math.Abs(relative(d, model[next-1])) > 0.02 {
				t.Fatalf("p%v of %d samples: %v, want %v, off by %.2f%%", 100*q, n, d, model[rank-1], 100*e)
			}
		}
	})
}

func TestQuantileOutOfRange(t *testing.T) {
	tracker := New(0, epoch0)
	for range 10_000 {
		tracker.Record(epoch0, time.Millisecond, false)
	}
	for _, q := range []float64{math.NaN(), math.Inf(-1), -1, 0, 1, 1.5, math.Inf(1)} {
		if d, ok := tracker.Quantile(epoch0, q); ok {
			t.Errorf("Quantile(%v) = %v, want false", q, d)
		}
	}
	// What is outside the range of durations is clamped to it.
	for _, tc := range []struct{ d, want time.Duration }{
		{-1, shortest}, {0, shortest}, {time.Microsecond, shortest}, {time.Hour, longest},
	} {
		tracker := New(0, epoch0)
		for range 100 {
			tracker.Record(epoch0, tc.d, false)
		}
		if d, ok := tracker.Quantile(epoch0, 0.5); !ok || d != tc.want {
			t.Errorf("the median of %v is %v, %v; want %v", tc.d, d, ok, tc.want)
		}
	}
}

func TestUpTo(t *testing.T) {
	tracker := New(30*time.Second, epoch0)
	if p, ok := tracker.UpTo(epoch0, time.Second); ok {
		t.Errorf("%v of no attempts, want false", p)
	}
	for i := range 1000 { // 1 to 100 ms, evenly
		tracker.Record(epoch0, time.Millisecond+time.Duration(i)*99*time.Microsecond, false)
	}
	tracker.Record(epoch0, 2*longest, true)
	for _, tt := range []struct {
		d    time.Duration
		want float64
	}{
		{-1, 0}, {0, 0}, {time.Millisecond / 2, 0}, {10 * time.Millisecond, 9. / 99}, {50 * time.Millisecond, 49. / 99},
		{99 * time.Millisecond, 98. / 99}, {time.Second, 1}, {3 * longest, 1},
	} {
		// The one that was cut off moves nothing by more than a thousandth.
		if p, ok := tracker.UpTo(epoch0, tt.d); !ok || math.Abs(p-tt.want) > 0.004 {
			t.Errorf("%v up to %v, want %v", p, tt.d, tt.want)
		}
	}
	for _, q := range []float64{0.1, 0.5, 0.9, 0.99} {
		d, _ := tracker.Quantile(epoch0, q)
		if p, ok := tracker.UpTo(epoch0, d); !ok || math.Abs(p-q) > 0.02 {
			t.Errorf("%v up to the %v-quantile %v", p, q, d)
		}
	}
	if p, ok := tracker.UpTo(epoch0.Add(time.Minute), time.Second); ok {
		t.Errorf("%v of attempts that are forgotten, want false", p)
	}
}

// A story: a tracker is born, learns, sees the service change, falls silent.
func TestWindow(t *testing.T) {
	const ms = time.Millisecond
	tracker := New(30*time.Second, epoch0)
	now := epoch0
	median := func() time.Duration {
		d, ok := tracker.Quantile(now, 0.5)
		if !ok {
			return 0
		}
		return d.Round(ms)
	}
	expect := func(what string, want time.Duration) {
		t.Helper()
		if got := median(); got != want {
			t.Errorf("%s: the median is %v, want %v", what, got, want)
		}
	}
	record := func(n int, d, every time.Duration) {
		for range n {
			now = now.Add(every)
			tracker.Record(now, d, false)
		}
	}
	expect("a new tracker", 0)
	record(5, 10*ms, 0)
	expect("five samples", 0)
	// The curve of five is 0 ms old, so only their doubling brings a new one.
	record(4, 10*ms, 0)
	expect("nine samples at once", 0)
	record(1, 10*ms, 0)
	expect("ten samples at once", 10*ms)

	record(1000, 10*ms, 20*ms) // 20 s
	expect("after 20 s", 10*ms)
	record(900, 20*ms, 20*ms) // 18 s: fewer than the others, until those leave
	expect("18 s after the change", 20*ms)

	now = now.Add(24 * time.Second)
	expect("24 s of silence", 20*ms)
	now = now.Add(7 * time.Second)
	expect("31 s of silence", 0)
	now = now.Add(5 * time.Hour)
	expect("5 h of silence", 0)
	record(6, 30*ms, 0)
	expect("six samples after it", 30*ms)

	// A caller whose clock is a little behind gets the same answer.
	now = now.Add(-3 * time.Second)
	expect("3 s back", 30*ms)
	record(6, 40*ms, 0)
	now = now.Add(4 * time.Second)
	record(1, 40*ms, 0)
	expect("late samples", 40*ms)
}

// A curve that outlived the window is not read, even while the caller who should
// replace it is busy.
func TestExpiredCurveWhileRefreshing(t *testing.T) {
	tracker := New(30*time.Second, epoch0)
	for range 100 {
		tracker.Record(epoch0, time.Millisecond, false)
	}
	if _, ok := tracker.Quantile(epoch0, 0.5); !ok {
		t.Fatal("no median of 100 samples")
	}
	tracker.refreshing.Store(true) // as if another caller were at it
	if _, ok := tracker.Quantile(epoch0.Add(29*time.Second), 0.5); !ok {
		t.Error("after 29 s: not ok, want the old curve")
	}
	if d, ok := tracker.Quantile(epoch0.Add(30*time.Second), 0.5); ok {
		t.Errorf("after 30 s: %v from a curve of which nothing is left", d)
	}
}

// Readers run against refreshes that follow each other without a pause, so that
// a reader who is suspended in mid-search wakes up in a curve written later. The
// samples of a curve are all 1 ms or all 1 s long, and curves g and g+2, which
// share a buffer, are of different kinds: any other answer is a mixture of two.
func TestReadersNeverSeeTornCurves(t *testing.T) {
	const (
		window = 300 * time.Nanosecond // so that a refresh is due every nanosecond
		step   = 2 * window            // and each finds a new window
	)
	rounds := 20_000
	if testing.Short() {
		rounds = 400
	}
	tracker := New(window, epoch0)
	var clock atomic.Int64 // ns
	var done atomic.Bool
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for !done.Load() {
				d, ok := tracker.Quantile(epoch0.Add(time.Duration(clock.Load())), 0.5)
				if ok && math.Abs(relative(d, time.Millisecond)) > 0.02 && math.Abs(relative(d, time.Second)) > 0.02 {
					t.Errorf("the median is %v, want 1 ms or 1 s", d)
					return
				}
			}
		})
	}
	for i := range rounds {
		d := time.Millisecond
		if i/2%2 == 1 {
			d = time.Second
		}
		now := epoch0.Add(time.Duration(i) * step)
		for range 8 {
			tracker.Record(now, d, false)
		}
		tracker.Quantile(now, 0.5)
		clock.Store(int64(now.Sub(epoch0)))
	}
	done.Store(true)
	wg.Wait()
}

// Whatever interleaves, once the writers are done the curve has every sample.
func TestConcurrentRecordAndQuantile(t *testing.T) {
	const goroutines = 8
	each := 20_000
	if testing.Short() {
		each = 3000
	}
	tracker := New(30*time.Second, epoch0)
	var clock atomic.Int64
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 1))
			for range each {
				// All of the test takes 24 s, so that no sample leaves.
				now := epoch0.Add(time.Duration(clock.Add(1)) * 24 * time.Second / time.Duration(goroutines*each))
				tracker.Record(now, time.Duration(rnd.ExpFloat64()*1e6), rnd.IntN(20) == 0)
				if d, ok := tracker.Quantile(now, 0.95); ok && (d < shortest || d > time.Second) {
					t.Errorf("p95 = %v", d)
				}
			}
		})
	}
	wg.Wait()
	tracker.refresh(int64(25 * time.Second))
	got := tracker.curves[tracker.published.Load()%2].samples.Load()
	if got != uint64(goroutines*each) {
		t.Errorf("the last curve has %d samples, want %d", got, goroutines*each)
	}
}

// All calls, refreshes and rotations included, cost no allocation.
func TestNoAllocations(t *testing.T) {
	tracker := New(30*time.Second, epoch0)
	now := epoch0
	curve, slot := tracker.published.Load(), tracker.counts.epoch(0)
	allocs := testenv.Allocs(50, func() {
		now = now.Add(400 * time.Millisecond)
		tracker.Record(now, 5*time.Millisecond, false)
		tracker.Record(now, 7*time.Millisecond, true)
		tracker.Quantile(now, 0.95)
		tracker.Quantile(now, 0.999)
		tracker.UpTo(now, 6*time.Millisecond)
	})
	if allocs != 0 {
		t.Errorf("%v allocations, want 0", allocs)
	}
	refreshes := tracker.published.Load() - curve
	turns := tracker.counts.epoch(int64(now.Sub(epoch0))) - slot
	if refreshes < 250 || turns < 2*ringSlots {
		t.Errorf("%d refreshes and %d turns: too few to tell", refreshes, turns)
	}
}

// The doc of Tracker promises 64 KiB.
func TestMemory(t *testing.T) {
	if got := unsafe.Sizeof(Tracker{}); got > 64<<10 {
		t.Errorf("a Tracker takes %d bytes, more than 64 KiB", got)
	}
	t.Logf("%d bytes", unsafe.Sizeof(Tracker{}))
}
