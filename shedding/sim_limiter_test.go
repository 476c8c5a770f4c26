package shedding

import (
	"slices"
	"testing"
	"time"
)

// bestStatic sweeps static limits in the same simulation: the best is the one with the
// least p99 among those within half a percent of the most goodput.
func bestStatic(t *testing.T, s sim) (limit int, best simResult) {
	t.Helper()
	s.warm, s.run = time.Second, s.run-s.warm+time.Second
	all := map[int]simResult{}
	most := 0.0
	for _, f := range []float64{0.9, 1, 1.1, 1.3} {
		n := max(1, int(f*float64(s.workers)))
		if _, ok := all[n]; ok {
			continue
		}
		s.config.Limiter = LimiterConfig{Algorithm: Static, Limit: n}
		all[n] = s.simulate(t)
		most = max(most, all[n].goodput)
	}
	for n, r := range all {
		if r.goodput >= most-0.005 && (limit == 0 || p99(r.latencies) < p99(best.latencies)) {
			limit, best = n, r
		}
	}
	return limit, best
}

// From 20, the limiter comes to what the server can run, in 10 s, whatever that is.
func TestSimLimiterFindsTheLimit(t *testing.T) {
	long(t)
	for _, constant := range []bool{true, false} {
		for _, workers := range []int{4, 32, 256} {
			s := overloadSim(constant, 2)
			s.workers = workers
			switch workers {
			case 32:
				s.run = 20 * time.Second
			case 256:
				s.run = 12 * time.Second
			}
			limit, best := bestStatic(t, s)
			algorithms := []Algorithm{Gradient, Vegas, AIMD}
			if workers == 256 {
				algorithms = algorithms[:1] // the others are here to be compared, and this one takes seconds
			}
			for _, algorithm := range algorithms {
				s.config.Limiter = LimiterConfig{Algorithm: algorithm}
				r := s.simulate(t)
				goodput, slow := r.goodput/best.goodput, float64(p99(r.latencies))/float64(p99(best.latencies))
				t.Logf("%-11s capacity %3d: best static %3d (goodput %.3f, p99 %v); %-8s mean limit %5.1f, goodput x%.3f, p99 x%.2f", kind(constant), workers,
					limit, best.goodput, p99(best.latencies).Round(ms/10), algorithm, r.limit, goodput, slow)
				if algorithm == Gradient && (goodput < 0.95 || slow > 1.2) {
					t.Errorf("goodput %v of the best static limit's, want 0.95; p99 %v times, want 1.2", goodput, slow)
				}
			}
		}
	}
}

// When the server changes, so does the limit, within 10 s: the number of its workers, or
// only their speed, which looks the same at first.
func TestSimLimiterFollows(t *testing.T) {
	long(t)
	for _, c := range []struct {
		name   string
		change func(*sim)
		from   float64 // of what the server can run, 10 s later
		to     float64
	}{
		{"half the workers", func(s *sim) { s.workers /= 2 }, 1, 2},
		{"half as fast", func(s *sim) { s.mean *= 2 }, 1, 2},
		{"twice the workers", func(s *sim) { s.workers *= 2 }, 0.95, 2},
		{"twice as fast", func(s *sim) { s.mean /= 2 }, 1, 2},
	} {
		for _, constant := range []bool{true, false} {
			s := overloadSim(constant, 4)
			s.workers = 16
			s.changeAt, s.run = 20*time.Second, 40*time.Second
			var limits []float64
			workers := 0
			s.change = func(s *sim) { c.change(s); workers = s.workers }
			s.watch = func(at time.Duration, st Stats) {
				if at > 30*time.Second {
					limits = append(limits, float64(st.Limit))
				}
			}
			s.simulate(t)
			sum, least := 0.0, limits[0]
			for _, l := range limits {
				sum += l
				least = min(least, l)
			}
			mean, w := sum/float64(len(limits)), float64(workers)
			to := c.to
			if constant {
				to = 1.25
			}
			t.Logf("%s, %s: mean limit %.1f, least %v, of %v workers", c.name, kind(constant), mean, least, w)
			if mean < c.from*w || mean > to*w {
				t.Errorf("mean limit %v, want [%v, %v] of %v", mean, c.from, to, w)
			}
		}
	}
}

// The limit of an hour later is that of ten minutes later, and that of any ten minutes the
// mean, also where it is seldom reached.
func TestSimLimiterDoesNotDrift(t *testing.T) {
	long(t)
	for _, load := range []float64{0.9, 2} {
		s := overloadSim(false, load)
		s.mean, s.deadline = 100*ms, time.Second // 80 handlers/s
		s.config.Queue = &QueueConfig{Target: 50 * ms, MaxWait: time.Second}
		s.warm, s.run = 0, time.Hour
		var parts [6]float64
		s.watch = func(at time.Duration, st Stats) {
			parts[min(int(at/(10*time.Minute)), 5)] += float64(st.Limit) / 6000
		}
		r := s.simulate(t)
		t.Logf("%vx: mean limits of 10 min each %.1f, goodput %.3f", load, parts, r.goodput)
		mean := 0.0
		for _, p := range parts {
			mean += p / 6
		}
		if drift := parts[5] / parts[0]; drift < 0.85 || drift > 1.15 || slices.Min(parts[:]) < 0.85*mean || slices.Max(parts[:]) > 1.15*mean {
			t.Errorf("%vx: the limit drifts: %.1f", load, parts)
		}
	}
}

// Times of microseconds are times, too.
func TestSimLimiterOfFastHandlers(t *testing.T) {
	long(t)
	for _, constant := range []bool{true, false} {
		s := overloadSim(constant, 2)
		s.mean, s.deadline = 100*time.Microsecond, 20*ms
		s.warm, s.run = 3*time.Second, 5*time.Second
		r := s.simulate(t)
		t.Logf("%s, 8 workers x 100 us: goodput %.3f, p99 %v, limit %.1f", kind(constant), r.goodput, p99(r.latencies), r.limit)
		if r.goodput < 0.98 || p99(r.latencies) > 15*ms || r.limit < 7.5 || r.limit > 16 {
			t.Errorf("goodput %v, p99 %v, limit %v", r.goodput, p99(r.latencies), r.limit)
		}
	}
}

// An idle server keeps its limit, so that a burst after the night is served.
func TestSimLimiterIdle(t *testing.T) {
	s := overloadSim(false, 0.05)
	s.run = 10 * time.Minute
	least := 1 << 20
	s.watch = func(_ time.Duration, st Stats) {
		if st.Limit < least {
			least = st.Limit
		}
	}
	if r := s.simulate(t); r.refused() > 0 || least < 10 {
		t.Errorf("refused %v, least limit %d; want 0, and at least the half of 20 to which the first probe goes", r.refused(), least)
	}
}
