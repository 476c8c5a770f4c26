// Package report turns what a comparison recorded into a table or a JSON document.
//
// A percentile is of all requests of a policy at once: histograms are merged,
// percentiles never averaged. A request that failed ranks as slower than any
// that succeeded, whenever it failed: neither a policy that fails fast nor one
// that drops its slowest calls looks good for it. The mean is of successes.
package report

import (
	"slices"
	"time"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

// Report is everything that a comparison found.
type Report struct {
	Scenario *scenario.Scenario
	Seed     uint64
	// Block is the nominal length of a block; Warmup how much of each policy's
	// time was dropped before.
	Block, Warmup time.Duration
	// Policies stand in the order of the command line; the first is what the
	// others are compared with.
	Policies  []Policy
	Generator Generator
	// TraceRatio is the share of the requests that were traced; 0: none.
	TraceRatio float64
	// Interrupted says that the comparison did not end by itself.
	Interrupted bool

	runs []Run // computed once: the bootstrap takes a while
}

// Policy is what one policy did.
type Policy struct {
	Name   string
	Blocks []Block
	// Slowest are the slowest requests that were traced, at most [MaxSlowest].
	Slowest []Traced
}

// Block is one stretch of the schedule under one policy.
type Block struct {
	// At is where it begins on the scenario's timeline.
	At time.Duration
	// Length is how long it lasted.
	Length time.Duration
	// Latencies are those of the requests that succeeded, from their intended start.
	Latencies []time.Duration
	// Errors counts the requests that failed or could not be sent.
	Errors int
	// Refused counts those of Errors that bobtail refused, at either end, by the reason of
	// the status; Late those of the others whose deadline passed.
	Refused map[string]int
	Late    int
	// Classes has an entry for each class, in a scenario with criticality.
	Classes map[string]Class
	// Calls counts leaf calls, CallsOK those that succeeded, Attempts what was
	// really sent for all.
	Calls, CallsOK, Attempts int64
}

// Class is what became of the requests of one class.
type Class struct{ Calls, OK int }

// Run is one policy's line. A nil is what the samples cannot give.
type Run struct {
	Policy string `json:"policy"`
	// Calls are requests: with a fan-out, each made many leaf calls.
	Calls    int         `json:"calls"`
	Errors   int         `json:"errors"`
	MeanMs   *float64    `json:"mean_ms"`
	P50      *float64    `json:"p50_ms"`
	P50CI    *[2]float64 `json:"p50_ci_ms"`
	P90      *float64    `json:"p90_ms"`
	P90CI    *[2]float64 `json:"p90_ci_ms"`
	P99      *float64    `json:"p99_ms"`
	P99CI    *[2]float64 `json:"p99_ci_ms"`
	P999     *float64    `json:"p999_ms"`
	P999CI   *[2]float64 `json:"p999_ci_ms"`
	P50Ratio *float64    `json:"p50_ratio"` // to the first policy
	P99Ratio *float64    `json:"p99_ratio"`
	// AttemptsPerCall is attempts sent / leaf calls: 1.05 is 5% extra load.
	AttemptsPerCall *float64 `json:"attempts_per_call"`
	// WastedPerCall is (attempts sent - leaf calls that succeeded) / leaf calls: attempts
	// whose answer nobody used.
	WastedPerCall *float64 `json:"wasted_per_call"`
	// GoodputPerS is successful requests / the time in which they were to arrive.
	GoodputPerS *float64 `json:"goodput_per_s"`
	// Faults is how it came through faults that begin or end; nil if there are none.
	Faults *Recovery `json:"faults,omitempty"`
	// Slowest are the slowest requests that were traced, from the slowest on; absent if none was.
	Slowest []Traced `json:"slowest,omitempty"`
	// Timeline has a bin per block.
	Timeline []Bin `json:"timeline"`
}

// levels are the percentiles that a report prints.
var levels = [...]float64{0.5, 0.9, 0.99, 0.999}

// Runs returns a line per policy. The first call computes them; the report must
// not change after it.
func (r *Report) Runs() []Run {
	if len(r.runs) == len(r.Policies) {
		return r.runs
	}
	r.runs = nil
	for _, p := range r.Policies {
		run := p.run(r.Seed)
		run.Timeline, run.Faults, run.Slowest = p.timeline(), p.recovery(r.Scenario), p.Slowest
		r.runs = append(r.runs, run)
	}
	for i := range r.runs {
		run, first := &r.runs[i], r.runs[0]
		run.P50Ratio, run.P99Ratio = ratio(run.P50, first.P50), ratio(run.P99, first.P99)
	}
	return r.runs
}

func (p Policy) run(seed uint64) Run {
	run := Run{Policy: p.Name}
	var sum, length time.Duration
	var ok int
	var calls, callsOK, attempts int64
	for _, b := range p.Blocks {
		run.Calls += b.requests()
		run.Errors += b.Errors
		ok += len(b.Latencies)
		for _, d := range b.Latencies {
			sum += d
		}
		length += b.Length
		calls += b.Calls
		callsOK += b.CallsOK
		attempts += b.Attempts
	}
	run.MeanMs = quotient(ms(sum), float64(ok))
	run.AttemptsPerCall = quotient(float64(attempts), float64(calls))
	run.WastedPerCall = quotient(float64(attempts-callsOK), float64(calls))
	run.GoodputPerS = quotient(float64(ok), length.Seconds())

	s := newSample(slices.DeleteFunc(slices.Clone(p.Blocks), func(b Block) bool { return b.requests() == 0 }))
	points := s.quantiles(levels[:])
	intervals := s.bootstrap(seed, levels[:])
	for i, to := range [...]struct {
		point **float64
		ci    **[2]float64
	}{{&run.P50, &run.P50CI}, {&run.P90, &run.P90CI}, {&run.P99, &run.P99CI}, {&run.P999, &run.P999CI}} {
		if run.Calls < Needs(levels[i]) {
			continue
		}
		*to.point, *to.ci = points[i], intervals[i]
	}
	return run
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func ratio(a, b *float64) *float64 {
	if a == nil || b == nil {
		return nil
	}
	return quotient(*a, *b)
}

func quotient(a, b float64) *float64 {
	if b == 0 {
		return nil
	}
	q := a / b
	return &q
}
