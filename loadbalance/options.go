package loadbalance

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/bobtail-rpc/bobtail/internal/strictjson"
)

// A document is a configuration as it was written. grpc's xDS balancers write out what
// they have parsed, with json.Marshal, and parse that again on its way down
// (internal/xds/balancer/cdsbalancer): a configuration that does not come out as it went
// in is none that xDS can deliver.
type document struct{ js string }

// MarshalJSON implements json.Marshaler.
func (d document) MarshalJSON() ([]byte, error) {
	if d.js == "" { // the defaults
		return []byte("{}"), nil
	}
	return []byte(d.js), nil
}

// options are what every balancer of this package can be told.
type options struct {
	document
	// maxInFlight, [1, 1e9], is how many attempts of this client, streams included, may be
	// in flight at one endpoint. An attempt that would exceed it goes to the least loaded
	// endpoint with room, and fails with RESOURCE_EXHAUSTED if there is none. Default 0:
	// no bound.
	maxInFlight int64
	slowStart   slowStart
	ejection    ejection
	subset      subset
	zone        zone
}

func defaultOptions() options {
	return options{
		slowStart: slowStart{window: 10 * time.Second, aggression: 1},
		ejection: ejection{
			latencyFactor:      3,
			latencyFloor:       5 * time.Millisecond,
			failureRatio:       0.2,
			minimumCalls:       20,
			baseTime:           10 * time.Second,
			maxEjectionPercent: 34,
			panicThreshold:     50,
			probeEvery:         100,
		},
		zone: zone{overload: 2},
	}
}

// read reads the options' keys.
func (o *options) read(r *strictjson.Object) {
	whole(r.Key("maxInFlight"), &o.maxInFlight, 1, 1e9)
	if s, ok := r.Key("slowStart").Object(); ok {
		duration(s.Key("window"), &o.slowStart.window, 0, time.Hour)
		number(s.Key("aggression"), &o.slowStart.aggression, above(0), 100)
	}
	if e, ok := r.Key("ejection").Object(); ok {
		number(e.Key("latencyFactor"), &o.ejection.latencyFactor, above(1), 1000)
		duration(e.Key("latencyFloor"), &o.ejection.latencyFloor, 0, time.Hour)
		number(e.Key("failureRatio"), &o.ejection.failureRatio, above(0), 1)
		whole(e.Key("minimumCalls"), &o.ejection.minimumCalls, 1, memory-1)
		duration(e.Key("baseEjectionTime"), &o.ejection.baseTime, time.Millisecond, time.Hour)
		number(e.Key("maxEjectionPercent"), &o.ejection.maxEjectionPercent, 0, 100)
		number(e.Key("panicThreshold"), &o.ejection.panicThreshold, 0, 100)
		whole(e.Key("probeEvery"), &o.ejection.probeEvery, 2, 1e9)
	}
	if s, ok := r.Key("subset").Object(); ok {
		o.subset.read(s)
	}
	if z, ok := r.Key("zone").Object(); ok {
		o.zone.read(z)
	}
}

func (s *subset) read(r *strictjson.Object) {
	before := r.Faults()
	index, count := int64(-1), int64(0)
	whole(r.Key("size"), &s.size, 1, 1e6)
	whole(r.Key("clientIndex"), &index, 0, 1e9)
	whole(r.Key("clientCount"), &count, 1, 1e9)
	if r.Faults() > before {
		return // what follows would compare with values that are not there
	}
	s.index, s.count = max(index, 0), count
	switch {
	case s.size == 0:
		r.Fault("size", "missing, want a whole number in [1, 1000000]")
	case index < 0 && count > 0:
		r.Fault("clientIndex", "missing, want a whole number in [0, %d)", count)
	case index >= 0 && count == 0:
		r.Fault("clientCount", "missing, want how many clients there are")
	case index >= max(count, 1):
		r.Fault("clientIndex", "%d, want a whole number in [0, %d), below clientCount", index, count)
	}
}

func (z *zone) read(r *strictjson.Object) {
	const want = "the name of the caller's zone"
	local := r.Key("local")
	name, ok := local.Text(want)
	if ok && name == "" {
		local.Fault("%q, want %s", name, want)
	}
	z.local = name
	number(r.Key("overload"), &z.overload, above(1), 1000)
	if !r.Has("local") {
		r.Fault("local", "missing, want %s", want)
	}
}

func whole(v strictjson.Value, to *int64, least, most int64) {
	want := fmt.Sprintf("a whole number in [%d, %d]", least, most)
	if n, ok := v.Integer(want, func(n int64) bool { return n >= least && n <= most }); ok {
		*to = n
	}
}

// above makes an open bound of a closed one: the least number that is more.
func above(x float64) float64 { return math.Nextafter(x, math.Inf(1)) }

func number(v strictjson.Value, to *float64, least, most float64) {
	bracket, from := "[", least
	if below := math.Nextafter(least, math.Inf(-1)); below == math.Trunc(below) {
		bracket, from = "(", below
	}
	want := fmt.Sprintf("a number in %s%v, %v]", bracket, from, most)
	if x, ok := v.Number(want, func(x float64) bool { return x >= least && x <= most }); ok {
		*to = x
	}
}

// duration reads a duration as service configs write it: "10s", "0.25s". For more than 0,
// least is 1 ns.
func duration(v strictjson.Value, to *time.Duration, least, most time.Duration) {
	const want = `a duration such as "10s"`
	s, ok := v.Text(want)
	if !ok {
		return
	}
	n, ok := strings.CutSuffix(s, "s")
	d, err := time.ParseDuration(s)
	switch {
	case err != nil || !ok || strings.Trim(n, "-0123456789.") != "":
		v.Fault("%q, want %s", s, want)
	case least == 1 && (d < least || d > most):
		v.Fault("%v, want (0s, %v]", d, most)
	case d < least || d > most:
		v.Fault("%v, want [%v, %v]", d, least, most)
	default:
		*to = d
	}
}

// slowStart is for an endpoint that comes to those that serve already, or comes back to
// them from an ejection or a failed connection: its caches are cold. Its weight is
//
//	max(0.1, (age / window) ^ (1 / aggression))
//
// of what it will be (Envoy's,
// https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/load_balancing/slow_start).
type slowStart struct {
	// window, [0s, 1h], is how long it takes. 0s: there is none. Default 10s.
	window time.Duration
	// aggression, (0, 100], bends the ramp: above 1 it rises soon, below 1 late. Default 1.
	aggression float64
}

// leastShare is where the ramp begins: with none an endpoint would never be measured.
const leastShare = 0.1

// share returns the part of its weight that an endpoint has whose slow start began at
// ramp; -1 for none.
func (s slowStart) share(ramp, now time.Duration) float64 {
	age := max(0, now-ramp) // a sweep may have read the clock before the ramp began
	if ramp < 0 || age >= s.window {
		return 1
	}
	return max(leastShare, math.Pow(age.Seconds()/s.window.Seconds(), 1/s.aggression))
}
