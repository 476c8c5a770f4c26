package shedding

import (
	"testing"
	"time"
)

func kind(constant bool) string {
	if constant {
		return "constant"
	}
	return "exponential"
}

// mixed is a load of which the two upper classes are 0.27, and their sum fits up to 3x.
var mixed = map[Criticality]float64{CriticalPlus: 0.1, Critical: 0.17, SheddablePlus: 0.23, Sheddable: 0.5}

// In an overload the server does all it can, those that it accepts are fast, and nothing
// is refused when there is room. A server without admission does nothing useful at 2x.
//
// The 99th percentile of an exponential service of 10 ms is 46 ms by itself, so that the
// bounds of 25 and 40 ms can only be of constant times. Of exponential ones the waits, in
// the queue and inside the server, are bounded by 25 ms instead.
func TestSimOverload(t *testing.T) {
	long(t)
	for _, mix := range []map[Criticality]float64{nil, mixed} {
		for _, constant := range []bool{true, false} {
			for _, load := range []float64{0.5, 1, 2, 4, 8} {
				s := overloadSim(constant, load)
				s.mix = mix
				if load == 1 {
					s.run = 190 * time.Second // what chance refuses is known to 0.2 points
				}
				r := s.simulate(t)
				p := s
				p.plain, p.run = true, 20*time.Second
				plain := p.simulate(t)
				slow, waits := p99(r.latencies), p99(r.waits)
				t.Logf("%-11s mixed %-5v %3.1fx: goodput %.3f refused %.4f p99 %5.1f ms, of waits %5.1f ms, limit %4.1f; plain: goodput %.3f",
					kind(constant), mix != nil, load, r.goodput, r.refused(), float64(slow)/1e6, float64(waits)/1e6, r.limit, plain.goodput)
				switch {
				case load == 0.5:
					if r.refused() > 0 {
						t.Errorf("%v of the load refused", r.refused())
					}
				case load == 1:
					// The aim is 3%, and 40 ms. Exponential times do not quite meet it: the limit
					// moves by chance, too, and is at times below what the server can run. Of a mixed
					// load all waiting falls on the sheddable classes, three quarters of it.
					refused, bound := 0.03, 40*ms
					if !constant {
						refused = 0.034
						if mix != nil {
							refused = 0.04
						}
					}
					if r.refused() > refused {
						t.Errorf("%v of the load refused, want at most %v", r.refused(), refused)
					}
					if constant && slow > bound {
						t.Errorf("p99 of the accepted %v, want at most %v", slow, bound)
					}
				default:
					if r.goodput < 0.98 {
						t.Errorf("goodput %v, want 0.98", r.goodput)
					}
					// At 8x critical_plus alone is 0.8 of what the server can do. It is served
					// as a whole, not cut short for the others' sake, and waits as long as a
					// load of 0.8 waits whenever a probe lowers the limit.
					bound, mostWaits := 25*ms, 25*ms
					if mix != nil && load == 8 {
						bound, mostWaits = 28*ms, 35*ms
					}
					if constant && slow >= bound {
						t.Errorf("p99 of the accepted %v, want less than %v", slow, bound)
					}
					if waits >= mostWaits {
						t.Errorf("p99 of waits %v, want less than %v", waits, mostWaits)
					}
					if plain.goodput > 0.1 {
						t.Errorf("the plain server's goodput is %v: this is no overload", plain.goodput)
					}
				}
			}
		}
	}
}

// While the upper classes fit, they are served; what is refused is refused from below. With
// exponential times the limit is seldom, and for seconds, below what the server can run: that is
// 0.2 to 0.3% in the mean of runs of ten minutes, and up to 0.9% of a single one. So the bound is
// of the mean of three, and no run may be much worse.
func TestSimCriticality(t *testing.T) {
	long(t)
	for _, constant := range []bool{true, false} {
		for _, extra := range []float64{0, 0.1} {
			for _, load := range []float64{2, 3, 4, 8} {
				s := overloadSim(constant, load)
				s.mix, s.extra = mixed, extra
				seeds := uint64(1)
				if !constant {
					s.run, seeds = 10*time.Minute, 3
				}
				var goodput float64
				var success, lowest [classes]float64 // success: the mean
				for rank := range lowest {
					lowest[rank] = 1
				}
				for seed := uint64(1); seed <= seeds; seed++ {
					s.seed = seed
					r := s.simulate(t)
					goodput += r.goodput / float64(seeds)
					for rank := range success {
						got := r.classes[rank].success()
						success[rank] += got / float64(seeds)
						lowest[rank] = min(lowest[rank], got)
					}
				}
				t.Logf("%-11s extra %.1f %vx: goodput %.3f, success from below %.4f, at the least %.4f", kind(constant), extra, load, goodput, success, lowest)
				above := 0.0 // part of the capacity
				for rank := classes - 1; rank >= 0; rank-- {
					above += load * mixed[Sheddable+Criticality(rank)]
					switch got := success[rank]; {
					case above < 0.9 && got < 0.995:
						t.Errorf("%v: success %v, want 0.995: all that is above fits", Sheddable+Criticality(rank), got)
					case above < 0.9 && lowest[rank] < 0.99:
						t.Errorf("%v: success %v in one run, want 0.99: all that is above fits", Sheddable+Criticality(rank), lowest[rank])
					case rank > 0 && got < success[rank-1]-0.01:
						t.Errorf("%v: success %v, less than in the class below", Sheddable+Criticality(rank), got)
					case above-load*mixed[Sheddable+Criticality(rank)] > 1.3 && got > 0.01:
						t.Errorf("%v: success %v, while those above do not fit", Sheddable+Criticality(rank), got)
					}
				}
			}
		}
	}
}

// A load that has no cohorts is not refused as a whole, and a tap that refuses on the
// verdict changes nothing but where it is refused.
func TestSimCohorts(t *testing.T) {
	for _, constant := range []bool{true, false} {
		s := overloadSim(constant, 4)
		s.run = 40 * time.Second
		s.oneCohort = true
		r := s.simulate(t)
		t.Logf("%s, one cohort: goodput %.3f p99 %v refused %v", kind(constant), r.goodput, p99(r.latencies), r.reasons)
		if r.goodput < 0.98 || constant && p99(r.latencies) > 25*ms {
			t.Errorf("one cohort: goodput %v, p99 %v", r.goodput, p99(r.latencies))
		}
		s.oneCohort, s.gate = false, true
		r = s.simulate(t)
		t.Logf("%s, gate: goodput %.3f p99 %v early %d", kind(constant), r.goodput, p99(r.latencies), r.early)
		if r.goodput < 0.98 || constant && p99(r.latencies) > 25*ms || r.early < r.offered/2 {
			t.Errorf("gate: goodput %v, p99 %v, %d refused early", r.goodput, p99(r.latencies), r.early)
		}
	}
}

// When an overload is over, all are served again at once; the gate, which nobody but the
// timer tells so, too.
func TestSimRecovers(t *testing.T) {
	s := overloadSim(false, 8)
	s.gate = true
	s.changeAt, s.change = 20*time.Second, func(s *sim) { s.rate /= 16 }
	s.warm, s.run = 22*time.Second, 40*time.Second
	if r := s.simulate(t); r.refused() > 0 || r.stats.Overloaded || r.stats.Cursor != 0 {
		t.Errorf("2 s after the load fell: %v refused, %+v", r.refused(), r.stats)
	}
}

// A server whose handlers mostly wait needs its limit from the first second. By default it is
// found in some seconds, in which some is refused: min is the cure.
func TestSimWaitingHandlers(t *testing.T) {
	for _, constant := range []bool{true, false} {
		for _, least := range []int{0, 160} {
			s := sim{
				workers: 1000, mean: 200 * ms, constant: constant, load: 0.12, deadline: 2 * time.Second, // 600/s, 120 at once
				run: 5 * time.Second, config: AdmissionConfig{Limiter: LimiterConfig{Min: least}, Queue: &QueueConfig{}}, seed: 1,
			}
			r := s.simulate(t)
			t.Logf("%-11s min %3d: %.3f of the first 5 s refused, limit then %d", kind(constant), least, r.refused(), r.stats.Limit)
			most := 0.0
			if least == 0 {
				if most = 0.2; !constant {
					most = 0.4
				}
			}
			if r.refused() > most {
				t.Errorf("%s, min %d: %.3f refused, want at most %v", kind(constant), least, r.refused(), most)
			}
			s.warm, s.run = 10*time.Second, 20*time.Second
			if r := s.simulate(t); r.refused() > 0.01 {
				t.Errorf("%s, min %d: %.3f refused after 10 s", kind(constant), least, r.refused())
			}
		}
	}
}
