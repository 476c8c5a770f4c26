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

func (r reader) scenario() *Scenario {
	s := &Scenario{
		Name:        r.text("name"),
		Description: r.text("description"),
		Backends:    r.whole("backends", 1, maxFleet, need),
		Fanout:      r.whole("fanout", 1, maxFleet, 1),
		Rate:        r.number("rate", 1e-3, maxRate, need),
		Arrivals:    r.text("arrivals"),
		Requests:    r.whole("requests", 1, maxRequests, need),
		Timeout:     r.duration("timeout", time.Millisecond, maxDuration, 10*time.Second),
	}
	if s.Name == "" {
		r.Fault("name", "missing")
	}
	switch s.Arrivals {
	case "":
		s.Arrivals = "poisson"
	case "poisson", "uniform":
	default:
		r.Fault("arrivals", "%q, want \"poisson\" or \"uniform\"", s.Arrivals)
	}
	for _, v := range r.Key("policies").List() {
		p, _ := v.Text("a string")
		s.Policies = append(s.Policies, p)
	}
	times := r.Key("serviceTime").List()
	for _, v := range times {
		if c, ok := object(v); ok {
			s.ServiceTime = append(s.ServiceTime, c.component())
		}
	}
	if len(times) == 0 {
		r.Fault("serviceTime", "missing: how long does a call take?")
	}
	if o, ok := object(r.Key("stragglers")); ok {
		s.Stragglers = &Stragglers{
			Probability: o.number("probability", 0, 1, need),
			Add:         o.duration("add", 0, maxDuration, need),
		}
	}
	for _, v := range r.Key("slow").List() {
		if o, ok := object(v); ok {
			s.Slow = append(s.Slow, Slow{
				Backend: o.whole("backend", 0, float64(s.Backends-1), need),
				Factor:  o.number("factor", 0, maxFactor, need),
			})
		}
	}
	if o, ok := object(r.Key("stalls")); ok {
		s.Stalls = o.stalls(s.Backends)
	}
	if o, ok := object(r.Key("criticality")); ok {
		s.Criticality = o.criticality()
	}
	if o, ok := object(r.Key("keys")); ok {
		s.Keys = &Keys{
			Count:    o.whole("count", 1, maxKeys, need),
			Exponent: o.number("exponent", 0, maxExponent, 1),
			Hot:      o.number("hot", 0, 1, 0),
		}
	}
	s.SideBySide = r.boolean("sideBySide")
	s.SameWork = r.boolean("sameWork")
	r.queue(s)
	r.loads(s)
	for _, v := range r.Key("faults").List() {
		if o, ok := object(v); ok {
			s.Faults = append(s.Faults, o.faultOf(s.Backends))
		}
	}
	r.still(s)
	if s.TimedFaults() && !s.SideBySide {
		r.Fault("faults", "some begin or end, want \"sideBySide\": true with them: between a policy's turns its budgets and breakers would recover")
	}
	return s
}

// queue reads what a backend does with calls that it cannot serve at once.
func (r reader) queue(s *Scenario) {
	s.Workers = r.whole("workers", 1, maxWorkers, 0)
	s.ServeAbandoned = r.boolean("serveAbandoned")
	s.ServerTimeout = r.duration("serverTimeout", time.Millisecond, maxDuration, 0)
	switch {
	case s.Workers > 0 && !s.SideBySide:
		r.Fault("workers", "%d, want \"sideBySide\": true with it: a queue outlasts a policy's turn", s.Workers)
	case s.Workers == 0 && s.ServeAbandoned:
		r.Fault("serveAbandoned", "true, want workers with it: nothing waits where all are served at once")
	case s.Workers > 0 && !s.ServeAbandoned && s.ServerTimeout > 0:
		r.Fault("serverTimeout", "%v, want \"serveAbandoned\": true with workers: the work goes on", s.ServerTimeout)
	}
}

// loads reads what a sweep offers.
func (r reader) loads(s *Scenario) {
	for _, v := range r.Key("loads").List() {
		load := float(v, minLoad, maxLoad)
		if n := len(s.Loads); n > 0 && load <= s.Loads[n-1] {
			v.Fault("%v, want more than the %v before it", load, s.Loads[n-1])
		}
		s.Loads = append(s.Loads, load)
	}
	if len(s.Loads) > 0 && s.Workers == 0 {
		r.Fault("loads", "%v, want workers with it: where all are served at once, nothing is the capacity", s.Loads)
	}
}

// criticality reads the weights of classes.
func (r reader) criticality() map[string]float64 {
	weights := map[string]float64{}
	var sum float64
	for _, class := range classes {
		w := r.number(class, 0, maxWeight, 0)
		if r.Has(class) {
			weights[class] = w
		}
		sum += w
	}
	if sum == 0 {
		r.Fault("", "no class has a weight, want one of %s", strings.Join(classes[:], ", "))
	}
	return weights
}

func (r reader) faultOf(backends int) Fault {
	f := Fault{
		Kind:     FaultKind(r.text("kind")),
		From:     r.duration("from", 0, maxDuration, 0),
		For:      r.duration("for", time.Millisecond, maxDuration, 0),
		Every:    r.duration("every", 10*time.Millisecond, maxDuration, 0),
		Backends: r.indexes("backends", backends),
	}
	code, probability := r.code("code", Code(codes.Unavailable)), r.number("probability", 1e-6, 1, 1)
	factor, add := r.number("factor", 0, maxFactor, 1), r.duration("add", 0, maxDuration, 0)
	switch f.Kind {
	case Error:
		f.Code, f.Probability = code, probability
	case Slowed:
		f.Factor, f.Add = factor, add
		if factor == 1 && add == 0 {
			r.Fault("", "a slow fault that takes no longer, want factor or add")
		}
	case Blackhole, Stall, Down:
	default:
		r.Fault("kind", "%q, want \"error\", \"blackhole\", \"stall\", \"slow\" or \"down\"", f.Kind)
		return f
	}
	for _, own := range []struct {
		key  string
		kind FaultKind
	}{{"code", Error}, {"probability", Error}, {"factor", Slowed}, {"add", Slowed}} {
		if r.Has(own.key) && f.Kind != own.kind {
			r.Fault(own.key, "no key of kind %q, only of %q", f.Kind, own.kind)
		}
	}
	switch {
	case f.Every > 0 && f.For == 0:
		r.Fault("every", "%v, want for with it: what comes back must have ended", f.Every)
	case f.Every > 0 && f.Every < f.From+f.For:
		r.Fault("every", "%v, want at least from + for, %v", f.Every, f.From+f.For)
	case f.Kind == Stall && f.For == 0:
		r.Fault("for", "missing: what never serves is a blackhole")
	case f.Kind == Down && f.For == 0:
		r.Fault("for", "missing: what never comes back is no backend")
	}
	return f
}

// still finds a backend that stands still for too much of its time, whatever the
// luck: the stalls of several sources may fall one after the other.
func (r reader) still(s *Scenario) {
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
			r.Fault("faults", "backend %d stands still for up to %.0f%% of its time, want at most %.0f%%", b, 100*share, 100*maxStill)
			return
		}
	}
}

func (r reader) component() (comp Component) {
	comp.Weight = r.number("weight", math.SmallestNonzeroFloat64, 1e9, 1)
	comp.Shift = r.duration("shift", 0, maxDuration, 0)
	kinds := 0
	if o, ok := object(r.Key("lognormal")); ok {
		kinds++
		comp.Lognormal = &Lognormal{o.duration("median", 0, maxDuration, need), o.number("sigma", 0, maxSigma, need)}
	}
	if o, ok := object(r.Key("exponential")); ok {
		kinds++
		comp.Exponential = &Exponential{o.duration("mean", 0, maxDuration, need)}
	}
	if o, ok := object(r.Key("constant")); ok {
		kinds++
		comp.Constant = &Constant{o.duration("value", 0, maxDuration, need)}
	}
	if kinds != 1 {
		r.Fault("", "%d distributions, want one of lognormal, exponential, constant", kinds)
	}
	return comp
}

func (r reader) stalls(backends int) *Stalls {
	st := &Stalls{
		MeanInterval: r.duration("meanInterval", 10*time.Millisecond, maxDuration, need),
		Min:          r.duration("min", 0, maxDuration, need),
		Max:          r.duration("max", 0, maxDuration, need),
	}
	if st.Min > st.Max {
		r.Fault("min", "%v, want at most max, %v", st.Min, st.Max)
	}
	// A backend that stands still more often than not would keep work for ever.
	if st.Max > st.MeanInterval/2 {
		r.Fault("max", "%v, want at most half of meanInterval, %v", st.Max, st.MeanInterval/2)
	}
	st.Backends = r.indexes("backends", backends)
	return st
}
