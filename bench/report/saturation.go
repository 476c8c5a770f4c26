package report

import (
	"fmt"
	"time"
)

// Generator is how the generator itself fared.
type Generator struct {
	// LagP99 is how late it sent a request, at the 99th percentile.
	LagP99 time.Duration
	// CPU is the processor time it used, as a share of all cores; its children's
	// is not in it.
	CPU float64
	// Overflow counts requests that it did not send because too many were under
	// way, Abandoned those that an interrupt cut off.
	Overflow, Abandoned int64
}

// Thresholds of saturation. Measured on two cores at the default's 1,000
// requests/s: a lag of 0.3 to 0.9 ms at p99 and 27% of the processors when
// nothing else runs, 3 to 5 ms beside a compiler; a generator that cannot keep
// its schedule falls behind without end.
const (
	// maxLag bounds the lag, which is a part of every latency.
	maxLag = 10 * time.Millisecond
	// maxLagShare bounds it relative to the shortest p99 in the table: of that, more
	// than half would be the generator's own.
	maxLagShare = 0.5
	// maxCPU: above it the backends, which share the processors, no longer get theirs.
	maxCPU = 0.75
)

// Saturated says in plain words why the figures are the generator's rather than
// the policies'; empty means that they are not.
func (r *Report) Saturated() []string { return r.Generator.saturated(r.Runs()) }

func (g Generator) saturated(runs []Run) []string {
	limit := maxLag
	for _, run := range runs {
		if run.P99 != nil {
			limit = min(limit, time.Duration(maxLagShare**run.P99*float64(time.Millisecond)))
		}
	}
	var why []string
	if g.LagP99 > limit {
		why = append(why, fmt.Sprintf("it sent requests late, by %s ms at p99, want at most %s ms", millisText(ms(g.LagP99)), millisText(ms(limit))))
	}
	if g.CPU > maxCPU {
		why = append(why, fmt.Sprintf("it used %.0f%% of the processors, want at most %.0f%%", 100*g.CPU, 100*maxCPU))
	}
	if g.Overflow > 0 {
		why = append(why, fmt.Sprintf("%s not sent, because too many were under way", plural(int(g.Overflow), "request")))
	}
	return why
}
