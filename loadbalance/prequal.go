package loadbalance

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/serviceconfig"

	"github.com/bobtail-rpc/bobtail/internal/strictjson"
)

// PrequalName is the name under which the balancer of this file is registered, for
// loadBalancingConfig: [{"bobtail_prequal": {}}].
const PrequalName = "bobtail_prequal"

const (
	// defaultProbesPerPick is the paper's (section 5.1).
	defaultProbesPerPick = 3
	// defaultQRIF is a little above the paper's 0.84. Where one client sees all of the load
	// (the first case of TestSharedFleet, without the bound of quantile, three seeds), 0.9 has
	// a p99 of 50.6 ms and a p99.9 of 80, 0.84 of 51.0 and 87, and 0.75 of 52.6 and 113: the
	// fewer are hot, the less is decided by RIF alone, which takes a slow server for as good as a
	// fast one. Many clients of 100 servers with antagonists do not mind: from 0.6 to 0.95
	// their p99 is a fourth of p2c's.
	defaultQRIF = 0.9
	// defaultMaxProbes renews the whole pool every 53 ms. A probe costs about as much as
	// a small call, some 100 us of both ends: that makes 3% of a processor. Beyond it
	// the simulator shows no gain, as calls bring reports too.
	defaultMaxProbes = 300
	// defaultProbeTimeout is not the paper's 3 ms, which holds within a data center: a
	// probe that takes longer than this tells of the past.
	defaultProbeTimeout = 50 * time.Millisecond
)

func init() { balancer.Register(prequalBuilder{}) }

type prequalBuilder struct{}

func (prequalBuilder) Name() string { return PrequalName }

func (prequalBuilder) Build(cc balancer.ClientConn, opts balancer.BuildOptions) balancer.Balancer {
	b := &prequalBalancer{shards: newShards(cc, opts), prober: newProber()}
	ctx, cancel := context.WithCancel(context.Background())
	b.stop = cancel
	go b.prober.run(ctx, b.now)
	return b
}

// prequalConfig is what bobtail_prequal can be told.
type prequalConfig struct {
	serviceconfig.LoadBalancingConfig
	options
	// decayTime, in (0, 1h], is that of bobtail_p2c, for the picks that go by what the
	// client sees. Default 10 s.
	decayTime time.Duration
	// probesPerPick, in [0.1, 16], is how many probes are sent for each pick. Default 3.
	probesPerPick float64
	// qRIF, in [0, 1], is the quantile of the RIFs reported of late above which an
	// endpoint is hot; of n endpoints it is at most 1 - 1.25/n. Default 0.9. With 0 nearly all is decided by RIF, with 1 by latency.
	qRIF float64
	// maxProbes, in [1, 100000], is how many probes are sent in a second at most.
	// Default 300.
	maxProbes int64
	// probeTimeout, in [1 ms, 1 s], is how long a probe is waited for. Default 50 ms.
	// One that is shorter than the way to the servers and back leaves no reports.
	probeTimeout time.Duration
}

func defaultPrequal() *prequalConfig {
	return &prequalConfig{
		options:       defaultOptions(),
		decayTime:     defaultDecayTime,
		probesPerPick: defaultProbesPerPick,
		qRIF:          defaultQRIF,
		maxProbes:     defaultMaxProbes,
		probeTimeout:  defaultProbeTimeout,
	}
}

// ParseConfig implements balancer.ConfigParser. It reports every fault.
func (prequalBuilder) ParseConfig(js json.RawMessage) (serviceconfig.LoadBalancingConfig, error) {
	c := defaultPrequal()
	c.js = string(js)
	err := strictjson.Read(js, "loadbalance: "+PrequalName, func(r *strictjson.Object) {
		c.read(r)
		duration(r.Key("decayTime"), &c.decayTime, 1, maxDecayTime)
		number(r.Key("probesPerPick"), &c.probesPerPick, 0.1, poolSize)
		number(r.Key("qRif"), &c.qRIF, 0, 1)
		whole(r.Key("maxProbesPerSecond"), &c.maxProbes, 1, 100_000)
		duration(r.Key("probeTimeout"), &c.probeTimeout, time.Millisecond, time.Second)
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// prequalBalancer is shards with a configuration and a prober.
type prequalBalancer struct {
	*shards
	prober *prober
	stop   context.CancelFunc
}

// UpdateClientConnState implements balancer.Balancer.
func (b *prequalBalancer) UpdateClientConnState(s balancer.ClientConnState) error {
	cfg := defaultPrequal()
	switch c := s.BalancerConfig.(type) {
	case *prequalConfig:
		cfg = c
	case nil: // named by the old loadBalancingPolicy, which has no configuration
	default:
		return fmt.Errorf("loadbalance: %s: configuration of type %T: %w", PrequalName, c, balancer.ErrBadResolverState)
	}
	return b.update(s.ResolverState, settings{
		options: cfg.options,
		tau:     cfg.decayTime,
		choose: func(members []member) chooser {
			return b.prober.replicas.choose(members, cfg, b.prober)
		},
		ended: func(e *endpoint, now time.Duration, v verdict, load any) {
			b.prober.ended(e, now, v, load, rand.Float64())
		},
	})
}

// Close implements balancer.Balancer. Probes that are on their way are cancelled.
func (b *prequalBalancer) Close() {
	b.stop()
	b.shards.Close()
}
