package scenario

import (
	"math"
	"time"
)

// Capacity is the requests per second that the backends can do, by their workers and the
// mean of their work, slow ones and stragglers included; stalls and faults are not. It is 0
// where all calls are served at once, or take no time at some backend.
func (s *Scenario) Capacity() float64 {
	var weights, mean float64 // ns
	for _, c := range s.ServiceTime {
		weights += c.Weight
		mean += c.Weight * c.mean()
	}
	mean /= weights
	if st := s.Stragglers; st != nil {
		mean += st.Probability * float64(st.Add)
	}
	if s.Workers == 0 {
		return 0
	}
	var leaves float64
	for b := range s.Backends {
		work := mean
		for _, slow := range s.Slow {
			if slow.Backend == b {
				work *= slow.Factor
			}
		}
		if work == 0 {
			return 0
		}
		leaves += float64(s.Workers) / work * float64(time.Second)
	}
	return leaves / float64(s.Fanout)
}

func (c Component) mean() float64 {
	t := float64(c.Shift)
	switch {
	case c.Lognormal != nil:
		t += float64(c.Lognormal.Median) * math.Exp(c.Lognormal.Sigma*c.Lognormal.Sigma/2)
	case c.Exponential != nil:
		t += float64(c.Exponential.Mean)
	case c.Constant != nil:
		t += float64(c.Constant.Value)
	}
	return t
}

// classes are those of package shedding, as they travel in metadata.
var classes = [...]string{"sheddable", "sheddable_plus", "critical", "critical_plus"}

// Class returns the criticality of request id, the same for all its attempts; "" if the
// scenario has none. Pure and safe for concurrent use.
func (s *Scenario) Class(seed, id uint64) string {
	if s.Criticality == nil {
		return ""
	}
	var sum float64
	for _, class := range classes {
		sum += s.Criticality[class]
	}
	u := draw{seed, id}.uniform(criticality) * sum
	last := ""
	for _, class := range classes {
		w := s.Criticality[class]
		if w == 0 {
			continue
		}
		last = class
		if u -= w; u < 0 {
			break
		}
	}
	return last
}
