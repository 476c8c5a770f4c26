package main

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"testing"

	clusterpb "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// A delivery is a way for a policy to come to a client.
type delivery struct {
	name string
	dial func(s *stage, policy, config string) *client
}

var deliveries = []delivery{
	{"default service config", func(s *stage, policy, config string) *client {
		return s.told(nil, grpc.WithDefaultServiceConfig(serviceConfig(policy, config)))
	}},
	{"service config of the resolver", func(s *stage, policy, config string) *client {
		// It overrides the default one.
		return s.told(func(cc resolver.ClientConn, state *resolver.State) {
			state.ServiceConfig = cc.ParseServiceConfig(serviceConfig(policy, config))
		}, grpc.WithDefaultServiceConfig(serviceConfig("pick_first", `{}`)))
	}},
	{"xDS", func(s *stage, policy, config string) *client {
		return s.overXDS(s.policy(policy, config))
	}},
	{"xDS, behind a policy that the client does not know", func(s *stage, policy, config string) *client {
		return s.overXDS(s.policy("of_another_language", `{"a": 1}`), s.policy(policy, config), s.policy("pick_first", `{}`))
	}},
}

func serviceConfig(policy, config string) string {
	return fmt.Sprintf(`{"loadBalancingConfig": [{%q: %s}]}`, policy, config)
}

// overXDS has the backends in two zones, of which the second has as many endpoints as are left.
func (s *stage) overXDS(policies ...*clusterpb.LoadBalancingPolicy_Policy) *client {
	s.Helper()
	localities := []locality{s.zone("near", 1, 0), s.zone("far", 2)}
	for i := range s.backends[1:] {
		localities[1].endpoints = append(localities[1].endpoints, endpoint{addr: s.backends[i+1].addr})
	}
	// Nothing of a default service config holds once xDS has spoken.
	_, c := s.controlled(newCluster(policies...), localities,
		grpc.WithDefaultServiceConfig(serviceConfig("pick_first", `{}`)))
	return c
}

// told has a resolver that is told the endpoints, and more by tell.
func (s *stage) told(tell func(resolver.ClientConn, *resolver.State), opts ...grpc.DialOption) *client {
	s.Helper()
	r := manual.NewBuilderWithScheme("told")
	r.BuildCallback = func(_ resolver.Target, cc resolver.ClientConn, _ resolver.BuildOptions) {
		var state resolver.State
		for _, b := range s.backends {
			state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: b.addr}}})
		}
		if tell != nil {
			tell(cc, &state)
		}
		r.InitialState(state)
	}
	return s.dial("told:///"+service, append(opts, grpc.WithResolvers(r))...)
}

// However it is delivered, it is our policy that runs, and with its configuration. One
// of three backends stalls: bobtail_p2c sends it next to nothing, where round_robin
// sends it a third. Users keep to one backend if bobtail_rendezvous is told the header
// that names them, and to none if it is not.
func TestDelivery(t *testing.T) {
	for _, d := range deliveries {
		for _, tc := range []struct {
			policy, config string
			stalled        [2]int // of 300 calls, the least and the most
		}{
			{"round_robin", `{}`, [2]int{100, 100}},
			{"bobtail_p2c", `{}`, [2]int{0, 30}},
			{"bobtail_p2c", `{"decayTime": "3600s"}`, [2]int{0, 30}},
			{"bobtail_rendezvous", `{"header": "x-other"}`, [2]int{0, 30}},
		} {
			t.Run(fmt.Sprintf("%s/stall/%s %s", d.name, tc.policy, tc.config), func(t *testing.T) {
				s := newStage(t, 3)
				c := d.dial(s, tc.policy, tc.config)
				if got := stall(c, 300); got < tc.stalled[0] || got > tc.stalled[1] {
					t.Errorf("%d of 300 calls at the backend that stalls, want %d", got, tc.stalled)
				}
			})
		}
		for _, tc := range []struct {
			policy, config string
			settled        bool
		}{
			{"round_robin", `{}`, false},
			{"bobtail_rendezvous", `{}`, false},
			{"bobtail_rendezvous", `{"header": "x-user-id"}`, true},
			{"bobtail_rendezvous", `{"header": "x-user-id", "eps": 0.5}`, true},
		} {
			t.Run(fmt.Sprintf("%s/users/%s %s", d.name, tc.policy, tc.config), func(t *testing.T) {
				s := newStage(t, 3)
				c := d.dial(s, tc.policy, tc.config)
				c.reach(0, 1, 2)
				if got := c.serve(50, 7); settled(got) != tc.settled {
					t.Errorf("each user at one backend: %v, want %v; per user: %v", settled(got), tc.settled, got.homes())
				}
			})
		}
	}
}

// stall makes calls of which backend 0 answers none, each when the last has ended or is
// stuck there, and returns how many of n have gone there. They are the n that follow
// when one has arrived at each backend: so the client is connected to all, and has never
// had an answer of that one which it could have taken for fast.
func stall(c *client, n int) (stalled int) {
	c.Helper()
	stuck := make(chan struct{})
	release := make(chan struct{})
	c.handle = func(_ context.Context, backend int) error {
		if backend == 0 {
			stuck <- struct{}{}
			<-release
		}
		return nil
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(release)
	call := func() {
		c.Helper()
		ended := make(chan error, 1)
		wg.Go(func() { ended <- c.try("") })
		select {
		case <-stuck:
		case err := <-ended:
			if err != nil {
				c.Fatal(err)
			}
		case <-c.ctx.Done():
			c.Fatal(c.ctx.Err())
		}
	}
	reached := make(counts)
	for reached.at(0) == 0 || reached.at(1) == 0 || reached.at(2) == 0 {
		call()
		maps.Copy(reached, c.arrived.take())
	}
	for range n {
		call()
	}
	return c.arrived.take().at(0)
}
