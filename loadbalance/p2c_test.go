package loadbalance

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
)

const hedgeAfter = 3500 * time.Microsecond

var policies = []struct {
	name string
	new  func(n int) policy
}{
	{"bobtail_p2c", newReal}, // first: the one that must hold the bounds
	{"least request", newLeast},
	{"peak EWMA", newPeak(1)},
	{"peak / fraction", newPeak(1.0 / 64)},
}

// compare runs a story with two seeds and hands the runs to check. With -v it runs
// it under every policy, and prints a line of figures for each.
func compare(t *testing.T, story func() *sim, figures func(*sim) string, check func(*testing.T, *sim)) {
	for _, pol := range policies {
		if !testing.Verbose() {
			break
		}
		s := story()
		s.policy = pol.new(s.n)
		t.Logf("%-15s %s", pol.name, figures(s.run(1)))
	}
	for seed := range uint64(2) {
		s := story()
		s.policy = newReal(s.n)
		check(t, s.run(seed+1))
	}
}

func latencies(s *sim) string {
	return fmt.Sprintf("p50 %.2f p99 %.2f p99.9 %.2f ms, extra %.1f%%",
		s.quantile(.5), s.quantile(.99), s.quantile(.999), 100*float64(s.extra)/float64(s.calls))
}

// Five equal replicas share evenly.
func TestEqualReplicas(t *testing.T) {
	t.Parallel()
	for _, hedge := range []time.Duration{0, hedgeAfter} {
		t.Run(fmt.Sprintf("hedge=%v", hedge), func(t *testing.T) {
			compare(t, func() *sim {
				return &sim{
					n: 5, rate: 1000, until: 30 * time.Second, hedge: hedge,
					service: func(r *rand.Rand, _ int, _ time.Duration) time.Duration { return heavy(r) },
				}
			}, func(s *sim) string {
				lo, hi := s.spread(0, 1, 2, 3, 4)
				return fmt.Sprintf("shares in any second %.1f..%.1f%%, longest gap %v, %s",
					lo, hi, s.longestGap(0).Round(ms), latencies(s))
			}, func(t *testing.T, s *sim) {
				for ep := range 5 {
					if x := s.share(ep, 0, 30); x < 17 || x > 23 {
						t.Errorf("endpoint %d got %.1f%% of the first attempts, want 17..23%%", ep, x)
					}
				}
				// Without hedges a straggler is 50 ms of latency, with them 3.5 ms: see
				// TestStragglersStarveNobody.
				if lo, hi := s.spread(0, 1, 2, 3, 4); hi > 40 || hedge > 0 && lo < 10 {
					t.Errorf("shares in one second %.1f..%.1f%%, want 10..40%%", lo, hi)
				}
			})
		})
	}
}

// Stragglers that nobody hedges cost an equal endpoint its turn for a while. As a rule that
// is half a second, but the tail of it is long: an endpoint that has met several in a row is
// asked when its cost has decayed, or when the others are busy.
func TestStragglersStarveNobody(t *testing.T) {
	t.Parallel()
	const seeds = 20
	var gaps []time.Duration
	for seed := range uint64(seeds) {
		s := &sim{
			n: 5, rate: 1000, until: 30 * time.Second,
			service: func(r *rand.Rand, _ int, _ time.Duration) time.Duration { return heavy(r) },
			policy:  newReal(5),
		}
		gaps = append(gaps, s.run(seed+1).longestGap(0))
	}
	slices.Sort(gaps)
	t.Logf("longest gap of any endpoint in 30s: median %v, 75%% %v, longest %v", gaps[seeds/2], gaps[seeds*3/4], gaps[seeds-1])
	if gaps[seeds/2] > 700*ms || gaps[seeds*3/4] > 1500*ms || gaps[seeds-1] > patience*tau {
		t.Errorf("gaps %v, want a median of at most 0.7s, 1.5s in 3 of 4 runs, and none above 2 tau", gaps)
	}
}

// A replica that is slow gets next to nothing within a few hundred calls, even if
// no attempt there ever comes to its end because hedges are faster.
func TestSlowReplica(t *testing.T) {
	t.Parallel()
	for _, hedge := range []time.Duration{0, hedgeAfter} {
		for _, slow := range []int{2, 10} {
			t.Run(fmt.Sprintf("hedge=%v/x%d", hedge, slow), func(t *testing.T) {
				compare(t, func() *sim {
					return &sim{
						n: 5, rate: 1000, until: 30 * time.Second, hedge: hedge,
						service: func(r *rand.Rand, ep int, _ time.Duration) time.Duration {
							d := heavy(r)
							if ep == 0 {
								d *= time.Duration(slow)
							}
							return d
						},
					}
				}, func(s *sim) string {
					lo, hi := s.spread(1, 2, 3, 4)
					return fmt.Sprintf("share of the slow one %.2f%% in the 1st second, %.2f%% after; of others in any second %.1f..%.1f%%; %s",
						s.share(0, 0, 1), s.share(0, 1, 30), lo, hi, latencies(s))
				}, func(t *testing.T, s *sim) {
					start, after := 2.0, 0.2
					if slow == 2 {
						start, after = 14, 8
					}
					if x := s.share(0, 0, 1); x > start {
						t.Errorf("slow replica got %.2f%% of the first 1000 calls, want at most %v%%", x, start)
					}
					if x := s.share(0, 1, 30); x > after {
						t.Errorf("slow replica got %.2f%% afterwards, want at most %v%%", x, after)
					}
					most := 400 * ms
					if hedge == 0 {
						most = patience * tau
					}
					if g := s.longestGap(1); g > most {
						t.Errorf("a good endpoint got nothing for %v, want at most %v", g, most)
					}
				})
			})
		}
	}
}

// A replica becomes slow, is found out, recovers, and is back within 3 tau.
func TestRecovery(t *testing.T) {
	t.Parallel()
	for _, hedge := range []time.Duration{0, hedgeAfter} {
		for _, slow := range []int{10, 500} {
			t.Run(fmt.Sprintf("hedge=%v/x%d", hedge, slow), func(t *testing.T) {
				back := func(s *sim) int {
					sec := 50
					for sec < 90 && s.share(0, sec, sec+1) < 10 {
						sec++
					}
					return sec - 50
				}
				compare(t, func() *sim {
					return &sim{
						n: 5, rate: 500, until: 90 * time.Second, hedge: hedge,
						service: func(r *rand.Rand, ep int, now time.Duration) time.Duration {
							d := heavy(r)
							if ep == 0 && now > 20*time.Second && now < 50*time.Second {
								d *= time.Duration(slow)
							}
							return d
						},
					}
				}, func(s *sim) string {
					return fmt.Sprintf("share of the slow one %.2f%% in its 1st second, %.2f%% after; back %d s after it recovered",
						s.share(0, 20, 21), s.share(0, 21, 50), back(s))
				}, func(t *testing.T, s *sim) {
					if x := s.share(0, 21, 50); x > 1 {
						t.Errorf("slow replica got %.2f%%, want at most 1%%", x)
					}
					if b := back(s); b > 30 {
						t.Errorf("back after %d s, want at most 3 tau = 30 s", b)
					}
				})
			})
		}
	}
}

// A replica that fails at once is idle, and yet no magnet.
func TestFailingReplica(t *testing.T) {
	t.Parallel()
	for name, p := range map[string]struct {
		from  time.Duration
		ratio float64
		after int     // seconds
		most  float64 // share after them
	}{
		"from the start": {0, 1, 2, .2},
		"from 20 s":      {20 * time.Second, 1, 30, .3},
		// Over 10 seeds and two rates it was 9.9..16.3%, so this bound is no luck; in
		// any 10 s it may be as high as 20%.
		"30% of attempts": {0, .3, 2, 18},
	} {
		t.Run(name, func(t *testing.T) {
			compare(t, func() *sim {
				return &sim{
					n: 5, rate: 500, until: 40 * time.Second,
					service: func(r *rand.Rand, _ int, _ time.Duration) time.Duration { return heavy(r) },
					fails: func(r *rand.Rand, ep int, now time.Duration) bool {
						return ep == 0 && now >= p.from && r.Float64() < p.ratio
					},
				}
			}, func(s *sim) string {
				return fmt.Sprintf("its share %.2f%% in the 1st second, %.2f%% in 20-22, %.3f%% after %d s",
					s.share(0, 0, 1), s.share(0, 20, 22), s.share(0, p.after, 40), p.after)
			}, func(t *testing.T, s *sim) {
				if x := s.share(0, p.after, 40); x > p.most {
					t.Errorf("the failing replica got %.2f%%, want at most %v%%", x, p.most)
				}
			})
		})
	}
}

// Callers who give up, everywhere alike, shift no shares. Over 40 seeds the shares
// after 5 s were 16.4..22.8%. Before, an endpoint whose very first attempts were all
// cancelled may wait for seconds: 4.8 s at worst, 0.2 s or less in half of the runs.
func TestCancellationsStarveNobody(t *testing.T) {
	t.Parallel()
	for _, giveUp := range []time.Duration{ms, 2 * ms, 3 * ms} {
		t.Run(giveUp.String(), func(t *testing.T) {
			compare(t, func() *sim {
				return &sim{
					n: 5, rate: 1000, until: 20 * time.Second, giveUp: giveUp,
					service: func(r *rand.Rand, _ int, _ time.Duration) time.Duration { return heavy(r) },
				}
			}, func(s *sim) string {
				lo, hi := s.spread(0, 1, 2, 3, 4)
				return fmt.Sprintf("shares %.1f %.1f %.1f %.1f %.1f%%, in any second %.1f..%.1f%%, longest gap %v", s.share(0, 5, 20),
					s.share(1, 5, 20), s.share(2, 5, 20), s.share(3, 5, 20), s.share(4, 5, 20), lo, hi, s.longestGap(0).Round(ms))
			}, func(t *testing.T, s *sim) {
				for ep := range 5 {
					// From 5 s on: one whose first attempts were all cut may wait that long.
					if x := s.share(ep, 5, 20); x < 15 || x > 25 {
						t.Errorf("endpoint %d got %.1f%%, want 15..25%%", ep, x)
					}
				}
				if g := s.longestGap(0); g > tau {
					t.Errorf("an endpoint got nothing for %v, want at most %v", g, tau)
				}
			})
		})
	}
}

// Callers who give up at one endpoint only (its methods are slower, say) cannot
// shut it out for ever: it is probed, and comes back once they stop.
func TestCancellationsAtOne(t *testing.T) {
	var a, b endpoint
	p := newP2C(membersOf([]*endpoint{&a, &b}), tau)
	a.record(0, 2*ms, tau, answered)
	b.record(0, 2*ms, tau, answered)
	for range 10000 {
		a.record(0, 5*ms, tau, cut)
	}
	r := rand.New(rand.NewPCG(1, 1))
	if i := choose(p, ms, attempt.View{}, false, r); i != 1 {
		t.Errorf("chose %d right after, want 1", i)
	}
	if i := choose(p, 2*tau, attempt.View{}, false, r); i > 1 {
		t.Errorf("chose %d", i)
	}
	b.record(2*tau, 2*ms, tau, answered)
	if i := choose(p, 2*tau, attempt.View{}, false, r); i != 0 {
		t.Errorf("chose %d after 2 tau, want the probe of 0", i)
	}
}

// Ten backends with queues, two of them five times slower, at 70% load.
func TestQueues(t *testing.T) {
	t.Parallel()
	story := func() *sim {
		return &sim{
			n: 10, rate: .7 * 400 * (8 + 2/5.0), until: 15 * time.Second, workers: 4,
			service: func(r *rand.Rand, ep int, _ time.Duration) time.Duration {
				d := time.Duration(10e6 * r.ExpFloat64())
				if ep < 2 {
					d *= 5
				}
				return d
			},
		}
	}
	base := story()
	base.policy = newLeast(base.n)
	least := base.run(1).quantile(.99)
	compare(t, story, latencies, func(t *testing.T, s *sim) {
		if ours := s.quantile(.99); ours > 0.5*least {
			t.Errorf("p99 %.1f ms, want at most half of least request's %.1f ms", ours, least)
		}
	})
}

// 100,000 random picks, ends and changes of what is ready: wherever an attempt
// goes, it is where it may.
func TestChooseProperties(t *testing.T) {
	for name, policy := range map[string]func(all, ready []*endpoint) chooser{
		P2CName: func(_, ready []*endpoint) chooser { return newP2C(byWeight(ready), tau) },
		RendezvousName: func(all, ready []*endpoint) chooser {
			p := newRendezvous(byWeight(ready), &rendezvousConfig{eps: .25}, all[0].crowd)
			for _, e := range all {
				if !slices.Contains(ready, e) {
					p.adrift = append(p.adrift, e)
				}
			}
			return p
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testChooseProperties(t, policy)
		})
	}
}

// byWeight gives the first endpoint weight 1, the second 2 and so on.
func byWeight(ready []*endpoint) []member {
	ms := membersOf(ready)
	for i := range ms {
		ms[i].weight = float64(i + 1)
	}
	return ms
}

func testChooseProperties(t *testing.T, policy func(all, ready []*endpoint) chooser) {
	r := rand.New(rand.NewPCG(7, 7))
	all := make([]*endpoint, 8)
	for i := range all {
		all[i] = &endpoint{key: string(rune('a' + i)), crowd: new(crowd)}
		all[i].crowd = all[0].crowd
	}
	type sent struct {
		*attempt.Attempt
		e     *endpoint
		ended bool
	}
	type call struct {
		attempt.Call
		ctx  context.Context
		sent []*sent
	}
	calls := make([]*call, 10)
	var picks, unsent, again int
	var ready []*endpoint
	var p chooser
	for op := range 100_000 {
		now := time.Duration(op) * ms
		if op%50 == 0 { // churn
			ready = nil
			for _, e := range all {
				if r.IntN(3) > 0 {
					ready = append(ready, e)
				}
			}
			p = policy(all, ready)
		}
		ci := r.IntN(len(calls))
		c := calls[ci]
		if c == nil || len(c.sent) > 10 {
			if c != nil {
				for _, s := range c.sent {
					if !s.ended {
						s.e.release(false)
					}
				}
			}
			c = &call{ctx: WithKey(context.Background(), []string{"", "hot", "hot", "cold"}[r.IntN(4)])}
			calls[ci] = c
		}
		if r.IntN(2) == 0 && len(c.sent) > 0 { // an attempt ends
			s := c.sent[r.IntN(len(c.sent))]
			if !s.ended {
				s.ended = true
				s.End()
				s.e.release(false)
				s.e.record(now, time.Duration(r.IntN(1e7)), tau, verdict(r.IntN(3)))
			}
			continue
		}
		// The dumb model of where it may go.
		running, tried := map[*endpoint]bool{}, map[*endpoint]bool{}
		for _, s := range c.sent {
			tried[s.e] = true
			running[s.e] = running[s.e] || !s.ended
		}
		var untried, over int
		for _, e := range ready {
			if !tried[e] {
				untried++
			}
			if tried[e] && !running[e] {
				over++
			}
		}
		s := &sent{Attempt: new(attempt.Attempt)}
		s.Init(&c.Call, len(c.sent)+1, attempt.Hedge)
		v := s.View()
		q := &request{ctx: c.ctx, now: now, bits: r.Uint64(), intn: r.IntN}
		i := p.route(q, bars{view: v})
		if i < 0 {
			i = p.route(q, bars{v, true})
		}
		picks++
		if i < 0 {
			unsent++
			if untried+over > 0 {
				t.Fatalf("op %d: not sent, though %d untried and %d tried endpoints were free", op, untried, over)
			}
			s.MarkUnsent()
			continue
		}
		s.e = ready[i]
		if running[s.e] {
			t.Fatalf("op %d: sent beside a running sibling", op)
		}
		if tried[s.e] {
			again++
			if untried > 0 {
				t.Fatalf("op %d: sent to a tried endpoint, though %d untried were ready", op, untried)
			}
		}
		if !s.Claim(v, s.e.key) {
			t.Fatalf("op %d: no claim, though nobody else picks", op)
		}
		s.e.begin(false)
		c.sent = append(c.sent, s)
	}
	if unsent < 100 || again < 100 {
		t.Errorf("%d picks, %d unsent, %d to tried endpoints: too few to tell", picks, unsent, again)
	}
	for _, e := range all {
		if unary, streams := e.inFlight(); unary < 0 || streams != 0 {
			t.Errorf("%d unary, %d streams in flight at %s", unary, streams, e.key)
		}
	}
}

// Those it may choose from it draws evenly, whether most are allowed or few.
func TestDrawIsFair(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(3, 3))
	for _, tc := range []struct{ n, tried int }{{10, 0}, {10, 1}, {10, 7}, {5, 1}, {3, 1}} {
		p := p2c{tau: tau}
		var c attempt.Call
		for i := range tc.n {
			p.ready = append(p.ready, member{endpoint: &endpoint{key: string(rune('a' + i))}, weight: 1})
		}
		// One more than shown, so that the view is not empty.
		for i := range tc.tried + 1 {
			a := new(attempt.Attempt)
			a.Init(&c, i+1, attempt.First)
			key := "elsewhere"
			if i < tc.tried {
				key = p.ready[i].key
			}
			a.Claim(a.View(), key)
		}
		a := new(attempt.Attempt)
		a.Init(&c, tc.tried+2, attempt.Hedge)
		counts := make([]int, tc.n)
		const draws = 20_000
		for range draws {
			i, j := p.draw(&request{bits: r.Uint64(), intn: r.IntN}, bars{view: a.View()})
			if i == j || i < 0 || j < 0 {
				t.Fatalf("drew %d and %d", i, j)
			}
			counts[i]++
			counts[j]++
		}
		want := 2.0 * draws / float64(tc.n-tc.tried)
		for i, n := range counts {
			if i < tc.tried && n > 0 {
				t.Errorf("%+v: drew %d, which was tried", tc, i)
			}
			if i >= tc.tried && (float64(n) < .93*want || float64(n) > 1.07*want) {
				t.Errorf("%+v: drew %d %d times, want about %.0f", tc, i, n, want)
			}
		}
	}
}

// Streams go where fewer are open as long as there is nothing better to go by,
// but not to where they fail.
func TestStreamsAreSpread(t *testing.T) {
	p := newP2C(membersOf([]*endpoint{{}, {}, {}}), tau)
	r := rand.New(rand.NewPCG(1, 1))
	p.ready[0].record(0, 0, tau, failed)
	for range 100 {
		p.ready[choose(p, ms, attempt.View{}, true, r)].begin(true)
	}
	for i, want := range []int64{0, 50, 50} {
		if _, n := p.ready[i].inFlight(); n < want-15 || n > want+15 || want == 0 && n != 0 {
			t.Errorf("endpoint %d has %d streams, want about %d", i, n, want)
		}
	}
}

func TestParseConfig(t *testing.T) {
	for _, tc := range []struct {
		js   string
		want time.Duration
		errs []string
	}{
		{js: `{}`, want: 10 * time.Second},
		{js: `{"decayTime": "2.5s"}`, want: 2500 * ms},
		{js: `{"decayTime": "3600s"}`, want: time.Hour},
		{js: `{"decayTime": "0s"}`, errs: []string{"decayTime: 0s, want (0s, 1h0m0s]"}},
		{js: `{"decayTime": "-1s"}`, errs: []string{"decayTime: -1s, want (0s, 1h0m0s]"}},
		{js: `{"decayTime": "3601s"}`, errs: []string{"decayTime: 1h0m1s, want (0s, 1h0m0s]"}},
		{js: `{"decayTime": "1m"}`, errs: []string{`decayTime: "1m", want a duration`}},
		{js: `{"decayTime": "1m1s"}`, errs: []string{`decayTime: "1m1s", want a duration`}},
		{js: `{"decayTime": "s"}`, errs: []string{`decayTime: "s", want a duration`}},
		{js: `{"decayTime": 10}`, errs: []string{`decayTime: number 10, want a duration`}},
		{js: `{"decayTime": null}`, errs: []string{`decayTime: null, want a value or no such key`}},
		{js: `{"decayTime": "1s", "decayTime": "2s"}`, errs: []string{`decayTime: given twice`}},
		{js: `{"decaytime": "1s", "tau": 1}`, errs: []string{
			`decaytime: unknown key, did you mean "decayTime"?`, `tau: unknown key, want one of maxInFlight, slowStart, ejection, subset, zone, decayTime`}},
		{js: `{"dacayTim": "1s"}`, errs: []string{`dacayTim: unknown key, did you mean "decayTime"?`}},
		{js: `[]`, errs: []string{"document: a list, want an object"}},
		{js: `null`, errs: []string{"document: null, want an object"}},
		{js: ``, errs: []string{"document: not valid JSON at byte "}},
		{js: `{"decayTime"`, errs: []string{"document: not valid JSON at byte "}},
		{js: `{"decayTime": "1s"`, errs: []string{"document: not valid JSON at byte "}},
		{js: `{} {}`, errs: []string{"document: not valid JSON at byte "}},
		{js: `{}}`, errs: []string{"document: not valid JSON at byte "}},
	} {
		c, err := p2cBuilder{}.ParseConfig([]byte(tc.js))
		if len(tc.errs) == 0 {
			if err != nil {
				t.Errorf("%s: %v", tc.js, err)
			} else if got := c.(*p2cConfig).decayTime; got != tc.want {
				t.Errorf("%s: decay time %v, want %v", tc.js, got, tc.want)
			}
			continue
		}
		if err == nil {
			t.Errorf("%s: no error, want %q", tc.js, tc.errs)
			continue
		}
		for _, want := range append(tc.errs, "loadbalance: bobtail_p2c: ") {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q, want %q in it", tc.js, err, want)
			}
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add(`{"decayTime": "10s"}`)
	f.Add(`{"a": {"b": [1, null]}, "decayTime": 1}`)
	f.Fuzz(func(t *testing.T, js string) {
		c, err := p2cBuilder{}.ParseConfig([]byte(js))
		if err != nil {
			return
		}
		if d := c.(*p2cConfig).decayTime; d <= 0 || d > maxDecayTime {
			t.Errorf("%s: decay time %v", js, d)
		}
	})
}
