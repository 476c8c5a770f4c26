package loadbalance

import (
	"encoding/json"
	"fmt"
	"math"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/serviceconfig"

	"github.com/bobtail-rpc/bobtail/internal/strictjson"
)

// P2CName is the name under which the balancer of this file is registered, for
// loadBalancingConfig: [{"bobtail_p2c": {}}].
const P2CName = "bobtail_p2c"

const (
	// maxDraws is how many endpoints an attempt looks at, at most. In TestQueues, at 70%
	// load with two of ten replicas five times slower, 2 draws give a p99 of 98 ms, 3 of 58,
	// 5 of 50, 8 of 49, all ten 48.
	maxDraws = 8
	// alike is by which factor of the typical latency the endpoints' are held to be the
	// same. Without it an endpoint that has met a few stragglers loses every comparison with
	// one that has not, until its cost has decayed.
	alike = 1.5

	// defaultDecayTime is Finagle's, for the same estimate.
	defaultDecayTime = 10 * time.Second
	maxDecayTime     = time.Hour
)

func init() { balancer.Register(p2cBuilder{}) }

type p2cBuilder struct{}

func (p2cBuilder) Name() string { return P2CName }

func (p2cBuilder) Build(cc balancer.ClientConn, opts balancer.BuildOptions) balancer.Balancer {
	return &p2cBalancer{newShards(cc, opts)}
}

// p2cConfig is what bobtail_p2c can be told.
type p2cConfig struct {
	serviceconfig.LoadBalancingConfig
	options
	// decayTime, in (0, 1h], is tau: how fast an endpoint's past fades. Default 10 s.
	// An endpoint that was slow is asked again after 2 tau at the latest, so a
	// longer one learns later of a recovery, and a shorter one spends more calls
	// on probes: one in 2 tau for each slow endpoint.
	decayTime time.Duration
}

// ParseConfig implements balancer.ConfigParser. It reports every fault.
func (p2cBuilder) ParseConfig(js json.RawMessage) (serviceconfig.LoadBalancingConfig, error) {
	c := &p2cConfig{options: defaultOptions(), decayTime: defaultDecayTime}
	c.js = string(js)
	err := strictjson.Read(js, "loadbalance: "+P2CName, func(r *strictjson.Object) {
		c.read(r)
		duration(r.Key("decayTime"), &c.decayTime, 1, maxDecayTime)
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// p2cBalancer is shards with a configuration.
type p2cBalancer struct{ *shards }

// UpdateClientConnState implements balancer.Balancer.
func (b *p2cBalancer) UpdateClientConnState(s balancer.ClientConnState) error {
	cfg := &p2cConfig{options: defaultOptions(), decayTime: defaultDecayTime}
	switch c := s.BalancerConfig.(type) {
	case *p2cConfig:
		cfg = c
	case nil: // named by the old loadBalancingPolicy, which has no configuration
	default:
		return fmt.Errorf("loadbalance: %s: configuration of type %T: %w", P2CName, c, balancer.ErrBadResolverState)
	}
	tau := cfg.decayTime
	return b.update(s.ResolverState, settings{options: cfg.options, tau: tau, choose: func(members []member) chooser {
		return newP2C(members, tau)
	}})
}

// A p2c chooses among endpoints by the power of two choices: of two drawn at
// random, the one with the lower load,
//
//	load = expected latency x (in flight + 1).
//
// It draws on, up to eight times in all, while even the better one is busy: while its load
// exceeds 1.5 times the typical latency of the endpoints.
//
// Two choices instead of one take the expected longest queue from log n / log
// log n to log log n (Mitzenmacher, "The Power of Two Choices in Randomized Load
// Balancing", IEEE TPDS 12(10), 2001,
// https://www.eecs.harvard.edu/~michaelm/postscripts/tpds2001.pdf); and, unlike
// the choice of the best of all, they do not send every client to the same
// endpoint when what they know is stale. The further draws are for what this client
// knows at first hand: with its own attempts in flight at both, there may be an endpoint
// that has none. One among many clients seldom has, and keeps to two. The load is that
// of Finagle's
// balancer with peak EWMA
// (https://twitter.github.io/finagle/guide/Clients.html#power-of-two-choices-p2c-least-loaded),
// with another estimate of the latency: see endpoint.
//
// Endpoints of different weights are drawn in proportion to them, and
//
//	load = expected latency x (in flight / weight + 1)
//
// where weight is relative to the mean: attempts in flight weigh less where there is
// more to serve them, and where nothing is in flight the weight counts once, in the draw.
// An endpoint in its slow start has a lower weight.
//
// It is immutable, and safe for concurrent use.
type p2c struct {
	ready []member
	tau   time.Duration
	wheel *wheel // nil if all weights are equal
}

func newP2C(members []member, tau time.Duration) *p2c {
	return &p2c{members, tau, newWheel(members)}
}

// route implements chooser.
func (p *p2c) route(r *request, b bars) int {
	n := len(p.ready)
	if b.none() {
		switch n {
		case 0:
			return -1
		case 1:
			return 0
		}
		i, j := p.pair(r)
		return p.best(r, b, i, j)
	}
	i, j := p.draw(r, b)
	if j < 0 {
		return i
	}
	return p.best(r, b, i, j)
}

// best returns the endpoint of the lowest load of i, j, and those that are drawn on.
func (p *p2c) best(r *request, b bars, i, j int) int {
	x, y := p.weigh(r, i, false), p.weigh(r, j, true)
	if y.less(x) {
		i, x = j, y
	}
	for range maxDraws - 2 {
		if !x.busy(r.typical) {
			break
		}
		if j = p.one(r); j == i || !b.none() && b.at(p.ready[j].key) {
			continue
		}
		if y = p.weigh(r, j, true); y.less(x) {
			i, x = j, y
		}
	}
	return i
}

// one draws an endpoint.
func (p *p2c) one(r *request) int {
	if p.wheel != nil {
		return p.wheel.draw(fresh(r.intn), r.intn)
	}
	return r.intn(len(p.ready))
}

// A burden is what speaks against an endpoint.
type burden struct {
	cost float64 // in nanoseconds
	n    float64 // attempts in flight, one more with this
}

// weigh returns the burden of an endpoint. One that is to take over from that which was
// drawn first, in proportion to its weight, must have room by its own weight: or the
// lighter of two would be busy whenever the other is.
func (p *p2c) weigh(r *request, i int, later bool) burden {
	cost, n := p.ready[i].load(r.now, p.tau, r.streaming)
	if cost > r.typical*(1/alike) && cost < r.typical*alike {
		cost = r.typical
	}
	x := float64(n)
	if p.wheel != nil {
		w := p.wheel.relative[i]
		if x /= w; later && w < 1 {
			x += 1/w - 1 // this attempt counts by the weight too
		}
	}
	return burden{cost, x + 1}
}

// less reports whether x is the lower load.
func (x burden) less(y burden) bool {
	if (x.cost == unknown || y.cost == unknown) && x.cost < pending && y.cost < pending {
		// Nothing to compare latencies by: a stream goes where fewer are in flight.
		return x.n < y.n
	}
	return x.cost*x.n < y.cost*y.n
}

// busy reports whether it is worth to look for another. typical is 0 if nothing is known.
func (x burden) busy(typical float64) bool {
	if typical == 0 || x.cost == unknown {
		return x.n > 1
	}
	return x.cost*x.n > alike*typical
}

// pair draws two distinct endpoints of at least two.
func (p *p2c) pair(r *request) (i, j int) {
	n := uint64(len(p.ready))
	if p.wheel != nil {
		i = p.wheel.draw(r.bits, r.intn)
		for range 4 {
			if j = p.wheel.draw(fresh(r.intn), r.intn); j != i {
				return i, j
			}
		}
		// One endpoint has nearly all the weight: any other will do.
		j = r.intn(int(n) - 1)
	} else {
		// 32 bits each: the bias is n/2^32.
		i = int(r.bits >> 32 * n >> 32)
		j = int(r.bits & math.MaxUint32 * (n - 1) >> 32)
	}
	if j >= i { // drawn from all but the first
		j++
	}
	return i, j
}

// fresh draws the bits for another draw: the upper 30 of each half.
func fresh(intn func(int) int) uint64 {
	return uint64(intn(1<<30))<<34 | uint64(intn(1<<30))<<2
}

// draw returns two distinct endpoints that are not barred; -1 stands for one that does
// not exist.
func (p *p2c) draw(r *request, b bars) (i, j int) {
	// As a rule nearly all are allowed: draw until two fit. A pair that fits is
	// drawn as any among those that do, so giving up after a few draws and going
	// through all of them biases nothing.
	for range 4 {
		if len(p.ready) < 2 {
			break
		}
		i, j = p.pair(r)
		if !b.at(p.ready[i].key) && !b.at(p.ready[j].key) {
			return i, j
		}
		r.bits = fresh(r.intn)
	}
	// A reservoir of two.
	i, j = -1, -1
	seen := 0
	for k := range p.ready {
		if b.at(p.ready[k].key) {
			continue
		}
		seen++
		switch {
		case seen == 1:
			i = k
		case seen == 2:
			j = k
		default:
			switch r.intn(seen) {
			case 0:
				i = k
			case 1:
				j = k
			}
		}
	}
	return i, j
}

// A wheel draws indexes in proportion to weights, by Walker's alias method: an index drawn
// evenly is kept with a probability of its own, or else stands for another (Vose, "A
// Linear Algorithm for Generating Random Numbers with a Given Distribution", IEEE TSE
// 17(9), 1991).
type wheel struct {
	relative []float64 // to the mean
	keep     []float64
	alias    []int
}

// newWheel returns nil if all weights are equal.
func newWheel(members []member) *wheel {
	n := len(members)
	var sum float64
	equal := true
	for _, m := range members {
		sum += m.weight
		equal = equal && m.weight == members[0].weight
	}
	if equal {
		return nil
	}
	w := &wheel{make([]float64, n), make([]float64, n), make([]int, n)}
	var small, large []int
	for i, m := range members {
		x := m.weight / sum * float64(n)
		w.relative[i], w.keep[i], w.alias[i] = x, x, i
		if x < 1 {
			small = append(small, i)
		} else {
			large = append(large, i)
		}
	}
	for len(small) > 0 && len(large) > 0 {
		s, l := small[len(small)-1], large[len(large)-1]
		small = small[:len(small)-1]
		w.alias[s] = l
		w.keep[l] -= 1 - w.keep[s]
		if w.keep[l] < 1 {
			large = large[:len(large)-1]
			small = append(small, l)
		}
	}
	// What rounding has left over stands for itself.
	for _, i := range append(small, large...) {
		w.keep[i] = 1
	}
	return w
}

// draw returns an index.
func (w *wheel) draw(bits uint64, intn func(int) int) int {
	i := int(bits >> 32 * uint64(len(w.keep)) >> 32)
	if float64(intn(1<<30))*0x1p-30 < w.keep[i] {
		return i
	}
	return w.alias[i]
}
