package loadbalance

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/endpointsharding"
	"google.golang.org/grpc/balancer/pickfirst"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
)

const (
	// rememberFor is how long a removed endpoint is remembered: long enough for a
	// deployment that replaces a fleet address by address, or a resolver that
	// blinks.
	rememberFor = 5 * time.Minute
	// rememberMax is how many removed endpoints are remembered, the newest, so
	// that a fleet whose addresses never come back costs 200 KiB and no more.
	rememberMax = 1024
)

// shards is the machinery that the balancers of this package share: one
// pick_first child per endpoint, statistics that outlive pickers, connections
// and resolver updates, and a picker of the ready endpoints.
type shards struct {
	balancer.ClientConn // embedded to intercept UpdateState of the child
	child               balancer.Balancer
	target              string
	// start is the origin of the time that endpoints see.
	start   time.Time
	clock   clock
	methods methods
	// seed makes the random subset of this client another than that of its peers.
	seed uint64

	// crowd counts the attempts in flight at all endpoints, those that are not ready
	// any more included. It is nil unless the policy needs it: a word that every pick
	// and every end of an attempt writes costs what it costs.
	crowd *crowd

	// due is when the next sweep is. An atomic because the end of every attempt asks.
	due atomic.Int64
	// typical is the median latency of the endpoints of the caller's zone, and of the others,
	// as of the last sweep: float64s in nanoseconds. Atomics because picks read them.
	typical [2]atomic.Uint64
	// picks counts those that might be probes. It outlives rotations, or where these change
	// each second a client of few calls would never probe. Likewise.
	picks atomic.Uint64
	// news says that there are events to deliver. Likewise. declined is how many attempts have
	// ended since that do not take them.
	news     atomic.Bool
	declined atomic.Int64

	mu        sync.Mutex // guards what follows
	policy    settings
	updates   uint64 // of state, so far
	endpoints map[string]*remembered
	current   *picker       // nil while nothing is ready
	founded   time.Duration // when the first endpoint was ready; -1 before
	panicking bool
	zones     spill
	events    []Event // to deliver, at most maxEvents
	unlogged  []Event
}

// settings are what a policy tells the machinery at each update.
type settings struct {
	options
	// tau is the decay time of the endpoints' statistics.
	tau time.Duration
	// choose makes the chooser for endpoints that are ready, at least one. It keeps
	// the slice and does not write to it. shards.mu is held. It is called anew whenever
	// which of them there are, or their weights, have changed.
	choose func(members []member) chooser
	// ended is told the end of each attempt that says something, or brought a load report
	// (balancer.DoneInfo.ServerLoad). Nil for none. It is called without locks.
	ended func(e *endpoint, now time.Duration, v verdict, load any)
}

// A remembered endpoint is one that the resolver names, or named not long ago.
type remembered struct {
	*endpoint
	// weight is what the resolver says, times the part in the subset.
	weight float64
	far    bool
	// ready is the last of shards.updates at which it was.
	ready uint64
	// named is false once the resolver has removed the endpoint, at gone.
	named bool
	gone  time.Duration
	// down says that a connection to it could not be had since it was last ready.
	down bool
	// ramp is when its slow start began; -1 if it has none.
	ramp time.Duration
	probation
}

func newShards(cc balancer.ClientConn, opts balancer.BuildOptions) *shards {
	b := &shards{
		ClientConn: cc,
		target:     opts.Target.String(),
		start:      time.Now(),
		seed:       rand.Uint64(),
		endpoints:  make(map[string]*remembered),
		founded:    -1,
	}
	b.child = endpointsharding.NewBalancer(b, opts, balancer.Get(pickfirst.Name).Build, endpointsharding.Options{})
	return b
}

// now returns the time that endpoints see. It reads the monotonic clock only.
func (b *shards) now() time.Duration { return time.Since(b.start) }

// update takes what the resolver says, and what the policy wants.
func (b *shards) update(rs resolver.State, s settings) error {
	rs.Endpoints = distinct(rs.Endpoints)
	defer b.log()
	b.mu.Lock()
	b.policy = s
	if s.ejection.maxEjectionPercent == 0 {
		for _, e := range b.endpoints {
			if e.out {
				b.readmit(e, b.now(), Event{Reason: ReasonDisabled})
			}
		}
	}
	shares := s.shares(rs.Endpoints, b.seed)
	if s.subset.size > 0 {
		rs.Endpoints = chosen(rs.Endpoints, shares)
	}
	b.reconcile(rs.Endpoints, shares)
	b.mu.Unlock()
	// Without b.mu, as the child calls UpdateState from within.
	return b.child.UpdateClientConnState(balancer.ClientConnState{
		// So that client-side health checks and outlier detection below us reach
		// the pick_first children.
		ResolverState: pickfirst.EnableHealthListener(rs),
	})
}

// distinct leaves out endpoints that have the addresses of an earlier one, in whatever order
// or number: they are the same to everything here.
func distinct(endpoints []resolver.Endpoint) []resolver.Endpoint {
	seen := make(map[string]bool, len(endpoints))
	return slices.DeleteFunc(slices.Clone(endpoints), func(e resolver.Endpoint) bool {
		key := keyOf(e)
		defer func() { seen[key] = true }()
		return seen[key]
	})
}

// reconcile notes which endpoints the resolver names, and forgets those that it
// has not named for long. b.mu is held.
func (b *shards) reconcile(named []resolver.Endpoint, shares map[string]float64) {
	now := b.now()
	keys := make(map[string]bool, len(named))
	for _, e := range named {
		key := keyOf(e)
		keys[key] = true
		r := b.lookup(key)
		if !r.named && r.ready > 0 && now-r.gone > b.policy.slowStart.window {
			r.down = true // as in a rolling deployment: it was away, whatever its connection says
		}
		r.named = true
		r.weight = shares[key]
		r.far = b.policy.zone.local != "" && zoneOf(e) != b.policy.zone.local
	}
	var gone []*remembered
	for key, e := range b.endpoints {
		switch {
		case keys[key]:
			continue
		case e.named:
			e.named, e.gone = false, now
		case now-e.gone > rememberFor:
			delete(b.endpoints, key)
			continue
		}
		gone = append(gone, e)
	}
	if n := len(gone) - rememberMax; n > 0 {
		slices.SortFunc(gone, func(a, b *remembered) int { return cmp.Compare(a.gone, b.gone) })
		for _, e := range gone[:n] {
			delete(b.endpoints, e.key)
		}
	}
}

// lookup returns what is known of an endpoint, if only that it exists. b.mu is
// held.
func (b *shards) lookup(key string) *remembered {
	e := b.endpoints[key]
	if e == nil {
		e = &remembered{endpoint: &endpoint{key: key, crowd: b.crowd}, weight: 1, gone: b.now(), ramp: -1}
		b.endpoints[key] = e
	}
	return e
}

// UpdateState is called by the child, one call at a time, whenever the state of
// an endpoint changes.
func (b *shards) UpdateState(state balancer.State) {
	p := &picker{b: b}
	defer b.log()
	b.mu.Lock()
	b.updates++
	now := b.now()
	children := endpointsharding.ChildStatesFromPicker(state.Picker)
	for _, c := range children {
		e := b.lookup(keyOf(c.Endpoint))
		switch c.State.ConnectivityState {
		case connectivity.Ready:
			b.arrived(e, now)
			p.ready = append(p.ready, seated{e, c.State.Picker})
		case connectivity.TransientFailure:
			e.down = true
		}
	}
	p.named = len(children)
	b.current = nil
	if len(p.ready) > 0 {
		b.current = p
		p.rotation.Store(b.arrange(p, now))
	}
	b.mu.Unlock()
	// With nothing ready the child's own picker waits, reconnects or fails, as
	// the endpoints' states demand.
	if len(p.ready) > 0 {
		state = balancer.State{ConnectivityState: connectivity.Ready, Picker: p}
	} else {
		state.Picker = unready{state.Picker}
	}
	b.ClientConn.UpdateState(state)
}

// arrived notes that an endpoint is ready. b.mu is held.
func (b *shards) arrived(e *remembered, now time.Duration) {
	if b.founded < 0 {
		b.founded = now
	}
	first := e.ready == 0
	e.ready = b.updates
	if !first && !e.down {
		return // it was ready, or has only been idle
	}
	if e.down {
		e.down = false
		// A server that has been away is another than the one that was ejected.
		if e.out {
			b.readmit(e, now, Event{Reason: ReasonReconnected})
			return
		}
	}
	// Those with which the client begins are no newcomers among the others.
	if !first || now-b.founded > b.policy.slowStart.window {
		e.ramp = now
	}
}

// The rest of balancer.Balancer, but for UpdateClientConnState.

func (b *shards) ResolverError(err error) { b.child.ResolverError(err) }
func (b *shards) ExitIdle()               { b.child.ExitIdle() }
func (b *shards) Close()                  { b.child.Close() }

// UpdateSubConnState is never called: the children listen for themselves.
func (b *shards) UpdateSubConnState(balancer.SubConn, balancer.SubConnState) {}

// keyOf returns the name of an endpoint: its addresses, sorted and joined. It
// does not depend on their order, nor on a connection. An address that holds the
// separator is quoted, so that no two endpoints share a name.
func keyOf(e resolver.Endpoint) string {
	if len(e.Addresses) == 1 && !strings.Contains(e.Addresses[0].Addr, ",") {
		return e.Addresses[0].Addr
	}
	addrs := make([]string, 0, len(e.Addresses))
	for _, a := range e.Addresses {
		if strings.ContainsAny(a.Addr, `,"`) {
			addrs = append(addrs, strconv.Quote(a.Addr))
		} else {
			addrs = append(addrs, a.Addr)
		}
	}
	slices.Sort(addrs)
	return strings.Join(slices.Compact(addrs), ",")
}
