package loadbalance

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
)

// A table is endpoints and their weights, for the tests of a rendezvous.
type table struct {
	all     crowd
	eps     float64
	ready   []*endpoint
	weights []uint32
}

func seats(eps float64, weights ...uint32) *table {
	tb := &table{eps: eps, weights: weights}
	for i := range weights {
		tb.ready = append(tb.ready, &endpoint{key: fmt.Sprintf("10.0.0.%d:443", i), crowd: &tb.all})
	}
	return tb
}

// chooser makes the rendezvous of those endpoints that are not left out.
func (tb *table) chooser(without ...*endpoint) *rendezvous {
	var ready []member
	for i, e := range tb.ready {
		if !slices.Contains(without, e) {
			ready = append(ready, member{endpoint: e, weight: float64(max(1, tb.weights[i]))})
		}
	}
	p := newRendezvous(ready, &rendezvousConfig{eps: tb.eps}, &tb.all)
	p.adrift = without
	return p
}

// ranks is the dumb model: the endpoints by their scores, the highest first.
func (tb *table) ranks(key string) []*endpoint {
	score := map[*endpoint]float64{}
	for i, e := range tb.ready {
		u := 1 - unit(mix(uint64(hashKey(key))^mix(uint64(hashKey(e.key)))))
		score[e] = -float64(max(1, tb.weights[i])) / math.Log(u)
	}
	ranked := slices.Clone(tb.ready)
	slices.SortFunc(ranked, func(a, b *endpoint) int { return cmp.Compare(score[b], score[a]) })
	return ranked
}

// room is the dumb capacity of an endpoint with those of p ready, in whole numbers: eps
// must be a multiple of 1/16.
func (tb *table) room(e *endpoint, p *rendezvous) int64 {
	var m, w, sum int64
	for i, x := range tb.ready {
		if !p.has(x) {
			continue
		}
		m += at(x)
		sum += int64(max(1, tb.weights[i]))
		if x == e {
			w = int64(max(1, tb.weights[i]))
		}
	}
	n, d := int64(16*(1+tb.eps))*(m+1)*w, 16*sum
	return (n + d - 1) / d
}

// has reports whether an endpoint is a member.
func (p *rendezvous) has(e *endpoint) bool {
	return slices.ContainsFunc(p.ready, func(m member) bool { return m.endpoint == e })
}

// goes is seek as a rotation asks: where none has been tried, or else where none runs.
func (p *rendezvous) goes(key string, v attempt.View) int {
	i := p.seek(hashKey(key), bars{view: v})
	if i < 0 {
		i = p.seek(hashKey(key), bars{v, true})
	}
	return i
}

func at(e *endpoint) int64 {
	unary, streams := e.inFlight()
	return unary + streams
}

var drawWeights = rapid.OneOf(
	rapid.SliceOfN(rapid.Just(uint32(1)), 1, 40),
	rapid.SliceOfN(rapid.Uint32Range(0, 5), 1, 40),
	rapid.SliceOfN(rapid.Uint32(), 1, 40))

// The first attempt of a call goes to the key's first rank, each that follows while
// they run to the next, and none beside them; and then to where one has ended.
func TestAttemptsGoDownTheRanks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tb := seats(rapid.Float64Range(.01, 10).Draw(t, "eps"), drawWeights.Draw(t, "weights")...)
		key := rapid.StringN(1, -1, 40).Draw(t, "key")
		p, ranks := tb.chooser(), tb.ranks(key)
		var c attempt.Call
		as := make([]attempt.Attempt, len(ranks)+1)
		for i := range as {
			as[i].Init(&c, i+1, attempt.Hedge)
			v := as[i].View()
			got := p.goes(key, v)
			if i == len(ranks) {
				if got >= 0 {
					t.Fatalf("attempt %d goes beside a sibling", i+1)
				}
				break
			}
			if got < 0 || p.ready[got].endpoint != ranks[i] {
				t.Fatalf("attempt %d goes to %d, want rank %d: %s", i+1, got, i+1, ranks[i].key)
			}
			as[i].Claim(v, ranks[i].key)
		}
		k := rapid.IntRange(0, len(ranks)-1).Draw(t, "ended")
		as[k].End()
		if got := p.goes(key, as[len(ranks)].View()); got < 0 || p.ready[got].endpoint != ranks[k] {
			t.Fatalf("goes to %d, want where attempt %d has ended", got, k+1)
		}
	})
}

// One endpoint more or less moves the keys that are its own and no others; those are
// in proportion to its weight. The others keep the order of their ranks.
func TestOneEndpointMovesItsKeysOnly(t *testing.T) {
	const keys = 2000
	var moved, want, variance float64 // over all checks: one look at the odds
	rapid.Check(t, func(t *rapid.T) {
		tb := seats(maxEps, rapid.SliceOfN(rapid.Uint32Range(1, 3), 2, 20).Draw(t, "weights")...)
		k := rapid.IntRange(0, len(tb.ready)-1).Draw(t, "one")
		one := tb.ready[k]
		with, without := tb.chooser(), tb.chooser(one)
		salt := rapid.IntRange(0, 1<<30).Draw(t, "first key")
		for i := range keys {
			key := fmt.Sprint(salt + i)
			a, b := with.ready[with.goes(key, attempt.View{})].endpoint, without.ready[without.goes(key, attempt.View{})].endpoint
			if a == one {
				moved++
			} else if a != b {
				t.Fatalf("key %q moves from %s to %s", key, a.key, b.key)
			}
			if i < 20 {
				rest := seats(maxEps, slices.Delete(slices.Clone(tb.weights), k, k+1)...)
				rest.ready = slices.Delete(slices.Clone(tb.ready), k, k+1)
				if got, want := rest.ranks(key), slices.DeleteFunc(tb.ranks(key), func(e *endpoint) bool { return e == one }); !slices.Equal(got, want) {
					t.Fatalf("key %q: the ranks of the others change", key)
				}
			}
		}
		p := float64(tb.weights[k]) / with.sum
		want += keys * p
		variance += keys * p * (1 - p)
	})
	if se := math.Sqrt(variance); math.Abs(moved-want) > 5*se {
		t.Errorf("%.0f keys moved, want %.0f within %.0f", moved, want, 5*se)
	}
}

// within fails unless n of all is p of them, within 5 standard errors.
func within(t interface{ Errorf(string, ...any) }, what string, n, all, p float64) {
	if se := math.Sqrt(all * p * (1 - p)); math.Abs(n-all*p) > 5*se+1 {
		t.Errorf("%s: %.0f of %.0f, want %.1f within %.1f", what, n, all, all*p, 5*se)
	}
}

// Keys, like or unlike, are shared by weight: their first ranks, and the second ranks
// of those that have the same first.
func TestSharesAreWeights(t *testing.T) {
	t.Parallel()
	const keys = 100_000
	tb := seats(maxEps, 1, 0, 2, 3, 3, 10)
	const sum = 20.0
	w := []float64{1, 1, 2, 3, 3, 10}
	for name, format := range map[string]string{
		"numbers":             "%d",
		"a long prefix":       "tenants/7d3c0c5e-7f4e-4cf2-9d49/users/%d",
		"a long suffix":       "%d/7d3c0c5e-7f4e-4cf2-9d49@users.example.com",
		"like the endpoints'": "10.0.0.%d:443",
	} {
		p := tb.chooser()
		first, second := make([]float64, len(w)), make([][]float64, len(w))
		for i := range second {
			second[i] = make([]float64, len(w))
		}
		for k := range keys {
			key := fmt.Sprintf(format, k)
			var c attempt.Call
			var a, b attempt.Attempt
			a.Init(&c, 1, attempt.First)
			b.Init(&c, 2, attempt.Hedge)
			i := p.goes(key, a.View())
			a.Claim(a.View(), p.ready[i].key)
			first[i]++
			second[i][p.goes(key, b.View())]++
		}
		for i := range w {
			within(t, fmt.Sprintf("%s: first at %d", name, i), first[i], keys, w[i]/sum)
			for j := range w {
				if i != j {
					within(t, fmt.Sprintf("%s: second at %d after %d", name, j, i), second[i][j], first[i], w[j]/(sum-w[i]))
				}
			}
		}
	}
}

// Clients of all versions rank alike. If this fails, a rolling update would empty
// every cache.
func TestRanksNeverChange(t *testing.T) {
	for key, want := range map[string]string{
		"a":                 "41032",
		"user-1":            "40312",
		"user-2":            "24103",
		"Grüße":             "43021",
		"10.0.0.1:443":      "24301",
		"a rather long one": "21403",
	} {
		var got strings.Builder
		for _, e := range seats(1, 1, 1, 1, 1, 4).ranks(key) {
			got.WriteByte(e.key[len("10.0.0.")])
		}
		if got.String() != want {
			t.Errorf("%q: ranks %q, want %q", key, got.String(), want)
		}
	}
}

// Nobody is sent to an endpoint that is full, and everybody to the first in rank that
// is not; what is adrift counts for nothing. With a large eps nothing is ever full.
func TestLoadIsBounded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tb := seats(rapid.SampledFrom([]float64{.0625, .25, 1, 10}).Draw(t, "eps"), drawWeights.Draw(t, "weights")...)
		pure := tb.eps == maxEps && len(tb.ready) <= 11 && slices.Max(tb.weights) <= 1
		p := tb.chooser()
		type flight struct {
			*endpoint
			streaming bool
		}
		var open []flight
		for range rapid.IntRange(1, 200).Draw(t, "ops") {
			switch op := rapid.IntRange(0, 9).Draw(t, "op"); {
			case op == 0 && len(tb.ready) > 1:
				p = tb.chooser(tb.ready[rapid.IntRange(0, len(tb.ready)-1).Draw(t, "gone")])
			case op <= 2 && len(open) > 0:
				k := rapid.IntRange(0, len(open)-1).Draw(t, "ended")
				open[k].release(open[k].streaming)
				open = slices.Delete(open, k, k+1)
			default:
				key := rapid.SampledFrom([]string{"hot", "hot", "hot", "warm", "a", "b", "c"}).Draw(t, "key")
				ranks := tb.ranks(key)
				want := ranks[slices.IndexFunc(ranks, func(e *endpoint) bool {
					return p.has(e) && at(e) < tb.room(e, p)
				})]
				got := p.ready[p.goes(key, attempt.View{})].endpoint
				if got != want {
					t.Fatalf("%s: sent to %s (%d in flight, room for %d), want %s", key, got.key, at(got), tb.room(got, p), want.key)
				}
				if pure && len(p.ready) == len(tb.ready) && got != ranks[0] {
					t.Fatalf("%s: not sent to the first", key)
				}
				f := flight{got, rapid.Bool().Draw(t, "streaming")}
				f.begin(f.streaming)
				open = append(open, f)
			}
		}
	})
}

// Picks at the same instant may find the endpoints full while their sum still says
// that they are not. Nobody is turned away for it.
func TestAllFullIsNoReason(t *testing.T) {
	tb := seats(.25, 1, 1, 1)
	for _, e := range tb.ready {
		e.flights.Store(10) // and nothing in the crowd
	}
	p := tb.chooser()
	if i := p.goes("k", attempt.View{}); i < 0 || p.ready[i].endpoint != tb.ranks("k")[0] {
		t.Errorf("sent to %d, want the first rank", i)
	}
}

// No hash has a score of nothing or of infinity.
func TestUnit(t *testing.T) {
	for _, h := range []uint64{0, 1, 1 << 11, 1 << 63, math.MaxUint64 - 1<<11, math.MaxUint64} {
		if u := unit(h); u <= 0 || u >= 1 || 1-(1-u) != u {
			t.Errorf("%x: %v, want a number in (0, 1) that 1 less it is exact of", h, u)
		}
	}
}

// The attempts of one call, step by step: three endpoints, named by the key's ranks
// from 1, and whatever else is in flight there.
func TestRendezvousSteps(t *testing.T) {
	const unsent = 0
	type step struct {
		do   string // "send", "end" or "fill"
		n    int    // the attempt that ends, or the rank that is filled
		want int    // the rank it is sent to
	}
	send := func(rank int) step { return step{"send", 0, rank} }
	end := func(attempt int) step { return step{"end", attempt, 0} }
	fill := func(rank int) step { return step{"fill", rank, 0} }
	for name, steps := range map[string][]step{
		"hedges":                           {send(1), send(2), send(3), send(unsent)},
		"retries":                          {send(1), end(1), send(2), end(2), send(3), end(3), send(1)},
		"a retry beside a hedge":           {send(1), send(2), end(1), send(3), send(1), send(unsent)},
		"of those that ended the first":    {send(1), send(2), send(3), end(3), end(2), send(2), send(3)},
		"the first is full":                {fill(1), send(2), send(3), send(1)},
		"the second is full":               {fill(2), send(1), send(3), send(2)},
		"untried and full before tried":    {send(1), end(1), fill(2), fill(3), send(2), send(3), send(1)},
		"tried and full, but nowhere else": {send(1), end(1), send(2), send(3), fill(1), send(1)},
	} {
		t.Run(name, func(t *testing.T) {
			tb := seats(.25, 1, 1, 1)
			p, ranks := tb.chooser(), tb.ranks("k")
			var c attempt.Call
			var sent []*attempt.Attempt
			for i, s := range steps {
				switch s.do {
				case "end":
					a := sent[s.n-1]
					a.End()
					tb.ready[slices.IndexFunc(tb.ready, func(e *endpoint) bool { return e.key == a.Endpoint() })].release(false)
				case "fill":
					for e := ranks[s.n-1]; at(e) < 20; {
						e.begin(true)
					}
				case "send":
					a := new(attempt.Attempt)
					a.Init(&c, len(sent)+1, attempt.Hedge)
					v := a.View()
					got := unsent
					if k := p.goes("k", v); k >= 0 {
						got = 1 + slices.Index(ranks, p.ready[k].endpoint)
						a.Claim(v, p.ready[k].key)
						p.ready[k].begin(false)
					}
					if got != s.want {
						t.Fatalf("step %d: sent to rank %d, want %d", i+1, got, s.want)
					}
					sent = append(sent, a)
				}
			}
		})
	}
}
