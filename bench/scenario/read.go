package scenario

import (
	"math"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
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
	maxWorkers  = 1000
	maxKeys     = 1e9
	maxExponent = 10
	minLoad     = 0.01
	maxLoad     = 100
	maxWeight   = 1e9
	// maxStill is the share of its time that a backend may stand still for ever:
	// beyond it, work might never be done.
	maxStill = 0.75
)

func (r *reader) scenario(c cursor) *Scenario {
	if !c.object("name", "description", "backends", "fanout", "rate", "arrivals", "requests", "timeout",
		"policies", "sideBySide", "serviceTime", "sameWork", "stragglers", "slow", "stalls",
		"workers", "serveAbandoned", "serverTimeout", "loads", "criticality", "keys", "faults") {
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
	if k, ok := c.key("criticality"); ok {
		s.Criticality = r.criticality(k)
	}
	if k, ok := c.key("keys"); ok && k.object("count", "exponent", "hot") {
		s.Keys = &Keys{
			Count:    k.whole("count", 1, maxKeys, need),
			Exponent: k.number("exponent", 0, maxExponent, 1),
			Hot:      k.number("hot", 0, 1, 0),
		}
	}
	s.SideBySide = c.boolean("sideBySide")
	s.SameWork = c.boolean("sameWork")
	r.queue(c, s)
	r.loads(c, s)
	for _, k := range c.items("faults") {
		s.Faults = append(s.Faults, r.faultOf(k, s.Backends))
	}
	r.still(c, s)
	if s.TimedFaults() && !s.SideBySide {
		r.fault(c.path+".faults", "some begin or end, want \"sideBySide\": true with them: between a policy's turns its budgets and breakers would recover")
	}
	return s
}

// queue reads what a backend does with calls that it cannot serve at once.
func (r *reader) queue(c cursor, s *Scenario) {
	if _, ok := c.key("workers"); ok {
		s.Workers = c.whole("workers", 1, maxWorkers, need)
	}
	s.ServeAbandoned = c.boolean("serveAbandoned")
	s.ServerTimeout = c.span("serverTimeout", time.Millisecond)
	switch {
	case s.Workers > 0 && !s.SideBySide:
		r.fault(c.path+".workers", "%d, want \"sideBySide\": true with it: a queue outlasts a policy's turn", s.Workers)
	case s.Workers == 0 && s.ServeAbandoned:
		r.fault(c.path+".serveAbandoned", "true, want workers with it: nothing waits where all are served at once")
	case s.Workers > 0 && !s.ServeAbandoned && s.ServerTimeout > 0:
		r.fault(c.path+".serverTimeout", "%v, want \"serveAbandoned\": true with workers: the work goes on", s.ServerTimeout)
	}
}

// loads reads what a sweep offers.
func (r *reader) loads(c cursor, s *Scenario) {
	for _, k := range c.items("loads") {
		load := k.float(minLoad, maxLoad)
		if n := len(s.Loads); n > 0 && load <= s.Loads[n-1] {
			r.fault(k.path, "%v, want more than the %v before it", load, s.Loads[n-1])
		}
		s.Loads = append(s.Loads, load)
	}
	if len(s.Loads) > 0 && s.Workers == 0 {
		r.fault(c.path+".loads", "%v, want workers with it: where all are served at once, nothing is the capacity", s.Loads)
	}
}

// criticality reads the weights of classes.
func (r *reader) criticality(c cursor) map[string]float64 {
	if !c.object(classes[:]...) {
		return nil
	}
	weights := map[string]float64{}
	var sum float64
	for _, class := range classes {
		if _, ok := c.key(class); ok {
			weights[class] = c.number(class, 0, maxWeight, need)
			sum += weights[class]
		}
	}
	if sum == 0 {
		r.fault(c.path, "no class has a weight, want one of %s", strings.Join(classes[:], ", "))
	}
	return weights
}

func (r *reader) faultOf(c cursor, backends int) (f Fault) {
	if !c.object("kind", "from", "for", "every", "backends", "code", "probability", "factor", "add") {
		return f
	}
	f.Kind = FaultKind(c.text("kind"))
	f.From = c.duration("from", 0, maxDuration, 0)
	f.For = c.span("for", time.Millisecond)
	f.Every = c.span("every", 10*time.Millisecond)
	f.Backends = c.indexes("backends", backends)
	switch f.Kind {
	case Error:
		f.Code = c.code("code", Code(codes.Unavailable))
		f.Probability = c.number("probability", 1e-6, 1, 1)
	case Slowed:
		f.Factor = c.number("factor", 0, maxFactor, 1)
		f.Add = c.duration("add", 0, maxDuration, 0)
		if f.Factor == 1 && f.Add == 0 {
			r.fault(c.path, "a slow fault that takes no longer, want factor or add")
		}
	case Blackhole, Stall, Down:
	default:
		r.fault(c.path+".kind", "%q, want \"error\", \"blackhole\", \"stall\", \"slow\" or \"down\"", f.Kind)
		return f
	}
	for _, own := range []struct {
		key  string
		kind FaultKind
	}{{"code", Error}, {"probability", Error}, {"factor", Slowed}, {"add", Slowed}} {
		if k, ok := c.key(own.key); ok && f.Kind != own.kind {
			r.fault(k.path, "no key of kind %q, only of %q", f.Kind, own.kind)
		}
	}
	switch {
	case f.Every > 0 && f.For == 0:
		r.fault(c.path+".every", "%v, want for with it: what comes back must have ended", f.Every)
	case f.Every > 0 && f.Every < f.From+f.For:
		r.fault(c.path+".every", "%v, want at least from + for, %v", f.Every, f.From+f.For)
	case f.Kind == Stall && f.For == 0:
		r.fault(c.path+".for", "missing: what never serves is a blackhole")
	case f.Kind == Down && f.For == 0:
		r.fault(c.path+".for", "missing: what never comes back is no backend")
	}
	return f
}

// still finds a backend that stands still for too much of its time, whatever the
// luck: the stalls of several sources may fall one after the other.
func (r *reader) still(c cursor, s *Scenario) {
	for b := range s.Backends {
		var share float64
		if st := s.Stalls; st != nil && on(st.Backends, b) {
			share = float64(st.Max) / float64(st.MeanInterval)
		}
		for _, f := range s.Faults {
			if f.Kind == Stall && f.Every > 0 && on(f.Backends, b) {
				share += float64(f.For) / float64(f.Every)
			}
		}
		if share > maxStill {
			r.fault(c.path+".faults", "backend %d stands still for up to %.0f%% of its time, want at most %.0f%%", b, 100*share, 100*maxStill)
			return
		}
	}
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
	st.Backends = c.indexes("backends", backends)
	return st
}
