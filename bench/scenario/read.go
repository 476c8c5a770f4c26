package scenario

import (
	"math"
	"time"
)

// Bounds. They keep arithmetic finite and a slip of the pen from asking for a
// year; nobody measures beyond them.
const (
	maxDuration = time.Hour
	maxFactor   = 1000
	maxSigma    = 5
	maxRate     = 1e6
	maxRequests = 1e8
	maxFleet    = 1000
)

func (r *reader) scenario(c cursor) *Scenario {
	if !c.object("name", "description", "backends", "fanout", "rate", "arrivals", "requests", "timeout",
		"policies", "serviceTime", "stragglers", "slow", "stalls") {
		return nil
	}
	s := &Scenario{
		Name:        c.text("name"),
		Description: c.text("description"),
		Backends:    c.whole("backends", 1, maxFleet, need),
		Fanout:      c.whole("fanout", 1, maxFleet, 1),
		Rate:        c.number("rate", 1e-3, maxRate, need),
		Arrivals:    c.text("arrivals"),
		Requests:    c.whole("requests", 1, maxRequests, need),
		Timeout:     c.duration("timeout", time.Millisecond, maxDuration, 10*time.Second),
	}
	if s.Name == "" {
		r.fault(c.path+".name", "missing")
	}
	switch s.Arrivals {
	case "":
		s.Arrivals = "poisson"
	case "poisson", "uniform":
	default:
		r.fault(c.path+".arrivals", "%q, want \"poisson\" or \"uniform\"", s.Arrivals)
	}
	for _, p := range c.items("policies") {
		s.Policies = append(s.Policies, p.string())
	}
	for _, comp := range c.items("serviceTime") {
		s.ServiceTime = append(s.ServiceTime, r.component(comp))
	}
	if len(s.ServiceTime) == 0 {
		r.fault(c.path+".serviceTime", "missing: how long does a call take?")
	}
	if k, ok := c.key("stragglers"); ok && k.object("probability", "add") {
		s.Stragglers = &Stragglers{
			Probability: k.number("probability", 0, 1, need),
			Add:         k.duration("add", 0, maxDuration, need),
		}
	}
	for _, k := range c.items("slow") {
		if k.object("backend", "factor") {
			s.Slow = append(s.Slow, Slow{
				Backend: k.whole("backend", 0, float64(s.Backends-1), need),
				Factor:  k.number("factor", 0, maxFactor, need),
			})
		}
	}
	if k, ok := c.key("stalls"); ok && k.object("meanInterval", "min", "max", "backends") {
		s.Stalls = r.stalls(k, s.Backends)
	}
	return s
}

func (r *reader) component(c cursor) (comp Component) {
	if !c.object("weight", "shift", "lognormal", "exponential", "constant") {
		return comp
	}
	comp.Weight = c.number("weight", math.SmallestNonzeroFloat64, 1e9, 1)
	comp.Shift = c.duration("shift", 0, maxDuration, 0)
	kinds := 0
	if k, ok := c.key("lognormal"); ok && k.object("median", "sigma") {
		kinds++
		comp.Lognormal = &Lognormal{k.duration("median", 0, maxDuration, need), k.number("sigma", 0, maxSigma, need)}
	}
	if k, ok := c.key("exponential"); ok && k.object("mean") {
		kinds++
		comp.Exponential = &Exponential{k.duration("mean", 0, maxDuration, need)}
	}
	if k, ok := c.key("constant"); ok && k.object("value") {
		kinds++
		comp.Constant = &Constant{k.duration("value", 0, maxDuration, need)}
	}
	if kinds != 1 {
		r.fault(c.path, "%d distributions, want one of lognormal, exponential, constant", kinds)
	}
	return comp
}

func (r *reader) stalls(c cursor, backends int) *Stalls {
	st := &Stalls{
		MeanInterval: c.duration("meanInterval", 10*time.Millisecond, maxDuration, need),
		Min:          c.duration("min", 0, maxDuration, need),
		Max:          c.duration("max", 0, maxDuration, need),
	}
	if st.Min > st.Max {
		r.fault(c.path+".min", "%v, want at most max, %v", st.Min, st.Max)
	}
	// A backend that stands still more often than not would keep work for ever.
	if st.Max > st.MeanInterval/2 {
		r.fault(c.path+".max", "%v, want at most half of meanInterval, %v", st.Max, st.MeanInterval/2)
	}
	for _, b := range c.items("backends") {
		st.Backends = append(st.Backends, int(b.float(0, float64(backends-1))))
	}
	return st
}
