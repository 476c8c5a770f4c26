package loadbalance

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"strings"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/serviceconfig"

	"github.com/bobtail-rpc/bobtail/internal/strictjson"
)

// RendezvousName is the name under which the balancer of this file is registered,
// for loadBalancingConfig: [{"bobtail_rendezvous": {}}].
const RendezvousName = "bobtail_rendezvous"

const (
	// defaultEps lets an endpoint have a quarter more than its share. For what that
	// costs the keys that are not hot see the package's documentation.
	defaultEps = 0.25
	maxEps     = 10
)

func init() { balancer.Register(rendezvousBuilder{}) }

type rendezvousBuilder struct{}

func (rendezvousBuilder) Name() string { return RendezvousName }

func (rendezvousBuilder) Build(cc balancer.ClientConn, opts balancer.BuildOptions) balancer.Balancer {
	b := &rendezvousBalancer{shards: newShards(cc, opts)}
	b.crowd = new(crowd)
	return b
}

// rendezvousConfig is what bobtail_rendezvous can be told.
type rendezvousConfig struct {
	serviceconfig.LoadBalancingConfig
	options
	// header names the outgoing metadata that holds a call's key, for calls whose
	// context has none. Default "": there is no such header.
	header string
	// eps, in (0, 10], is by how much of its share of the attempts in flight an
	// endpoint may exceed it. Default 0.25. The smaller, the more calls leave the
	// endpoint of their key; the larger, the more one key may load its endpoint.
	eps float64
}

// ParseConfig implements balancer.ConfigParser. It reports every fault.
func (rendezvousBuilder) ParseConfig(js json.RawMessage) (serviceconfig.LoadBalancingConfig, error) {
	c := &rendezvousConfig{options: defaultOptions(), eps: defaultEps}
	c.js = string(js)
	err := strictjson.Read(js, "loadbalance: "+RendezvousName, func(r *strictjson.Object) {
		c.read(r)
		header := r.Key("header")
		if name, ok := header.Text("the name of a header"); ok {
			if err := checkHeader(name); err != nil {
				header.Fault("%w", err)
			}
			c.header = name
		}
		number(r.Key("eps"), &c.eps, above(0), maxEps)
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// checkHeader reports why a name is none of a header that may hold a key.
func checkHeader(name string) error {
	foreign := func(r rune) bool { return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyz0123456789-_.", r) }
	switch {
	case name == "" || strings.ContainsFunc(name, foreign):
		return fmt.Errorf("%.40q, want a name of lower-case letters, digits and any of \"-_.\"", name)
	case strings.HasSuffix(name, "-bin"):
		// gRFC A76 forbids it for ring_hash: a proxy may encode it in several ways.
		return fmt.Errorf("%.40q, want a header of text, not -bin", name)
	case strings.HasPrefix(name, "grpc-"):
		// Of these, some differ from one attempt of a call to the next.
		return fmt.Errorf("%.40q, want a header of the application's, not one of gRPC's own", name)
	}
	return nil
}

// rendezvousBalancer is shards with a configuration.
type rendezvousBalancer struct {
	*shards
	// adrift are the endpoints that had attempts in flight when the last chooser was made
	// and were none of its members. Guarded by shards.mu.
	adrift []*endpoint
}

// UpdateClientConnState implements balancer.Balancer.
func (b *rendezvousBalancer) UpdateClientConnState(s balancer.ClientConnState) error {
	cfg := &rendezvousConfig{options: defaultOptions(), eps: defaultEps}
	switch c := s.BalancerConfig.(type) {
	case *rendezvousConfig:
		cfg = c
	case nil: // named by the old loadBalancingPolicy, which has no configuration
	default:
		return fmt.Errorf("loadbalance: %s: configuration of type %T: %w", RendezvousName, c, balancer.ErrBadResolverState)
	}
	return b.update(s.ResolverState, settings{options: cfg.options, tau: defaultDecayTime, choose: func(members []member) chooser {
		if cfg.zone.local != "" {
			// There are two choosers, and each is much adrift of the other.
			return newRendezvous(members, cfg, nil)
		}
		b.adrift = b.drift(members)
		p := newRendezvous(members, cfg, b.crowd)
		p.adrift = b.adrift
		return p
	}})
}

// drift returns the endpoints that are no members and have attempts in flight. It
// keeps those of the last time that shards has forgotten meanwhile. An attempt that
// begins at one of the others later is not known before the next update: one that an
// older picker sends, or a probe of an ejected one. shards.mu is held.
func (b *rendezvousBalancer) drift(members []member) []*endpoint {
	is := make(map[*endpoint]bool, len(members))
	for _, m := range members {
		is[m.endpoint] = true
	}
	var adrift []*endpoint
	add := func(e *endpoint) {
		if unary, streams := e.inFlight(); unary+streams > 0 {
			adrift = append(adrift, e)
		}
	}
	for _, e := range b.adrift {
		if r := b.endpoints[e.key]; r == nil || r.endpoint != e {
			add(e)
		}
	}
	for _, e := range b.endpoints {
		if !is[e.endpoint] {
			add(e.endpoint)
		}
	}
	return adrift
}

// routing is the context key of a call's key.
type routing struct{}

// WithKey returns a context whose calls have the given key: bobtail_rendezvous sends
// calls of one key to one endpoint. Other balancers take no notice. The key holds for
// every call made with the context, on any connection; "" is no key, and takes away
// one that ctx may have.
func WithKey(ctx context.Context, key string) context.Context {
	// Hashed here, once for all attempts of all calls.
	return context.WithValue(ctx, routing{}, hashKey(key))
}

// A rendezvous chooses among endpoints by weighted rendezvous hashing, or highest
// random weight: for a key, each endpoint i of weight w_i has the score
//
//	-w_i / ln(u_i)
//
// where u_i in (0, 1) is a hash of the key and the endpoint, and the scores rank the
// endpoints. An endpoint is the first in proportion to its weight; and as no score
// depends on another endpoint, one that goes moves its own keys only, to the next of
// their ranks, and one that comes takes no others than those that it is first for
// (Thaler & Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", IEEE/ACM
// ToN 6(1), 1998, https://www.microsoft.com/en-us/research/wp-content/uploads/2017/02/HRW98.pdf;
// with weights, Schindelhauer & Schomaker, "Weighted Distributed Hash Tables", SPAA
// 2005).
//
// The load is bounded, as for consistent hashing (Mirrokni, Thorup & Zadimoghaddam,
// "Consistent Hashing with Bounded Loads", SODA 2018,
// https://arxiv.org/abs/1608.01350): an endpoint has room for
//
//	ceil((1+eps) (m+1) w_i / W)
//
// attempts, where m are in flight at all that are ready and W is the sum of their
// weights; when it is full, the key's next rank is asked.
//
// A call without a key goes by the power of two choices, whatever room there is.
//
// It is immutable, and safe for concurrent use. Picks at the same instant do not see
// each other, so they may exceed the room of an endpoint by their number less one.
type rendezvous struct {
	p2c
	header string
	seats  []seat  // seats[i] belongs to ready[i]
	sum    float64 // of the weights, W
	// crowd is nil if the members are to be added up instead.
	crowd *crowd
	// adrift are endpoints that count in the crowd and are no members: as a rule
	// there are none.
	adrift []*endpoint
}

// A seat is what the ranking needs to know of an endpoint: 24 bytes, so that those of
// 1,000 endpoints stay in the first-level cache.
type seat struct {
	hash    uint64
	inverse float64 // 1 / weight
	claim   float64 // (1+eps) weight
}

func newRendezvous(members []member, c *rendezvousConfig, all *crowd) *rendezvous {
	p := &rendezvous{
		p2c:    *newP2C(members, defaultDecayTime),
		header: c.header,
		seats:  make([]seat, len(members)),
		crowd:  all,
	}
	for i, m := range members {
		p.sum += m.weight
		// Mixed once more than a key, or a key that is the name of an endpoint would
		// meet its equal, and rank that endpoint first whatever the weights.
		p.seats[i] = seat{hash: mix(uint64(hashKey(m.key))), inverse: 1 / m.weight, claim: (1 + c.eps) * m.weight}
	}
	return p
}

// route implements chooser.
func (p *rendezvous) route(r *request, b bars) int {
	key := p.keyOf(r.ctx)
	if key == noKey {
		return p.p2c.route(r, b)
	}
	return p.seek(key, b)
}

// keyOf returns the key that the context of a call has. One that the header has in
// several values is these joined with commas (gRFC A76, for ring_hash).
func (p *rendezvous) keyOf(ctx context.Context) keyHash {
	if key, _ := ctx.Value(routing{}).(keyHash); key != noKey || p.header == "" {
		return key
	}
	values := metadata.ValueFromOutgoingContext(ctx, p.header)
	if len(values) == 1 {
		return hashKey(values[0])
	}
	return hashKey(strings.Join(values, ","))
}

// seek returns the endpoint for an attempt with a key, or -1 if all are barred: of the
// others the first in rank that has room. If none has, the first: they were full because
// others are barred, or became so during the pick.
func (p *rendezvous) seek(key keyHash, b bars) int {
	if i := p.top(key, b, float64(p.inFlight()+1)); i >= 0 {
		return i
	}
	return p.top(key, b, math.Inf(1))
}

// inFlight returns how many attempts are in flight at the endpoints that are ready. It
// is the sum of their own counts, kept in one word: the two writes cost 5 ns (8 ns with
// two processors at it), and to add up 1,000 counts at each pick took 1.0 to 2.2 us, half
// as long as to rank the endpoints.
func (p *rendezvous) inFlight() (m int64) {
	if p.crowd == nil {
		for i := range p.ready {
			unary, streams := p.ready[i].inFlight()
			m += unary + streams
		}
		return m
	}
	m = p.crowd.n.Load()
	for _, e := range p.adrift {
		unary, streams := e.inFlight()
		m -= unary + streams
	}
	return m
}

// top returns the first in rank of the endpoints that are not barred and have room when
// load is to be shared; -1 if there is none.
func (p *rendezvous) top(key keyHash, b bars, load float64) int {
	open := b.none()
	at, limit := -1, math.Inf(1)
	var best seat
	var bestQ float64
	for i := range p.seats {
		s := p.seats[i]
		// Nearly all fall behind the best by q <= -ln(1-q) <= q/(1-q), without a
		// logarithm; and those that cannot be the first need not be asked for room.
		q := unit(mix(uint64(key) ^ s.hash))
		if q*s.inverse >= limit || at >= 0 && !outranks(q, s.inverse, bestQ, best.inverse) {
			continue
		}
		e := p.ready[i].endpoint
		if !open && b.at(e.key) {
			continue
		}
		// n < ceil(x) is n < x, as n is whole. By W on both sides, not by a quotient: so
		// nothing is rounded with the default eps, and a capacity of 5 is no 5.0000001.
		if unary, streams := e.inFlight(); float64(unary+streams)*p.sum >= load*s.claim {
			continue
		}
		at, best, bestQ, limit = i, s, q, q/(1-q)*s.inverse
	}
	return at
}

// outranks reports whether the score of an endpoint, with q = 1-u, is above that of
// another.
func outranks(q, inverse, otherQ, otherInverse float64) bool {
	if inverse == otherInverse {
		return q < otherQ
	}
	return math.Log(1-q)*inverse > math.Log(1-otherQ)*otherInverse
}

// keyHash is the hash of a key.
type keyHash uint64

// noKey is the hash of the empty key, which is no key.
const noKey keyHash = 0

// hashKey hashes a key, by FNV-1a and mix. Every client must rank alike, those of other
// versions too, so that it may never change.
func hashKey(key string) keyHash {
	if key == "" {
		return noKey
	}
	h := uint64(14695981039346656037)
	for i := range len(key) {
		h = (h ^ uint64(key[i])) * 1099511628211
	}
	return keyHash(max(1, mix(h)))
}

// mix is the finalizer of SplitMix64 (Stafford's Mix13): a bijection in which each bit
// of h flips each bit of the result with probability 1/2. FNV-1a alone leaves the high
// bits of keys that differ in their last byte much alike.
func mix(h uint64) uint64 {
	h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>27) * 0x94d049bb133111eb
	return h ^ h>>31
}

// unit makes of 53 bits a number in (0, 1), and never either. It is an odd multiple of
// 2^-53, so that 1 less it is exact.
func unit(h uint64) float64 { return float64(h>>11|1) * 0x1p-53 }
