package loadbalance

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"pgregory.net/rapid"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// told makes a chooser of n members of which the given ones have reported.
func told(n int, reports map[int]report) *prequal {
	c := new(replicas).choose(simMembers(n), defaultPrequal(), nil)
	for i, r := range reports {
		c.take(c.of[i], 0, r, true, 0)
	}
	return c
}

// always chooses one member.
type always int

func (i always) route(*request, bars) int { return int(i) }

// pick routes with random bits that make it not curious.
func (c *prequal) pick(now time.Duration) int {
	return c.route(&request{now: now, bits: 1 << 32, intn: func(int) int { return 0 }}, bars{})
}

// Which endpoint is chosen, by what is reported.
func TestPrequalRule(t *testing.T) {
	const fallback = 3
	rif := func(rif int64, latency time.Duration) report { return report{rif: rif, latency: latency * ms} }
	for _, tc := range []struct {
		name    string
		reports map[int]report
		hot     float64
		do      func(*prequal)
		now     time.Duration
		want    int
	}{
		{"cold: the lowest latency", map[int]report{0: rif(0, 9), 1: rif(4, 5), 2: rif(3, 7)}, 4, nil, 0, 1},
		{"a hot one is not asked for its latency", map[int]report{0: rif(0, 9), 1: rif(5, 1), 2: rif(3, 7)}, 4, nil, 0, 2},
		{"all hot: the lowest RIF", map[int]report{0: rif(6, 9), 1: rif(7, 1), 2: rif(8, 1)}, 4, nil, 0, 0},
		{"our own attempt makes it hot", map[int]report{0: rif(2, 9), 1: rif(4, 1)}, 4,
			func(c *prequal) { c.members[1].begin(false) }, 0, 0},
		{"weight", map[int]report{0: rif(2, 5), 1: rif(2, 6)}, 4, func(c *prequal) { c.members[1].weight = 2 }, 0, 1},
		{"weight of the hot", map[int]report{0: rif(10, 1), 1: rif(15, 1)}, 4, func(c *prequal) { c.members[1].weight = 2 }, 0, 1},
		{"a second old", map[int]report{0: rif(0, 5), 1: rif(0, 6)}, 4, nil, probeAge, 0},
		{"too old", map[int]report{0: rif(0, 5), 1: rif(0, 6)}, 4, nil, probeAge + 1, fallback},
		{"one probe is not enough", map[int]report{0: rif(0, 5)}, 4, nil, 0, fallback},
		{"no probe", nil, 0, nil, 0, fallback},
		{"failed", map[int]report{0: rif(0, 5), 1: rif(0, 6), 2: rif(0, 7)}, 4, func(c *prequal) { c.failed(c.of[0], 0) }, 0, 1},
		{"failed, and reports again at once", map[int]report{0: rif(0, 5), 1: rif(0, 6), 2: rif(0, 7)}, 4, func(c *prequal) {
			c.failed(c.of[0], 0)
			c.take(c.of[0], holdOff-1, rif(0, 5), true, 0)
		}, holdOff, 1},
		{"failed, and reports again later", map[int]report{0: rif(0, 5), 1: rif(0, 6), 2: rif(0, 7)}, 4, func(c *prequal) {
			c.failed(c.of[0], 0)
			c.take(c.of[0], holdOff, rif(0, 5), false, 0)
		}, holdOff, 0},
		{"failed twice in a row", map[int]report{0: rif(0, 5), 1: rif(0, 6), 2: rif(0, 7)}, 4, func(c *prequal) {
			c.failed(c.of[0], 0)
			c.failed(c.of[0], 0)
			c.take(c.of[0], holdOff, rif(0, 5), true, 0)
		}, holdOff, 1},
		{"failed, answered and failed", map[int]report{0: rif(0, 5), 1: rif(0, 6), 2: rif(0, 7)}, 4, func(c *prequal) {
			c.failed(c.of[0], 0)
			c.of[0].answered()
			c.failed(c.of[0], 0)
			c.take(c.of[0], holdOff, rif(0, 5), false, 0)
		}, holdOff, 0},
		{"one of another zone", map[int]report{0: rif(0, 5), 1: rif(0, 6), 2: rif(0, 7)}, 4, func(c *prequal) {
			c.replicas.choose(c.members[:1], c.cfg, nil)
			c.members = append([]member{c.members[3]}, c.members[1:]...)
		}, 0, 1},
		{"a member has no such service", map[int]report{0: rif(0, 5), 1: rif(0, 6)}, 4, func(c *prequal) { c.missed(c.of[2], 0, true) }, 0, fallback},
		{"a member has left two probes unanswered", map[int]report{0: rif(0, 5), 1: rif(0, 6)}, 4, func(c *prequal) {
			c.missed(c.of[2], 0, false)
			c.missed(c.of[2], 0, false)
		}, 0, 0},
		{"a member has left three probes unanswered", map[int]report{0: rif(0, 5), 1: rif(0, 6)}, 4, func(c *prequal) {
			for range 3 {
				c.pick(0)
				c.missed(c.of[2], 0, false)
			}
		}, 0, fallback},
		{"and then answered one", map[int]report{0: rif(0, 5), 1: rif(0, 6)}, 4, func(c *prequal) {
			for range 3 {
				c.missed(c.of[2], 0, false)
			}
			c.pick(0)
			c.take(c.of[2], 0, rif(0, 9), true, 0)
		}, 0, 0},
		{"one that has answered misses three", map[int]report{0: rif(0, 5), 1: rif(0, 6)}, 4, func(c *prequal) {
			for range 3 {
				c.missed(c.of[1], 0, false)
			}
		}, 0, 0},
		{"one that has answered loses the service", map[int]report{0: rif(0, 5), 1: rif(0, 6), 2: rif(0, 7)}, 4, func(c *prequal) {
			c.missed(c.of[1], 0, true)
		}, 0, fallback},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := told(4, tc.reports)
			c.fallback = always(fallback)
			if tc.do != nil {
				tc.do(c)
			}
			c.pool.hot.Store(math.Float64bits(tc.hot))
			if got := c.pick(tc.now); got != tc.want {
				t.Errorf("endpoint %d, want %d", got, tc.want)
			}
		})
	}
}

// Of equals each gets its part, wherever its slot is.
func TestPrequalTies(t *testing.T) {
	c := told(5, map[int]report{0: {latency: 5 * ms}, 1: {latency: 5 * ms}, 2: {latency: 5 * ms}, 3: {rif: 1, latency: 5 * ms}})
	c.pool.hot.Store(math.Float64bits(5))
	r := rand.New(rand.NewPCG(1, 1))
	var counts [5]int
	for range 4000 {
		counts[c.route(&request{bits: r.Uint64()}, bars{})]++
	}
	for i, n := range counts[:4] {
		if n < 900 || n > 1100 {
			t.Errorf("endpoint %d got %d of 4000 picks, want a fourth: %v", i, n, counts)
		}
	}
}

// One pick follows an invitation, if the endpoint is idle still.
func TestInvited(t *testing.T) {
	for _, tc := range []struct {
		name  string
		other report
		do    func(c *prequal)
		want  []int
	}{
		{"invited", report{latency: 9 * ms, invites: true}, nil, []int{1, 0, 0}},
		{"not invited", report{latency: 9 * ms}, nil, []int{0, 0, 0}},
		{"others came first", report{rif: 1, latency: 18 * ms, invites: true}, nil, []int{0, 0, 0}},
		{"an attempt of ours is there", report{latency: 9 * ms, invites: true}, func(c *prequal) { c.members[1].begin(false) }, []int{0, 0, 0}},
		{"failed", report{latency: 9 * ms, invites: true}, func(c *prequal) { c.of[1].until.Store(9) }, []int{0, 0, 0}},
	} {
		c := told(3, map[int]report{0: {latency: 5 * ms}, 1: tc.other, 2: {rif: 1, latency: 50 * ms}})
		c.pool.hot.Store(math.Float64bits(5))
		if tc.do != nil {
			tc.do(c)
		}
		if got := c.route(&request{streaming: true}, bars{}); got != 0 {
			t.Errorf("%s: a stream to endpoint %d, want 0", tc.name, got)
		}
		for i, want := range tc.want {
			if got := c.pick(0); got != want {
				t.Errorf("%s: pick %d: endpoint %d, want %d", tc.name, i, got, want)
			}
		}
	}
}

// Of few endpoints a single overloaded one is hot, however often each has reported.
func TestOneOfFewIsHot(t *testing.T) {
	for n := 2; n < 20; n++ {
		c := told(n, nil)
		for round := range 100 {
			for i := range n {
				r := report{rif: 1, latency: 5 * ms}
				if i == 0 {
					r = report{rif: 100, latency: ms}
				}
				c.take(c.of[i], 0, r, true, 0)
			}
			if got := c.pick(0); got == 0 && round > 1 {
				t.Fatalf("of %d endpoints the overloaded one is chosen", n)
			}
		}
	}
	for _, tc := range []struct {
		n    int
		want float64
	}{{1, 0}, {2, 0.375}, {5, 0.75}, {12, 1 - 1.25/12}, {13, 0.9}, {1000, 0.9}} {
		if got := quantile(0.9, tc.n); math.Abs(got-tc.want) > 1e-9 {
			t.Errorf("%d endpoints: %v, want %v", tc.n, got, tc.want)
		}
	}
}

// b_reuse, by the paper's formula.
func TestReuseLimit(t *testing.T) {
	for _, tc := range []struct {
		perPick float64
		n       int
		want    float64
	}{
		{3, 2, math.Inf(1)}, {3, 16, math.Inf(1)}, {3, 24, math.Inf(1)},
		{3, 32, 4}, {3, 100, 2 / 1.52}, {3, 1000, 2 / 1.952}, {16, 100, 1}, {0.3, 100, 2 / 0.152},
	} {
		if got := reuse(tc.perPick, tc.n); math.Abs(got-tc.want) > 1e-9 && got != tc.want {
			t.Errorf("%v probes per pick, %d endpoints: %v, want %v", tc.perPick, tc.n, got, tc.want)
		}
	}
	// 32 endpoints: four uses each, and the probe is gone. The best is used up first.
	c := told(32, map[int]report{0: {rif: 0, latency: ms}, 1: {rif: 0, latency: 2 * ms}, 2: {rif: 0, latency: 3 * ms}})
	c.pool.earned.Store(0) // no removals
	for i, want := range []int{0, 0, 0, 0, 1, 1, 1, 1} {
		if got := c.pick(0); got != want {
			t.Errorf("pick %d: endpoint %d, want %d", i, got, want)
		}
	}
	if got := c.pool.held(); len(got) != 1 || got[0] != "2" {
		t.Errorf("pool %q, want only the probe of endpoint 2", got)
	}
	// The limit of 100 endpoints is 1.3: two uses for 3 of 10, else one.
	c = told(100, nil)
	for _, tc := range []struct {
		u    float64
		want int64
	}{{0, 1}, {0.68, 1}, {0.69, 2}, {0.999, 2}} {
		c.take(c.of[0], 0, report{}, true, tc.u)
		if got := c.pool.slots[0].Load().left.Load(); got != tc.want {
			t.Errorf("u %v: %d uses, want %d", tc.u, got, tc.want)
		}
	}
}

// Each pick among many endpoints removes the oldest probe and the worst one in turn;
// among few none.
func TestRemoval(t *testing.T) {
	for _, tc := range []struct {
		n    int
		want string
	}{
		{16, "0 1 2 3 4 5"},
		// 0 and then 1 are used up; the oldest is 5, and the worst 4: it is hot.
		{1000, "2 3"},
	} {
		c := told(tc.n, nil)
		for i, r := range []report{{rif: 0, latency: ms}, {rif: 0, latency: 2 * ms}, {rif: 0, latency: 3 * ms}, {rif: 0, latency: 4 * ms}, {rif: 50, latency: ms}, {rif: 0, latency: 5 * ms}} {
			at := time.Duration(10 + i)
			if i == 5 {
				at = 1
			}
			c.take(c.of[i], at, r, true, 0)
		}
		c.pool.hot.Store(math.Float64bits(40))
		c.pick(20)
		c.pick(20)
		got := strings.Join(c.pool.held(), " ")
		if got != tc.want {
			t.Errorf("%d endpoints: left are %q, want %q", tc.n, got, tc.want)
		}
	}
}

// Whatever has been reported, failed and gone: a pick goes to no barred endpoint, by no
// probe that is too old or used up, and leaves at most poolSize of them, one per endpoint.
func TestPrequalProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 40).Draw(t, "n")
		cfg := defaultPrequal()
		cfg.probesPerPick = rapid.SampledFrom([]float64{0.1, 1, 3, 16}).Draw(t, "probesPerPick")
		members := simMembers(n)
		s := new(replicas)
		c := s.choose(members, cfg, nil)
		used := make(map[*probe]int)
		now := time.Duration(0)
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			i := r.IntN(len(c.members))
			switch r.IntN(8) {
			case 0, 1, 2:
				c.take(c.of[i], now, report{int64(r.IntN(20)), time.Duration(r.IntN(20)) * ms, r.IntN(2) == 0}, r.IntN(2) == 0, r.Float64())
			case 3:
				now += time.Duration(r.IntN(300)) * ms
			case 4:
				c.failed(c.of[i], now)
			case 5:
				rest := append(append([]member(nil), members[:i]...), members[i+1:]...)
				if len(rest) > 0 {
					c = s.choose(rest, cfg, nil)
				}
			default:
				var call attempt.Call
				first, second := new(attempt.Attempt), new(attempt.Attempt)
				first.Init(&call, 1, attempt.First)
				second.Init(&call, 2, attempt.Hedge)
				first.Claim(first.View(), c.members[i].key)
				b := bars{view: second.View()}
				var before [poolSize]*probe
				left := make(map[*probe]int64)
				for k := range before {
					if before[k] = c.pool.slots[k].Load(); before[k] != nil {
						left[before[k]] = before[k].left.Load()
					}
				}
				got := c.route(&request{now: now, bits: r.Uint64(), intn: r.IntN}, b)
				if got == i || got < 0 != (len(c.members) == 1) {
					t.Fatalf("endpoint %d of %d, %d is barred", got, len(c.members), i)
				}
				for p, was := range left {
					if p.left.Load() != was {
						used[p]++
						if now-p.at > probeAge {
							t.Fatalf("a probe of age %v was used", now-p.at)
						}
						if float64(used[p]) > math.Ceil(c.uses) {
							t.Fatalf("a probe was used %d times, limit %v", used[p], c.uses)
						}
						if now < time.Duration(p.of.until.Load()) {
							t.Fatal("a probe of an endpoint that has failed was used")
						}
					}
				}
			}
			seen := make(map[string]bool)
			for _, key := range c.pool.held() {
				if seen[key] {
					t.Fatalf("two probes of endpoint %s", key)
				}
				seen[key] = true
			}
		}
	})
}

// What is known of an endpoint that is gone is forgotten in the end.
func TestReplicasAreBounded(t *testing.T) {
	s := new(replicas)
	for range 5000 {
		s.choose(simMembers(2), defaultPrequal(), nil)
	}
	n := 0
	s.known.Range(func(any, any) bool { n++; return true })
	if n != s.size || n > 2*2+1024+2 {
		t.Errorf("%d endpoints are known, counted %d", n, s.size)
	}
}

func TestRouteAllocatesNothing(t *testing.T) {
	c := filled(10)
	r := &request{intn: func(int) int { return 0 }}
	if n := testenv.Allocs(100, func() { c.route(r, bars{}) }); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}

func filled(n int) *prequal {
	c := told(n, nil)
	c.prober = newProber()
	for i := range min(n, poolSize) {
		c.take(c.of[i], 0, report{rif: int64(i % 5), latency: time.Duration(5+i%7) * ms}, true, 0.5)
		c.pool.slots[i].Load().left.Store(unlimited)
	}
	c.pool.earned.Store(0)
	return c
}

func BenchmarkPrequalRoute(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("endpoints=%d", n), func(b *testing.B) {
			c := filled(n)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				r := &request{intn: rand.IntN}
				for pb.Next() {
					r.bits++
					c.route(r, bars{})
				}
			})
		})
	}
}

// Every fault of a configuration, as it is told.
func TestParsePrequalConfig(t *testing.T) {
	with := func(set func(*prequalConfig)) prequalConfig {
		c := defaultPrequal()
		set(c)
		return *c
	}
	for _, tc := range []struct {
		js   string
		want prequalConfig
		errs []string // lines of the error
	}{
		{js: `{}`, want: *defaultPrequal()},
		{js: `{"probesPerPick": 0.1, "qRif": 0, "maxProbesPerSecond": 1, "probeTimeout": "0.001s", "decayTime": "1s"}`, want: with(func(c *prequalConfig) {
			c.probesPerPick, c.qRIF, c.maxProbes, c.probeTimeout, c.decayTime = 0.1, 0, 1, ms, time.Second
		})},
		{js: `{"probesPerPick": 16, "qRif": 1, "maxProbesPerSecond": 100000, "probeTimeout": "1s"}`, want: with(func(c *prequalConfig) {
			c.probesPerPick, c.qRIF, c.maxProbes, c.probeTimeout = 16, 1, 100000, time.Second
		})},
		{js: `{"maxInFlight": 5}`, want: with(func(c *prequalConfig) { c.maxInFlight = 5 })},
		{js: `{"probesPerPick": 0.09}`, errs: []string{`probesPerPick: 0.09, want a number in [0.1, 16]`}},
		{js: `{"probesPerPick": 17}`, errs: []string{`probesPerPick: 17, want a number in [0.1, 16]`}},
		{js: `{"qRif": -0.1}`, errs: []string{`qRif: -0.1, want a number in [0, 1]`}},
		{js: `{"qRif": 84}`, errs: []string{`qRif: 84, want a number in [0, 1]`}},
		{js: `{"qRif": null}`, errs: []string{`qRif: null, want a value or no such key`}},
		{js: `{"maxProbesPerSecond": 0}`, errs: []string{`maxProbesPerSecond: 0, want a whole number in [1, 100000]`}},
		{js: `{"maxProbesPerSecond": 100001}`, errs: []string{`maxProbesPerSecond: 100001, want a whole number in [1, 100000]`}},
		{js: `{"maxProbesPerSecond": 1.5}`, errs: []string{`maxProbesPerSecond: 1.5, want a whole number in [1, 100000]`}},
		{js: `{"probeTimeout": "0.0009s"}`, errs: []string{`probeTimeout: 900µs, want [1ms, 1s]`}},
		{js: `{"probeTimeout": "1.1s"}`, errs: []string{`probeTimeout: 1.1s, want [1ms, 1s]`}},
		{js: `{"probeTimeout": 3}`, errs: []string{`probeTimeout: number 3, want a duration such as "10s"`}},
		{js: `{"decayTime": "0s", "qRIF": 1, "qRif": 2, "qRif": 1}`, errs: []string{
			`qRif: given twice`, `decayTime: 0s, want (0s, 1h0m0s]`, `qRif: 2, want a number in [0, 1]`, `qRIF: unknown key, did you mean "qRif"?`}},
		{js: `[]`, errs: []string{`document: a list, want an object`}},
	} {
		c, err := prequalBuilder{}.ParseConfig([]byte(tc.js))
		switch {
		case len(tc.errs) == 0 && err != nil:
			t.Errorf("%s: %v", tc.js, err)
		case len(tc.errs) == 0:
			tc.want.js = tc.js
			if got := *c.(*prequalConfig); got != tc.want {
				t.Errorf("%s: %+v, want %+v", tc.js, got, tc.want)
			}
		default:
			const prefix = "loadbalance: bobtail_prequal: "
			if want := prefix + strings.Join(tc.errs, "\n"+prefix); err == nil || err.Error() != want {
				t.Errorf("%s:\n%v\nwant\n%s", tc.js, err, want)
			}
		}
	}
	if _, err := grpc.NewClient("passthrough:///x", grpc.WithDefaultServiceConfig(
		`{"loadBalancingConfig":[{"bobtail_prequal":{"qRif":2}}]}`)); err == nil {
		t.Error("no error for a faulty configuration")
	}
	var b prequalBalancer
	if err := b.UpdateClientConnState(balancer.ClientConnState{BalancerConfig: &p2cConfig{}}); !errors.Is(err, balancer.ErrBadResolverState) {
		t.Errorf("got %v, want ErrBadResolverState", err)
	}
}

func FuzzParsePrequalConfig(f *testing.F) {
	f.Add(`{"probesPerPick": 3, "qRif": 0.75, "maxProbesPerSecond": 300, "probeTimeout": "0.003s"}`)
	f.Add(`{"qRif": 1e999, "decayTime": "1h"}`)
	f.Fuzz(func(t *testing.T, js string) {
		parsed, err := prequalBuilder{}.ParseConfig([]byte(js))
		if err != nil {
			return
		}
		c := parsed.(*prequalConfig)
		if !(c.probesPerPick >= 0.1 && c.probesPerPick <= poolSize) || !(c.qRIF >= 0 && c.qRIF <= 1) ||
			c.maxProbes < 1 || c.maxProbes > 100_000 || c.probeTimeout < ms || c.probeTimeout > time.Second ||
			c.decayTime <= 0 || c.decayTime > maxDecayTime {
			t.Errorf("%s: %+v is out of bounds", js, c)
		}
	})
}

// A server that reports what cannot be is no better for it, nor does it turn the reports of the
// others off.
func TestPrequalBelievesNoNonsense(t *testing.T) {
	for _, rif := range []int64{1 << 40, math.MaxInt64} {
		c := told(4, map[int]report{0: {rif: 3, latency: 5 * ms}, 1: {rif: 4, latency: 6 * ms}, 2: {rif: 5, latency: 7 * ms}})
		c.fallback = always(3)
		c.take(c.of[3], 0, report{rif: rif, latency: ms}, true, 0)
		c.pool.hot.Store(math.Float64bits(10))
		if got := c.pick(0); got != 0 {
			t.Errorf("rif %d: pick %d, want 0", rif, got)
		}
		// one attempt begun there since
		c.members[3].begin(false)
		if got := c.pick(0); got != 0 {
			t.Errorf("rif %d, one of ours there: pick %d, want 0", rif, got)
		}
	}
}

// Likewise for what would overflow a sum.
func TestPrequalIsNotTurnedOff(t *testing.T) {
	c := told(5, map[int]report{0: {rif: 30, latency: 5 * ms}, 1: {rif: 40, latency: 6 * ms}, 2: {rif: 50, latency: 7 * ms}})
	c.fallback = always(4)
	c.pool.hot.Store(math.Float64bits(60))
	if got := c.pick(0); got != 0 {
		t.Errorf("control: %d", got)
	}
	for _, rif := range []int64{1 << 61, 1 << 62, math.MaxInt64 - 200, math.MaxInt64} {
		c.take(c.of[3], 0, report{rif: rif, latency: ms}, true, 0)
		c.pool.hot.Store(math.Float64bits(60))
		if got := c.pick(0); got != 0 {
			t.Errorf("rif %d: pick %d, want 0", rif, got)
		}
	}
}

// However many attempts have failed in a row.
func TestPrequalManyFailures(t *testing.T) {
	c := told(2, nil)
	c.of[0].failures.Store(math.MaxInt32)
	c.failed(c.of[0], 0)
	c.failed(c.of[0], 0)
}

// The endpoints of the caller's zone have a pool of their own: what those of other zones
// report takes none of its slots, and does not say which of its endpoints are hot.
func TestPoolsOfTheZones(t *testing.T) {
	var s replicas
	all := simMembers(4 + 40)
	for i := range all {
		all[i].far = i >= 4
	}
	near, far := s.choose(all[:4], defaultPrequal(), nil), s.choose(all[4:], defaultPrequal(), nil)
	near.fallback, far.fallback = always(3), always(39)
	for i := range 3 {
		near.take(near.of[i], 0, report{rif: int64(10 + i), latency: time.Duration(5-i) * ms}, true, 0)
	}
	for i := range 30 {
		far.take(far.of[i], ms, report{rif: 0, latency: 90 * ms}, true, 0)
	}
	if got := len(near.pool.held()); got != 3 {
		t.Errorf("%d probes of the zone are left, want 3", got)
	}
	if hot := math.Float64frombits(near.pool.hot.Load()); hot < 10 {
		t.Errorf("hot in the zone are those above %v, by what others have", hot)
	}
	// Two are below what is hot, and the faster of these is chosen.
	near.pool.hot.Store(math.Float64bits(11))
	if got := near.pick(ms); got != 1 {
		t.Errorf("endpoint %d, want 1", got)
	}
	if got := far.pick(ms); got >= 30 {
		t.Errorf("endpoint %d of the others, want one that has reported", got)
	}
	// A call's report is taken by whichever chooser was asked last.
	far.take(near.of[3], ms, report{rif: 1, latency: ms}, false, 0)
	if got := near.pick(ms); got != 3 {
		t.Errorf("endpoint %d, want 3", got)
	}
	for _, c := range []*prequal{near, far} {
		key := c.pool.held()[0]
		i := slices.IndexFunc(c.of, func(r *replica) bool { return r.e.key == key })
		near.failed(c.of[i], ms)
		if got := c.pool.held(); slices.Contains(got, key) {
			t.Errorf("the probe of one that failed, %s, is left: %v", key, got)
		}
	}
}

// idle is the picker of a connection to nobody.
type idle struct{}

func (idle) Pick(balancer.PickInfo) (balancer.PickResult, error) { return balancer.PickResult{}, nil }

// A pick that asks a chooser twice, or two of them, as a hedge does where all is tried, earns
// the probes of one.
func TestAPickIsCountedOnce(t *testing.T) {
	p := newProber()
	all := simMembers(4)
	for i := range all {
		all[i].leaf, all[i].far = idle{}, i >= 2
	}
	b := &shards{start: time.Now()}
	b.due.Store(math.MaxInt64)
	rot := &rotation{tau: tau, ended: func(*endpoint, time.Duration, verdict, any) {}}
	choose := func(m []member) chooser { return p.replicas.choose(m, defaultPrequal(), p) }
	rot.add(all[:2], choose, &b.typical[0])
	rot.add(all[2:], choose, &b.typical[1])
	from := &picker{b: b}
	from.rotation.Store(rot)
	var picks uint64
	for range 100 {
		var call attempt.Call
		var as [6]attempt.Attempt
		var dones []func(balancer.DoneInfo)
		for i := range as {
			as[i].Init(&call, i+1, attempt.Hedge)
			res, err := from.Pick(balancer.PickInfo{Ctx: attempt.NewContext(t.Context(), &as[i])})
			if (err == nil) != (i < 4) {
				t.Fatalf("attempt %d: %v", i+1, err)
			}
			if err == nil {
				dones = append(dones, res.Done)
			}
			picks++
			if n := p.picks.Load(); n != picks {
				t.Fatalf("attempt %d: %d picks are counted, want %d", i+1, n, picks)
			}
		}
		for _, done := range dones {
			done(got)
		}
	}
}
