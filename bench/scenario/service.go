package scenario

import (
	"math"
	"slices"
	"time"
)

// Service is how long an attempt takes at a backend that starts it at the
// moment at of the scenario's timeline: its work, and the stalls in between.
//
// The draw depends on seed, call (id) and attempt (unless SameWork), not on the backend: whatever
// a policy picks, it faces the same luck. The backend contributes only its
// factor and its stalls. Pure and safe for concurrent use.
func (s *Scenario) Service(seed, id uint64, attempt, backend int, at time.Duration) time.Duration {
	return s.Finish(seed, backend, at, s.Work(seed, id, attempt, backend, at)) - at
}

// Work is how long an attempt takes that is begun at the moment at, at a backend that
// does not stand still.
func (s *Scenario) Work(seed, id uint64, attempt, backend int, at time.Duration) time.Duration {
	if s.SameWork {
		attempt = 0
	}
	d := draw{seed, id, uint64(attempt)}
	t := s.mixture(d)
	if st := s.Stragglers; st != nil && d.uniform(straggler) < st.Probability {
		t += float64(st.Add)
	}
	for _, slow := range s.Slow {
		if slow.Backend == backend {
			t *= slow.Factor
		}
	}
	for i := range s.Faults {
		if f := &s.Faults[i]; f.Kind == Slowed && f.holds(backend, at) {
			t = t*f.Factor + float64(f.Add)
		}
	}
	// A lognormal of a large sigma has no end; a Duration has. No request waits longer.
	return time.Duration(min(t, float64(2*maxDuration)))
}

// Finish is the moment at which a backend has done work that it begins at the
// moment at: the work waits while the backend stands still.
func (s *Scenario) Finish(seed uint64, backend int, at, work time.Duration) time.Duration {
	for {
		from, to, ok := s.pause(seed, backend, at)
		if !ok || from >= at+work {
			return at + work
		}
		if from > at {
			work -= from - at
		}
		at = to
	}
}

// pause returns, of the stretches in which the backend stands still and that end
// after the moment at, the one that begins first.
func (s *Scenario) pause(seed uint64, backend int, at time.Duration) (from, to time.Duration, ok bool) {
	if s.Stalls != nil && on(s.Stalls.Backends, backend) {
		from, to = s.Stalls.next(seed, backend, at)
		ok = true
	}
	for i := range s.Faults {
		f := &s.Faults[i]
		if f.Kind != Stall || !on(f.Backends, backend) {
			continue
		}
		if w, more := f.window(at); more && (!ok || w.From < from) {
			from, to, ok = w.From, w.To, true
		}
	}
	return from, to, ok
}

// on says whether a list of backends, none for all, has this one.
func on(backends []int, backend int) bool {
	return len(backends) == 0 || slices.Contains(backends, backend)
}

func (s *Scenario) mixture(d draw) float64 {
	var sum float64
	for _, c := range s.ServiceTime {
		sum += c.Weight
	}
	u := d.uniform(component) * sum
	for _, c := range s.ServiceTime[:len(s.ServiceTime)-1] {
		if u -= c.Weight; u < 0 {
			return c.quantile(d.uniform(duration))
		}
	}
	return s.ServiceTime[len(s.ServiceTime)-1].quantile(d.uniform(duration))
}

// quantile is the component's inverse distribution function, in nanoseconds.
func (c Component) quantile(u float64) float64 {
	t := float64(c.Shift)
	switch {
	case c.Lognormal != nil:
		t += float64(c.Lognormal.Median) * math.Exp(c.Lognormal.Sigma*math.Sqrt2*math.Erfinv(2*u-1))
	case c.Exponential != nil:
		t += float64(c.Exponential.Mean) * -math.Log1p(-u)
	case c.Constant != nil:
		t += float64(c.Constant.Value)
	}
	return t
}

// next returns the first stall that ends after the moment at. Time is cut into
// cells of MeanInterval, each of which holds one stall, so no history need be kept.
func (st *Stalls) next(seed uint64, backend int, at time.Duration) (from, to time.Duration) {
	for cell := max(at, 0) / time.Duration(st.MeanInterval); ; cell++ {
		if from, to = st.stall(seed, backend, cell); to > at {
			return from, to
		}
	}
}

// stall is the one in the given cell. It lies inside the cell whole.
func (st *Stalls) stall(seed uint64, backend int, cell time.Duration) (from, to time.Duration) {
	d := draw{seed, uint64(backend), uint64(cell)}
	length := float64(st.Min) + d.uniform(stallLength)*float64(st.Max-st.Min)
	free := float64(st.MeanInterval) - length
	from = cell*time.Duration(st.MeanInterval) + time.Duration(d.uniform(stallStart)*free)
	return from, from + time.Duration(length)
}

// Each random number of a draw has a stream of its own, so that they are independent.
const (
	component uint64 = iota + 1
	duration
	straggler
	stallStart
	stallLength
	faulty // the first of as many as there are faults: keep it last
)

// Streams of keys and classes, far above those of faults.
const (
	keyHot uint64 = 1<<32 + iota
	keyRank
	criticality
)

// draw names one source of random numbers: a call's attempt, or a backend's stall.
type draw [3]uint64

// uniform returns a number in (0, 1) that depends on nothing but d and stream.
func (d draw) uniform(stream uint64) float64 {
	h := mix(d[0])
	for _, v := range [...]uint64{d[1], d[2], stream} {
		h = mix(h ^ v)
	}
	return (float64(h>>11) + 0.5) / (1 << 53)
}

// mix is a step of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection whose output
// bits each depend on every input bit.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
