package scenario

import (
	"math"
	"os"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// times are n service times, of calls 0 to n-1, in ms, sorted.
func times(s *Scenario, seed uint64, n int) []float64 {
	out := make([]float64, n)
	for i := range out {
		out[i] = s.Service(seed, uint64(i), 0, 0, 0).Seconds() * 1e3
	}
	slices.Sort(out)
	return out
}

// within asserts that a share q of sorted values lies below want, to within five
// standard errors: a fair generator fails that in one of two million.
func within(t *testing.T, sorted []float64, q, want float64) {
	t.Helper()
	below, _ := slices.BinarySearch(sorted, want)
	share := float64(below) / float64(len(sorted))
	if sigma := math.Sqrt(q * (1 - q) / float64(len(sorted))); math.Abs(share-q) > 5*sigma {
		t.Errorf("a share of %.4f is below %.3f ms, want %v", share, want, q)
	}
}

func TestDistributions(t *testing.T) {
	ms := func(v float64) Duration { return Duration(v * 1e6) }
	// Standard normal percentiles.
	z := map[float64]float64{0.01: -2.32635, 0.5: 0, 0.9: 1.28155, 0.99: 2.32635, 0.999: 3.09023}
	for q, z := range z {
		for seed := range uint64(3) {
			lognormal := &Scenario{ServiceTime: []Component{{Weight: 1, Lognormal: &Lognormal{ms(2), 0.3}}}}
			within(t, times(lognormal, seed, 50_000), q, 2*math.Exp(0.3*z))
			exponential := &Scenario{ServiceTime: []Component{{Weight: 7, Shift: ms(5), Exponential: &Exponential{ms(4)}}}}
			within(t, times(exponential, seed, 50_000), q, 5-4*math.Log(1-q))
		}
	}
	constant := &Scenario{ServiceTime: []Component{{Weight: 1, Shift: ms(1), Constant: &Constant{ms(2)}}}}
	if got := times(constant, 1, 10); got[0] != 3 || got[9] != 3 {
		t.Errorf("constant: %v, want 3", got)
	}
	// A mixture: weights 3 and 1 are three quarters and one.
	mixture := &Scenario{ServiceTime: []Component{{Weight: 3, Constant: &Constant{ms(1)}}, {Weight: 1, Constant: &Constant{ms(9)}}}}
	within(t, times(mixture, 1, 50_000), 0.75, 5)
}

// The embedded scenarios are what their descriptions say.
func TestScenarios(t *testing.T) {
	named := func(name string) *Scenario {
		s, err := Named(name)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	healthy := times(named("healthy"), 1, 100_000)
	within(t, healthy, 0.5, 2)
	within(t, healthy, 0.99, 2*math.Exp(0.3*2.32635))

	stragglers := times(named("stragglers"), 1, 100_000)
	within(t, stragglers, 0.98, 40)
	within(t, stragglers, 0.99, 52) // the median of the slow ones

	slow := named("slow-replica")
	for id := range uint64(1000) {
		fast := slow.Service(1, id, 0, 0, 0)
		if got := slow.Service(1, id, 0, 2, 0); math.Abs(float64(got-10*fast)) > 10 {
			t.Fatalf("call %d takes %v at the slow replica and %v elsewhere, want 10 times", id, got, fast)
		}
	}
}

// The mixture in FIGURES fits the paper's in-memory BigTable if its rare
// components are drawn *instead* of the body: 600,000 requests then have p95 25.0
// and p99 35.9 ms, as FIGURES has them; added to the body, 25.1 and 36.6.
func TestBigtable(t *testing.T) {
	if testing.Short() {
		t.Skip("4 million draws")
	}
	s, err := Named("bigtable")
	if err != nil {
		t.Fatal(err)
	}
	const requests = 40_000
	var sum float64
	slowest := make([]float64, requests)
	for r := range slowest {
		for leaf := range s.Fanout {
			slowest[r] = max(slowest[r], s.Service(1, uint64(r*s.Fanout+leaf), 0, 0, 0).Seconds()*1e3)
		}
		sum += slowest[r]
	}
	slices.Sort(slowest)
	for _, c := range []struct {
		what              string
		got, want, within float64
	}{
		{"mean", sum / requests, 31, 0.25}, // heavy-tailed: 100 requests hold half of it
		{"p95", slowest[requests*95/100-1], 25, 0.02},
		{"p99", slowest[requests*99/100-1], 36, 0.03},
		{"p99.9", slowest[requests*999/1000-1], 1290, 0.25},
	} {
		t.Logf("%s %.1f ms", c.what, c.got)
		if math.Abs(c.got/c.want-1) > c.within {
			t.Errorf("%s %.1f ms, want %v to within %v%%", c.what, c.got, c.want, 100*c.within)
		}
	}
}

// The draw depends on seed, call and attempt; not on the backend, nor on when.
func TestDraws(t *testing.T) {
	s, err := Named("stragglers")
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		seed, id := rapid.Uint64().Draw(t, "seed"), rapid.Uint64().Draw(t, "id")
		attempt := rapid.IntRange(0, 5).Draw(t, "attempt")
		d := s.Service(seed, id, attempt, 0, 0)
		if d <= 0 {
			t.Fatalf("%v, want more than 0", d)
		}
		if other := s.Service(seed, id, attempt, 4, time.Hour); other != d {
			t.Errorf("%v at backend 0, %v at 4 an hour later", d, other)
		}
	})
}

// A call's two attempts are independent, and so are neighbouring calls: else
// hedging would be measured as better or worse than it is.
func TestIndependence(t *testing.T) {
	s, err := Named("stragglers")
	if err != nil {
		t.Fatal(err)
	}
	d := s.Service(1, 2, 0, 0, 0)
	for what, other := range map[string]time.Duration{
		"seed": s.Service(2, 2, 0, 0, 0), "id": s.Service(1, 3, 0, 0, 0), "attempt": s.Service(1, 2, 1, 0, 0),
	} {
		if other == d {
			t.Errorf("another %s, the same %v", what, d)
		}
	}
	const n = 100_000
	var next, hedge, stream float64
	for id := range uint64(n) {
		u := draw{1, id, 0}.uniform(component) - 0.5
		next += u * (draw{1, id + 1, 0}.uniform(component) - 0.5)
		hedge += u * (draw{1, id, 1}.uniform(component) - 0.5)
		stream += u * (draw{1, id, 0}.uniform(straggler) - 0.5)
	}
	// The correlation's standard error is 1/sqrt(n).
	for what, sum := range map[string]float64{"calls": next, "attempts": hedge, "streams": stream} {
		if r := sum * 12 / n; math.Abs(r) > 5/math.Sqrt(n) {
			t.Errorf("neighbouring %s correlate by %.4f", what, r)
		}
	}
}

func TestStalls(t *testing.T) {
	doc, err := os.ReadFile("testdata/stalls.json")
	if err != nil {
		t.Fatal(err)
	}
	s, err := Decode(doc)
	if err != nil {
		t.Fatal(err)
	}
	const ms = time.Millisecond
	stretch := func(seed uint64, backend int, at, work time.Duration) time.Duration {
		return s.Finish(seed, backend, at, work) - at
	}
	from, to := s.Stalls.stall(1, 1, 3)
	if from < 1500*ms || to > 2000*ms || to-from < 20*ms || to-from > 80*ms {
		t.Fatalf("stall from %v to %v, want 20 to 80 ms between 1.5 and 2 s", from, to)
	}
	for _, c := range []struct {
		what           string
		at, work, want time.Duration
	}{
		{"ends before it", from - 5*ms, 5 * ms, 5 * ms},
		{"caught by it", from - 5*ms, 6 * ms, 6*ms + to - from},
		{"begins in it", to - ms, 2 * ms, 3 * ms},
		{"begins after it", to, 2 * ms, 2 * ms},
		{"no work, in it", to - ms, 0, ms},
	} {
		if got := stretch(1, 1, c.at, c.work); got != c.want {
			t.Errorf("%s: %v, want %v", c.what, got, c.want)
		}
	}
	if got := stretch(1, 0, to-ms, 2*ms); got != 2*ms {
		t.Errorf("another backend: %v, want 2ms", got)
	}

	// Long work meets one stall in each interval, and only their time is added.
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		at := time.Duration(rapid.Int64Range(0, int64(time.Minute)).Draw(t, "at"))
		work := time.Duration(rapid.Int64Range(0, int64(3*time.Second)).Draw(t, "work"))
		took := stretch(seed, 1, at, work)
		var stalled time.Duration
		for cell := at / (500 * ms); cell <= (at+took)/(500*ms); cell++ {
			from, to := s.Stalls.stall(seed, 1, cell)
			stalled += max(min(to, at+took)-max(from, at), 0)
		}
		if took != work+stalled {
			t.Errorf("%v of work took %v, with %v of stalls", work, took, stalled)
		}
	})
}
