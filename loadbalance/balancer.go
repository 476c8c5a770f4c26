package loadbalance

import (
	"cmp"
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/endpointsharding"
	"google.golang.org/grpc/balancer/pickfirst"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

const (
	// rememberFor is how long a removed endpoint is remembered: long enough for a
	// deployment that replaces a fleet address by address, or a resolver that
	// blinks.
	rememberFor = 5 * time.Minute
	// rememberMax is how many removed endpoints are remembered, the newest, so
	// that a fleet whose addresses never come back costs 200 KiB and no more.
	rememberMax = 1024
	// maxMethods is how many methods are remembered to be streaming or not. A
	// client that calls more of them looks the others up each time, at 300 ns.
	maxMethods = 1024
)

// errNotSent ends the attempt that may go nowhere. It is a status, so that grpc
// ends the RPC at once even if it waits for ready.
var errNotSent = refusal(codes.Unavailable, "NOT_SENT",
	"loadbalance: not sent: every ready endpoint has an attempt of this call in flight")

func refusal(code codes.Code, reason, message string) error {
	st := status.New(code, message)
	if d, err := st.WithDetails(&errdetails.ErrorInfo{Domain: "bobtail", Reason: reason}); err == nil {
		st = d
	}
	return st.Err()
}

// errFull ends the call that finds every endpoint at its maxInFlight. It is a status
// too: to wait in the client would build the backlog that the bound is there to prevent.
var errFull = refusal(codes.ResourceExhausted, "BULKHEAD_FULL",
	"loadbalance: every ready endpoint has maxInFlight attempts in flight")

// shards is the machinery that the balancers of this package share: one
// pick_first child per endpoint, statistics that outlive pickers, connections
// and resolver updates, and a picker of the ready endpoints.
type shards struct {
	balancer.ClientConn // embedded to intercept UpdateState of the child
	child               balancer.Balancer
	target              string
	// start is the origin of the time that endpoints see.
	start   time.Time
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
	// news says that there are events to deliver. Likewise.
	news atomic.Bool

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
	shares := s.subset.of(rs.Endpoints, b.seed)
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

// unready is the picker while no endpoint is ready. The call's own attempt waits or
// fails by it, as the caller has asked; a hedge has nowhere to go and is not sent, or
// it would fail a call that is willing to wait.
type unready struct{ balancer.Picker }

func (u unready) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	if a := attempt.FromContext(info.Ctx); a != nil && a.Kind == attempt.Hedge && a.Of(info.FullMethodName) {
		a.MarkUnsent()
		return balancer.PickResult{}, errNotSent
	}
	return u.Picker.Pick(info)
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

// A picker sends attempts to the endpoints that were ready when it was made. What it
// counts and measures lives in the endpoints.
type picker struct {
	b     *shards
	ready []seated
	named int // how many endpoints there are, ready or not
	// rotation is who takes part. An atomic because a sweep replaces it, and picks must
	// not wait for that: so an ejection needs no new picker.
	rotation atomic.Pointer[rotation]
}

// seated is an endpoint that is ready, and the picker of its connection.
type seated struct {
	*remembered
	leaf balancer.Picker
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

// Pick implements balancer.Picker. It takes no lock, and allocates nothing as a rule.
func (p *picker) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	w := watches.Get().(*watched)
	t := p.rotation.Load()
	w.b, w.t, w.ctx = p.b, t, info.Ctx
	w.now, w.bits = p.b.now(), rand.Uint64()
	m, err := w.choose(info)
	if err != nil {
		w.recycle()
		return balancer.PickResult{}, err
	}
	result, err := m.leaf.Pick(info)
	if err != nil {
		// Not ready any more. A new picker is on its way, and grpc asks it.
		m.release(w.streaming)
		w.recycle()
		return result, err
	}
	w.e, w.done = m.endpoint, result.Done
	w.unmeasured = t.ended == nil && m.unmeasured(w.now, w.bits)
	result.Done = w.finish
	return result, nil
}

// choose chooses an endpoint and counts the attempt in there.
func (w *watched) choose(info balancer.PickInfo) (*member, error) {
	a := attempt.FromContext(info.Ctx)
	if a == nil || !a.Of(info.FullMethodName) { // a call made within an attempt of another
		w.streaming = w.b.methods.streaming(info.FullMethodName)
		m := w.t.find(&w.request, attempt.View{})
		if !w.t.admit(&m, w.streaming, attempt.View{}) {
			return nil, errFull
		}
		return m, nil
	}
	w.streaming = a.Streaming
	for {
		v := a.View()
		m := w.t.find(&w.request, v)
		if m == nil {
			a.MarkUnsent()
			return nil, errNotSent
		}
		if !w.t.admit(&m, w.streaming, v) {
			if a.Kind == attempt.Hedge {
				a.MarkUnsent()
				return nil, errNotSent
			}
			return nil, errFull
		}
		if a.Claim(v, m.key) {
			return m, nil
		}
		// A sibling was picked in the meantime: look where it went.
		m.release(w.streaming)
	}
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

// watched is an attempt in flight. It is pooled with its function, which is what a pick
// would allocate otherwise: grpc calls that once and not again
// (balancer.PickResult.Done).
type watched struct {
	request
	finish func(balancer.DoneInfo)
	b      *shards
	e      *endpoint
	t      *rotation
	done   func(balancer.DoneInfo)
	// unmeasured attempts are counted and nothing more.
	unmeasured bool
}

var watches sync.Pool

func init() {
	watches.New = func() any {
		w := new(watched)
		w.intn = rand.IntN
		w.finish = w.end
		return w
	}
}

// recycle gives w back.
func (w *watched) recycle() {
	w.b, w.ctx, w.e, w.t, w.done = nil, nil, nil, nil, nil
	watches.Put(w)
}

// end counts the attempt out, and notes what it says about its endpoint.
func (w *watched) end(info balancer.DoneInfo) {
	b, ctx, e, t, done := w.b, w.ctx, w.e, w.t, w.done
	if b == nil {
		return // called twice, which grpc does not
	}
	sent, streaming, unmeasured := w.now, w.streaming, w.unmeasured
	w.recycle()

	e.release(streaming)
	if unmeasured {
		if done != nil {
			done(info)
		}
		return
	}
	v, ok := judge(ctx, info, streaming)
	if ok || t.ended != nil && info.ServerLoad != nil {
		now := b.now()
		if ok {
			took := now - sent
			if streaming {
				took = 0 // a stream's length is no latency when it fails either
			}
			e.record(now, took, t.tau, v)
		}
		if t.ended != nil {
			t.ended(e, now, v, info.ServerLoad)
		}
		if now >= time.Duration(b.due.Load()) {
			b.sweep(now)
		}
	}
	if b.news.Load() {
		b.deliver(ctx)
	}
	if done != nil {
		done(info)
	}
}

// judge says what the end of an attempt tells about its endpoint; false if
// nothing.
func judge(ctx context.Context, info balancer.DoneInfo, streaming bool) (verdict, bool) {
	if info.Err == nil {
		// The length of a stream is no latency; and an empty DoneInfo is that of a
		// connection that was not ready any more.
		return answered, info.BytesReceived && !streaming
	}
	code := status.Code(info.Err)
	if code == codes.Canceled && ctx.Err() != nil {
		if a := attempt.FromContext(ctx); a != nil && a.Superseded() {
			return superseded, !streaming
		}
		return cut, !streaming
	}
	if !info.BytesSent && ctx.Err() == nil {
		// The request never left: a draining connection, or credentials that were
		// not to be had. It says nothing about how the endpoint serves.
		return failed, false
	}
	if outcome.OfCode(code) == outcome.Success {
		return answered, info.BytesReceived && !streaming
	}
	// Not only outcome's failures. RESOURCE_EXHAUSTED is ignored elsewhere, as it is
	// no fault; here it is work not done, and a replica that turns calls away at
	// once must not look fast. Nor may one that answers CANCELLED unasked.
	return failed, true
}

// methods remembers which methods are streaming. The zero value is ready.
type methods struct {
	// last is the method that was asked for twice first: most clients call one more than all
	// others. An atomic because every pick without an attempt reads it.
	last atomic.Pointer[method]
	// known is an atomic for the same reason, and replaced whole when a method is called
	// for the first time.
	known atomic.Pointer[map[string]*method]
	mu    sync.Mutex // orders replacements
}

type method struct {
	name      string
	streaming bool
}

// streaming reports whether a method is known to be streaming, by the descriptors
// linked into the program.
func (m *methods) streaming(fullName string) bool {
	if l := m.last.Load(); l != nil && l.name == fullName {
		return l.streaming
	}
	if known := m.known.Load(); known != nil {
		if one, ok := (*known)[fullName]; ok {
			if m.last.Load() == nil { // not each time: methods that alternate would contend for it
				m.last.Store(one)
			}
			return one.streaming
		}
	}
	return m.learn(fullName)
}

func (m *methods) learn(fullName string) bool {
	s := describedAsStreaming(fullName)
	if known := m.known.Load(); known != nil && len(*known) >= maxMethods {
		return s
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var old map[string]*method
	if p := m.known.Load(); p != nil {
		old = *p
	}
	if len(old) >= maxMethods {
		return s
	}
	next := make(map[string]*method, len(old)+1)
	for k, v := range old {
		next[k] = v
	}
	one := &method{strings.Clone(fullName), s}
	next[one.name] = one
	m.known.Store(&next)
	return s
}

func describedAsStreaming(fullName string) bool {
	name := protoreflect.FullName(strings.ReplaceAll(strings.TrimPrefix(fullName, "/"), "/", "."))
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
	if err != nil {
		return false
	}
	m, ok := d.(protoreflect.MethodDescriptor)
	return ok && (m.IsStreamingClient() || m.IsStreamingServer())
}
