package loadbalance

import (
	"encoding/json"
	"fmt"
	"google.golang.org/grpc/connectivity"
	"math"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"
)

// Which part leaves the zone because of its overload, sweep by sweep.
func TestSpillSteps(t *testing.T) {
	type step struct{ near, far, want float64 }
	for name, steps := range map[string][]step{
		"all is well":                        {{10, 0, 0}, {12, 0, 0}, {19, 30, 0}, {20, 1, 0}},
		"nothing is known":                   {{0, 0, 0}, {0, 5, 0}, {10, 0, 0}},
		"too slow, the others are not known": {{10, 0, 0}, {25, 0, .01}, {25, 0, .01}},
		"and are faster":                     {{10, 0, 0}, {25, 15, .1}, {25, 16, .2}, {25, 16.6, .3}},
		"and are as slow":                    {{10, 0, 0}, {25, 0, .01}, {25, 25, 0}, {25, 0, 0}, {25, 17, 0}},
		"relieved":                           {{10, 0, 0}, {25, 15, .1}, {12, 15, .05}, {12, 15, 0}},
		"up to all":                          {{10, 0, 0}, {90, 5, .1}, {90, 5, .2}, {90, 5, .3}, {90, 5, .4}, {90, 5, .5}, {90, 5, .6}, {90, 5, .7}, {90, 5, .8}, {90, 5, .9}, {90, 5, 1}, {90, 5, 1}},
		"no more calls in the zone":          {{10, 0, 0}, {25, 15, .1}, {0, 15, .05}},
		"usual is the least of late":         {{30, 0, 0}, {10, 0, 0}, {25, 15, .1}},
	} {
		var s spill
		for i, st := range steps {
			s.step(st.near, st.far, 2)
			if math.Abs(s.extra-st.want) > 1e-9 {
				t.Errorf("%s, step %d: %v, want %v", name, i+1, s.extra, st.want)
			}
		}
	}
	// Two that are alike differ by chance, and that is no reason to leave.
	r := rand.New(rand.NewPCG(1, 2))
	var s spill
	var sum float64
	for range 2000 {
		s.usual = 10
		s.step(25*math.Exp(.2*r.NormFloat64()), 25*math.Exp(.2*r.NormFloat64()), 2)
		sum += s.extra / 2000
	}
	if sum > .1 {
		t.Errorf("%.0f%% leave when all are slow alike", 100*sum)
	}
	// A zone that has become slower for good is taken for usual in the end.
	s = spill{}
	s.step(10, 0, 2)
	n := 0
	for s.step(21, 5, 2); s.extra > 0 && n < 1000; n++ {
		s.step(21, 5, 2)
	}
	if n < 35 || n > 80 { // 1.002^25 is 1.05; then down from 1
		t.Errorf("taken for usual after %d sweeps", n)
	}
	if s.step(41, 15, 4); s.extra > 0 {
		t.Error("overloaded below four times the usual")
	}
	if s.step(60, 15, 2); s.extra == 0 {
		t.Error("not overloaded above twice the usual")
	}
}

// Which part leaves the zone while some of its endpoints are not healthy.
func TestSpillShare(t *testing.T) {
	for _, tc := range []struct{ extra, healthy, want float64 }{
		{0, 1, 0}, {0, .72, 0}, {0, .5, .3}, {0, .25, .65}, {0, 0, 1}, {.1, 1, .1}, {.1, .5, .3}, {.4, .5, .4}, {1, 1, 1},
	} {
		s := spill{extra: tc.extra}
		if got := s.share(tc.healthy); math.Abs(got-tc.want) > 1e-9 {
			t.Errorf("%+v: %v", tc, got)
		}
	}
}

func TestZoneOf(t *testing.T) {
	e := resolver.Endpoint{}
	if zoneOf(e) != "" || zoneOf(SetZone(e, "a")) != "a" || zoneOf(SetZone(SetZone(e, "a"), "b")) != "b" || zoneOf(e) != "" {
		t.Error("the zone is not what it was set to")
	}
}

// zoned is a balancer whose endpoints are in zone a up to an index, and in b from there.
type zoned struct {
	balancer.Builder
	name string
	near int
}

func (z zoned) Name() string { return z.name }
func (z zoned) Build(cc balancer.ClientConn, o balancer.BuildOptions) balancer.Balancer {
	return zonedBalancer{z.Builder.Build(cc, o), z.near}
}
func (z zoned) ParseConfig(js json.RawMessage) (serviceconfig.LoadBalancingConfig, error) {
	return z.Builder.(balancer.ConfigParser).ParseConfig(js)
}

type zonedBalancer struct {
	balancer.Balancer
	near int
}

func (z zonedBalancer) UpdateClientConnState(s balancer.ClientConnState) error {
	es := make([]resolver.Endpoint, len(s.ResolverState.Endpoints))
	for i, e := range s.ResolverState.Endpoints {
		var index int
		_, _ = fmt.Sscanf(e.Addresses[0].Addr, "backend-%d", &index)
		es[i] = SetZone(e, map[bool]string{true: "a", false: "b"}[index < z.near])
	}
	s.ResolverState.Endpoints = es
	return z.Balancer.UpdateClientConnState(s)
}

// zones is detect with zones: the first near backends are in zone a, the others in b.
func zones(t *testing.T, n, near int, name, js string, opts ...grpc.DialOption) *detected {
	z := zoned{balancer.Get(name), fmt.Sprintf("zoned_%s_%d", name, near), near}
	balancer.Register(z)
	return detect(t, n, z.name, js, opts...)
}

// beyond returns the part of the calls, in percent, that went beyond the first near backends.
func beyond(n []int64, near int) float64 {
	var far, all int64
	for i, x := range n {
		all += x
		if i >= near {
			far += x
		}
	}
	return 100 * float64(far) / float64(all)
}

// The caller's zone has all calls while it is well, and by its healthy share what it can
// carry; with none left the others have all.
func TestZoneFirst(t *testing.T) {
	for _, name := range ours {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := zones(t, 8, 4, name, `{"zone": {"local": "a"}, "slowStart": {"window": "0s"}}`)
				check := func(when string, want, off float64) {
					t.Helper()
					time.Sleep(100 * ms)
					if x := beyond(d.run(10*time.Second), 4); math.Abs(x-want) > off {
						t.Errorf("%s: %.1f%% of the calls leave the zone, want %v%%", when, x, want)
					}
				}
				check("all is well", 0, 0)
				d.f.Stop(0)
				check("three of four", 0, 0) // 1.4 x 0.75 > 1
				d.f.Stop(1)
				check("two of four", 30, 4)
				d.f.Stop(2)
				check("one of four", 65, 4)
				d.f.Stop(3)
				check("none", 100, 0)
				for i := range 4 {
					d.f.Start(i)
				}
				// The wait between two attempts to connect has grown to 17 s.
				time.Sleep(time.Minute)
				check("all are back", 0, 0)
				if es := d.told(); d.failed.Load() > 0 || len(es) > 0 {
					t.Errorf("%d calls failed, %+v", d.failed.Load(), es)
				}
			})
		})
	}
}

// A zone that nobody is in, and endpoints in no zone: all are far, and all serve.
func TestUnknownZone(t *testing.T) {
	for _, name := range ours {
		synctest.Test(t, func(t *testing.T) {
			d := zones(t, 4, 2, name, `{"zone": {"local": "elsewhere"}}`)
			for i, n := range d.run(5 * time.Second) {
				if n < 150 || n > 350 {
					t.Errorf("%s: backend %d has %d of 1000 calls, want a quarter", name, i, n)
				}
			}
		})
		synctest.Test(t, func(t *testing.T) {
			d := detect(t, 4, name, `{"zone": {"local": "a"}}`)
			for i, n := range d.run(5 * time.Second) {
				if n < 150 || n > 350 {
					t.Errorf("%s: backend %d, in no zone, has %d of 1000 calls, want a quarter", name, i, n)
				}
			}
		})
	}
}

// A key stays at its endpoint of the zone, and where the zone is left, all that leave it
// with one key go to one other.
func TestZonesWithKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := zones(t, 8, 4, RendezvousName, `{"zone": {"local": "a"}, "eps": 10}`)
		d.keys = 1
		used := func(ns []int64) (near, far int) {
			for i, n := range ns {
				if n > 0 && i < 4 {
					near++
				} else if n > 0 {
					far++
				}
			}
			return
		}
		if near, far := used(d.run(5 * time.Second)); near != 1 || far != 0 {
			t.Errorf("one key at %d endpoints of the zone and %d others, want one", near, far)
		}
		d.f.Stop(0)
		d.f.Stop(1)
		time.Sleep(time.Second)
		if near, far := used(d.run(5 * time.Second)); near != 1 || far != 1 {
			t.Errorf("with half the zone: one key at %d endpoints of the zone and %d others, want one each", near, far)
		}
	})
}

// A zone that becomes slow, as under overload, is relieved until it is not; when it is
// well again all calls return.
func TestOverloadSpills(t *testing.T) {
	for _, name := range ours {
		synctest.Test(t, func(t *testing.T) {
			d := zones(t, 8, 4, name, `{"zone": {"local": "a"}, "slowStart": {"window": "0s"}}`)
			if x := beyond(d.run(10*time.Second), 4); x != 0 {
				t.Errorf("%s: %.1f%% leave a zone that is well", name, x)
			}
			for i := range 4 {
				d.slow[i].Store(int64(18 * ms)) // ten times as long
			}
			d.run(10 * time.Second) // 10% more in each
			if x := beyond(d.run(5*time.Second), 4); x < 70 {
				t.Errorf("%s: %.1f%% leave a zone that is overloaded, want nearly all", name, x)
			}
			for i := range 4 {
				d.slow[i].Store(0)
			}
			// The zone has had no calls for a while, and is not asked before what is known of
			// it is old. Then 5% in each return.
			d.run(45 * time.Second)
			if x := beyond(d.run(5*time.Second), 4); x != 0 {
				t.Errorf("%s: %.1f%% leave a zone that is well again", name, x)
			}
			if es := d.told(); len(es) > 0 {
				t.Errorf("%s: %+v, want no ejection of a zone", name, es)
			}
		})
	}
}

// If all have become slow alike, nothing is gained elsewhere: no more leave than it takes
// to see that.
func TestAllSlowAlikeStayHome(t *testing.T) {
	for _, name := range ours {
		synctest.Test(t, func(t *testing.T) {
			d := zones(t, 8, 4, name, `{"zone": {"local": "a"}, "slowStart": {"window": "0s"}}`)
			d.run(10 * time.Second)
			d.noise.Store(true)
			for i := range 8 {
				d.slow[i].Store(int64(18 * ms))
			}
			if x := beyond(d.run(60*time.Second), 4); x > 10 || x == 0 {
				t.Errorf("%s: %.1f%% leave the zone, want few", name, x)
			}
		})
	}
}

// Endpoints of another zone are farther away: that is no reason to eject them.
func TestDistanceIsNoFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := zones(t, 10, 7, RendezvousName, `{"zone": {"local": "a"}, "slowStart": {"window": "0s"}}`)
		for i := 7; i < 10; i++ {
			d.slow[i].Store(int64(30 * ms))
		}
		for i := range 3 {
			d.f.Stop(i)
		}
		time.Sleep(time.Second)
		if x := beyond(d.run(20*time.Second), 7); x < 15 {
			t.Errorf("%.1f%% leave the zone, want 20%%", x)
		}
		if es := d.told(); len(es) > 0 {
			t.Errorf("%+v, want nobody ejected", es)
		}
	})
}

// What the zone and the others take is told by the endpoints in rotation, and by what is
// recent.
func TestSteerByTheRotation(t *testing.T) {
	for name, tc := range map[string]struct {
		slow func(e *remembered)
		want float64
	}{
		"a slow one":            {func(*remembered) {}, explore},
		"an ejected one":        {func(e *remembered) { e.out = true }, 0},
		"one of another zone":   {func(e *remembered) { e.far = true }, 0},
		"one that is long past": {func(e *remembered) { e.last.Store(int64(-tau)) }, 0},
	} {
		b := &shards{policy: settings{tau: tau, options: defaultOptions()}}
		p := &picker{b: b}
		for i, took := range []time.Duration{2 * ms, 20 * ms} {
			e := &remembered{endpoint: &endpoint{key: fmt.Sprint(i)}}
			e.record(0, took, tau, answered)
			if i == 1 {
				tc.slow(e)
			}
			p.ready = append(p.ready, seated{remembered: e})
		}
		b.zones.usual = 2e6
		if changed := b.steer(p, 0); changed != (tc.want > 0) || b.zones.extra != tc.want {
			t.Errorf("%s: %v leave, changed %v, want %v", name, b.zones.extra, changed, tc.want)
		}
	}
}

// The zone is overloaded three times, and the others are 100 ms away.
func TestAnOverloadedZoneWithFarOthers(t *testing.T) {
	var s spill
	s.step(1e6, 0, 2)
	const near, far = 3e6, 100e6
	lastFar := -1e9
	var total float64
	for sec := 0; sec < 300; sec++ {
		known := 0.0
		if float64(sec)-lastFar < 10 {
			known = far
		}
		s.step(near, known, 2)
		if s.extra > 0 {
			lastFar = float64(sec)
			total += s.extra
		}
	}
	if share := total / 300; share > .001 {
		t.Errorf("%.2f%% of the calls go where they take 33 times as long", share*100)
	}
}

// What is typical of the zone is not that of the others.
func TestTypicalIsOfTheZone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg, _ := balancer.Get(P2CName).(balancer.ConfigParser).ParseConfig([]byte(`{"zone":{"local":"a"}}`))
		cc := &fakeConn{}
		b := balancer.Get(P2CName).Build(cc, balancer.BuildOptions{})
		defer b.Close()
		var rs resolver.State
		for i := range 9 {
			e := resolver.Endpoint{Addresses: []resolver.Address{{Addr: "10.0.0." + string(rune('0'+i)) + ":443"}}}
			z := "b"
			if i < 4 {
				z = "a"
			}
			rs.Endpoints = append(rs.Endpoints, SetZone(e, z))
		}
		if err := b.UpdateClientConnState(balancer.ClientConnState{ResolverState: rs, BalancerConfig: cfg}); err != nil {
			t.Fatal(err)
		}
		for _, sc := range cc.conns {
			sc.step(connectivity.Connecting, connectivity.Ready)
		}
		sh := shardsOf(b)
		for i := range 9 {
			if i < 4 {
				sh.met(i, 2*ms, answered)
			} else {
				sh.met(i, 60*ms, answered)
			}
		}
		sh.sweep(sh.now())
		if ty := time.Duration(math.Float64frombits(sh.typical[0].Load())); ty > 3*ms {
			t.Errorf("typical %v for a client whose calls go to endpoints of 2ms", ty)
		}
	})
}
