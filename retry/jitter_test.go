package retry

import (
	"cmp"
	"container/heap"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// Each jitter against the distribution that its formula names: the largest distance of
// the sample's distribution function from it (Kolmogorov-Smirnov) stays below the 0.1%
// bound, 1.95/sqrt(n), for the waits before each retry.
func TestJitterDistributions(t *testing.T) {
	const n = 20_000
	b := Backoff{Initial: 10 * ms, Max: 65 * ms, Multiplier: 2}
	for _, tc := range []struct {
		jitter Jitter
		// low and high of the uniform distribution of the k-th wait, given the one before.
		bounds func(k int, last float64) (low, high float64)
	}{
		{FullJitter, func(k int, _ float64) (float64, float64) { return 0, b.cap(k) }},
		{EqualJitter, func(k int, _ float64) (float64, float64) { return b.cap(k) / 2, b.cap(k) }},
		{GRPCJitter, func(k int, _ float64) (float64, float64) { return 0.8 * b.cap(k), 1.2 * b.cap(k) }},
		{DecorrelatedJitter, func(_ int, last float64) (float64, float64) {
			return float64(b.Initial), 3 * max(last, float64(b.Initial))
		}},
	} {
		t.Run(tc.jitter.String(), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(1, 2))
			const retries = 5
			var u [retries][]float64
			for range n {
				c := core{backoff: b}
				c.backoff.Jitter = tc.jitter
				last := 0.0
				for k := range retries {
					wait := float64(c.next(rng.Float64()))
					low, high := tc.bounds(k, last)
					if tc.jitter == DecorrelatedJitter && wait > float64(b.Max) {
						t.Fatalf("a wait of %v, want at most %v", wait, b.Max)
					}
					// The share of the distribution below the wait: uniform on [0, 1], but
					// for what the cap cuts off.
					x := (wait - low) / (high - low)
					if x < 0 || x > 1 {
						t.Fatalf("wait %d is %v, want %v to %v", k+1, wait, low, high)
					}
					if tc.jitter != DecorrelatedJitter || wait < float64(b.Max) {
						u[k] = append(u[k], x*cut(tc.jitter, low, high, float64(b.Max)))
					}
					last = wait
				}
			}
			for k, xs := range u {
				if tc.jitter == DecorrelatedJitter && k > 0 {
					continue // the cap cuts each at another place: only the bounds are tested
				}
				slices.Sort(xs)
				d := 0.0
				for i, x := range xs {
					d = max(d, math.Abs(x-float64(i)/float64(len(xs))))
				}
				if bound := 1.95 / math.Sqrt(float64(len(xs))); d > bound {
					t.Errorf("wait %d: distance %.4f from the formula's distribution, want at most %.4f", k+1, d, bound)
				}
			}
		})
	}
}

// cut stretches what the cap leaves of a decorrelated wait to [0, 1].
func cut(j Jitter, low, high, most float64) float64 {
	if j == DecorrelatedJitter && high > most {
		return (high - low) / (most - low)
	}
	return 1
}

// none is a backoff without jitter, and always 0 without a backoff, as the yardsticks of
// the simulation below.
const (
	none = iota + 100
	exponential
)

// occ is the simulation of "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015),
// after its description: 100 clients update one row under optimistic concurrency
// control. A client reads the row's version, then writes with that version, and the write
// fails if another was quicker; then it backs off (5 ms x 2^n, at most 2 s) and starts
// again with the read. Each message takes N(10, 2) ms. It returns how many writes were
// sent and how long it took until all clients had written.
func occ(rng *rand.Rand, jitter int) (writes int, took time.Duration) {
	const clients = 100
	b := Backoff{Initial: 5 * ms, Max: 2 * time.Second, Multiplier: 2, Jitter: Jitter(jitter)}
	delay := func() time.Duration {
		return time.Duration(math.Abs(10+2*rng.NormFloat64()) * float64(ms))
	}
	q := &occQueue{}
	version := 0
	cores := make([]core, clients)
	for i := range clients {
		cores[i] = core{backoff: b}
		heap.Push(q, occEvent{delay(), i, read, 0})
	}
	for q.Len() > 0 {
		e := heap.Pop(q).(occEvent)
		switch e.kind {
		case read: // at the server
			heap.Push(q, occEvent{e.at + delay(), e.client, readBack, version})
		case readBack:
			heap.Push(q, occEvent{e.at + delay(), e.client, write, e.version})
		case write:
			writes++
			kind := failed
			if e.version == version {
				version++
				kind = written
			}
			heap.Push(q, occEvent{e.at + delay(), e.client, kind, 0})
		case written:
			took = e.at
		case failed:
			wait := time.Duration(0)
			switch c := &cores[e.client]; jitter {
			case none:
			case exponential:
				wait = time.Duration(b.cap(c.n))
				c.n++
			default:
				wait = c.next(rng.Float64())
			}
			heap.Push(q, occEvent{e.at + wait + delay(), e.client, read, 0})
		}
	}
	return writes, took
}

const (
	read = iota
	readBack
	write
	written
	failed
)

type occEvent struct {
	at      time.Duration
	client  int
	kind    int
	version int
}

type occQueue []occEvent

func (q occQueue) Len() int           { return len(q) }
func (q occQueue) Less(i, j int) bool { return cmp.Less(q[i].at, q[j].at) }
func (q occQueue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *occQueue) Push(x any)        { *q = append(*q, x.(occEvent)) }
func (q *occQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	*q = old[:len(old)-1]
	return e
}

// The article's finding, with our backoffs: jitter cuts both the work and the time, full
// jitter most; a plain exponential backoff keeps the clients in step and takes many times
// as long as none at all. Means of 200 runs beside those of the article's own simulator.
func TestOptimisticConcurrency(t *testing.T) {
	const runs = 200
	type figures struct{ calls, ms float64 }
	got := map[string]figures{}
	for _, tc := range []struct {
		name   string
		jitter int
		want   figures
	}{
		{"none", none, figures{2420, 2021}},
		{"exponential", exponential, figures{1860, 63637}},
		{"equal", int(EqualJitter), figures{811, 6620}},
		{"full", int(FullJitter), figures{797, 4924}},
		{"decorrelated", int(DecorrelatedJitter), figures{999, 4585}},
	} {
		rng := rand.New(rand.NewPCG(7, 0))
		var f figures
		for range runs {
			calls, took := occ(rng, tc.jitter)
			f.calls += float64(calls) / runs
			f.ms += float64(took) / float64(ms) / runs
		}
		t.Logf("%-12s calls %5.0f (%5.0f)  ms %6.0f (%6.0f)", tc.name, f.calls, tc.want.calls, f.ms, tc.want.ms)
		got[tc.name] = f
		if r := f.calls / tc.want.calls; r < 0.8 || r > 1.25 {
			t.Errorf("%s: %.0f calls, want about %.0f", tc.name, f.calls, tc.want.calls)
		}
		if r := f.ms / tc.want.ms; r < 0.7 || r > 1.4 {
			t.Errorf("%s: %.0f ms, want about %.0f", tc.name, f.ms, tc.want.ms)
		}
	}
	if !(got["full"].calls < got["equal"].calls && got["equal"].calls < got["decorrelated"].calls &&
		got["decorrelated"].calls < got["exponential"].calls && got["exponential"].calls < got["none"].calls) {
		t.Error("another order of calls than the article's: full, equal, decorrelated, exponential, none")
	}
	if !(got["none"].ms < got["decorrelated"].ms && got["decorrelated"].ms < got["full"].ms &&
		got["full"].ms < got["equal"].ms && got["equal"].ms < got["exponential"].ms) {
		t.Error("another order of times than the article's: none, decorrelated, full, equal, exponential")
	}
}
