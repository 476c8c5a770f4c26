package loadbalance

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/balancer"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
)

// weighing returns a p2c of endpoints of these weights.
func weighing(weights ...float64) *p2c {
	var es []*endpoint
	for i := range weights {
		es = append(es, &endpoint{key: fmt.Sprint(i)})
	}
	return newP2C(membersOf(es, weights...), tau)
}

// The wheel draws each index as often as its weight says, to five standard deviations.
func TestWheelDrawsByWeight(t *testing.T) {
	for _, weights := range [][]float64{
		{1, 2}, {1, 2, 3, 4}, {5, 5, 5, 1}, {1000, 1}, {1, 1000, 1}, {1e9, 1}, {1e9, 1, 1e9}, {.1, 1, 1, 1},
		{.1, .35, .7, 1, 1, 3, 3, 3, 40, 40, 40, 40, .001},
	} {
		const draws = 400_000
		w := newWheel(weighing(weights...).ready)
		r := rand.New(rand.NewPCG(1, uint64(len(weights))))
		counts := make([]int, len(weights))
		for range draws {
			counts[w.draw(r.Uint64(), r.IntN)]++
		}
		var sum float64
		for _, x := range weights {
			sum += x
		}
		for i, x := range weights {
			p := x / sum
			if off := math.Abs(float64(counts[i]) - draws*p); off > 5*math.Sqrt(draws*p*(1-p))+1 {
				t.Errorf("%v: drew %d %d times of %d, want about %.0f", weights, i, counts[i], draws, draws*p)
			}
			if rel := p * float64(len(weights)); math.Abs(w.relative[i]/rel-1) > 1e-9 {
				t.Errorf("%v: relative weight %v, want %v", weights, w.relative[i], rel)
			}
		}
	}
}

// Equal weights, whatever they are, need no wheel.
func TestEqualWeightsNeedNoWheel(t *testing.T) {
	for _, weights := range [][]float64{{}, {7}, {1, 1}, {.1, .1, .1}, {1e9, 1e9}} {
		if p := weighing(weights...); p.wheel != nil {
			t.Errorf("%v: a wheel", weights)
		}
	}
	if weighing(1, 1, math.Nextafter(1, 2)).wheel == nil {
		t.Error("no wheel for weights that differ")
	}
	for _, name := range ours {
		cc, b := fakeReady(t, name, 2)
		wheelOf := func() *wheel {
			if r, ok := chooserOf(cc).(*rendezvous); ok {
				return r.wheel
			}
			return chooserOf(cc).(*p2c).wheel
		}
		update(t, b, nil, 5, 5)
		if wheelOf() != nil {
			t.Errorf("%s: a wheel for equal weights of a resolver", name)
		}
		update(t, b, nil, 5, 15)
		if w := wheelOf(); w == nil || slices.Max(w.relative) != 1.5 || slices.Min(w.relative) != .5 {
			t.Errorf("%s: %+v for weights 5 and 15, want them relative to their mean", name, w)
		}
	}
}

// The two that are drawn differ, however unequal the weights are.
func TestPairsAreDistinct(t *testing.T) {
	for _, weights := range [][]float64{{1, 1}, {1, 1000}, {1000, 1}, {1e9, 1}, {1, 1e9, 1}, {1, 2, 3}, {1e9, 1, 1, 1}} {
		p := weighing(weights...)
		r := rand.New(rand.NewPCG(3, 4))
		for range 20_000 {
			i, j := p.pair(&request{bits: r.Uint64(), intn: r.IntN})
			if i == j || i < 0 || j < 0 || i >= len(weights) || j >= len(weights) {
				t.Fatalf("%v: drew %d and %d", weights, i, j)
			}
		}
	}
}

// Among many, where each has little of the whole, idle endpoints of the same latency
// get their weights' shares.
func TestSharesFollowWeightsWhenIdle(t *testing.T) {
	weights := make([]float64, 40)
	for i := range weights {
		weights[i] = float64(1 + i%4)
	}
	p := weighing(weights...)
	for _, m := range p.ready {
		m.record(0, 10*ms, tau, answered)
	}
	r := rand.New(rand.NewPCG(5, 6))
	const picks = 200_000
	counts := make([]float64, 5) // by weight
	for range picks {
		i := choose(p, ms, attempt.View{}, false, r)
		counts[int(weights[i])]++
	}
	for w := 1; w <= 4; w++ {
		if want := picks * float64(w) / 10; math.Abs(counts[w]-want) > 5*math.Sqrt(want) {
			t.Errorf("weight %d: %.0f of %d picks, want about %.0f", w, counts[w], picks, want)
		}
	}
}

// With queues everywhere, the attempts in flight are in proportion to the weights, and so
// are the shares if the endpoints serve in that proportion.
func TestSharesFollowWeightsUnderLoad(t *testing.T) {
	for _, weights := range [][]float64{{1, 3}, {9, 1}, {1, 2, 3, 4}, {8, 1, 1, 1, 1, 1, 1, 1, 1}} {
		var sum float64
		for _, w := range weights {
			sum += w
		}
		p := &underTest{p: *weighing(weights...)}
		s := &sim{n: len(weights), rate: 10_000, policy: p, until: 30 * time.Second, // 100 in flight
			service: func(r *rand.Rand, _ int, _ time.Duration) time.Duration { return time.Duration(10e6 * r.ExpFloat64()) }}
		s.run(7)
		for i, w := range weights {
			if got, want := s.share(i, 2, 30), 100*w/sum; math.Abs(got/want-1) > .1 {
				t.Errorf("%v: endpoint %d has %.1f%%, want about %.1f%%", weights, i, got, want)
			}
		}
	}
}

// A resolver's weights reach the picks of a balancer: as many attempts in flight as
// they say.
func TestResolverWeightsCount(t *testing.T) {
	cc, b := fakeReady(t, P2CName, 3)
	update(t, b, nil, 1, 2, 7)
	for _, e := range shardsOf(b).endpoints {
		e.record(0, 10*ms, tau, answered)
	}
	for range 1000 {
		if _, err := cc.state.Picker.Pick(balancer.PickInfo{FullMethodName: "/kv.KV/Get", Ctx: t.Context()}); err != nil {
			t.Fatal(err)
		}
	}
	for i, want := range []int64{100, 200, 700} {
		if n := at(shardsOf(b).endpoints[fmt.Sprintf("10.0.0.%d:443", i)].endpoint); n < want-20 || n > want+20 {
			t.Errorf("endpoint %d has %d of 1000 in flight, want about %d", i, n, want)
		}
	}
}
