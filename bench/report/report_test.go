package report

import (
	"bytes"
	"encoding/json"
	"flag"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

var update = flag.Bool("update", false, "write the golden files")

// drawn is n blocks of a policy whose latencies are base plus an exponential of
// mean base, and which sends extra attempts per call.
func drawn(name string, n, perBlock int, base time.Duration, extra float64) Policy {
	rng := rand.New(rand.NewPCG(1, 2))
	p := Policy{Name: name}
	for i := range n {
		b := Block{At: time.Duration(i) * time.Second, Length: time.Second, Calls: int64(perBlock), CallsOK: int64(perBlock)}
		for range perBlock {
			b.Latencies = append(b.Latencies, base+time.Duration(rng.ExpFloat64()*float64(base)))
		}
		b.Attempts = b.Calls + int64(extra*float64(perBlock))
		p.Blocks = append(p.Blocks, b)
	}
	return p
}

func fail(p Policy, perBlock int) Policy {
	for i := range p.Blocks {
		b := &p.Blocks[i]
		b.Latencies = b.Latencies[perBlock:]
		b.Errors = perBlock
		b.CallsOK -= int64(perBlock)
	}
	return p
}

// out makes everything fail from the 10th block on, up to block until, with so many
// attempts per call.
func out(p Policy, until int, attempts float64) Policy {
	for i := 10; i < until; i++ {
		b := &p.Blocks[i]
		b.Errors += len(b.Latencies)
		b.Latencies, b.CallsOK = nil, 0
		b.Attempts = int64(attempts * float64(b.Calls))
	}
	return p
}

func traced(p Policy, slowest ...Traced) Policy {
	p.Slowest = slowest
	return p
}

func named(t *testing.T, name string) *scenario.Scenario {
	t.Helper()
	s, err := scenario.Named(name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The documents whole, as a reader gets them.
func TestGolden(t *testing.T) {
	good := Generator{LagP99: 420 * time.Microsecond, CPU: 0.213}
	for name, r := range map[string]*Report{
		"full": {Scenario: named(t, "stragglers"), Seed: 7, Block: time.Second, Warmup: time.Second, Generator: good,
			Policies: []Policy{drawn("none", 10, 1000, 20*time.Millisecond, 0), drawn("hedge", 10, 1000, 2*time.Millisecond, 0.05)}},
		// Too few for p99.9, and for one policy for p99; no interval from three blocks.
		"few": {Scenario: named(t, "slow-replica"), Seed: 7, Block: time.Second, Generator: good, Interrupted: true,
			Policies: []Policy{drawn("none", 4, 100, 200*time.Millisecond, 0), drawn("hedge", 3, 100, 2*time.Millisecond, 0), {Name: "p2c"}}},
		"saturated": {Scenario: named(t, "bigtable"), Seed: 7, Block: time.Second,
			Generator: Generator{LagP99: time.Second, CPU: 0.97, Overflow: 1234, Abandoned: 5},
			Policies:  []Policy{fail(drawn("none", 10, 1000, time.Second, 0), 20), fail(drawn("hedge", 10, 1000, time.Second, 0.5), 5)}},
		// An outage from 10 s to 15 s of 25: one policy comes out of it at once, one 3 s
		// late, one never.
		"faults": {Scenario: named(t, "outage"), Seed: 7, Block: time.Second, Warmup: time.Second, Generator: good,
			Policies: []Policy{out(drawn("none", 25, 100, 2*time.Millisecond, 0), 15, 1), out(drawn("retry", 25, 100, 2*time.Millisecond, 0), 18, 1.05), out(drawn("retry-naive", 25, 100, 2*time.Millisecond, 0), 25, 4)}},
		// One request in four was traced; none of those of p2c has reached the receiver.
		"traced": {Scenario: named(t, "stragglers"), Seed: 7, Block: time.Second, Generator: good, TraceRatio: 0.25,
			Policies: []Policy{
				traced(drawn("none", 10, 1000, 20*time.Millisecond, 0), Traced{1000, strings.Repeat("2", 32), 17, 0.25, "DEADLINE_EXCEEDED"}, Traced{61.5, strings.Repeat("1", 32), 4711, 4.7, ""}),
				traced(drawn("hedge", 10, 1000, 2*time.Millisecond, 0.05), Traced{8.125, strings.Repeat("3", 32), 12, 0.125, ""}),
				drawn("p2c", 10, 1000, 2*time.Millisecond, 0)}},
		// A fault without end has no before and after; rows stand for 10 s.
		"hole": {Scenario: named(t, "blackhole"), Seed: 7, Block: 500 * time.Millisecond, Generator: good,
			Policies: []Policy{fail(drawn("none", 200, 10, 2*time.Millisecond, 0), 2)}},
	} {
		t.Run(name, func(t *testing.T) {
			var table, doc bytes.Buffer
			if err := r.Table(&table); err != nil {
				t.Fatal(err)
			}
			if err := r.JSON(&doc); err != nil {
				t.Fatal(err)
			}
			golden(t, name+".txt", table.Bytes())
			golden(t, name+".json", doc.Bytes())
		})
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

// The keys that are promised, whatever else is added.
func TestJSONKeys(t *testing.T) {
	r := &Report{Scenario: named(t, "stragglers"), Policies: []Policy{{Name: "none"}}}
	var out bytes.Buffer
	if err := r.JSON(&out); err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := json.Unmarshal(out.Bytes(), &doc); err != nil {
		t.Fatal(err)
	}
	has := func(in any, keys ...string) {
		t.Helper()
		for _, k := range keys {
			if _, ok := in.(map[string]any)[k]; !ok {
				t.Errorf("no key %q in %v", k, in)
			}
		}
	}
	has(doc, "schema", "scenario", "seed", "runs", "generator")
	has(doc["runs"].([]any)[0], "policy", "calls", "errors", "mean_ms", "p50_ms", "p90_ms", "p99_ms", "p99_ci_ms", "p999_ms",
		"attempts_per_call", "wasted_per_call", "goodput_per_s")
	has(doc["generator"], "lag_p99_ms", "cpu", "saturated")
}

func TestNeeds(t *testing.T) {
	for q, want := range map[float64]int{0.5: 6, 0.9: 36, 0.99: 368, 0.999: 3688, 0.9999: 36887} {
		if got := Needs(q); got != want {
			t.Errorf("Needs(%v) = %d, want %d", q, got, want)
		}
	}
}

// A percentile is the nearest rank over all blocks, failures slowest.
func TestQuantiles(t *testing.T) {
	var blocks [4]Block
	for i := range 1000 {
		b := &blocks[i%7%4] // unequal
		if i >= 990 {
			b.Errors++
			continue
		}
		b.Latencies = append(b.Latencies, time.Duration(i+1)*time.Millisecond)
	}
	s := newSample(blocks[:])
	got := s.quantiles([]float64{0.001, 0.5, 0.9, 0.99, 0.991})
	for i, want := range []float64{1, 500, 900, 990} {
		if got[i] == nil || math.Abs(*got[i]/want-1) > 0.001 {
			t.Errorf("percentile %d: %v, want %v", i, got[i], want)
		}
	}
	if got[4] != nil {
		t.Errorf("p99.1 of 1%% failures is %v, want none", *got[4])
	}
	if got := newSample(nil).quantiles([]float64{0.5}); got[0] != nil {
		t.Errorf("of nothing: %v, want none", *got[0])
	}
}

// The 95% interval holds the truth about 95 times in 100: for independent calls,
// and for blocks that are slow as a whole, where one that took calls for
// independent would hold it far less often.
func TestBootstrapCoverage(t *testing.T) {
	if testing.Short() {
		t.Skip("200,000 resamples")
	}
	const trials = 100
	for _, c := range []struct {
		what    string
		cluster float64 // how much the blocks differ
	}{{"independent", 0}, {"clustered", 0.5}} {
		truth := p90(c.cluster)
		rng := rand.New(rand.NewPCG(3, 4))
		hit := 0
		for range trials {
			blocks := make([]Block, 20)
			for i := range blocks {
				scale := 10 * math.Exp(c.cluster*rng.NormFloat64())
				for range 40 {
					blocks[i].Latencies = append(blocks[i].Latencies, time.Duration(rng.ExpFloat64()*scale*1e6))
				}
			}
			ci := newSample(blocks).bootstrap(rng.Uint64(), []float64{0.9})[0]
			if ci[0] <= truth && truth <= ci[1] {
				hit++
			}
		}
		t.Logf("%s: %d of %d intervals hold the truth", c.what, hit, trials)
		// The standard error of 95 is 2; a bootstrap of 20 blocks falls a little short.
		if hit < 84 {
			t.Errorf("%s: %d of %d intervals hold the truth, want about 95", c.what, hit, trials)
		}
	}
}

// p90 is that of 10 e^(sigma Z) x Exp(1), Z standard normal: bisection on the
// tail, the normal by its 2,000 quantiles.
func p90(sigma float64) float64 {
	tail := func(t float64) (p float64) {
		const n = 2000
		for i := range n {
			z := math.Sqrt2 * math.Erfinv((2*float64(i)+1)/n-1)
			p += math.Exp(-t/(10*math.Exp(sigma*z))) / n
		}
		return p
	}
	lo, hi := 0.0, 1000.0
	for range 60 {
		if mid := (lo + hi) / 2; tail(mid) > 0.1 {
			lo = mid
		} else {
			hi = mid
		}
	}
	return lo
}

// The same report is printed twice alike; another seed moves only intervals.
func TestBootstrapSeed(t *testing.T) {
	blocks := drawn("none", 10, 500, time.Millisecond, 0).Blocks
	a := newSample(blocks).bootstrap(1, levels[:])
	if diff := cmp.Diff(a, newSample(blocks).bootstrap(1, levels[:])); diff != "" {
		t.Error(diff)
	}
	if cmp.Diff(a, newSample(blocks).bootstrap(2, levels[:])) == "" {
		t.Error("another seed gives the same intervals")
	}
	if ci := newSample(blocks[:minBlocks-1]).bootstrap(1, levels[:]); ci[0] != nil {
		t.Errorf("an interval %v from %d blocks", *ci[0], minBlocks-1)
	}
}

func TestSaturated(t *testing.T) {
	p99 := func(v float64) []Run { return []Run{{P99: nil}, {P99: &v}} }
	const ms = time.Millisecond
	for _, c := range []struct {
		what string
		g    Generator
		runs []Run
		want int
	}{
		{"all well", Generator{LagP99: 2 * ms, CPU: 0.3}, p99(5), 0},
		{"at the bounds", Generator{LagP99: 2500 * time.Microsecond, CPU: 0.75, Abandoned: 9}, p99(5), 0},
		{"late for so short a tail", Generator{LagP99: 2501 * time.Microsecond}, p99(5), 1},
		{"late for any", Generator{LagP99: 11 * ms}, p99(500), 1},
		{"late, no p99", Generator{LagP99: 11 * ms}, nil, 1},
		{"busy", Generator{CPU: 0.76}, nil, 1},
		{"full", Generator{Overflow: 1}, nil, 1},
		{"all of it", Generator{LagP99: time.Second, CPU: 1, Overflow: 1}, nil, 3},
	} {
		if got := c.g.saturated(c.runs); len(got) != c.want {
			t.Errorf("%s: %q, want %d reasons", c.what, got, c.want)
		}
	}
}

func BenchmarkBootstrap(b *testing.B) {
	s := newSample(drawn("none", 20, 500, time.Millisecond, 0).Blocks)
	for b.Loop() {
		s.bootstrap(1, levels[:])
	}
}
