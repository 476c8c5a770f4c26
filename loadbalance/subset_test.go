package loadbalance

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/experimental/balancer/weight"
	"google.golang.org/grpc/resolver"
	"pgregory.net/rapid"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// named makes endpoints of the given weights, 0 for none.
func named(weights ...uint32) []resolver.Endpoint {
	es := make([]resolver.Endpoint, len(weights))
	for i, w := range weights {
		es[i] = resolver.Endpoint{Addresses: []resolver.Address{{Addr: fmt.Sprintf("10.1.%d.%d:443", i/256, i%256)}}}
		if w > 0 {
			es[i] = weight.Set(es[i], weight.EndpointInfo{Weight: w})
		}
	}
	return es
}

// gained returns how many endpoints of b are not in a.
func gained(a, b map[string]float64) (n int) {
	for key := range b {
		if _, ok := a[key]; !ok {
			n++
		}
	}
	return n
}

// All clients together load the endpoints in proportion to their weights, to rounding,
// whatever the numbers; and each of them uses size endpoints at least.
func TestApertureIsEven(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		count := rapid.Int64Range(1, 60).Draw(t, "clients")
		size := rapid.Int64Range(1, 12).Draw(t, "size")
		weights := rapid.SliceOfN(rapid.OneOf(rapid.Just(uint32(0)), rapid.Uint32Range(1, 9), rapid.Uint32Range(1, 1000)), 1, 60).Draw(t, "weights")
		if rapid.Bool().Draw(t, "equal") {
			clear(weights)
		}
		es := named(weights...)
		total := make(map[string]float64)
		for i := range count {
			shares := subset{size, i, count}.of(es, 0)
			if len(shares) < min(int(size), len(es)) {
				t.Fatalf("client %d has %d endpoints, want at least %d", i, len(shares), size)
			}
			var sum float64
			for key, x := range shares {
				if x <= 0 {
					t.Fatalf("client %d has a share of %v of %s", i, x, key)
				}
				sum += x
			}
			for key, x := range shares {
				total[key] += x / sum
			}
		}
		var sum float64
		for _, w := range weights {
			sum += float64(max(1, w))
		}
		for i, e := range es {
			want := float64(count) * float64(max(1, weights[i])) / sum
			if got := total[keyOf(e)]; math.Abs(got/want-1) > 1e-6 {
				t.Fatalf("endpoint %d has %v clients' load, want %v", i, got, want)
			}
		}
	})
}

// The stretch is no longer than it need be: no client has many more endpoints than size if
// there are many clients.
func TestApertureIsSmall(t *testing.T) {
	for _, tc := range []struct{ endpoints, clients, size int64 }{{100, 1000, 5}, {1000, 1000, 20}, {37, 500, 6}, {10, 10, 3}} {
		for i := range tc.clients {
			if n := len(subset{tc.size, i, tc.clients}.of(named(make([]uint32, tc.endpoints)...), 0)); n > int(tc.size)+2 {
				t.Errorf("%+v: client %d has %d endpoints", tc, i, n)
			}
		}
	}
}

// An endpoint more or less moves the others' stretches by less than an endpoint: at either
// end of a client's stretch an endpoint or two change.
func TestApertureMovesLittle(t *testing.T) {
	const clients, size = 300, 10
	for _, n := range []int{50, 99, 200} {
		es := named(make([]uint32, n+1)...)
		for _, gone := range []int{0, n / 2, n} {
			less := slices.Delete(slices.Clone(es), gone, gone+1)
			var moved int
			for i := range int64(clients) {
				s := subset{size, i, clients}
				a, b := s.of(es, 0), s.of(less, 0)
				if x, y := gained(a, b), gained(b, a); x > 3 || y > 3 {
					t.Errorf("%d endpoints without %d: client %d gains %d and loses %d", n+1, gone, i, x, y)
				} else {
					moved += x
				}
			}
			if moved > 2*clients {
				t.Errorf("%d endpoints without %d: %d new connections of %d clients", n+1, gone, moved, clients)
			}
		}
	}
}

// A subset does not depend on the order in which a resolver names the endpoints, nor on
// their being named twice.
func TestSubsetIgnoresOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, s := range []subset{{size: 5, index: 3, count: 11}, {size: 5}} {
		es := named(3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9)
		want := s.of(es, 42)
		for range 20 {
			r.Shuffle(len(es), func(i, j int) { es[i], es[j] = es[j], es[i] })
			if got := s.of(append(es, es[0]), 42); !maps.Equal(got, want) {
				t.Fatalf("%+v: %v, want %v", s, got, want)
			}
			if got := chosen(es, want); len(got) != len(want) {
				t.Fatalf("%+v: chose %d endpoints of %d", s, len(got), len(want))
			}
		}
	}
}

// The random subset has exactly size endpoints, each with its whole weight, differs from
// client to client, and changes by one at most when an endpoint comes or goes.
func TestRandomSubset(t *testing.T) {
	es := named(make([]uint32, 60)...)
	es[7] = weight.Set(es[7], weight.EndpointInfo{Weight: 5})
	r := rand.New(rand.NewPCG(3, 4))
	s := subset{size: 6}
	clients := make(map[string]int)
	kinds := make(map[string]bool)
	const n = 2000
	for range n {
		seed := r.Uint64()
		shares := s.of(es, seed)
		if len(shares) != 6 || !maps.Equal(shares, s.of(es, seed)) {
			t.Fatalf("%v, want 6 endpoints and the same again", shares)
		}
		for key, w := range shares {
			clients[key]++
			if want := map[bool]float64{true: 5, false: 1}[key == keyOf(es[7])]; w != want {
				t.Errorf("%s weighs %v, want %v", key, w, want)
			}
		}
		kinds[fmt.Sprint(slices.Sorted(maps.Keys(shares)))] = true
		gone := r.IntN(len(es))
		less := s.of(slices.Delete(slices.Clone(es), gone, gone+1), seed)
		_, had := shares[keyOf(es[gone])]
		if x := gained(shares, less); len(less) != 6 || had && x != 1 || !had && x != 0 {
			t.Fatalf("without %d, which it had (%v): gained %d", gone, had, x)
		}
	}
	if len(kinds) < n-5 {
		t.Errorf("%d of %d clients have subsets of their own", len(kinds), n)
	}
	for _, e := range es {
		within(t, "clients of "+keyOf(e), float64(clients[keyOf(e)]), n, 6./60)
	}
}

// A subset as large as the fleet, and none, is the fleet with its weights.
func TestSubsetOfAll(t *testing.T) {
	es := named(0, 2, 3)
	want := map[string]float64{keyOf(es[0]): 1, keyOf(es[1]): 2, keyOf(es[2]): 3}
	for _, s := range []subset{{}, {size: 3}, {size: 1e6}, {size: 3, index: 1, count: 2}} {
		if got := s.of(es, 1); !maps.Equal(got, want) {
			t.Errorf("%+v: %v, want %v", s, got, want)
		}
	}
	if got := (subset{size: 2, count: 1}).of(nil, 1); len(got) != 0 {
		t.Errorf("%v of nothing", got)
	}
}

// A balancer connects to its subset and to nothing else; its calls go there, by whatever
// policy, and a resolution that changes nothing for it changes no connection.
func TestBalancerKeepsToItsSubset(t *testing.T) {
	for _, name := range ours {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := grpctest.NewFleet(t, 12, serve(func(*grpctest.Backend) time.Duration { return ms }))
				used := make(map[int]int) // by how many clients
				for i := range 4 {
					before := make([]int64, 12)
					for k, b := range f.Backends {
						before[k] = b.Started.Load()
					}
					c := dialWith(t, f, name, fmt.Sprintf(`{"subset": {"size": 3, "clientIndex": %d, "clientCount": 4}}`, i))
					for k := range 200 {
						if _, err := c.Get(WithKey(t.Context(), fmt.Sprint(k)), &kvpb.Request{}); err != nil {
							t.Fatal(err)
						}
					}
					n := 0
					for k, b := range f.Backends {
						if b.Started.Load() > before[k] {
							n++
							used[k]++
						}
					}
					if n != 3 {
						t.Errorf("client %d uses %d backends, want 3", i, n)
					}
				}
				for k := range f.Backends {
					if used[k] != 1 {
						t.Errorf("backend %d has %d of 4 clients, want 1", k, used[k])
					}
				}
			})
		})
	}
	for _, name := range ours {
		cc := &fakeConn{}
		b := balancer.Get(name).Build(cc, balancer.BuildOptions{})
		t.Cleanup(b.Close)
		cfg, err := balancer.Get(name).(balancer.ConfigParser).ParseConfig([]byte(`{"subset": {"size": 4}}`))
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			resolve(t, b, cfg, 50)
		}
		if len(cc.conns) != 4 {
			t.Errorf("%s: %d connections, want 4", name, len(cc.conns))
		}
		resolve(t, b, cfg, 51)
		resolve(t, b, cfg, 50)
		if len(cc.conns) > 6 {
			t.Errorf("%s: %d connections after an endpoint came and went, want at most 6", name, len(cc.conns))
		}
		for _, e := range shardsOf(b).endpoints {
			if e.weight <= 0 {
				t.Errorf("%s: %s weighs %v", name, e.key, e.weight)
			}
		}
	}
}

// With a zone a client has as many endpoints of it as it is to have, though these be few
// among all, and as many others for when the zone does badly.
func TestSubsetOfEachZone(t *testing.T) {
	es := named(make([]uint32, 100)...)
	for i := range es {
		es[i] = SetZone(es[i], map[bool]string{true: "a", false: "b"}[i < 10])
	}
	near := func(shares map[string]float64) (n int) {
		for _, e := range es[:10] {
			if _, ok := shares[keyOf(e)]; ok {
				n++
			}
		}
		return n
	}
	// A client's stretch of the ring has a whole number of its 50 parts, and so may touch some more.
	for seed := range uint64(50) {
		for _, s := range []subset{{size: 4}, {size: 4, index: int64(seed), count: 50}} {
			o := options{subset: s, zone: zone{local: "a"}}
			if shares := o.shares(es, seed); near(shares) < 4 || near(shares) > 5 || len(shares) < 8 || len(shares) > 12 {
				t.Errorf("%+v: %d endpoints, %d of the zone, want four of each", s, len(shares), near(shares))
			}
			o.subset.size = 20
			if shares := o.shares(es, seed); near(shares) != 10 || len(shares) < 30 || len(shares) > 33 {
				t.Errorf("%+v: %d endpoints, %d of the zone, want all ten of it and 20 others", s, len(shares), near(shares))
			}
			o.subset.size, o.zone.local = 4, "elsewhere"
			if n := len(o.shares(es, seed)); n < 4 || n > 5 {
				t.Errorf("%+v, in a zone of nobody: %d endpoints, want 4", s, n)
			}
			o.zone.local = ""
			if n := len(o.shares(es, seed)); n < 4 || n > 5 {
				t.Errorf("%+v, without a zone: %d endpoints, want 4", s, n)
			}
		}
	}
	// All clients of a zone together load its endpoints evenly.
	total := make(map[string]float64)
	for i := range int64(30) {
		o := options{subset: subset{size: 3, index: i, count: 30}, zone: zone{local: "a"}}
		sum, shares := 0., o.shares(es, 0)
		for _, e := range es[:10] {
			sum += shares[keyOf(e)]
		}
		for _, e := range es[:10] {
			total[keyOf(e)] += shares[keyOf(e)] / sum
		}
	}
	for key, x := range total {
		if math.Abs(x-3) > 1e-9 {
			t.Errorf("%s has the load of %v clients, want 3", key, x)
		}
	}
}

// Such a client keeps to its zone while that is well, and has a place to go when it is not.
func TestSubsetWithAZone(t *testing.T) {
	for _, name := range ours {
		synctest.Test(t, func(t *testing.T) {
			d := zones(t, 16, 3, name, `{"zone": {"local": "a"}, "subset": {"size": 2}, "slowStart": {"window": "0s"}}`)
			count := func() (near, far int) {
				for i, n := range d.run(5 * time.Second) {
					switch {
					case n > 0 && i < 3:
						near++
					case n > 0:
						far++
					}
				}
				return near, far
			}
			if near, far := count(); near != 2 || far != 0 {
				t.Errorf("%s: calls at %d endpoints of the zone and %d others, want 2 and 0", name, near, far)
			}
			for i := range 3 {
				d.f.Stop(i)
			}
			time.Sleep(100 * ms)
			if near, far := count(); near != 0 || far != 2 {
				t.Errorf("%s: the zone is down: calls at %d endpoints of it and %d others, want 0 and 2", name, near, far)
			}
		})
	}
}
