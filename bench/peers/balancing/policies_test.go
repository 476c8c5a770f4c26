package balancing

import (
	"fmt"
	"os"
	"testing"

	"github.com/go-kratos/kratos/v2/selector"
	"github.com/go-kratos/kratos/v2/selector/p2c"
	_ "github.com/go-kratos/kratos/v2/transport/grpc" // registers "selector"
	"google.golang.org/grpc/balancer"
	_ "google.golang.org/grpc/balancer/leastrequest"
	_ "google.golang.org/grpc/balancer/weightedroundrobin"

	_ "github.com/bobtail-rpc/bobtail/loadbalance"
)

// A policy is a row of the table.
type policy struct {
	name string
	// balancer is the name under which it is registered, and config its JSON.
	balancer, config string
	// reports is whether its servers tell their load.
	reports bool
}

var policies = []policy{
	{name: "round_robin", balancer: "round_robin"},
	{name: "least_request(2)", balancer: "least_request_experimental", config: `{"choiceCount": 2}`},
	{name: "least_request(5)", balancer: "least_request_experimental", config: `{"choiceCount": 5}`},
	// All by default: weights are updated each second, and used once there have been
	// reports for 10 s.
	{name: "weighted_round_robin", balancer: "weighted_round_robin", reports: true},
	// go-zero's is in gozero_test.go.
	{name: "kratos", balancer: "selector"},
	{name: "bobtail_p2c", balancer: "bobtail_p2c"},
	{name: "bobtail_prequal", balancer: "bobtail_prequal"},
	{name: "bobtail_rendezvous", balancer: "bobtail_rendezvous"}, // its calls have no key
}

func (p policy) json() string {
	if p.config == "" {
		return "{}"
	}
	return p.config
}

func (p policy) serviceConfig() string {
	return fmt.Sprintf(`{"loadBalancingConfig":[{%q:%s}]}`, p.balancer, p.json())
}

// registered says whether the policy can be had.
func (p policy) registered() bool { return balancer.Get(p.balancer) != nil }

func TestMain(m *testing.M) {
	// kratos's default selector is weighted round robin.
	selector.SetGlobalSelector(p2c.NewBuilder())
	os.Exit(m.Run())
}
