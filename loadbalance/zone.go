package loadbalance

import (
	"math"
	"slices"
	"time"

	"google.golang.org/grpc/resolver"
)

// zone prefers the endpoints of the caller's zone. Attempts go there while it does well,
// and spill to the others as far as it does not: because too few of its endpoints are
// left, or because it is overloaded.
type zone struct {
	// local is the name of the caller's zone. Default "": all endpoints are alike. What
	// zone an endpoint is in the resolver says: see SetZone.
	local string
	// overload, (1, 1000], is how many times its usual latency a zone must take to count
	// as overloaded, if the others are faster. Default 2.
	overload float64
}

const (
	// overprovisioned, as in Envoy's priority levels: with 72% of its endpoints a zone
	// still carries all its load.
	overprovisioned = 1.4
	// spillUp and spillDown are the steps per sweep. It is sooner relieved than loaded.
	spillUp, spillDown = 0.1, 0.05
	// explore is the part that leaves an overloaded zone to see how the others are, where that
	// is not known.
	explore = 0.01
	// forget is by how much of itself what is usual may grow in a sweep: it doubles in
	// six minutes.
	forget = 0.002
)

// zoneKey is the attribute of a zone.
type zoneKey struct{}

// SetZone returns the endpoint with the name of its zone, for "zone" in a balancer's
// configuration. A resolver calls it; without it an endpoint is in none.
func SetZone(e resolver.Endpoint, name string) resolver.Endpoint {
	e.Attributes = e.Attributes.WithValue(zoneKey{}, name)
	return e
}

func zoneOf(e resolver.Endpoint) string {
	name, _ := e.Attributes.Value(zoneKey{}).(string)
	return name
}

// A spill decides which part of the attempts leaves the zone.
type spill struct {
	extra float64 // because of overload
	usual float64 // the zone's latency in nanoseconds; 0 until it is known
	// far is the others' latency when it was known last, unknown sweeps ago.
	far     float64
	unknown int
}

// remember is for how many sweeps the others' latency is believed.
const remember = 300

// step takes the median latencies of the zone and of the others, in nanoseconds; 0 is
// unknown.
func (s *spill) step(near, far, overload float64) {
	if near > 0 {
		if s.usual == 0 {
			s.usual = near
		}
		s.usual = min(s.usual*(1+forget), near)
	}
	// To be overloaded is to be slower than usual and than the others: if all have become
	// slow, nothing is gained elsewhere. That is not known before some have gone there. By a
	// margin, as of two that are alike either is the slower half of the time.
	if s.unknown++; far > 0 {
		s.far, s.unknown = far, 0
	}
	switch {
	case near <= overload*s.usual:
		s.extra = max(0, s.extra-spillDown)
	case s.far == 0 || s.unknown > remember:
		s.extra = max(explore, s.extra-spillDown)
	case s.far*alike < near:
		s.extra = min(1, s.extra+spillUp)
	default:
		s.extra = max(0, s.extra-spillDown)
	}
}

// share returns the part that leaves the zone while a part of its endpoints is healthy.
func (s *spill) share(healthy float64) float64 {
	return max(s.extra, 1-min(1, overprovisioned*healthy))
}

// locals returns how many endpoints of the caller's zone there are, ready or not, at
// least 1. b.mu is held.
func (b *shards) locals() (n int) {
	for _, r := range b.endpoints {
		if r.named && !r.far {
			n++
		}
	}
	return max(n, 1)
}

// steer reads the zones; it reports whether the spill has changed. b.mu is held.
func (b *shards) steer(p *picker, now time.Duration) bool {
	var near, far []float64
	for _, s := range p.ready {
		cost, known := s.recent(now, b.policy.tau)
		switch {
		case s.out || !known:
		case s.far:
			far = append(far, cost)
		default:
			near = append(near, cost)
		}
	}
	before := b.zones.extra
	b.zones.step(medianOf(near), medianOf(far), b.policy.zone.overload)
	return b.zones.extra != before
}

func medianOf(xs []float64) float64 {
	if len(xs) == 0 {
		return 0
	}
	slices.Sort(xs)
	return median(xs)
}

// recent returns the endpoint's latency in nanoseconds if it has one that is not old.
func (e *endpoint) recent(now, tau time.Duration) (cost float64, ok bool) {
	return math.Float64frombits(e.cost.Load()), e.known.Load() == measured && now-time.Duration(e.last.Load()) < tau
}
