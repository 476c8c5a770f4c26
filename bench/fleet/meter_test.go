package fleet

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// What a meter shows is the fading average, here summed up in small steps.
func TestMeter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type visit struct {
			from, to int // ms
			how      ending
		}
		visits := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) visit {
			from := rapid.IntRange(0, 3000).Draw(t, "from")
			return visit{from, from + rapid.IntRange(1, 3000).Draw(t, "for"), ending(rapid.IntRange(0, 2).Draw(t, "how"))}
		}), 1, 10).Draw(t, "visits")
		workers := rapid.IntRange(0, 3).Draw(t, "workers")

		m := newMeter(workers)
		var want, got levels
		keep := math.Exp(-0.001 / meterWindow.Seconds())
		present := 0
		for now := 0; now <= 6000; now++ {
			at := time.Duration(now) * time.Millisecond
			if now > 0 {
				want.utilization = want.utilization*keep + (1-keep)*float64(present)/float64(max(workers, 1))
				want.qps, want.eps = want.qps*keep, want.eps*keep
			}
			for _, v := range visits {
				if v.to == now {
					present--
					if v.how != left {
						want.qps += 1 / meterWindow.Seconds()
					}
					if v.how == failed {
						want.eps += 1 / meterWindow.Seconds()
					}
					got = m.end(at, v.how)
					for what, p := range map[string][2]float64{"utilization": {got.utilization, want.utilization},
						"qps": {got.qps, want.qps}, "eps": {got.eps, want.eps}} {
						if math.Abs(p[0]-p[1]) > 1e-9 {
							t.Fatalf("%s %v after %v, want %v", what, p[0], at, p[1])
						}
					}
				}
				if v.from == now {
					present++
					m.begin(at)
				}
			}
		}
	})
}

// Of two calls that read the clock and come in the other order, the late one changes
// counts and no averages.
func TestMeterOutOfOrder(t *testing.T) {
	m := newMeter(2)
	m.begin(0)
	m.begin(2 * time.Second)
	before := m.inFlight
	if l := m.end(time.Second, left); m.inFlight != before || l.utilization != before/2 || l.qps != 0 || m.last != 2*time.Second || m.present != 1 {
		t.Errorf("%+v of %+v, want in flight %v", l, m, before)
	}
}
