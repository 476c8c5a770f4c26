package report

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

// Bin is one block of a policy's timeline. A request counts where it was meant to
// start, whenever it ended, and so do its attempts.
type Bin struct {
	// T is where it begins on the scenario's timeline, in seconds.
	T float64 `json:"t_s"`
	// Offered is requests, Goodput those that succeeded, per second of the bin.
	Offered float64 `json:"offered_per_s"`
	Goodput float64 `json:"goodput_per_s"`
	// AttemptsPerCall is as in Run.
	AttemptsPerCall *float64 `json:"attempts_per_call"`
	Errors          int      `json:"errors"`
	// The percentiles are absent where so few requests do not say, or where they
	// fall among the failures.
	P50 *float64 `json:"p50_ms,omitempty"`
	P99 *float64 `json:"p99_ms,omitempty"`
}

func (p Policy) timeline() []Bin {
	bins := []Bin{}
	for _, b := range p.Blocks {
		if b.Length <= 0 {
			continue // interrupted as it began
		}
		bin := Bin{
			T: b.At.Seconds(), Errors: b.Errors,
			Offered:         float64(b.requests()) / b.Length.Seconds(),
			Goodput:         float64(len(b.Latencies)) / b.Length.Seconds(),
			AttemptsPerCall: quotient(float64(b.Attempts), float64(b.Calls)),
		}
		sorted := slices.Sorted(slices.Values(b.Latencies))
		bin.P50, bin.P99 = b.quantile(sorted, 0.5), b.quantile(sorted, 0.99)
		bins = append(bins, bin)
	}
	return bins
}

func (b Block) requests() int { return len(b.Latencies) + b.Errors }

// quantile is the nearest rank in ms, failures slowest.
func (b Block) quantile(sorted []time.Duration, q float64) *float64 {
	rank := int(math.Ceil(q * float64(b.requests())))
	if b.requests() < Needs(q) || rank > len(sorted) {
		return nil
	}
	v := ms(sorted[rank-1].Round(time.Microsecond))
	return &v
}

// maxRows bounds the timeline in the table: what fits a screen. widths are what a
// row may stand for.
const maxRows = 30

var widths = []time.Duration{1 * time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second,
	20 * time.Second, 30 * time.Second, time.Minute, 2 * time.Minute, 5 * time.Minute, 10 * time.Minute,
	20 * time.Minute, 30 * time.Minute, time.Hour}

// chart writes the goodput of all policies over time.
func (r *Report) chart(w *bytes.Buffer) {
	end := r.end()
	if end <= 0 {
		return // interrupted before the first block
	}
	width := widths[len(widths)-1]
	for _, d := range widths {
		if d >= r.Block && int((end+d-1)/d) <= maxRows {
			width = d
			break
		}
	}
	fmt.Fprintf(w, "\nsuccesses/s over time, by intended start; a row is %s\n", plainly(width))
	header := []string{"from"}
	for _, p := range r.Policies {
		header = append(header, p.Name)
	}
	rows := [][]string{append(header, "")}
	spans := r.Scenario.FaultSpans(end)
	digits := len(plainly((end - 1) / width * width))
	for at := time.Duration(0); at < end; at += width {
		row := []string{fmt.Sprintf("%*s", digits, plainly(at))}
		for _, p := range r.Policies {
			row = append(row, optional(p.goodput(scenario.Span{From: at, To: at + width}), fixed(0)))
		}
		mark := ""
		if slices.ContainsFunc(spans, func(s scenario.Span) bool { return s.From < at+width && at < s.To }) {
			mark = "fault"
		}
		rows = append(rows, append(row, mark))
	}
	align(w, rows)
}

// goodput is successes per second of the blocks that begin within a span.
func (p Policy) goodput(s scenario.Span) *float64 {
	var ok int
	var length time.Duration
	for _, b := range p.Blocks {
		if s.Contains(b.At) {
			ok += len(b.Latencies)
			length += b.Length
		}
	}
	return quotient(float64(ok), length.Seconds())
}

// end is where the last block of all ends.
func (r *Report) end() (end time.Duration) {
	for _, p := range r.Policies {
		for _, b := range p.Blocks {
			end = max(end, b.At+b.Length)
		}
	}
	return end
}

// plainly writes 90 s, not 1m30s, so that moments line up.
func plainly(d time.Duration) string { return number(d.Seconds()) + " s" }
