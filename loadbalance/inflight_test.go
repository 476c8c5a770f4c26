package loadbalance

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/serviceconfig"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// configured builds a balancer of ours with n ready endpoints and a configuration.
func configured(tb testing.TB, name string, n int, js string) (*fakeConn, balancer.Balancer, serviceconfig.LoadBalancingConfig) {
	tb.Helper()
	cfg, err := balancer.Get(name).(balancer.ConfigParser).ParseConfig([]byte(js))
	if err != nil {
		tb.Fatal(err)
	}
	cc, b := fakeReady(tb, name, n)
	resolve(tb, b, cfg, n)
	return cc, b, cfg
}

// dialWith connects to a fleet by one of our balancers.
func dialWith(t *testing.T, f *grpctest.Fleet, name, js string, opts ...grpc.DialOption) kvpb.KVClient {
	t.Helper()
	c := kvpb.NewKVClient(f.Dial(append(opts, grpc.WithDefaultServiceConfig(
		fmt.Sprintf(`{"loadBalancingConfig":[{%q:%s}]}`, name, js)))...))
	ready(t, c)
	return c
}

// reasonOf returns domain and reason of the ErrorInfo of a status.
func reasonOf(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.Domain + "/" + info.Reason
		}
	}
	return ""
}

// No endpoint ever has more than maxInFlight attempts, however many are picked at once,
// streams among them, and the counts come out even.
func TestMaxInFlightIsNeverExceeded(t *testing.T) {
	for _, name := range ours {
		t.Run(name, func(t *testing.T) {
			const full = 3
			cc, b, _ := configured(t, name, 4, `{"maxInFlight": 3}`)
			// What grpc sees in flight: by endpoint, from pick to Done. The SubConn that a
			// pick is given tells the endpoint.
			held := make(map[balancer.SubConn]*atomic.Int64)
			for _, sc := range cc.conns {
				held[sc] = new(atomic.Int64)
			}
			var refused, sent atomic.Int64
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					type flight struct {
						n    *atomic.Int64
						done func(balancer.DoneInfo)
					}
					var open []flight
					for i := range 2000 {
						method := "/kv.KV/Get"
						if i%5 == 0 {
							method = "/kv.KV/Scan"
						}
						res, err := cc.state.Picker.Pick(balancer.PickInfo{FullMethodName: method, Ctx: WithKey(context.Background(), fmt.Sprint(i%3))})
						if err != nil {
							refused.Add(1)
							if status.Code(err) != codes.ResourceExhausted {
								t.Errorf("%v, want RESOURCE_EXHAUSTED", err)
							}
						} else {
							sent.Add(1)
							n := held[res.SubConn]
							if x := n.Add(1); x > full {
								t.Errorf("%d in flight at once, want at most %d", x, full)
							}
							open = append(open, flight{n, res.Done})
						}
						runtime.Gosched() // so that all hold some at once
						if len(open) > 3 || err != nil && len(open) > 0 {
							k := rand.IntN(len(open))
							open[k].n.Add(-1)
							open[k].done(got)
							open = slices.Delete(open, k, k+1)
						}
					}
					for _, f := range open {
						f.n.Add(-1)
						f.done(got)
					}
				})
			}
			wg.Wait()
			if refused.Load() == 0 || sent.Load() < 4000 {
				t.Errorf("%d sent and %d refused, want both", sent.Load(), refused.Load())
			}
			for key, e := range shardsOf(b).endpoints {
				if unary, streams := e.inFlight(); unary != 0 || streams != 0 {
					t.Errorf("%s: %d unary and %d streams in flight at the end", key, unary, streams)
				}
			}
			if all := shardsOf(b).crowd; all != nil && all.n.Load() != 0 {
				t.Errorf("%d in flight in all at the end", all.n.Load())
			}
		})
	}
}

// With every endpoint full a call fails with BULKHEAD_FULL, one that waits for ready
// too; and as soon as one attempt has ended there is room.
func TestFullEverywhere(t *testing.T) {
	for _, name := range ours {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := grpctest.NewFleet(t, 3, serve(func(*grpctest.Backend) time.Duration { return time.Second }))
				c := dialWith(t, f, name, `{"maxInFlight": 2}`)
				var wg sync.WaitGroup
				for range 6 {
					wg.Go(func() {
						if _, err := c.Get(WithKey(t.Context(), "k"), &kvpb.Request{}); err != nil {
							t.Error(err)
						}
					})
				}
				time.Sleep(10 * ms)
				for i, b := range f.Backends {
					if n := b.Started.Load() - b.Ended.Load(); n != 2 {
						t.Errorf("backend %d has %d in flight, want 2", i, n)
					}
				}
				for _, wait := range []bool{false, true} {
					start := time.Now()
					_, err := c.Get(t.Context(), &kvpb.Request{}, grpc.WaitForReady(wait))
					if status.Code(err) != codes.ResourceExhausted || reasonOf(err) != "bobtail/BULKHEAD_FULL" || time.Since(start) != 0 {
						t.Errorf("waitForReady %v: %v (%s) after %v, want BULKHEAD_FULL at once", wait, err, reasonOf(err), time.Since(start))
					}
				}
				wg.Wait()
				if _, err := c.Get(t.Context(), &kvpb.Request{}); err != nil {
					t.Errorf("with room again: %v", err)
				}
			})
		})
	}
}

// A hedge that finds no room is not sent, and its call goes on; a retry or a first
// attempt fails.
func TestHedgeFindsNoRoom(t *testing.T) {
	for _, name := range ours {
		cc, _, _ := configured(t, name, 2, `{"maxInFlight": 1}`)
		pick := func(a *attempt.Attempt) error {
			_, err := cc.state.Picker.Pick(balancer.PickInfo{FullMethodName: "/kv.KV/Get", Ctx: attempt.NewContext(t.Context(), a)})
			return err
		}
		var call, other attempt.Call
		var first, blocker, hedge, third attempt.Attempt
		first.Init(&call, 1, attempt.First)
		blocker.Init(&other, 1, attempt.First)
		hedge.Init(&call, 2, attempt.Hedge)
		third.Init(&call, 3, attempt.Retry)
		if pick(&first) != nil || pick(&blocker) != nil || first.Endpoint() == blocker.Endpoint() {
			t.Fatalf("%s: at %q and %q, want one at each", name, first.Endpoint(), blocker.Endpoint())
		}
		if err := pick(&hedge); !hedge.Unsent() || reasonOf(err) != "bobtail/NOT_SENT" {
			t.Errorf("%s: a hedge: %v, unsent %v, want it unsent", name, err, hedge.Unsent())
		}
		if err := pick(&third); third.Unsent() || reasonOf(err) != "bobtail/BULKHEAD_FULL" {
			t.Errorf("%s: a retry: %v, unsent %v, want BULKHEAD_FULL", name, err, third.Unsent())
		}
	}
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 2, serve(func(*grpctest.Backend) time.Duration { return time.Second }))
		c := dialWith(t, f, P2CName, `{"maxInFlight": 1}`, grpc.WithChainUnaryInterceptor(
			hedging.UnaryClientInterceptor(hedging.Config{MaxAttempts: 2, Delay: 100 * ms})))
		var wg sync.WaitGroup
		before := f.Total(func(b *grpctest.Backend) int64 { return b.Started.Load() })
		for range 2 {
			wg.Go(func() {
				start := time.Now()
				if _, err := c.Get(t.Context(), &kvpb.Request{}); err != nil || time.Since(start) != time.Second {
					t.Errorf("%v after %v, want an answer after 1s", err, time.Since(start))
				}
			})
		}
		wg.Wait()
		if n := f.Total(func(b *grpctest.Backend) int64 { return b.Started.Load() }) - before; n != 2 {
			t.Errorf("%d attempts, want the calls' own 2", n)
		}
	})
}

// An attempt that would exceed the bound goes to the least loaded endpoint with room,
// where its call has not been if there is one, and never beside a sibling.
func TestRoomElsewhere(t *testing.T) {
	es := make([]*endpoint, 4)
	for i := range es {
		es[i] = &endpoint{key: fmt.Sprint(i)}
	}
	const full = 5
	// In flight, of five; where an attempt of the call runs; where one has ended.
	for _, tc := range []struct {
		load           [4]int
		weights        []float64
		runs, over, to int
	}{
		{load: [4]int{5, 4, 3, 5}, runs: -1, over: -1, to: 2},
		{load: [4]int{5, 4, 3, 5}, runs: -1, over: 2, to: 1},
		{load: [4]int{5, 4, 3, 5}, runs: 2, over: -1, to: 1},
		{load: [4]int{5, 5, 3, 5}, runs: -1, over: 2, to: 2},
		{load: [4]int{5, 5, 3, 5}, runs: 2, over: -1, to: -1},
		{load: [4]int{5, 5, 3, 4}, runs: 3, over: 2, to: 2},
		{load: [4]int{5, 5, 5, 5}, runs: -1, over: -1, to: -1},
		{load: [4]int{5, 1, 3, 5}, weights: []float64{1, 1, 4, 1}, runs: -1, over: -1, to: 2},
		{load: [4]int{5, 0, 0, 0}, weights: []float64{1, 1, 1, 1}, runs: 1, over: 2, to: 3},
	} {
		for i, n := range tc.load {
			for range n {
				es[i].begin(i%2 == 0) // streams count as others do
			}
		}
		rot := &rotation{full: full}
		rot.add(membersOf(es, tc.weights...), func(m []member) chooser { return newP2C(m, tau) }, new(atomic.Uint64))
		var call attempt.Call
		var a, b, c attempt.Attempt
		a.Init(&call, 1, attempt.First)
		b.Init(&call, 2, attempt.Hedge)
		c.Init(&call, 3, attempt.Hedge)
		if tc.over >= 0 {
			a.Claim(a.View(), es[tc.over].key)
			a.End()
		}
		if tc.runs >= 0 {
			b.Claim(b.View(), es[tc.runs].key)
		}
		m := &rot.groups[0].members[0] // which is full
		if ok := rot.admit(&m, false, c.View()); ok != (tc.to >= 0) {
			t.Errorf("%+v: admitted %v", tc, ok)
		} else if ok {
			if m.key != fmt.Sprint(tc.to) {
				t.Errorf("%+v: to %s", tc, m.key)
			}
			m.release(false)
		}
		for i, n := range tc.load {
			for range n {
				es[i].release(i%2 == 0)
			}
			if at(es[i]) != 0 {
				t.Fatalf("%+v: %d left at %d", tc, at(es[i]), i)
			}
		}
	}
}

// The endpoints of the rotation are asked for room before those of other zones, and
// these before the ejected.
func TestRoomIsSoughtByGroups(t *testing.T) {
	es := make([]*endpoint, 4)
	for i := range es {
		es[i] = &endpoint{key: fmt.Sprint(i)}
	}
	ms := membersOf(es)
	p2cOf := func(m []member) chooser { return newP2C(m, tau) }
	rot := &rotation{full: 2}
	rot.add(ms[:2], p2cOf, new(atomic.Uint64))
	rot.add(ms[2:3], p2cOf, new(atomic.Uint64))
	rot.add(ms[3:], p2cOf, new(atomic.Uint64))
	var order []string
	es[1].begin(false)
	for range 8 {
		m := rot.roomy(attempt.View{})
		if m == nil {
			break
		}
		m.begin(false)
		order = append(order, m.key)
	}
	if want := []string{"0", "0", "1", "2", "2", "3", "3"}; !slices.Equal(order, want) {
		t.Errorf("room at %v, want %v", order, want)
	}
}

// Of two attempts at once one finds the room for one.
func TestNobodyIsTurnedAwayByAnother(t *testing.T) {
	const rounds = 100_000
	e := make([]endpoint, rounds)
	var ok [2][]bool
	var turn [2]atomic.Int64
	var wg sync.WaitGroup
	for g := range 2 {
		ok[g] = make([]bool, rounds)
		wg.Go(func() {
			for i := range rounds {
				turn[g].Store(int64(i + 1))
				for n := 0; turn[1-g].Load() < int64(i+1); n++ {
					if n > 1000 {
						runtime.Gosched()
					}
				}
				ok[g][i] = e[i].beginWithin(false, 1)
			}
		})
	}
	wg.Wait()
	n := 0
	for i := range rounds {
		if !ok[0][i] && !ok[1][i] {
			n++
		}
	}
	if n > 0 {
		t.Errorf("%d of %d times two attempts both found an idle endpoint of maxInFlight 1 full", n, rounds)
	}
}
