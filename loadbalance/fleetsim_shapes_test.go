//go:build !race

package loadbalance

import (
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

const fleetSeed = 1

// brief says that there is no time for the whole length: with -short, or under the race
// detector, which makes the simulator ten times slower and has nothing to find in it.
func brief() bool { return testing.Short() }

// contest runs a story under each contender, two or more at once, prints the table and
// returns the runs by name.
func contest(t *testing.T, title string, story func() *fleetSim, contenders ...contender) map[string]*fleetSim {
	t.Helper()
	runs := make([]*fleetSim, len(contenders))
	t.Run("runs", func(t *testing.T) {
		for i, c := range contenders {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				f := story()
				f.lag = c.lag
				f.run(fleetSeed, c.policy)
				// What is not in the table may go.
				f.steer, f.gauges, f.jobs = nil, nil, nil
				runs[i] = f
			})
		}
	})
	byName := make(map[string]*fleetSim)
	var table strings.Builder
	fmt.Fprintf(&table, "%s\n%-26s %7s %7s %7s %7s %9s %8s %8s %7s\n", title, "in service times", "mean", "p50", "p99", "p99.9", "max queue", "timeouts", "failures", "probes")
	for i, c := range contenders {
		f := runs[i]
		byName[c.name] = f
		n := float64(f.calls)
		fmt.Fprintf(&table, "%-26s %7.2f %7.2f %7.1f %7.1f %9d %7.2f%% %7.3f%% %7.2f\n", c.name, f.mean(), f.quantile(.5), f.quantile(.99), f.quantile(.999),
			f.longest, 100*float64(f.timeouts)/n, 100*float64(f.failures-f.timeouts)/n, float64(f.probes)/n)
	}
	fmt.Fprintf(&table, "%d calls each", runs[0].calls)
	t.Log(table.String())
	return byName
}

// near reports a figure that is off by more than a part of what is wanted.
func near(t *testing.T, what string, got, want, part float64) {
	t.Helper()
	if math.Abs(got-want) > part*want {
		t.Errorf("%s %.3g, want %.3g within %.0f%%", what, got, want, 100*part)
	}
}

// hold reports the claims that do not.
func hold(t *testing.T, runs map[string]*fleetSim, claims []claim) {
	t.Helper()
	for _, c := range claims {
		got, other := runs[c.of.name].quantile(.99), runs[c.other.name].quantile(.99)
		if !(got <= c.times*other) {
			t.Errorf("the p99 of %s is %.2f, want at most %v times the %.2f of %s", c.of.name, got, c.times, other, c.other.name)
		}
	}
}

// The simulator against the theory of queues, and against the figures of others for the same
// ten servers at load 0.9.
func TestFleetSimIsRight(t *testing.T) {
	// The figures are rounded to two digits, and JSQ's p99 is 5% lower than in all long runs.
	length, part := 100_000.0, 0.1
	if brief() {
		length, part = 20_000, 0.15
	}
	ten := func() *fleetSim {
		return &fleetSim{clients: 1, servers: 10, workers: 1, rate: 900, from: units(1000), until: units(1000 + length)}
	}
	runs := contest(t, "10 servers, load 0.9", ten, randomly, twoQueues, shortest, boardTwo, boardJSQ, staleTwo, staleJSQ)
	for _, tc := range []struct {
		c         contender
		mean, p99 float64
	}{
		// M/M/1: exponential, of mean 1/(1-load).
		{randomly, 10, 10 * math.Log(100)},
		{twoQueues, 3.0, 10},
		{shortest, 1.9, 7.6},
		{boardTwo, 5.7, 19},
		{boardJSQ, 26, 92},
	} {
		f := runs[tc.c.name]
		near(t, tc.c.name+": mean", f.mean(), tc.mean, part)
		near(t, tc.c.name+": p99", f.quantile(.99), tc.p99, part)
	}

	// M/M/10, by Erlang's formula.
	pool := (&fleetSim{clients: 1, servers: 1, workers: 10, rate: 900, from: units(1000), until: units(1000 + length)}).run(1, steerRandom)
	near(t, "M/M/10: mean", pool.mean(), 1+erlangC(10, 9)/(10-9), part)

	// Two choices among very many: sum of load^(2^i - 2), Mitzenmacher, section 3.
	many := (&fleetSim{clients: 1, servers: 1000, workers: 1, rate: 90_000, from: units(200), until: units(200 + length/200)}).run(1, steerTwo(0))
	want := 0.0
	for i := 1; i < 10; i++ {
		want += math.Pow(0.9, math.Pow(2, float64(i))-2)
	}
	near(t, "P2C of 1,000: mean", many.mean(), want, part)
}

// erlangC returns the probability that a call has to wait for one of n workers, when as many
// as load are busy on average.
func erlangC(n int, load float64) float64 {
	term, sum := 1.0, 1.0
	for i := 1; i < n; i++ {
		term *= load / float64(i)
		sum += term
	}
	term *= load / float64(n) * float64(n) / (float64(n) - load)
	return term / (sum + term)
}

// A claim says that the p99 of one is at most so many times that of another.
type claim struct {
	of    contender
	times float64
	other contender
}

// Ten servers at load 0.9, as one client sees them who is all of the load, and as ten and a
// hundred see them who share it. The factors leave a fifth or more to chance.
func TestFleetOfTen(t *testing.T) {
	length := 40_000.0
	if brief() {
		length = 4000
	}
	for _, tc := range []struct {
		clients int
		claims  []claim
	}{
		// What it counts itself is the truth, and it looks at up to eight: close to JSQ.
		{1, []claim{
			{realP2C, 1.4, shortest}, {realP2C, 1.2, twoQueues}, {lateP2C, 1, staleTwo},
			{realPrequal, 1.4, shortest}, {realPrequal, 1.2, twoQueues}, {latePrequal, 1, staleTwo},
			{realKeys, 1.4, twoQueues},
		}},
		// One in ten calls is its own: still worth more than textbook P2C's truth that is late.
		{10, []claim{
			{realP2C, 1, leastOfTwo}, {realP2C, 0.8, staleTwo}, {lateP2C, 0.9, staleTwo},
			{realPrequal, 1, leastOfTwo}, {realPrequal, 0.8, staleTwo},
			{realKeys, 0.6, randomly},
			// As its pool holds all ten servers, it is JSQ, and what is late makes it herd.
			{latePrequal, 1, staleJSQ}, {randomly, 1, latePrequal},
		}},
		// Next to nothing is its own. With keys, nothing but the keys decides.
		{100, []claim{
			{realP2C, 0.8, randomly}, {realP2C, 1.2, leastOfTwo}, {lateP2C, 0.8, randomly},
			{realPrequal, 0.8, randomly}, {realPrequal, 1.1, leastOfTwo},
			{realKeys, 1.3, randomly},
			{latePrequal, 1.1, staleJSQ}, {randomly, 1, latePrequal},
		}},
	} {
		t.Run(fmt.Sprintf("clients=%d", tc.clients), func(t *testing.T) {
			runs := contest(t, fmt.Sprintf("10 servers, load 0.9, clients: %d", tc.clients), func() *fleetSim {
				return &fleetSim{clients: tc.clients, servers: 10, workers: 1, rate: 900, from: units(2000), until: units(2000 + length)}
			}, randomly, weighted, leastOfTwo, twoQueues, shortest, realP2C, realPrequal, realKeys, staleTwo, staleJSQ, lateP2C, latePrequal)
			hold(t, runs, tc.claims)
		})
	}
}

// How late reports may be. The reports of a few servers are all in Prequal's pool: it is JSQ
// then, and what is late makes a herd of its clients: from one service time on bobtail_p2c is
// better, which goes by what each client knows itself, and beyond five chance is.
func TestFleetWithLateReports(t *testing.T) {
	length := 20_000.0
	if brief() {
		length = 4000
	}
	runs := contest(t, "10 servers, load 0.9, 10 clients", func() *fleetSim {
		return &fleetSim{clients: 10, servers: 10, workers: 1, rate: 900, from: units(1000), until: units(1000 + length)}
	}, randomly, realPrequal, late(realPrequal, 1), late(realPrequal, 2), late(realPrequal, 5), latePrequal,
		realP2C, late(realP2C, 1), late(realP2C, 2), late(realP2C, 5), lateP2C)
	hold(t, runs, []claim{
		{late(realPrequal, 1), 0.6, randomly}, {late(realPrequal, 2), 0.8, randomly},
		{lateP2C, 0.5, randomly}, {late(realP2C, 5), 1, late(realPrequal, 2)}, {randomly, 1, latePrequal},
	})
}

// thousand is 1,000 servers and 100 clients; in brief 200 and 20, so that a client still
// makes as many calls.
func thousand(load, warm, length float64) *fleetSim {
	f := &fleetSim{clients: 100, servers: 1000, workers: 1, from: units(warm), until: units(warm + length)}
	if brief() {
		f.clients, f.servers = 20, 200
	}
	f.rate = load * float64(f.servers) / simMean.Seconds()
	return f
}

// A large fleet, of which each client sees a hundredth. JSQ by what is late is the herd: all
// clients run to where nobody was. No policy of ours does, late or not. What a client sees
// itself is hardly better than chance; what servers report is as good as textbook P2C's truth.
func TestFleetOfThousand(t *testing.T) {
	for _, tc := range []struct {
		load   float64
		claims []claim
	}{
		{0.7, []claim{
			{randomly, 0.7, staleJSQ},
			{realP2C, 1.05, randomly}, {realP2C, 1.1, leastOfTwo}, {lateP2C, 1.1, randomly}, {lateP2C, 0.7, staleJSQ},
			{realPrequal, 1.1, twoQueues}, {realPrequal, 0.6, randomly}, {latePrequal, 1.05, randomly}, {latePrequal, 0.7, staleJSQ},
		}},
		{0.9, []claim{
			{randomly, 0.5, staleJSQ},
			{realP2C, 0.8, randomly}, {realP2C, 1.2, leastOfTwo}, {lateP2C, 0.9, randomly}, {lateP2C, 0.4, staleJSQ},
			{realPrequal, 1, twoQueues}, {realPrequal, 0.25, randomly}, {latePrequal, 0.6, randomly}, {latePrequal, 0.3, staleJSQ},
		}},
	} {
		t.Run(fmt.Sprintf("load=%v", tc.load), func(t *testing.T) {
			// The longest run first, so that none is left at the end.
			contenders := []contender{latePrequal, realPrequal, realP2C, lateP2C, randomly, weighted, leastOfTwo, twoQueues, shortest, staleTwo, staleJSQ}
			if brief() && tc.load > 0.7 {
				t.Skip("left to the full length")
			}
			if !brief() && tc.load == 0.7 {
				contenders = append([]contender{realKeys}, contenders...)
				tc.claims = append(tc.claims, claim{realKeys, 1.3, randomly})
			}
			story := func() *fleetSim { return thousand(tc.load, 500, 200) }
			title := fmt.Sprintf("%d servers, %d clients, load %v", story().servers, story().clients, tc.load)
			hold(t, contest(t, title, story, contenders...), tc.claims)
		})
	}
}

// A fifth of the servers is five times slower, and all have work for 70% of the time: 4.8% of
// the capacity, which is what the slow ones should get at most.
func TestFleetOfUnequals(t *testing.T) {
	runs := contest(t, "a fifth of the servers 5 times slower, load 0.7", func() *fleetSim {
		f := thousand(0.7*0.84, 500, 200)
		fifth := f.servers / 5
		f.slow = func(server int, _ time.Duration) float64 {
			if server < fifth {
				return 5
			}
			return 1
		}
		return f
	}, realPrequal, realP2C, randomly, weighted, leastOfTwo, twoQueues, shortest)
	hold(t, runs, []claim{{realP2C, 0.4, weighted}, {realP2C, 0.8, twoQueues}, {realPrequal, 0.6, realP2C}, {realPrequal, 0.9, shortest}})
	for name, f := range runs {
		share := f.share(f.servers / 5)
		t.Logf("%-26s %6.2f%% of the calls went to the slow fifth", name, share)
		if ours := name == P2CName || name == PrequalName; ours && share > 1 {
			t.Errorf("%s: %.2f%% of the calls went to the slow fifth, want at most 1%%", name, share)
		}
	}
}

// One server fails all that it gets at once, and so always looks idle. JSQ runs into it
// more often than chance; ours, which take no failure for an answer, less often. Nobody is
// ejected here: that is not the choosers' doing.
func TestFleetWithSinkhole(t *testing.T) {
	runs := contest(t, "one server of many fails at once, load 0.7", func() *fleetSim {
		f := thousand(0.7, 500, 300)
		f.sinkhole = true
		return f
	}, realPrequal, realP2C, randomly, weighted, leastOfTwo, twoQueues, shortest)
	for name, f := range runs {
		fair := f.share(1) * float64(f.servers) / 100
		t.Logf("%-26s %.3f%% of the calls went to the sinkhole, %.2f times a fair share", name, f.share(1), fair)
		switch ours := name == P2CName || name == PrequalName; {
		case ours && fair > 0.6:
			t.Errorf("%s: the sinkhole got %.2f times its share, want at most 0.6", name, fair)
		case name == shortest.name && fair < 2:
			t.Errorf("%s: the sinkhole got %.2f times its share, want at least 2: it is no trap", name, fair)
		}
	}
}

// The load ramp of the Prequal paper (section 5.1): tasks that are guaranteed their
// allocation, and have more while their neighbours leave it. Here that is 2.5 times the
// allocation, but on a tenth of the machines never, and on each other a fifth of the time, so that the
// fleet gives 2.08 times its allocation. Weighted round robin levels what each task uses, so
// that above 1 the tenth has to serve more than it can, whatever there is elsewhere.
func TestFleetWithAntagonists(t *testing.T) {
	for _, tc := range []struct {
		load       float64
		brief      bool
		wrr, ours  bool // run into the timeout
		warm, more time.Duration
	}{
		{load: 0.75, warm: 40 * time.Second, more: 40 * time.Second},
		{load: 0.93, warm: 40 * time.Second, more: 40 * time.Second, brief: true},
		// The queue grows by 3% of the time, to 5 s.
		{load: 1.03, warm: 160 * time.Second, more: 40 * time.Second, wrr: true},
		{load: 1.27, warm: 40 * time.Second, more: 40 * time.Second, wrr: true, brief: true},
		{load: 1.74, warm: 40 * time.Second, more: 40 * time.Second, wrr: true},
		{load: 2.5, warm: 30 * time.Second, more: 10 * time.Second, wrr: true, ours: true, brief: true},
	} {
		t.Run(fmt.Sprintf("load=%v", tc.load), func(t *testing.T) {
			if brief() && !tc.brief {
				t.Skip("left to the full length")
			}
			title := fmt.Sprintf("antagonists, load %v of the allocation, calls of 20, timeout 500", tc.load)
			runs := contest(t, title, func() *fleetSim { return contended(tc.load, tc.warm, tc.more) }, realPrequal, realP2C, weighted)
			for name, f := range runs {
				want := tc.ours
				if name == weighted.name {
					want = tc.wrr
				}
				if most := f.quantile(1); most > 500 {
					t.Errorf("%s: a call took %.0f, want at most the timeout", name, most)
				}
				if p := f.quantile(0.999); (p >= 500) != want {
					t.Errorf("%s: p99.9 %.0f, timeout 500: reached %v, want %v", name, p, p >= 500, want)
				}
			}
			if !tc.ours {
				hold(t, runs, []claim{{realPrequal, 1, realP2C}, {realP2C, 0.95, weighted}})
			}
		})
	}
}

func contended(load float64, warm, more time.Duration) *fleetSim {
	const mean = 20 // 200 ms
	f := &fleetSim{
		clients: 100, servers: 100, workers: 4,
		from: warm, until: warm + more, timeout: units(500),
		work:   func(r *rand.Rand) float64 { return mean * r.ExpFloat64() },
		stolen: true,
		slow: func(server int, now time.Duration) float64 {
			// The same in every run, whoever balances.
			epoch := (now + time.Duration(server)*50*time.Millisecond) / (5 * time.Second)
			if server%10 == 0 || mix(uint64(server)<<32|uint64(epoch))%5 == 0 {
				return 1
			}
			return 1 / 2.5
		},
	}
	if brief() {
		f.servers, f.from, f.until = 40, 20*time.Second, 30*time.Second
	}
	f.rate = load * float64(f.servers*f.workers) / units(mean).Seconds()
	return f
}

// The same seed gives the same run, another seed another one.
func TestFleetSimIsDeterministic(t *testing.T) {
	for _, c := range []contender{randomly, weighted, leastOfTwo, twoQueues, staleJSQ, boardJSQ, realP2C, realKeys, realPrequal, latePrequal} {
		run := func(seed uint64) *fleetSim {
			f := &fleetSim{clients: 10, servers: 50, workers: 2, rate: 8000, from: units(20), until: units(120), timeout: units(20), lag: c.lag}
			return f.run(seed, c.policy)
		}
		a, b, other := run(1), run(1), run(2)
		if !slices.Equal(a.latency, b.latency) || !slices.Equal(a.sent, b.sent) || a.probes != b.probes {
			t.Errorf("%s: two runs of one seed differ", c.name)
		}
		if slices.Equal(a.latency, other.latency) {
			t.Errorf("%s: runs of two seeds are the same", c.name)
		}
	}
}

// A call costs the simulator no allocation, nor the cores under test but for Prequal's probes.
func TestFleetSimAllocatesNothing(t *testing.T) {
	for _, c := range []contender{randomly, weighted, leastOfTwo, staleTwo, staleJSQ, realP2C, lateP2C, realKeys} {
		run := func(length float64) (mallocs uint64, calls int) {
			f := &fleetSim{clients: 1, servers: 10, workers: 1, rate: 900, from: units(100), until: units(100 + length), timeout: units(50), lag: c.lag}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			f.run(1, c.policy)
			runtime.ReadMemStats(&after)
			return after.Mallocs - before.Mallocs, f.calls
		}
		short, few := run(1000)
		long, many := run(6000)
		// One each second is the sweep's.
		if got := (float64(long) - float64(short)) / float64(many-few); got > 0.01 {
			t.Errorf("%s: %.3f allocations per call, want none", c.name, got)
		}
	}
}
