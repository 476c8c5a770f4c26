package main

import (
	"context"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	clusterpb "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/bobtail-rpc/bobtail"
)

// What the weights of EDS do. Right below the priorities bobtail_rendezvous has all
// localities of one before it, and a weight for each endpoint that is its share of its
// locality's share (gRFC A113). Below wrr_locality there is a balancer for each
// locality, whose share of the calls is its weight.
func TestWeights(t *testing.T) {
	for name, perLocality := range map[string]bool{"rendezvous": false, "rendezvous below wrr_locality": true} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, 4)
			p := s.policy("bobtail_rendezvous", `{"header": "x-user-id", "eps": 10}`)
			if perLocality {
				p = s.below(p)
			}
			_, c := s.controlled(newCluster(p), []locality{
				{zone: "near", weight: 1, endpoints: []endpoint{{s.backends[0].addr, 1}, {s.backends[1].addr, 3}}},
				s.zone("far", 2, 2),
				{zone: "last resort", weight: 1, priority: 1, endpoints: []endpoint{{addr: s.backends[3].addr}}},
			})
			c.reach(0, 1, 2)
			const users = 1200
			got := c.serve(users, 1)
			for i, share := range []float64{1. / 12, 3. / 12, 8. / 12, 0} {
				// The ports are other ones in each run, and with them the ranks. Five
				// standard deviations are exceeded in one of 1.7 million.
				if n := got.at(i); math.Abs(float64(n)-users*share) > 5*math.Sqrt(users*share*(1-share)) {
					t.Errorf("backend %d has %d of %d users, want about %.0f", i, n, users, users*share)
				}
			}
			// Who is sent to a zone at random has no home.
			again := c.serve(50, 7)
			if settled(again) == perLocality {
				t.Errorf("each user at one backend: %v, want %v: %v", !perLocality, perLocality, again.homes())
			}
		})
	}

	t.Run("p2c below wrr_locality", func(t *testing.T) {
		s := newStage(t, 3)
		_, c := s.controlled(newCluster(s.below(s.policy("bobtail_p2c", `{}`))),
			[]locality{s.zone("near", 1, 0, 1), s.zone("far", 3, 2)})
		c.reach(0, 1, 2)
		got := c.serve(1, 1000)
		if n := got.at(2); n < 680 || n > 820 { // five standard deviations of 14
			t.Errorf("%d of 1000 calls in the zone that has 3/4 of the weight", n)
		}
	})

	t.Run("an update of nothing but weights", func(t *testing.T) {
		s := newStage(t, 2)
		control, c := s.controlled(newCluster(s.policy("bobtail_rendezvous", `{"header": "x-user-id"}`)),
			[]locality{s.zone("near", 1, 0), s.zone("far", 1, 1)})
		c.reach(0, 1)
		const users = 400
		for _, tc := range []struct {
			far  uint32
			want float64
		}{{1, .5}, {9, .9}, {1, .5}} {
			if err := control.setEndpoints(s.ctx, []locality{s.zone("near", 1, 0), s.zone("far", tc.far, 1)}); err != nil {
				t.Fatal(err)
			}
			// The client applies what it has accepted a moment later. Then every user
			// has a backend, as before.
			n, last := -1, -2
			for n != last || math.Abs(float64(n)-users*tc.want) > 5*math.Sqrt(users*.25) {
				if s.ctx.Err() != nil {
					t.Fatalf("weight %d: %d of %d users, then %d, want about %.0f", tc.far, last, users, n, users*tc.want)
				}
				n, last = c.serve(users, 1).at(1), n
			}
		}
	})
}

// below is the policy below wrr_locality.
func (s *stage) below(p *clusterpb.LoadBalancingPolicy_Policy) *clusterpb.LoadBalancingPolicy_Policy {
	s.Helper()
	p, err := perLocality(p)
	if err != nil {
		s.Fatal(err)
	}
	return p
}

// A configuration that is none is refused as a whole, and the control plane is told why.
// The client goes on with the one that it had.
func TestInvalidConfigIsNACKed(t *testing.T) {
	for _, tc := range []struct{ policy, config, want string }{
		{"bobtail_p2c", `{"decayTime": "0s"}`, "loadbalance: bobtail_p2c: decayTime: 0s, want (0s, 1h0m0s]"},
		{"bobtail_p2c", `{"decaytime": "1s"}`, `loadbalance: bobtail_p2c: decaytime: unknown key, did you mean "decayTime"?`},
		{"bobtail_rendezvous", `{"eps": 11}`, "loadbalance: bobtail_rendezvous: eps: 11, want a number in (0, 10]"},
		{"bobtail_rendezvous", `{"header": "key-bin"}`, `loadbalance: bobtail_rendezvous: header: "key-bin", want a header of text, not -bin`},
	} {
		t.Run(tc.policy+" "+tc.config, func(t *testing.T) {
			s := newStage(t, 2)
			good := newCluster(s.policy("bobtail_rendezvous", `{"header": "x-user-id"}`))
			localities := []locality{s.zone("near", 1, 0), s.zone("far", 1, 1)}
			control, c := s.controlled(good, localities)
			c.reach(0, 1)

			err := control.setCluster(s.ctx, newCluster(s.policy(tc.policy, tc.config)))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("the control plane is told: %v\nwant: %s", err, tc.want)
			}
			if got := c.serve(50, 7); !settled(got) {
				t.Errorf("after the refusal each user is at one backend no more: %v", got.homes())
			}
			if err := control.setCluster(s.ctx, newCluster(s.policy("bobtail_p2c", `{"decayTime": "1s"}`))); err != nil {
				t.Errorf("a good one after it: %v", err)
			}
		})
	}

	t.Run("from the start", func(t *testing.T) {
		s := newStage(t, 1)
		_, c := s.controlled(newCluster(s.policy("bobtail_p2c", `{"decayTime": "0s"}`)), []locality{s.zone("near", 1, 0)})
		err := c.try("")
		const want = "bobtail_p2c: decayTime: 0s, want (0s, 1h0m0s]"
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), want) {
			t.Errorf("a call ends with %v, want UNAVAILABLE and %s", err, want)
		}
	})
}

// load makes calls of 20 users from 8 goroutines until told to stop, and then returns
// how many it made. None may fail.
func (c *client) load() (made *atomic.Int64, stop func()) {
	made = new(atomic.Int64)
	var stopped atomic.Bool
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := 0; !stopped.Load(); i++ {
				if err := c.try(fmt.Sprintf("user-%d", (worker+i)%20)); err != nil {
					c.Errorf("lost after %d: %v", made.Load(), err)
					return
				}
				made.Add(1)
			}
		})
	}
	return made, func() { stopped.Store(true); wg.Wait() }
}

// window returns what arrives next, n calls or a few more, while others make load.
func (c *client) window(n int) counts {
	c.Helper()
	c.arrived.take()
	all := make(counts)
	for calls := 0; calls < n; {
		c.call("") // one's own calls, which are nobody's, pace the loop
		for a, k := range c.arrived.take() {
			all[a] += k
			calls += k
		}
	}
	return all
}

// until waits for a window that is good, and wants the next one to be so, too.
func (c *client) until(what string, good func(counts) bool) {
	c.Helper()
	got := c.window(400)
	for !good(got) {
		if c.Failed() || c.ctx.Err() != nil {
			c.Fatalf("never came: %s: %v", what, got)
		}
		got = c.window(400)
	}
	if got := c.window(400); !good(got) {
		c.Errorf("came and went: %s: %v", what, got)
	}
}

// Endpoints come and go under load, and no call is lost.
func TestEndpointsChangeUnderLoad(t *testing.T) {
	for policy, config := range map[string]string{
		"bobtail_p2c":        `{"decayTime": "0.05s"}`, // a probe of each in 0.1 s, however slow it was
		"bobtail_rendezvous": `{"header": "x-user-id"}`,
	} {
		t.Run(policy, func(t *testing.T) {
			s := newStage(t, 6)
			control, c := s.controlled(newCluster(s.policy(policy, config)),
				[]locality{s.zone("near", 1, 0, 1), s.zone("far", 1, 2)})
			c.reach(0, 1, 2)
			made, stop := c.load()
			defer stop()
			for _, step := range []struct{ near, far []int }{
				{[]int{1, 3}, []int{2}},
				{[]int{3}, []int{4, 5}},
				{[]int{0, 1}, []int{2}}, // all others
				{[]int{0, 1, 3}, []int{2, 4, 5}},
			} {
				if err := control.setEndpoints(s.ctx, []locality{s.zone("near", 1, step.near...), s.zone("far", 1, step.far...)}); err != nil {
					t.Fatal(err)
				}
				in := make(map[int]bool)
				for _, i := range append(step.near, step.far...) {
					in[i] = true
				}
				seen := make(map[int]bool)
				c.until(fmt.Sprint("calls at all of ", step, " and nowhere else"), func(got counts) bool {
					for a := range got {
						if !in[a.backend] {
							return false
						}
						seen[a.backend] = true
					}
					return len(seen) == len(in)
				})
			}
			stop()
			if made.Load() < 2000 {
				t.Errorf("%d calls, want 2000", made.Load())
			}
			t.Logf("%d calls, none lost", made.Load())
		})
	}
}

// The policy changes under load, and no call is lost.
func TestPolicyChangesUnderLoad(t *testing.T) {
	s := newStage(t, 3)
	p2c := newCluster(s.policy("bobtail_p2c", `{}`))
	// With an eps of 10 each of three endpoints has room for all calls.
	rendezvous := newCluster(s.policy("bobtail_rendezvous", `{"header": "x-user-id", "eps": 10}`))
	control, c := s.controlled(p2c, []locality{s.zone("near", 2, 0, 1), s.zone("far", 1, 2)})
	c.reach(0, 1, 2)
	made, stop := c.load()
	defer stop()
	athome := func(got counts) bool {
		for i := range s.backends {
			delete(got, arrival{backend: i})
		}
		return settled(got)
	}
	for range 3 {
		if err := control.setCluster(s.ctx, rendezvous); err != nil {
			t.Fatal(err)
		}
		c.until("users at one backend", athome)
		if err := control.setCluster(s.ctx, p2c); err != nil {
			t.Fatal(err)
		}
		c.until("users anywhere", func(got counts) bool { return !athome(got) })
	}
	stop()
	if made.Load() < 2000 {
		t.Errorf("%d calls, want 2000", made.Load())
	}
	t.Logf("%d calls, none lost", made.Load())
}

// A priority takes over when the one before it has no endpoint that can be reached.
func TestPriorityTakesOver(t *testing.T) {
	s := newStage(t, 3)
	last := s.zone("last resort", 1, 2)
	last.priority = 1
	_, c := s.controlled(newCluster(s.policy("bobtail_p2c", `{}`)), []locality{s.zone("near", 1, 0, 1), last})
	c.reach(0, 1)
	if got := c.serve(1, 100); got.at(2) != 0 {
		t.Errorf("%d of 100 calls at the second priority, want none", got.at(2))
	}
	s.backends[0].server.Stop()
	s.backends[1].server.Stop()
	for c.arrived.take().at(2) == 0 {
		if err := c.try(""); err != nil && s.ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	c.serve(1, 100)
}

// Outlier detection is above our policy, and ejects an endpoint below it: the users of
// the one that fails all calls are at another after that.
func TestOutlierDetectionEjects(t *testing.T) {
	s := newStage(t, 3)
	cluster := newCluster(s.policy("bobtail_rendezvous", `{"header": "x-user-id", "eps": 10}`))
	cluster.OutlierDetection = &clusterpb.OutlierDetection{
		Interval:                       durationpb.New(50e6),
		BaseEjectionTime:               durationpb.New(60e9),
		MaxEjectionTime:                durationpb.New(60e9),
		MaxEjectionPercent:             wrapperspb.UInt32(34),
		EnforcingSuccessRate:           wrapperspb.UInt32(0),
		FailurePercentageThreshold:     wrapperspb.UInt32(50),
		EnforcingFailurePercentage:     wrapperspb.UInt32(100),
		FailurePercentageMinimumHosts:  wrapperspb.UInt32(3),
		FailurePercentageRequestVolume: wrapperspb.UInt32(5),
	}
	_, c := s.controlled(cluster, []locality{s.zone("near", 1, 0, 1), s.zone("far", 1, 2)})
	c.reach(0, 1, 2)
	before := c.serve(40, 1)
	s.handle = func(_ context.Context, backend int) error {
		if backend == 0 {
			return status.Error(codes.Internal, "out of order")
		}
		return nil
	}
	// Until it is ejected, the calls of its users fail.
	for failures := 1; failures > 0; {
		failures = 0
		for i := range 40 {
			if err := c.try(fmt.Sprintf("user-%d", i)); err != nil {
				failures++
			}
		}
		if s.ctx.Err() != nil {
			t.Fatal("the backend that fails all calls is not ejected")
		}
	}
	after := c.serve(40, 3)
	if n := after.at(0); n != 0 {
		t.Errorf("%d calls at the backend that is ejected", n)
	}
	for a := range before {
		if a.backend != 0 && after[a] != 3 {
			t.Errorf("%s had its calls at %d, which is not ejected, and now has %d of 3 there", a.user, a.backend, after[a])
		}
	}
}

// A hedge of package bobtail goes to another endpoint, and of rendezvous to the next rank,
// through all that xDS puts between a call and our picker. The ranks are the
// same for all clients.
func TestHedgeGoesElsewhere(t *testing.T) {
	s := newStage(t, 3)
	control, plain := s.controlled(newCluster(s.policy("bobtail_rendezvous", `{"header": "x-user-id", "eps": 10}`)),
		[]locality{s.zone("near", 2, 0, 1), s.zone("far", 1, 2)})
	plain.reach(0, 1, 2)
	homes := plain.serve(20, 1)

	policy, err := bobtail.ParsePolicy([]byte(`{
		"extraLoad": {"max": 1},
		"methodConfig": [{
			"name": [{"service": "grpc.health.v1.Health", "method": "Check"}],
			"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.03s"}
		}]
	}`))
	if err != nil {
		t.Fatal(err)
	}
	tail, err := bobtail.NewClient(policy)
	if err != nil {
		t.Fatal(err)
	}
	builder, err := control.resolver()
	if err != nil {
		t.Fatal(err)
	}
	c := s.dial("xds:///"+service, append(tail.DialOptions(), grpc.WithResolvers(builder))...)
	c.reach(0, 1, 2)
	s.handle = func(ctx context.Context, backend int) error {
		if backend != 0 {
			return nil
		}
		<-ctx.Done()
		return ctx.Err()
	}
	hedged := 0
	for a := range homes {
		if a.backend != 0 {
			continue
		}
		hedged++
		second := -1
		for range 3 {
			c.arrived.take()
			c.call(a.user)
			got := c.arrived.take()
			if got.at(0) != 1 || got.at(1)+got.at(2) != 1 {
				t.Fatalf("a call whose first attempt stalls arrived at %v, want once there and once elsewhere", got)
			}
			other := 1
			if got.at(2) == 1 {
				other = 2
			}
			if second >= 0 && other != second {
				t.Errorf("the hedges of %s went to %d and to %d", a.user, second, other)
			}
			second = other
		}
	}
	if hedged == 0 {
		t.Errorf("none of 20 users has backend 0: %v", homes)
	}
}
