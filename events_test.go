package bobtail_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/loadbalance"
)

// A backend that fails half of its calls is ejected, comes back when it is well, and
// either is told once, whatever is in front of the balancer.
func TestBalancerEvents(t *testing.T) {
	for name, policy := range map[string]bobtail.Policy{"default": bobtail.DefaultPolicy(), "empty": {}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var ill atomic.Bool
				var served atomic.Int64 // by the ill one: never three well in a row
				f := grpctest.NewFleet(t, 4, grpctest.Handlers{
					Unary: func(_ context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
						time.Sleep(2 * time.Millisecond)
						if b.Index == 2 && ill.Load() && served.Add(1)%2 == 0 {
							return nil, status.Error(codes.Internal, "ill")
						}
						return &kvpb.Response{Id: req.Id, Backend: b.Name}, nil
					},
				})
				var events []loadbalance.Event // one call at a time
				c, err := bobtail.NewClient(policy, bobtail.WithLogger(nil),
					bobtail.WithBalancerEvents(func(e loadbalance.Event) { events = append(events, e) }))
				if err != nil {
					t.Fatal(err)
				}
				kv := kvpb.NewKVClient(f.Dial(c.DialOptions()...))
				call := func(d time.Duration) {
					for range d / (5 * time.Millisecond) {
						_, _ = kv.Get(t.Context(), &kvpb.Request{}) // of failures the balancer tells
						time.Sleep(3 * time.Millisecond)
					}
				}
				call(2 * time.Second)
				ill.Store(true)
				call(20 * time.Second)
				ill.Store(false)
				call(60 * time.Second)
				if len(events) != 2 {
					t.Fatalf("events %+v, want an ejection and a readmission", events)
				}
				for i, want := range []loadbalance.Event{
					{Kind: loadbalance.Ejected, Reason: loadbalance.ReasonFailures},
					{Kind: loadbalance.Readmitted, Reason: loadbalance.ReasonProbes},
				} {
					e := events[i]
					if e.Kind != want.Kind || e.Reason != want.Reason || e.Endpoint != "backend-2" || e.Target != "fleet:///kv" {
						t.Errorf("event %+v, want %s of backend-2 for %s", e, want.Kind, want.Reason)
					}
				}
			})
		})
	}
}
