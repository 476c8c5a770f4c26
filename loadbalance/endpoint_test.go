package loadbalance

import (
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

const (
	ms  = time.Millisecond
	tau = 10 * time.Second
)

// A step is one thing that happens to an endpoint, and the load of a unary attempt
// sent right after it.
type step struct {
	at      time.Duration
	begin   int // attempts begun, before anything ends
	end     time.Duration
	v       verdict
	ended   bool
	want    time.Duration // cost
	wantSum int64         // in flight
}

const (
	due  = time.Duration(0)
	held = time.Duration(pending)
)

func begin(at time.Duration, want time.Duration, n int64) step {
	return step{at: at, begin: 1, want: want, wantSum: n}
}

func end(at, elapsed time.Duration, v verdict, want time.Duration, n int64) step {
	return step{at: at, end: elapsed, v: v, ended: true, want: want, wantSum: n}
}

func look(at, want time.Duration) step { return step{at: at, want: want} }

func TestEndpoint(t *testing.T) {
	e := math.E
	tests := map[string][]step{
		"one probe for the unknown, and no stampede": {
			look(0, due),
			begin(0, held, 1),
			end(4*ms, 4*ms, answered, 4*ms, 0),
		},
		"a mean at first": {
			begin(0, held, 1), end(0, 4*ms, answered, 4*ms, 0),
			begin(0, 4*ms, 1), end(0, 8*ms, answered, 6*ms, 0),
			begin(0, 6*ms, 1), end(0, 3*ms, answered, 5*ms, 0),
		},
		"a cancelled attempt adds its time and no answer": {
			begin(0, held, 1), end(0, 4*ms, answered, 4*ms, 0),
			begin(0, 4*ms, 1), end(0, 6*ms, cut, 10*ms, 0),
			begin(0, 10*ms, 1), end(0, 6*ms, cut, 16*ms, 0),
			begin(0, 16*ms, 1), end(0, 4*ms, answered, 10*ms, 0),
		},
		"one that was cancelled at once says nothing": {
			begin(0, held, 1), end(0, 4*ms, answered, 4*ms, 0),
			begin(0, 4*ms, 1), end(0, 0, cut, 4*ms, 0),
		},
		"cancelled from the start: probed one at a time": {
			begin(0, held, 1), end(0, 6*ms, cut, 6*ms, 0),
			begin(0, held, 1), end(0, 6*ms, cut, 12*ms, 0),
		},
		"a failure at once is never fast": {
			begin(0, held, 1), end(0, 4*ms, answered, 4*ms, 0),
			begin(0, 4*ms, 1), end(0, 0, failed, 8*ms, 0),
			begin(0, 8*ms, 1), end(0, 100*ms, failed, 108*ms, 0),
		},
		"failures from the start: asked again ever later": {
			begin(0, held, 1), end(0, 0, failed, held, 0),
			look(tau/4-1, time.Duration(pending*math.Exp(-float64(tau/4-1)/float64(tau)))),
			look(tau/4, due),
			begin(tau/4, held, 1),
			end(tau/4, 0, failed, held, 0),
			look(tau/2, time.Duration(pending*math.Exp(-.25))),
			look(3*tau/4, due),
			begin(3*tau/4, held, 1),
			end(3*tau/4, 2*ms, answered, 2*ms, 0),
		},
		"curious while idle, not while a probe is out": {
			begin(0, held, 1), end(0, 40*ms, answered, 40*ms, 0),
			look(tau, time.Duration(40e6/e)),
			begin(tau, 40*ms, 1),
			end(tau, 40*ms, answered, 40*ms, 0),
		},
		"out of patience after 2 tau": {
			begin(0, held, 1), end(0, time.Hour, answered, time.Hour, 0),
			look(2*tau-1, time.Duration(3600e9/e/e)),
			look(2*tau, due),
			begin(2*tau, time.Hour, 1),
			end(2*tau, 2*ms, answered, 2*ms, 0), // and believed alone
		},
		"after a silence of tau the newest dominates": {
			begin(0, held, 1), end(0, 100*ms, answered, 100*ms, 0),
			begin(tau, 100*ms, 1),
			// keep = .98/e = .3605, so the past weighs .3605/.6395 = .5637.
			end(tau, 0, answered, 36052185, 0),
		},
		"ends out of order, or before they began": {
			begin(ms, held, 1), begin(ms, held, 2),
			end(ms, 4*ms, answered, 4*ms, 1),
			end(0, -4*ms, cut, 4*ms, 0),
		},
	}
	for name, steps := range tests {
		t.Run(name, func(t *testing.T) {
			var ep endpoint
			for i, s := range steps {
				for range s.begin {
					ep.begin(false)
				}
				if s.ended {
					ep.release(false)
					ep.record(s.at, s.end, tau, s.v)
				}
				cost, n := ep.load(s.at, tau, false)
				if math.Abs(cost-float64(s.want)) > 1e-6*float64(s.want)+2 || n != s.wantSum {
					t.Fatalf("step %d: cost %v and %d in flight, want %v and %d",
						i, time.Duration(cost), n, s.want, s.wantSum)
				}
			}
		})
	}
}

// The memory is that of 50 attempts: after as many again a change is known to
// 1 - 1/e.
func TestEndpointMemory(t *testing.T) {
	var e endpoint
	for range 1000 {
		e.record(0, 2*ms, tau, answered)
	}
	for range memory {
		e.record(0, 12*ms, tau, answered)
	}
	cost, _ := e.load(0, tau, false)
	if want := 2e6 + 10e6*(1-math.Pow(.98, 50)); math.Abs(cost-want) > 1 {
		t.Errorf("cost %v, want %v", time.Duration(cost), time.Duration(want))
	}
	// And cancellations, however many, stay finite: exposure of 50.
	for range 10000 {
		e.record(0, 6*ms, tau, cut)
	}
	cost, _ = e.load(0, tau, false)
	if want := float64(memory) * 6e6; math.Abs(cost-want) > 1e3 {
		t.Errorf("cost %v after cancellations, want %v", time.Duration(cost), time.Duration(want))
	}
}

// Where attempts end very often so many are measured that 64 of them take 32 to 128 ms, and all are
// again as soon as they end less often, or have been away.
func TestSparse(t *testing.T) {
	var e endpoint
	now := time.Duration(0)
	r := rand.New(rand.NewPCG(1, 2))
	// run sends attempts for a while, and returns which part of them was measured in the last fifth.
	run := func(every, long time.Duration) float64 {
		n, all := 0., 0.
		for end := now + long; now < end; {
			now += every
			passed := passes(r.Uint64(), e.sampling(now))
			if !passed {
				e.record(now, ms, tau, answered)
			}
			if end-now < long/5 {
				if all++; !passed {
					n++
				}
			}
		}
		return n / all
	}
	for _, tc := range []struct {
		every, long time.Duration
		want        float64
	}{
		{600 * time.Microsecond, time.Second, 1}, // 1,700 a second
		{400 * time.Microsecond, time.Second, 1. / 2},
		{600 * time.Microsecond, time.Second, 1. / 2}, // still more than 500 of them
		{100 * time.Microsecond, time.Second, 1. / 8},
		{2 * time.Microsecond, time.Second, 1. / 256},
		{100 * time.Nanosecond, time.Second, 1. / 256}, // no fewer
		{400 * time.Microsecond, time.Second, 1. / 4},  // the fewest that are enough
		{4 * ms, time.Second, 1},
		{100 * time.Nanosecond, time.Second, 1. / 256},
		{2 * ms, 800 * ms, 1}, // after 20,000 times as many
	} {
		if x := run(tc.every, tc.long); x < tc.want*.8 || x > tc.want*1.25 {
			t.Errorf("one every %v: %.4f are measured, want %.4f", tc.every, x, tc.want)
		}
	}
	run(10*time.Microsecond, 100*ms)
	if k := e.sampling(now); k < 3 {
		t.Errorf("k = %d at 100,000 a second", k)
	}
	if k := e.sampling(now + stale); k != 0 {
		t.Errorf("k = %d after a silence", k)
	}
}

func TestDecay(t *testing.T) {
	for dt := time.Duration(1); dt < 100*tau; dt += dt/10 + 1 {
		if got, want := decay(dt, tau), math.Exp(-float64(dt)/float64(tau)); math.Abs(got-want) > 2e-10 {
			t.Fatalf("after %v: %v, want %v", dt, got, want)
		}
	}
}

// Streams are counted, and are no probes.
func TestEndpointStreams(t *testing.T) {
	var e endpoint
	check := func(now time.Duration, streaming bool, want float64, wantN int64) {
		t.Helper()
		if cost, n := e.load(now, tau, streaming); cost != want || n != wantN {
			t.Errorf("at %v, streaming %v: cost %v and %d in flight, want %v and %d", now, streaming, cost, n, want, wantN)
		}
	}
	check(0, true, unknown, 0)
	e.begin(true)
	check(0, true, unknown, 1)
	check(0, false, 0, 1) // a unary attempt may still probe
	e.begin(false)
	check(0, false, pending, 2)
	e.release(false)
	e.record(0, 4*ms, tau, answered)
	check(tau, true, 4e6, 1) // undecayed
	if cost, _ := e.load(tau, tau, false); cost > 2e6 {
		t.Errorf("cost %v: an open stream keeps its endpoint from its probe", cost)
	}
	check(2*tau, true, unknown, 1)
	e.release(true)
	check(2*tau, true, unknown, 0)
}

// Whatever happens at once, counts come out even and the load stays a number.
func TestEndpointConcurrent(t *testing.T) {
	var e endpoint
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 2000 {
				streaming := i%3 == 0
				e.begin(streaming)
				cost, n := e.load(time.Duration(i), tau, streaming)
				if n < 1 || n > 8 || math.IsNaN(cost) || math.IsInf(cost, 0) {
					t.Errorf("cost %v, %d in flight", cost, n)
				}
				e.release(streaming)
				e.record(time.Duration(i*g), time.Duration(i), tau, verdict(i%3))
			}
		})
	}
	wg.Wait()
	if unary, streams := e.inFlight(); unary != 0 || streams != 0 {
		t.Errorf("%d unary attempts and %d streams in flight at the end", unary, streams)
	}
}

// What callers gave up is no evidence for an ejection, not even beside one slow answer;
// what siblings overtook is.
func TestSampleOfCancellations(t *testing.T) {
	var e endpoint
	e.record(0, 100*ms, tau, answered)
	for range 24 {
		e.record(0, 20*ms, tau, cut)
	}
	if s := e.sample(); math.Abs(s.calls-1) > 1e-9 || math.Abs(s.latency-100e6) > 1 || s.failures != 0 {
		t.Errorf("%+v, want one call of 100ms", s)
	}
	for range 19 {
		e.record(0, 20*ms, tau, superseded)
	}
	if s := e.sample(); math.Abs(s.calls-20) > 1e-9 || s.latency < 479e6 || s.latency > 481e6 {
		t.Errorf("%+v, want 20 calls and one answer in 480ms", s)
	}
	for range 5 {
		e.record(0, 0, tau, failed)
	}
	if s := e.sample(); math.Abs(s.failures-0.2) > 0.02 {
		t.Errorf("%+v, want a fifth of the calls to have failed", s)
	}
}

// An attempt that drew again goes unmeasured as others do.
func TestDrawnAgainIsSampledToo(t *testing.T) {
	var e endpoint
	e.sparse.Store(2)
	n := 0
	for i := range 1000 {
		if passes(fresh(rand.New(rand.NewPCG(uint64(i), 1)).IntN), e.sampling(1)) {
			n++
		}
	}
	if n < 650 || n > 850 {
		t.Errorf("of 1000 attempts that drew again %d are unmeasured, want 750", n)
	}
}

// A failure of which all are seen, where one in four answers is, counts a fourth: so
// endpoints are judged as if all were seen.
func TestPartsOfAttempts(t *testing.T) {
	var whole, part endpoint
	for i := range 4000 {
		v, took := answered, 2*ms
		switch i % 10 {
		case 3:
			v, took = failed, 30*ms
		case 5:
			v, took = superseded, 6*ms
		case 7:
			v, took = cut, ms
		}
		whole.record(0, took, tau, v)
		if v != answered {
			part.recordPart(0, took, tau, v, .25)
		} else if i%40 < 10 {
			part.recordPart(0, took, tau, v, 1)
		}
	}
	for name, e := range map[string]*endpoint{"all": &whole, "in part": &part} {
		s := e.sample()
		cost, _ := e.load(0, tau, false)
		// Of 10: 7 answers of 2 ms, 30 of a failure, 6 and 1 of those that were cancelled.
		if want := 51e6 / 7; math.Abs(cost-want) > .25*want {
			t.Errorf("%s: cost %v, want %v", name, time.Duration(cost), time.Duration(want))
		}
		if math.Abs(e.given/e.left-1e6) > 1 {
			t.Errorf("%s: those that were given up took %v, want 1ms", name, time.Duration(e.given/e.left))
		}
		if math.Abs(s.failures-1./9) > .04 || math.Abs(s.calls-45) > 1.5 {
			t.Errorf("%s: %+v, want a ninth of 45 calls to have failed", name, s)
		}
	}
	// Its memory is that of 50 whole ones.
	if math.Abs(part.weight-memory) > 1e-9 {
		t.Errorf("weight %v, want %d", part.weight, memory)
	}
	// After a silence a part outweighs the past too.
	part.recordPart(3*tau, 40*ms, tau, failed, .25)
	if part.weight > .25+.06 {
		t.Errorf("weight %v after a silence", part.weight)
	}
}
