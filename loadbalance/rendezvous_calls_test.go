package loadbalance

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/experimental/balancer/weight"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/retry"
)

func dialRendezvous(t *testing.T, f *grpctest.Fleet, opts ...grpc.DialOption) kvpb.KVClient {
	t.Helper()
	c := kvpb.NewKVClient(f.Dial(append(opts, grpc.WithDefaultServiceConfig(
		`{"loadBalancingConfig":[{"bobtail_rendezvous":{"header":"x-user-id","slowStart":{"window":"0s"}}}]}`))...))
	ready(t, c)
	return c
}

// fleetRanks returns a key's ranks among the backends of a fleet.
func fleetRanks(f *grpctest.Fleet, key string) []int {
	tb := &table{weights: make([]uint32, len(f.Backends))}
	for _, b := range f.Backends {
		tb.ready = append(tb.ready, &endpoint{key: b.Name})
	}
	var ranks []int
	for _, e := range tb.ranks(key) {
		ranks = append(ranks, slices.Index(tb.ready, e))
	}
	return ranks
}

// A key stays with its backend, moves to the next of its ranks while that is away, and
// comes back; no other key moves.
func TestKeysStayWithTheirBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 4, serve(func(*grpctest.Backend) time.Duration { return 2 * ms }))
		c := dialRendezvous(t, f)
		check := func(when string, away int) {
			t.Helper()
			for i := range 40 {
				key := fmt.Sprint("user-", i)
				want := fleetRanks(f, key)
				want = slices.DeleteFunc(want, func(b int) bool { return b == away })
				ctx := WithKey(t.Context(), key)
				if i%2 == 0 {
					ctx = metadata.AppendToOutgoingContext(t.Context(), "x-user-id", key)
				}
				for range 3 {
					res, err := c.Get(ctx, &kvpb.Request{})
					if err != nil || res.Backend != f.Backends[want[0]].Name {
						t.Errorf("%s: %s at %s, %v, want %s", when, key, res.GetBackend(), err, f.Backends[want[0]].Name)
					}
				}
			}
		}
		settle := func() { time.Sleep(3 * time.Second); synctest.Wait() }
		check("at first", -1)
		f.Resolve(3, 2, 0)
		settle()
		check("without backend 1", 1)
		f.Resolve(0, 1, 2, 3)
		settle()
		check("with it again", -1)
		f.Stop(2)
		settle()
		check("while backend 2 is down", 2)
		f.Start(2)
		settle()
		check("when it is up again", -1)
	})
}

// The first rank stalls: a hedge goes to the second, one more to the third.
func TestHedgesGoDownTheRanks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const key = "user-1"
		var ranks []int
		f := grpctest.NewFleet(t, 5, serve(func(b *grpctest.Backend) time.Duration {
			if i := slices.Index(ranks, b.Index); i == 0 || i == 1 {
				return time.Minute
			}
			return ms
		}))
		c := dialRendezvous(t, f, grpc.WithChainUnaryInterceptor(
			hedging.UnaryClientInterceptor(hedging.Config{MaxAttempts: 3, Delay: 10 * ms})))
		ranks = fleetRanks(f, key)
		before := make([]int64, 5)
		for i, b := range f.Backends {
			before[i] = b.Started.Load()
		}
		start := time.Now()
		res, err := c.Get(WithKey(t.Context(), key), &kvpb.Request{})
		if err != nil || res.Backend != f.Backends[ranks[2]].Name || time.Since(start) != 21*ms {
			t.Errorf("answer of %s after %v, %v, want one of %s after 21ms", res.GetBackend(), time.Since(start), err, f.Backends[ranks[2]].Name)
		}
		synctest.Wait()
		for rank, b := range ranks {
			if n, want := f.Backends[b].Started.Load()-before[b], map[bool]int64{true: 1}[rank < 3]; n != want {
				t.Errorf("rank %d got %d attempts, want %d", rank+1, n, want)
			}
		}
	})
}

// The first rank fails, and the second: retries go to the second and the third.
func TestRetriesGoDownTheRanks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const key = "user-2"
		var mu sync.Mutex // guards order
		var order []int
		f := grpctest.NewFleet(t, 4, grpctest.Handlers{Unary: func(_ context.Context, b *grpctest.Backend, _ *kvpb.Request) (*kvpb.Response, error) {
			mu.Lock()
			defer mu.Unlock()
			if order = append(order, b.Index); len(order)%3 != 0 {
				return nil, status.Error(codes.Unavailable, "down")
			}
			return &kvpb.Response{}, nil
		}})
		cfg := retry.Config{MaxAttempts: 3, RetryableCodes: []codes.Code{codes.Unavailable},
			Backoff: retry.Backoff{Initial: ms, Max: ms, Multiplier: 1}}
		c := dialRendezvous(t, f, grpc.WithChainUnaryInterceptor(retry.UnaryClientInterceptor(cfg)))
		order = nil
		if _, err := c.Get(WithKey(t.Context(), key), &kvpb.Request{}); err != nil {
			t.Fatal(err)
		}
		if want := fleetRanks(f, key)[:3]; !slices.Equal(order, want) {
			t.Errorf("attempts at %v, want %v", order, want)
		}
	})
}

// A hot key loads its endpoint with eps more than its share, and the rest goes on
// down its ranks.
func TestAHotKeySpills(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 4, serve(func(*grpctest.Backend) time.Duration { return time.Second }))
		c := dialRendezvous(t, f)
		var wg sync.WaitGroup
		for range 80 {
			wg.Go(func() {
				if _, err := c.Get(WithKey(t.Context(), "hot"), &kvpb.Request{}); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait() // one pick at a time
		}
		// One call of ready's, long over, is not in flight.
		var got []int64
		for _, b := range fleetRanks(f, "hot") {
			got = append(got, f.Backends[b].Started.Load()-f.Backends[b].Ended.Load())
		}
		// ceil(1.25 x 80/4) at the first three, and what is left.
		if want := []int64{25, 25, 25, 5}; !slices.Equal(got, want) {
			t.Errorf("in flight by rank %v, want %v", got, want)
		}
		wg.Wait()
	})
}

// update hands a balancer n endpoints and their weights.
func update(tb testing.TB, b balancer.Balancer, cfg serviceconfig.LoadBalancingConfig, weights ...uint32) {
	tb.Helper()
	var rs resolver.State
	for i, w := range weights {
		rs.Endpoints = append(rs.Endpoints, weight.Set(resolver.Endpoint{
			Addresses: []resolver.Address{{Addr: fmt.Sprintf("10.0.0.%d:443", i)}},
		}, weight.EndpointInfo{Weight: w}))
	}
	if err := b.UpdateClientConnState(balancer.ClientConnState{ResolverState: rs, BalancerConfig: cfg}); err != nil {
		tb.Fatal(err)
	}
}

// The resolver's weights and the configuration are taken over at each update, with no
// change of any connection.
func TestRendezvousTakesUpdates(t *testing.T) {
	cc, b := fakeReady(t, RendezvousName, 3)
	for _, tc := range []struct {
		cfg     *rendezvousConfig
		weights []uint32
		sum     float64
		claim   float64 // of the first
	}{
		{&rendezvousConfig{eps: .25}, []uint32{0, 0, 0}, 3, 1.25},
		{&rendezvousConfig{eps: .25, header: "x-h"}, []uint32{2, 1, 5}, 8, 2.5},
		{&rendezvousConfig{eps: 1}, []uint32{2, 1, 0}, 4, 4},
		{nil, []uint32{4, 1, 1}, 6, 5},
	} {
		if tc.cfg == nil {
			update(t, b, nil, tc.weights...)
			tc.cfg = &rendezvousConfig{eps: .25}
		} else {
			update(t, b, tc.cfg, tc.weights...)
		}
		p := chooserOf(cc).(*rendezvous)
		if tau := cc.state.Picker.(*picker).rotation.Load().tau; tau != defaultDecayTime {
			t.Errorf("decay time %v, want %v", tau, defaultDecayTime)
		}
		i := slices.IndexFunc(p.ready, func(m member) bool { return m.key == "10.0.0.0:443" })
		if p.sum != tc.sum || p.seats[i].claim != tc.claim || p.seats[i].inverse != 1/float64(max(1, tc.weights[0])) || p.header != tc.cfg.header {
			t.Errorf("%v: sum %v, seat %+v, header %q, want sum %v, claim %v, header %q",
				tc.weights, p.sum, p.seats[i], p.header, tc.sum, tc.claim, tc.cfg.header)
		}
	}
}

// Attempts that are still in flight where nothing is ready any more count for no
// endpoint's room: not while that is down, nor removed, nor forgotten.
func TestOnlyWhatIsReadyCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, b := fakeReady(t, RendezvousName, 3)
		r := b.(*rendezvousBalancer)
		known := r.endpoints["10.0.0.2:443"].endpoint
		known.record(0, 2*ms, tau, answered)
		check := func(when string, want int64) {
			t.Helper()
			if got := chooserOf(cc).(*rendezvous).inFlight(); got != want {
				t.Errorf("%s: %d in flight, want %d", when, got, want)
			}
		}
		for _, n := range []string{"0", "1", "2", "2"} {
			r.endpoints["10.0.0."+n+":443"].begin(n == "2")
		}
		check("all ready", 4)
		conn := func(addr string) *fakeSubConn {
			for _, sc := range cc.conns {
				if sc.addr == addr {
					return sc
				}
			}
			t.Fatalf("no connection to %s", addr)
			return nil
		}
		conn("10.0.0.2:443").step(connectivity.Idle)
		check("one is down", 2)
		resolve(t, b, nil, 2)
		check("and removed", 2)
		resolve(t, b, nil, 3)
		sc := cc.conns[len(cc.conns)-1]
		sc.become(connectivity.Connecting)
		sc.become(connectivity.Ready)
		check("and back", 4)
		if e := r.endpoints["10.0.0.2:443"].endpoint; e != known || e.known.Load() != measured {
			t.Error("what was known of it is lost")
		}
		resolve(t, b, nil, 2)
		time.Sleep(rememberFor + 1)
		resolve(t, b, nil, 2)
		resolve(t, b, nil, 2)
		if r.endpoints["10.0.0.2:443"] != nil {
			t.Fatal("not forgotten")
		}
		check("and forgotten", 2)
		resolve(t, b, nil, 3)
		if r.endpoints["10.0.0.2:443"].endpoint == known {
			t.Fatal("not forgotten")
		}
		check("and named anew", 2)
		known.release(true)
		known.release(true)
		check("and drained", 2)
		resolve(t, b, nil, 2)
		if len(r.adrift) > 0 {
			t.Errorf("%d endpoints adrift, want none", len(r.adrift))
		}
	})
}

// Where a call's key comes from.
func TestRendezvousKey(t *testing.T) {
	p := &rendezvous{header: "x-user-id"}
	bg := context.Background()
	header := func(ctx context.Context, kv ...string) context.Context {
		return metadata.AppendToOutgoingContext(ctx, kv...)
	}
	for name, tc := range map[string]struct {
		ctx  context.Context
		want string // "" is none
	}{
		"none":                      {bg, ""},
		"the context's":             {WithKey(bg, "a"), "a"},
		"the newer one":             {WithKey(WithKey(bg, "a"), "b"), "b"},
		"taken away":                {WithKey(WithKey(bg, "a"), ""), ""},
		"the header's":              {header(bg, "x-user-id", "h"), "h"},
		"in any case":               {header(bg, "X-User-ID", "h"), "h"},
		"another header":            {header(bg, "x-user", "h"), ""},
		"an empty header":           {header(bg, "x-user-id", ""), ""},
		"two values":                {header(bg, "x-user-id", "h", "x-user-id", "i"), "h,i"},
		"the context's wins":        {header(WithKey(bg, "a"), "x-user-id", "h"), "a"},
		"taken away for a header's": {header(WithKey(WithKey(bg, "a"), ""), "x-user-id", "h"), "h"},
	} {
		if got := p.keyOf(tc.ctx); got != hashKey(tc.want) {
			t.Errorf("%s: key %x, want that of %q", name, got, tc.want)
		}
	}
	if got := (&rendezvous{}).keyOf(header(bg, "x-user-id", "h")); got != noKey {
		t.Errorf("a header that is not configured is a key")
	}
	if hashKey("a") == noKey || hashKey("a") == hashKey("b") {
		t.Error("keys are not told apart")
	}
}

// Without a key the better of two is chosen, whatever its room, and the
// siblings of an attempt are avoided.
func TestWithoutAKey(t *testing.T) {
	tb := seats(.25, 1, 1)
	p := tb.chooser()
	r := &request{ctx: context.Background(), now: ms, intn: func(int) int { return 0 }}
	tb.ready[0].record(0, 2*ms, tau, answered)
	tb.ready[1].record(0, 5*ms, tau, answered)
	for i, want := range []int{0, 0, 1} { // 2 ms x 1, x 2 and x 3, against 5 ms x 1
		if got := p.route(r, bars{}); got != want {
			t.Fatalf("attempt %d goes to %d, want %d", i+1, got, want)
		}
		tb.ready[want].begin(false)
	}
	var c attempt.Call
	var a, b attempt.Attempt
	a.Init(&c, 1, attempt.First)
	b.Init(&c, 2, attempt.Hedge)
	a.Claim(a.View(), tb.ready[1].key)
	if i := p.route(r, bars{view: b.View()}); i != 0 {
		t.Errorf("sent to %d, beside a sibling", i)
	}
}
