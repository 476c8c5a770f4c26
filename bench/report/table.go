package report

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Kind is what every figure of this package was measured with.
const Kind = "real gRPC over loopback"

// Table writes the report for reading. Under each percentile stands its 95%
// interval.
func (r *Report) Table(w io.Writer) error {
	var out bytes.Buffer
	s := r.Scenario
	fmt.Fprintf(&out, "%s · scenario %s · seed %d\n%s\n", Kind, s.Name, r.Seed, s.Description)
	fmt.Fprintf(&out, "%s; %s requests/s", plural(s.Backends, "backend"), number(s.Rate))
	if s.Fanout > 1 {
		fmt.Fprintf(&out, " of %d leaf calls each", s.Fanout)
	}
	order := "in turns"
	if s.SideBySide {
		order = "side by side, each with backends of its own"
	}
	fmt.Fprintf(&out, ", %s; policies %s, in blocks of %v; %v of warm-up dropped\n\n", s.Arrivals, order, r.Block, r.Warmup)

	runs := r.Runs()
	rows := [][]string{{"policy", "calls", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "mean ms", "errors", "goodput", "attempts", "wasted", "p50 ×", "p99 ×"}}
	for _, run := range runs {
		rows = append(rows, run.cells()...)
	}
	align(&out, rows)
	if len(runs) > 0 && runs[0].Faults != nil {
		r.recoveries(&out, runs)
	}
	if len(runs) > 0 && (s.SideBySide || len(s.Faults) > 0) {
		r.chart(&out)
	}
	if r.TraceRatio > 0 {
		r.traces(&out, runs)
	}

	fmt.Fprintf(&out, "\nmilliseconds from a request's intended start; below each percentile its 95%% interval")
	if n := r.blocks(); n < minBlocks {
		fmt.Fprintf(&out, "\n(none from fewer than %d blocks)", minBlocks)
	}
	fmt.Fprintf(&out, "\ngoodput: successes/s; attempts: sent per %s; wasted: those whose answer nobody used; ×: to %s\n", call(s.Fanout), r.first())
	g := r.Generator
	fmt.Fprintf(&out, "generator: lag p99 %s ms, CPU %.0f%%", millisText(ms(g.LagP99)), 100*g.CPU)
	if g.Abandoned > 0 {
		fmt.Fprintf(&out, ", %s under way at the interrupt left out", plural(int(g.Abandoned), "request"))
	}
	out.WriteByte('\n')
	for _, why := range g.saturated(runs) {
		fmt.Fprintf(&out, "SATURATED: these figures are the generator's, not the policies'; %s\n", why)
	}
	if r.Interrupted {
		fmt.Fprintln(&out, "INTERRUPTED: this is what there was")
	}
	_, err := w.Write(out.Bytes())
	return err
}

func (r *Report) first() string {
	if len(r.Policies) == 0 {
		return "the first policy"
	}
	return r.Policies[0].Name
}

// blocks is the number of blocks of the policy that has the fewest.
func (r *Report) blocks() int {
	if len(r.Policies) == 0 {
		return 0
	}
	n := len(r.Policies[0].Blocks)
	for _, p := range r.Policies {
		n = min(n, len(p.Blocks))
	}
	return n
}

// cells are the two rows of a policy: its figures and their intervals.
func (run Run) cells() [][]string {
	figures := []string{run.Policy, grouped(run.Calls)}
	intervals := []string{"", ""}
	for i, p := range []struct {
		point *float64
		ci    *[2]float64
	}{{run.P50, run.P50CI}, {run.P90, run.P90CI}, {run.P99, run.P99CI}, {run.P999, run.P999CI}} {
		var point, ci string
		switch need := Needs(levels[i]); {
		case run.Calls < need:
			point = fmt.Sprintf("n/a (needs %s)", grouped(need))
		case p.point == nil:
			point = "failed" // more requests failed than the percentile leaves out
		default:
			point = millisText(*p.point)
		}
		if p.ci != nil {
			ci = millisText(p.ci[0]) + "–" + millisText(p.ci[1])
		}
		figures, intervals = append(figures, point), append(intervals, ci)
	}
	figures = append(figures, optional(run.MeanMs, millisText), grouped(run.Errors), optional(run.GoodputPerS, fixed(0)),
		optional(run.AttemptsPerCall, fixed(3)), optional(run.WastedPerCall, fixed(3)),
		optional(run.P50Ratio, fixed(2)), optional(run.P99Ratio, fixed(2)))
	return [][]string{figures, intervals}
}

// align writes rows in columns, the first to the left and the others to the right.
func align(w *bytes.Buffer, rows [][]string) { columns(w, rows, 1) }

// columns writes rows in columns, so many to the left and the others to the right. An
// empty row is an empty line.
func columns(w *bytes.Buffer, rows [][]string, left int) {
	width := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell))
			if i > 0 {
				line.WriteString("  ")
			}
			if i < left {
				line.WriteString(cell + pad)
			} else {
				line.WriteString(pad + cell)
			}
		}
		w.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
}

// millisText keeps three significant digits, which is what the histograms hold.
func millisText(v float64) string {
	switch {
	case v >= 1000:
		return grouped(int(v + 0.5))
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func fixed(digits int) func(float64) string {
	return func(v float64) string { return strconv.FormatFloat(v, 'f', digits, 64) }
}

func optional(v *float64, text func(float64) string) string {
	if v == nil {
		return "-"
	}
	return text(*v)
}

func number(v float64) string {
	if v == float64(int(v)) {
		return grouped(int(v))
	}
	return strconv.FormatFloat(v, 'g', -1, 64)
}

// grouped writes 12345 as 12,345.
func grouped(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return grouped(n) + " " + what + "s"
}

func call(fanout int) string {
	if fanout > 1 {
		return "leaf call"
	}
	return "call"
}
