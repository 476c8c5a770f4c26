package loadbalance

import (
	"cmp"
	"context"
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
var errNotSent = notSent()

func notSent() error {
	st := status.New(codes.Unavailable,
		"loadbalance: not sent: every ready endpoint has an attempt of this call in flight")
	if d, err := st.WithDetails(&errdetails.ErrorInfo{Domain: "bobtail", Reason: "NOT_SENT"}); err == nil {
		st = d
	}
	return st.Err()
}

// shards is the machinery that the balancers of this package share: one
// pick_first child per endpoint, statistics that outlive pickers, connections
// and resolver updates, and a picker of the ready endpoints.
type shards struct {
	balancer.ClientConn // embedded to intercept UpdateState of the child
	child               balancer.Balancer
	// start is the origin of the time that endpoints see.
	start   time.Time
	methods methods

	// crowd counts the attempts in flight at all endpoints, those that are not ready
	// any more included. It is nil unless the policy needs it: a word that every pick
	// and every end of an attempt writes costs what it costs.
	crowd *crowd

	mu        sync.Mutex // guards what follows
	policy    settings
	updates   uint64 // of state, so far
	endpoints map[string]*remembered
}

// settings are what a policy tells the machinery at each update.
type settings struct {
	// tau is the decay time of the endpoints' statistics.
	tau time.Duration
	// choose makes the chooser for the endpoints that are ready, at least one, each
	// with what the resolver says of it now. It keeps the slices and does not write
	// to them. shards.mu is held.
	choose func(ready []*endpoint, named []resolver.Endpoint) chooser
}

// A chooser is the policy as of one moment: it chooses among the endpoints that were
// ready when it was made. It is immutable, and safe for concurrent use. A policy is a
// builder, a balancer that embeds shards and hands it settings, and a chooser.
type chooser interface {
	// route returns the index of the endpoint that an attempt goes to, or -1 if there
	// is none that it may go to. The view shows where its siblings went. It is called
	// again if one of them is picked in the meantime.
	route(r request, view attempt.View) int
}

// A request is what a chooser may know of an attempt.
type request struct {
	ctx       context.Context
	now       time.Duration
	streaming bool
	intn      func(int) int // draws from [0, n)
}

// A remembered endpoint is one that the resolver names, or named not long ago.
type remembered struct {
	*endpoint
	// ready is the last of shards.updates at which it was.
	ready uint64
	// named is false once the resolver has removed the endpoint, at gone.
	named bool
	gone  time.Duration
}

func newShards(cc balancer.ClientConn, opts balancer.BuildOptions) *shards {
	b := &shards{
		ClientConn: cc,
		start:      time.Now(),
		endpoints:  make(map[string]*remembered),
	}
	b.child = endpointsharding.NewBalancer(b, opts, balancer.Get(pickfirst.Name).Build, endpointsharding.Options{})
	return b
}

// now returns the time that endpoints see. It reads the monotonic clock only.
func (b *shards) now() time.Duration { return time.Since(b.start) }

// update takes what the resolver says, and what the policy wants.
func (b *shards) update(rs resolver.State, s settings) error {
	b.mu.Lock()
	b.policy = s
	b.reconcile(rs.Endpoints)
	b.mu.Unlock()
	// Without b.mu, as the child calls UpdateState from within.
	return b.child.UpdateClientConnState(balancer.ClientConnState{
		// So that client-side health checks and outlier detection below us reach
		// the pick_first children.
		ResolverState: pickfirst.EnableHealthListener(rs),
	})
}

// reconcile notes which endpoints the resolver names, and forgets those that it
// has not named for long. b.mu is held.
func (b *shards) reconcile(named []resolver.Endpoint) {
	now := b.now()
	keys := make(map[string]bool, len(named))
	for _, e := range named {
		key := keyOf(e)
		keys[key] = true
		b.lookup(key).named = true
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
		e = &remembered{endpoint: &endpoint{key: key, crowd: b.crowd}, gone: b.now()}
		b.endpoints[key] = e
	}
	return e
}

// UpdateState is called by the child, one call at a time, whenever the state of
// an endpoint changes.
func (b *shards) UpdateState(state balancer.State) {
	p := &picker{b: b}
	var named []resolver.Endpoint
	b.mu.Lock()
	b.updates++
	for _, c := range endpointsharding.ChildStatesFromPicker(state.Picker) {
		if c.State.ConnectivityState == connectivity.Ready {
			e := b.lookup(keyOf(c.Endpoint))
			e.ready = b.updates
			p.ready = append(p.ready, e.endpoint)
			p.leaves = append(p.leaves, c.State.Picker)
			named = append(named, c.Endpoint)
		}
	}
	if len(p.ready) > 0 {
		p.tau = b.policy.tau
		p.chooser = b.policy.choose(p.ready, named)
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

// A picker sends attempts to the endpoints that were ready when it was made. It
// is immutable: what it counts and measures lives in the endpoints.
type picker struct {
	chooser
	ready  []*endpoint
	leaves []balancer.Picker // leaves[i] belongs to ready[i]
	tau    time.Duration
	b      *shards
}

// Pick implements balancer.Picker. It takes no lock, and allocates the function
// that it returns.
func (p *picker) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	a := attempt.FromContext(info.Ctx)
	if a != nil && !a.Of(info.FullMethodName) {
		a = nil // a call made within an attempt of another
	}
	r := request{ctx: info.Ctx, now: p.b.now(), intn: rand.IntN}
	var i int
	if a == nil {
		r.streaming = p.b.methods.streaming(info.FullMethodName)
		i = p.route(r, attempt.View{})
	} else {
		r.streaming = a.Streaming
		for {
			v := a.View()
			i = p.route(r, v)
			if i < 0 {
				a.MarkUnsent()
				return balancer.PickResult{}, errNotSent
			}
			if a.Claim(v, p.ready[i].key) {
				break
			}
			// A sibling was picked in the meantime: look where it went.
		}
	}
	result, err := p.leaves[i].Pick(info)
	if err != nil {
		// Not ready any more. A new picker is on its way, and grpc asks it.
		return result, err
	}
	p.watch(&result, info.Ctx, p.ready[i], r.streaming, r.now)
	return result, nil
}

// watch counts the attempt as in flight at e until its end, and notes then what
// it says about e.
func (p *picker) watch(result *balancer.PickResult, ctx context.Context, e *endpoint, streaming bool, sent time.Duration) {
	e.begin(streaming)
	b, tau, done := p.b, p.tau, result.Done
	result.Done = func(info balancer.DoneInfo) {
		e.release(streaming)
		if v, ok := judge(ctx, info, streaming); ok {
			now := b.now()
			e.record(now, now-sent, tau, v)
		}
		if done != nil {
			done(info)
		}
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
	// known is an atomic because every pick without an attempt reads it, and
	// replaced whole when a method is called for the first time.
	known atomic.Pointer[map[string]bool]
	mu    sync.Mutex // orders replacements
}

// streaming reports whether a method is known to be streaming, by the descriptors
// linked into the program.
func (m *methods) streaming(fullName string) bool {
	if known := m.known.Load(); known != nil {
		if s, ok := (*known)[fullName]; ok {
			return s
		}
	}
	return m.learn(fullName)
}

func (m *methods) learn(fullName string) bool {
	s := describedAsStreaming(fullName)
	m.mu.Lock()
	defer m.mu.Unlock()
	var old map[string]bool
	if p := m.known.Load(); p != nil {
		old = *p
	}
	if len(old) >= maxMethods {
		return s
	}
	next := make(map[string]bool, len(old)+1)
	for k, v := range old {
		next[k] = v
	}
	next[strings.Clone(fullName)] = s
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
