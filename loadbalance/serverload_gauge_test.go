package loadbalance

import (
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Small RIFs have a level each, greater ones share one within a quarter of an octave.
func TestLevels(t *testing.T) {
	for _, tc := range []struct {
		rif  int64
		want int
	}{{-1, 0}, {0, 0}, {1, 1}, {7, 7}, {8, 8}, {9, 8}, {10, 9}, {15, 11}, {16, 12}, {19, 12}, {20, 13}, {1 << 19, 72}, {1<<20 - 1, 75}, {1 << 20, 75}, {1 << 60, 75}} {
		if got := levelOf(tc.rif); got != tc.want {
			t.Errorf("RIF %d: level %d, want %d", tc.rif, got, tc.want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		x := rapid.Int64Range(0, 1<<21).Draw(t, "rif")
		if a, b := levelOf(x), levelOf(x+1); b < a || b > a+1 || b >= gaugeLevels {
			t.Fatalf("RIF %d: level %d, RIF %d: level %d", x, a, x+1, b)
		}
	})
}

// What a server says of its load, step by step.
func TestGauge(t *testing.T) {
	var g gauge
	record := func(now time.Duration, met int64, latencies ...time.Duration) func() {
		return func() {
			for _, l := range latencies {
				g.record(now, l, met)
			}
		}
	}
	set := func(rif int64) func() { return func() { g.rif.Store(rif) } }
	many := func(l time.Duration) (ls []time.Duration) {
		for range gaugeSamples {
			ls = append(ls, l)
		}
		return ls
	}
	for i, step := range []struct {
		do      func()
		now     time.Duration
		rif     int64
		latency time.Duration
	}{
		{set(0), 0, 0, 0},
		{record(0, 0, 1*ms, 9*ms, 2*ms), 0, 0, 2 * ms},
		{set(3), 0, 3, 2 * ms}, // the nearest known RIF
		{record(0, 3, many(50*ms)...), 0, 3, 50 * ms},
		{set(0), 0, 0, 50 * ms}, // 3 of its own are too few to tell: those of RIF 3 count too
		{record(0, 0, many(2*ms)...), 0, 0, 2 * ms},
		{set(2), 0, 2, 50 * ms}, // 3 is nearer than 0
		{set(1), 0, 1, 2 * ms},
		{record(gaugeRecent+time.Second, 40, many(80*ms)...), gaugeRecent + time.Second, 1, 80 * ms}, // recent before near
		{record(gaugeRecent+time.Second, 1, 5*ms), gaugeRecent + time.Second, 1, 80 * ms},
		{func() {}, time.Hour, 1, 2 * ms}, // all are old: the nearest
		{set(-1), time.Hour, 0, 2 * ms},
	} {
		step.do()
		if got, want := g.load(step.now), (report{rif: step.rif, latency: step.latency}); got != want {
			t.Errorf("step %d: %+v, want %+v", i, got, want)
		}
	}
	if g.begin() != -1 || g.begin() != 0 || g.rif.Load() != 1 {
		t.Error("begin counts the request itself as met")
	}
}

// With one level in use the latency is the median of its latest samples.
func TestGaugeMedian(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var g gauge
		all := rapid.SliceOfN(rapid.IntRange(1, 1000), 1, 60).Draw(t, "ms")
		for i, x := range all {
			g.record(time.Duration(i)*ms, time.Duration(x)*ms, 5)
			recent := slices.Clone(all[max(0, i+1-gaugeSamples) : i+1])
			slices.Sort(recent)
			want := time.Duration(recent[len(recent)/2]) * ms
			// A float32 has 24 bits.
			if got := g.load(time.Duration(i) * ms).latency; (got - want).Abs() > want>>22 {
				t.Fatalf("after %v: %v, want %v", all[:i+1], got, want)
			}
		}
	})
}

func TestGaugeConcurrently(t *testing.T) {
	var g gauge
	var wg sync.WaitGroup
	for w := range uint64(4) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(w, 1))
			for i := range 1000 {
				met := g.begin()
				g.record(time.Duration(i)*ms, time.Duration(1+r.IntN(9))*ms, met)
				if l := g.load(time.Duration(i) * ms); l.rif < 1 || l.latency < ms || l.latency > 9*ms {
					t.Errorf("load %+v", l)
				}
				g.release()
			}
		})
	}
	wg.Wait()
	if n := g.rif.Load(); n != 0 {
		t.Errorf("RIF %d at the end, want 0", n)
	}
}

func BenchmarkGauge(b *testing.B) {
	var g gauge
	for i := range 1000 {
		g.record(0, time.Duration(i)*ms, int64(i%20))
	}
	b.Run("begin+record", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				g.record(0, 5*ms, g.begin())
				g.release()
			}
		})
	})
	b.Run("load", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				g.load(0)
			}
		})
	})
}

// An idle server that has ended nothing of late invites one client a second.
func TestInvitations(t *testing.T) {
	var g gauge
	g.record(time.Second, ms, 0)
	for i, step := range []struct {
		now  time.Duration
		do   func()
		want bool
	}{
		{time.Second + gaugeRecent, nil, false},
		{time.Second + gaugeRecent + 1, nil, true},
		{time.Second + gaugeRecent + 2, nil, false},
		{time.Second + gaugeRecent + inviteEvery, nil, false},
		{time.Second + gaugeRecent + inviteEvery + 1, nil, true},
		{time.Minute, func() { g.begin() }, false},
		{time.Minute, func() { g.release() }, true},
		{time.Hour, func() { g.record(time.Hour, ms, 0) }, false},
	} {
		if step.do != nil {
			step.do()
		}
		if got := g.invite(step.now); got != step.want {
			t.Errorf("step %d: %v, want %v", i, got, step.want)
		}
	}
	if !NewServerLoad().gauge.invite(0) {
		t.Error("a new server does not invite")
	}
}
