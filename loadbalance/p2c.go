package loadbalance

import (
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
)

// P2CName is the name under which the balancer of this file is registered, for
// loadBalancingConfig: [{"bobtail_p2c": {}}].
const P2CName = "bobtail_p2c"

const (
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
	// decayTime, in (0, 1h], is tau: how fast an endpoint's past fades. Default 10 s.
	// An endpoint that was slow is asked again after 2 tau at the latest, so a
	// longer one learns later of a recovery, and a shorter one spends more calls
	// on probes: one in 2 tau for each slow endpoint.
	decayTime time.Duration
}

// ParseConfig implements balancer.ConfigParser. It reports every fault.
func (p2cBuilder) ParseConfig(js json.RawMessage) (serviceconfig.LoadBalancingConfig, error) {
	c := &p2cConfig{decayTime: defaultDecayTime}
	err := parseObject(js, map[string]func(json.RawMessage) error{
		"decayTime": func(v json.RawMessage) error {
			d, err := parseDuration(v)
			if err != nil {
				return err
			}
			if d <= 0 || d > maxDecayTime {
				return fmt.Errorf("%v, want (0s, %v]", d, maxDecayTime)
			}
			c.decayTime = d
			return nil
		},
	})
	if err != nil {
		return nil, fmt.Errorf("loadbalance: %s: %w", P2CName, err)
	}
	return c, nil
}

// p2cBalancer is shards with a configuration.
type p2cBalancer struct{ *shards }

// UpdateClientConnState implements balancer.Balancer.
func (b *p2cBalancer) UpdateClientConnState(s balancer.ClientConnState) error {
	tau := defaultDecayTime
	switch c := s.BalancerConfig.(type) {
	case *p2cConfig:
		tau = c.decayTime
	case nil: // named by the old loadBalancingPolicy, which has no configuration
	default:
		return fmt.Errorf("loadbalance: %s: configuration of type %T: %w", P2CName, c, balancer.ErrBadResolverState)
	}
	return b.update(s.ResolverState, settings{tau, func(ready []*endpoint, _ []resolver.Endpoint) chooser {
		return &p2c{ready, tau}
	}})
}

// A p2c chooses among endpoints by the power of two choices: of two drawn at
// random, the one with the lower load,
//
//	load = expected latency x (in flight + 1).
//
// Two choices instead of one take the expected longest queue from log n / log
// log n to log log n (Mitzenmacher, "The Power of Two Choices in Randomized Load
// Balancing", IEEE TPDS 12(10), 2001,
// https://www.eecs.harvard.edu/~michaelm/postscripts/tpds2001.pdf); and, unlike
// the choice of the best of all, they do not send every client to the same
// endpoint when what they know is stale. The load is that of Finagle's
// balancer with peak EWMA
// (https://twitter.github.io/finagle/guide/Clients.html#power-of-two-choices-p2c-least-loaded),
// with another estimate of the latency: see endpoint.
//
// It is immutable, and safe for concurrent use.
type p2c struct {
	ready []*endpoint
	tau   time.Duration
}

// route implements chooser.
func (p *p2c) route(r request, view attempt.View) int {
	return p.choose(r.now, view, r.streaming, r.intn)
}

// choose returns the index of the endpoint that an attempt goes to, or -1 if
// there is none that it may go to. The view shows where its siblings went, intn
// draws from [0, n).
//
// An attempt never goes beside a sibling that is in flight; it goes to an
// endpoint that no sibling has tried if one is ready, and else to one where the
// sibling's attempt has ended.
func (p *p2c) choose(now time.Duration, view attempt.View, streaming bool, intn func(int) int) int {
	n := len(p.ready)
	if view.Empty() {
		switch n {
		case 0:
			return -1
		case 1:
			return 0
		}
		// Two distinct ones: the second is drawn from all but the first.
		i, j := intn(n), intn(n-1)
		if j >= i {
			j++
		}
		return p.better(now, i, j, streaming)
	}
	i, j := p.draw(view, attempt.View.Tried, intn)
	if i < 0 {
		i, j = p.draw(view, attempt.View.InFlight, intn)
	}
	if j < 0 {
		return i
	}
	return p.better(now, i, j, streaming)
}

// draw returns two distinct endpoints for which avoid does not hold, uniformly;
// -1 stands for one that does not exist.
func (p *p2c) draw(view attempt.View, avoid func(attempt.View, string) bool, intn func(int) int) (i, j int) {
	n := len(p.ready)
	// As a rule nearly all are allowed: draw until two fit. A pair that fits is
	// uniform among those that do, so giving up after a few draws and going
	// through all of them biases nothing.
	for range 4 {
		if n < 2 {
			break
		}
		i, j = intn(n), intn(n-1)
		if j >= i {
			j++
		}
		if !avoid(view, p.ready[i].key) && !avoid(view, p.ready[j].key) {
			return i, j
		}
	}
	// A reservoir of two.
	i, j = -1, -1
	seen := 0
	for k, e := range p.ready {
		if avoid(view, e.key) {
			continue
		}
		seen++
		switch {
		case seen == 1:
			i = k
		case seen == 2:
			j = k
		default:
			switch intn(seen) {
			case 0:
				i = k
			case 1:
				j = k
			}
		}
	}
	return i, j
}

// better returns which of endpoints i and j has the lower load; i if they are
// equal.
func (p *p2c) better(now time.Duration, i, j int, streaming bool) int {
	ci, ni := p.ready[i].load(now, p.tau, streaming)
	cj, nj := p.ready[j].load(now, p.tau, streaming)
	if (ci == unknown || cj == unknown) && ci < pending && cj < pending {
		// Nothing to compare latencies by: a stream goes where fewer are in flight.
		ci, cj = 1, 1
	}
	if cj*float64(nj+1) < ci*float64(ni+1) {
		return j
	}
	return i
}
