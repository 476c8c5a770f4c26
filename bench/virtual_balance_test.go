package main

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/bobtail-rpc/bobtail/bench/load"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// played is what one policy did to a scenario's requests.
type played struct {
	requests []ended
	attempts []arrived // that backends have seen, in no order
	start    time.Time
}

// play runs all requests of a scenario under one policy, from the timeline's zero.
func play(t *testing.T, sc *scenario.Scenario, seed uint64, policyName string) (r played) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p, err := findPolicy(policyName)
		if err != nil {
			t.Fatal(err)
		}
		var o observer
		cc := virtualFleet(t, sc, seed, p.server, &o).Dial(append(p.opts, load.CountAttempts())...)
		cc.Connect()
		time.Sleep(time.Second) // every backend is ready

		r.start = time.Now()
		caller := &load.Caller{Client: kvpb.NewKVClient(cc), Fanout: 1, Epoch: r.start, Attempts: new(load.Attempts)}
		if sc.Keys != nil {
			caller.Key = func(id uint64) string { return sc.Key(seed, id) }
		}
		r.requests = drive(t, sc, seed, r.start, sc.Requests, caller.Send)
		synctest.Wait()
		r.attempts = o.attempts
	})
	return r
}

// tail is what became of the requests meant to begin in a span. One that failed ranks as
// slower than all others, at the timeout.
func (r played) tail(sc *scenario.Scenario, in scenario.Span) (out tailOf, errors float64) {
	var took []time.Duration
	var failed int
	for _, e := range r.requests {
		switch {
		case !in.Contains(e.at):
		case e.err != nil:
			failed++
			took = append(took, time.Duration(sc.Timeout))
		default:
			took = append(took, e.end-e.at)
		}
	}
	slices.Sort(took)
	return tailOf{
		p50: nearestRank(took, 0.5), p99: nearestRank(took, 0.99), p999: nearestRank(took, 0.999),
		extra: float64(len(r.attempts))/float64(len(r.requests)) - 1,
	}, float64(failed) / float64(len(took))
}

// always is every request.
var always = scenario.Span{To: math.MaxInt64}

// compared plays a scenario under several policies, and logs what became of the requests
// meant to begin in a span. A policy whose balancer is not linked is left out.
func compared(t *testing.T, sc *scenario.Scenario, in scenario.Span, policies ...string) (tails map[string]tailOf, errors map[string]float64) {
	t.Helper()
	tails, errors = map[string]tailOf{}, map[string]float64{}
	for _, name := range policies {
		if !slices.Contains(policyNames(), name) {
			t.Logf("%-20s is not linked", name)
			continue
		}
		tails[name], errors[name] = play(t, sc, seed, name).tail(sc, in)
		t.Logf("%-20s %v, %.2f%% failed", name, tails[name], 100*errors[name])
	}
	return tails, errors
}

// judged is the span of each scenario in which a test looks at latencies.
var judged = map[string]scenario.Span{
	// By then even shares have filled the slow backends' queues up to the timeout, and
	// weights have been learnt.
	"skewed":     {From: 5 * time.Second, To: math.MaxInt64},
	"sinkhole":   {From: 4 * time.Second, To: math.MaxInt64},
	"cold-start": {From: 5 * time.Second, To: 15500 * time.Millisecond},
	"gc-pause":   always,
	"hot-key":    always,
}

// TestVirtualSpread prints how the figures of policies scatter over seeds in these
// scenarios:
//
//	BENCH_SPREAD=5 BENCH_SCENARIOS=skewed BENCH_POLICIES=none,p2c go test ./bench -run Spread -v
func TestVirtualSpread(t *testing.T) {
	n, _ := strconv.Atoi(os.Getenv("BENCH_SPREAD"))
	if n == 0 {
		t.Skip("BENCH_SPREAD is not set to a number of seeds")
	}
	for _, s := range strings.Split(cmp.Or(os.Getenv("BENCH_SCENARIOS"), "skewed"), ",") {
		for _, p := range strings.Split(cmp.Or(os.Getenv("BENCH_POLICIES"), "none,p2c"), ",") {
			var values [5][]float64
			for seed := range n {
				sc := named(t, s)
				r := play(t, sc, uint64(seed+1), p)
				tail, failed := r.tail(sc, judged[s])
				_, total := r.tail(sc, always)
				for i, v := range []float64{tail.p50, tail.p99, tail.p999, 100 * failed, 100 * total} {
					values[i] = append(values[i], v)
				}
			}
			line := ""
			for i, name := range []string{"p50", "p99", "p99.9", "failed%", "failed% of all"} {
				slices.Sort(values[i])
				line += fmt.Sprintf("  %s %.2f..%.2f..%.2f", name, values[i][0], values[i][n/2], values[i][n-1])
			}
			t.Logf("%-10s %-20s min..median..max of %d seeds:%s", s, p, n, line)
		}
	}
}

// Two of ten backends five times slower, at 70%: who does not see it drowns them (two
// thirds of what even shares send there is too much); who sees queues alone still sends
// them more than is good for p99.
func TestVirtualSkewed(t *testing.T) {
	if testenv.Race {
		t.Skip("a measurement of many thousand calls: minutes under the race detector, and run without it")
	}
	t.Parallel()
	sc := named(t, "skewed")
	policies := []string{"round_robin", "least_request", "p2c"}
	if testing.Short() {
		sc.Requests = 12000
	} else {
		policies = append(policies, "least_request_2", "weighted_round_robin", "prequal")
	}
	tails, errors := compared(t, sc, judged["skewed"], policies...)
	if e := errors["round_robin"]; e < 0.1 {
		t.Errorf("round_robin: %.3f of requests fail, want two thirds of a fifth", e)
	}
	best := math.Inf(1)
	for name, r := range tails {
		if name != "p2c" && name != "prequal" {
			best = min(best, r.p50)
		}
	}
	p2c := tails["p2c"]
	if errors["p2c"] > 0 {
		t.Errorf("p2c: %.4f of requests fail, want none", errors["p2c"])
	}
	if p2c.p99 > 0.5*tails["round_robin"].p99 {
		t.Errorf("p2c: a p99 of %.1f ms, want at most half of round_robin's %.1f", p2c.p99, tails["round_robin"].p99)
	}
	if p2c.p50 > 1.05*best {
		t.Errorf("p2c: a p50 of %.2f ms, want at most 1.05 times the best of grpc's own, %.2f", p2c.p50, best)
	}
	for _, name := range []string{"least_request", "weighted_round_robin"} {
		other, ok := tails[name]
		if ok && (p2c.p50 >= other.p50 || p2c.p99 >= other.p99 || p2c.p999 >= other.p999) {
			t.Errorf("p2c: %v, want less than %s: %v", p2c, name, other)
		}
	}
	if prequal, ok := tails["prequal"]; ok && prequal.p99 > 0.5*tails["round_robin"].p99 {
		t.Errorf("prequal: a p99 of %.1f ms, want at most half of round_robin's %.1f", prequal.p99, tails["round_robin"].p99)
	}
}

// A backend that fails at once has the fastest answers and nothing in flight.
func TestVirtualSinkhole(t *testing.T) {
	sc := named(t, "sinkhole")
	if testing.Short() {
		sc.Requests /= 2
	}
	const begins = 2 * time.Second
	share := func(policy string) (total, later float64) {
		r := play(t, sc, seed, policy)
		_, total = r.tail(sc, always)
		_, later = r.tail(sc, judged["sinkhole"])
		t.Logf("%-14s %.2f%% failed, %.2f%% from %v on", policy, 100*total, 100*later, judged["sinkhole"].From)
		if _, before := r.tail(sc, scenario.Span{To: begins - 100*time.Millisecond}); before > 0 {
			t.Errorf("%s: %.4f of requests fail before the fault", policy, before)
		}
		return total, later
	}
	// That it attracts can be seen: more than its fifth goes there.
	if _, later := share("round_robin"); math.Abs(later-0.2) > 0.01 {
		t.Errorf("round_robin: %.3f of requests fail, want the fifth that meets it", later)
	}
	if _, later := share("least_request"); later < 0.22 {
		t.Errorf("least_request: %.3f of requests fail, want more than a fifth", later)
	}
	if total, later := share("p2c"); total > 0.015 || later > 0.015 {
		t.Errorf("p2c: %.2f%% of requests fail, %.2f%% in steady state, want at most 1.5%%", 100*total, 100*later)
	}
}

// Each backend pauses for 100 to 300 ms in every 10 s: a fiftieth of the calls waits,
// which a second attempt elsewhere cures for as much extra load.
func TestVirtualGCPause(t *testing.T) {
	if testenv.Race {
		t.Skip("a measurement of many thousand calls: minutes under the race detector, and run without it")
	}
	t.Parallel()
	sc := named(t, "gc-pause")
	policies := []string{"round_robin", "hedge"}
	if testing.Short() {
		sc.Requests /= 2
	} else {
		policies = append(policies, "least_request", "p2c")
	}
	tails, _ := compared(t, sc, always, policies...)
	none, hedge := tails["round_robin"], tails["hedge"]
	if none.p99 < 50 {
		t.Errorf("round_robin: a p99 of %.1f ms, want that of a pause", none.p99)
	}
	if hedge.p99 > 0.35*none.p99 || hedge.extra > 0.05 {
		t.Errorf("hedge: %v, want a p99 of at most 0.35 times %.1f ms, for at most 5%% extra", hedge, none.p99)
	}
}

// One of five backends is gone for half a second, and slow for 10 s when it is back.
func TestVirtualColdStart(t *testing.T) {
	if testenv.Race {
		t.Skip("a measurement of many thousand calls: minutes under the race detector, and run without it")
	}
	t.Parallel()
	sc := named(t, "cold-start")
	if testing.Short() {
		sc.Requests /= 2 // the first 12.5 s
	}
	spans := sc.FaultSpans(time.Hour)
	if len(spans) != 1 || spans[0] != judged["cold-start"] {
		t.Fatalf("faults in %v, want that the second begins as the first ends, of %v", spans, judged["cold-start"])
	}
	tails, errors := compared(t, sc, spans[0], "round_robin", "least_request", "p2c")
	none, p2c := tails["round_robin"], tails["p2c"]
	if none.p99 < 100 {
		t.Errorf("round_robin: a p99 of %.1f ms in the fault, want that of a cold backend", none.p99)
	}
	if p2c.p99 > 0.1*none.p99 {
		t.Errorf("p2c: a p99 of %.1f ms in the fault, want at most a tenth of %.1f", p2c.p99, none.p99)
	}
	if e := errors["p2c"]; e > 0.001 {
		t.Errorf("p2c: %.4f of requests fail in the fault, want no more than were under way", e)
	}

	// The backend is really gone, and back.
	gone, slow := 0, 0
	r := play(t, sc, seed, "round_robin")
	for _, a := range r.attempts {
		switch at := a.at.Sub(r.start) - spans[0].From; {
		case a.backend != 2 || at < 0:
		case at < 500*time.Millisecond:
			gone++
		default:
			slow++
		}
	}
	if gone > 0 || slow < 100 {
		t.Errorf("%d attempts at the backend while it is gone, %d after, want none and hundreds", gone, slow)
	}
}

// keyed is where calls of keys went.
type keyed struct {
	home float64 // share of the calls of all keys but the hot one at the backend with most of the key's
	few  int     // how many backends take nine tenths of the hot key's calls
	most float64 // the largest share of all calls at one backend
}

func (r played) keyed(backends int) (k keyed) {
	counts := map[string][]int{}
	load := make([]int, backends)
	for _, a := range r.attempts {
		if counts[a.key] == nil {
			counts[a.key] = make([]int, backends)
		}
		counts[a.key][a.backend]++
		load[a.backend]++
	}
	sum := func(v []int) (n int) {
		for _, x := range v {
			n += x
		}
		return n
	}
	var home, calls int
	for key, c := range counts {
		// Of a key with a handful of calls, the largest share is large by luck.
		if key != scenario.HotKey && sum(c) >= 100 {
			home += slices.Max(c)
			calls += sum(c)
		}
	}
	hot := counts[scenario.HotKey]
	slices.Sort(hot)
	for left := 0.9 * float64(sum(hot)); left > 0; k.few++ {
		left -= float64(hot[backends-1-k.few])
	}
	k.home = float64(home) / float64(calls)
	k.most = float64(slices.Max(load)) / float64(sum(load))
	return k
}

// A key that is too hot for one backend takes a few, not all; the others stay at home;
// and nobody waits for it.
func TestVirtualHotKey(t *testing.T) {
	if testenv.Race {
		t.Skip("a measurement of many thousand calls: minutes under the race detector, and run without it")
	}
	t.Parallel()
	sc := named(t, "hot-key")
	if testing.Short() {
		sc.Requests /= 2
	}
	tails, where := map[string]tailOf{}, map[string]keyed{}
	for _, name := range []string{"p2c", "rendezvous"} {
		r := play(t, sc, seed, name)
		tails[name], _ = r.tail(sc, always)
		where[name] = r.keyed(sc.Backends)
		t.Logf("%-10s %v; %+v", name, tails[name], where[name])
	}
	p2c, rendezvous := where["p2c"], where["rendezvous"]
	if p2c.few < 8 || p2c.home > 0.3 {
		t.Errorf("p2c: %+v, want that it takes no notice of keys", p2c)
	}
	if rendezvous.few > 4 || rendezvous.few < 2 {
		t.Errorf("rendezvous: the hot key is at %d backends, want 2 to 4", rendezvous.few)
	}
	if rendezvous.home < 0.5 {
		t.Errorf("rendezvous: %.3f of calls at their key's first backend, want at least half", rendezvous.home)
	}
	if got, want := tails["rendezvous"].p99, tails["p2c"].p99; got > 1.25*want {
		t.Errorf("rendezvous: a p99 of %.1f ms, want at most 1.25 times p2c's %.1f", got, want)
	}
}
