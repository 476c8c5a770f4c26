package loadbalance_test

import (
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/loadbalance"
)

// An Update of a bobtail.Client does not touch the balancer, neither one that changes
// what may change nor one that is refused.
func TestNothingIsForgottenByAnUpdateOfTheClient(t *testing.T) {
	for _, name := range loadbalance.Balancers() {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var client *bobtail.Client
				var config string
				policy := func(rest string) bobtail.Policy {
					p, err := bobtail.ParsePolicy([]byte(strings.TrimSuffix(config, "}") + rest + "}"))
					if err != nil {
						t.Fatal(err)
					}
					return p
				}
				dial := func(c string) []grpc.DialOption {
					config = c
					var err error
					client, err = bobtail.NewClient(policy(`, "methodConfig": [{"name": [{}], "timeout": "600s"}]`), bobtail.WithLogger(nil))
					if err != nil {
						t.Fatal(err)
					}
					return client.DialOptions()
				}
				loadbalance.Survives(t, name, dial, func() {
					if err := client.Update(policy(`, "methodConfig": [{"name": [{}], "timeout": "30s",
						"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.050s"}, "idempotent": true}]`)); err != nil {
						t.Error(err)
					}
					config = `{"loadBalancingConfig": [{"round_robin": {}}]}`
					if err := client.Update(policy("")); err == nil {
						t.Error("no error for another loadBalancingConfig")
					}
				})
			})
		})
	}
}
