package report

import (
	"bytes"
	"cmp"
	"slices"
	"time"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

// Recovery is what faults that begin and end did to a policy, and how it came
// out of them. A block belongs to a phase whole, by its middle.
type Recovery struct {
	// Before is the time up to the first fault, During that of all faults, After
	// whatever follows one, the time between two of them included.
	Before Phase `json:"before"`
	During Phase `json:"during"`
	After  Phase `json:"after"`
	// RecoveredS is the time in seconds, to a block, from the end of the last fault
	// that ended until goodput is at least 95% of what is offered and stays so for
	// a second. null: not within the run, or no fault ended.
	RecoveredS *float64 `json:"recovered_s"`
	// Ended says that a fault ended in the run: then a null RecoveredS is "never".
	Ended bool `json:"ended"`
}

// Phase is one of them. A nil is what no request says.
type Phase struct {
	AttemptsPerCall *float64 `json:"attempts_per_call"`
	// GoodputShare is requests that succeeded / requests.
	GoodputShare *float64 `json:"goodput_share"`
}

// What counts as recovered: 95% of what is offered, for a second.
const (
	recoveredShare = 0.95
	settled        = time.Second
)

// recovery is nil for a scenario without faults that begin or end.
func (p Policy) recovery(s *scenario.Scenario) *Recovery {
	if !s.TimedFaults() {
		return nil
	}
	var end time.Duration
	if n := len(p.Blocks); n > 0 {
		end = p.Blocks[n-1].At + p.Blocks[n-1].Length
	}
	spans := s.FaultSpans(end)
	var before, during, after []Block
	for _, b := range p.Blocks {
		switch middle := b.At + b.Length/2; {
		case len(spans) == 0 || middle < spans[0].From:
			before = append(before, b)
		case in(spans, middle):
			during = append(during, b)
		default:
			after = append(after, b)
		}
	}
	r := &Recovery{Before: phase(before), During: phase(during), After: phase(after)}
	// The last that ended: faults are in order, and as a rule all but the last one have.
	for i, span := range slices.Backward(spans) {
		if span.To >= end {
			continue
		}
		until := end
		if i+1 < len(spans) {
			until = spans[i+1].From
		}
		r.Ended = true
		r.RecoveredS = recovered(p.Blocks, scenario.Span{From: span.To, To: until})
		break
	}
	return r
}

// in reports whether one of the spans, which are in order and apart, contains at.
func in(spans []scenario.Span, at time.Duration) bool {
	i, _ := slices.BinarySearchFunc(spans, at, func(s scenario.Span, at time.Duration) int { return cmp.Compare(s.To, at) })
	return i < len(spans) && spans[i].Contains(at) || i+1 < len(spans) && spans[i+1].Contains(at)
}

func phase(blocks []Block) Phase {
	var requests, ok int
	var calls, attempts int64
	for _, b := range blocks {
		requests += b.requests()
		ok += len(b.Latencies)
		calls += b.Calls
		attempts += b.Attempts
	}
	return Phase{quotient(float64(attempts), float64(calls)), quotient(float64(ok), float64(requests))}
}

// recovered is the time in seconds from the beginning of healthy to that of the
// first block from which on goodput is good for long enough, within healthy; nil
// if there is none.
func recovered(blocks []Block, healthy scenario.Span) *float64 {
	var since time.Duration
	good := false // all from since on
	for _, b := range blocks {
		if b.At < healthy.From {
			continue
		}
		if b.At >= healthy.To {
			break
		}
		if float64(len(b.Latencies)) < recoveredShare*float64(b.requests()) {
			good = false
			continue
		}
		if !good {
			good, since = true, b.At
		}
		if min(b.At+b.Length, healthy.To)-since >= settled {
			v := (since - healthy.From).Seconds()
			return &v
		}
	}
	return nil
}

// recoveries writes a line per policy.
func (r *Report) recoveries(w *bytes.Buffer, runs []Run) {
	rows := [][]string{{"policy", "attempts in fault", "goodput before", "in fault", "after", "recovered after"}}
	for _, run := range runs {
		f := run.Faults
		after := "-"
		switch {
		case f.RecoveredS != nil:
			after = number(*f.RecoveredS) + " s"
		case f.Ended:
			after = "never"
		}
		rows = append(rows, []string{run.Policy, optional(f.During.AttemptsPerCall, fixed(3)),
			optional(f.Before.GoodputShare, percent), optional(f.During.GoodputShare, percent),
			optional(f.After.GoodputShare, percent), after})
	}
	w.WriteByte('\n')
	align(w, rows)
}

func percent(share float64) string { return fixed(1)(100*share) + "%" }
