package loadbalance

import (
	"context"
	"math"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/balancer"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
)

// A member is an endpoint that is ready.
type member struct {
	*endpoint
	// weight is the endpoint's own, greater than 0, times its part of the subset and of
	// the slow start. Only its proportion to that of others means something.
	weight float64
	leaf   balancer.Picker // gives its SubConn
	far    bool            // not of the caller's zone
}

// A chooser is the policy as of one moment: it chooses among the endpoints that were
// ready when it was made. It is immutable, and safe for concurrent use. A policy is a
// builder, a balancer that embeds shards and hands it settings, and a chooser.
type chooser interface {
	// route returns the index of the member that an attempt goes to, or -1 if all are
	// barred. It is called again with other bars if so, or if a sibling is picked in the
	// meantime. It does not keep r.
	route(r *request, b bars) int
}

// A request is what a chooser may know of an attempt.
type request struct {
	ctx       context.Context
	now       time.Duration
	streaming bool
	typical   float64       // latency of the endpoints in nanoseconds; 0 if unknown
	bits      uint64        // 64 random bits: the first draw
	intn      func(int) int // draws from [0, n)
	noted     bool          // for the probes of bobtail_prequal: a pick may ask several choosers, or one twice
}

// bars says to which endpoints an attempt may not go, because of its siblings.
type bars struct {
	view attempt.View
	// running bars those only where a sibling is in flight, not all that were tried.
	running bool
}

// none reports whether nothing is barred: so for the first attempt of a call.
func (b bars) none() bool { return b.view.Empty() }

// at reports whether an endpoint is barred.
func (b bars) at(key string) bool {
	if b.running {
		return b.view.InFlight(key)
	}
	return b.view.Tried(key)
}

// A rotation says which of the ready endpoints take part, as of one moment. It is
// immutable, but for the count of its picks.
type rotation struct {
	tau   time.Duration
	ended func(e *endpoint, now time.Duration, v verdict, load any)
	full  int64 // how many attempts may be in flight at one endpoint; 0: any number
	// groups are asked in turn: those of the rotation, those of other zones, those that
	// are ejected. An attempt that has no other place goes to one of the latter rather
	// than beside a sibling.
	groups []group
	// spill is the part of the attempts that begin with the second group.
	spill float64
	// bench are those that are ejected. One of so many picks is a probe of one of them.
	bench   []member
	every   uint64
	picks   *atomic.Uint64 // counted only while there is a bench
	ramping bool           // some weight changes with time
}

// A group is members and who chooses among them.
type group struct {
	chooser
	members []member
	typical *atomic.Uint64 // of shards
}

// ask is route.
func (g *group) ask(r *request, b bars) int {
	r.typical = math.Float64frombits(g.typical.Load())
	return g.route(r, b)
}

func (t *rotation) add(members []member, choose func([]member) chooser, typical *atomic.Uint64) {
	t.groups = append(t.groups, group{choose(members), members, typical})
}

// arrange makes the rotation of what is ready. b.mu is held.
func (b *shards) arrange(p *picker, now time.Duration) *rotation {
	t := &rotation{tau: b.policy.tau, ended: b.policy.ended, full: b.policy.maxInFlight}
	in := 0
	for _, s := range p.ready {
		if !s.out {
			in++
		}
	}
	// A few that are left must not carry the load of all: if so many seem bad, it is
	// not they.
	panicking := in < len(p.ready) && float64(in)*100 < b.policy.ejection.panicThreshold*float64(p.named)
	if panicking != b.panicking {
		b.panicking = panicking
		kind := PanicEnded
		if panicking {
			kind = PanicBegan
		}
		b.tell(Event{Kind: kind, Ready: len(p.ready), Ejected: len(p.ready) - in})
	}
	var near, far, bench []member
	for _, s := range p.ready {
		m := member{endpoint: s.endpoint, leaf: s.leaf, far: s.far, weight: s.weight * b.policy.slowStart.share(s.ramp, now)}
		if m.weight < s.weight {
			t.ramping = true
		}
		switch {
		case s.out && !panicking:
			bench = append(bench, m)
		case s.far:
			far = append(far, m)
		default:
			near = append(near, m)
		}
	}
	typical := &b.typical[0]
	if len(near) == 0 {
		near, far, typical = far, nil, &b.typical[1]
	}
	if len(near) > 0 { // or all are ejected, and no panic is wanted
		t.add(near, b.policy.choose, typical)
	}
	if len(far) > 0 {
		t.spill = b.zones.share(float64(len(near)) / float64(b.locals()))
		t.add(far, b.policy.choose, &b.typical[1])
	}
	if len(bench) > 0 {
		t.add(bench, func(m []member) chooser { return newP2C(m, b.policy.tau) }, &b.typical[0])
		t.bench = bench
		t.every, t.picks = uint64(b.policy.ejection.probeEvery), &b.picks
	}
	return t
}

// find returns where an attempt goes; nil if nowhere.
func (t *rotation) find(r *request, v attempt.View) *member {
	b := bars{view: v}
	if b.none() {
		if t.bench != nil && !r.streaming {
			if m := t.probe(r.now); m != nil {
				return m
			}
		}
		if t.spill == 0 {
			g := &t.groups[0]
			if i := g.ask(r, b); i >= 0 {
				return &g.members[i]
			}
		}
	}
	skip := 0 // the group to ask last
	if t.spill > 0 && float64(r.intn(1<<20)) < t.spill*(1<<20) {
		skip = 1
	}
	for _, b.running = range [...]bool{false, true} {
		for k := range t.groups {
			g := &t.groups[k]
			if skip > 0 && k < 2 {
				g = &t.groups[1-k]
			}
			if i := g.ask(r, b); i >= 0 {
				return &g.members[i]
			}
		}
		if b.none() {
			break
		}
	}
	return nil
}

// probe returns the ejected endpoint that this pick is to try, nil as a rule.
func (t *rotation) probe(now time.Duration) *member {
	n := t.picks.Add(1)
	if n%t.every != 0 {
		return nil
	}
	for i := range t.bench {
		if m := &t.bench[(n/t.every+uint64(i))%uint64(len(t.bench))]; m.probing(now) {
			return m
		}
	}
	return nil
}

// roomy returns the endpoint with the fewest attempts in flight of those that have room
// and are not barred; nil if there is none.
func (t *rotation) roomy(v attempt.View) *member {
	var best *member
	var least float64
	for _, running := range [...]bool{false, true} {
		b := bars{v, running}
		for k := range t.groups {
			g := &t.groups[k]
			for i := range g.members {
				m := &g.members[i]
				unary, streams := m.inFlight()
				if n := float64(unary+streams) / m.weight; unary+streams < t.full && (best == nil || n < least) && !b.at(m.key) {
					best, least = m, n
				}
			}
			if best != nil {
				return best
			}
		}
	}
	return nil
}

// admit counts an attempt in at a member, or at another if that has no room; it reports
// whether there was any.
func (t *rotation) admit(m **member, streaming bool, v attempt.View) bool {
	if t.full == 0 {
		(*m).begin(streaming)
		return true
	}
	for *m != nil && !(*m).beginWithin(streaming, t.full) {
		*m = t.roomy(v)
	}
	return *m != nil
}
