package report

import (
	"bytes"
	"cmp"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

// Sweep is what policies make of more and more load.
type Sweep struct {
	Scenario *scenario.Scenario
	Seed     uint64
	// Duration is how long each point was measured, Warmup what was dropped before.
	Duration, Warmup time.Duration
	// Points stand in the order in which they were measured: by load, then by policy.
	Points []Point
	// Interrupted says that the sweep did not end by itself.
	Interrupted bool
}

// Point is one policy under one load. A nil is what the samples cannot give.
//
// Every request is one of four: it succeeded, it was refused, its deadline passed, or it
// failed otherwise. Those that were not refused were accepted.
type Point struct {
	Policy string `json:"policy"`
	// Load is what was to be offered, in multiples of the capacity.
	Load float64 `json:"load"`
	// Calls are requests.
	Calls       int     `json:"calls"`
	OfferedPerS float64 `json:"offered_per_s"`
	GoodputPerS float64 `json:"goodput_per_s"`
	// GoodputShare is goodput / the best possible: what is offered or, if that is less,
	// the capacity.
	GoodputShare float64 `json:"goodput_share"`
	// P50 and P99 are of the accepted, from their intended start; one that did not succeed
	// ranks as slower than all that did. nil: it falls among those, or there are too few.
	P50   *float64    `json:"p50_ms"`
	P99   *float64    `json:"p99_ms"`
	P99CI *[2]float64 `json:"p99_ci_ms"`
	// Refused, Late and Failed are shares of Calls.
	Refused float64 `json:"refused"`
	Late    float64 `json:"late"`
	Failed  float64 `json:"failed"`
	// Reasons counts the refused by the reason of their status.
	Reasons map[string]int `json:"reasons"`
	// AttemptsPerCall is attempts sent / leaf calls: less than 1 where the client refuses
	// before anything is sent.
	AttemptsPerCall *float64 `json:"attempts_per_call"`
	WastedPerCall   *float64 `json:"wasted_per_call"`
	// Classes is the share of requests that succeeded, by criticality, in a scenario that
	// has it.
	Classes map[string]float64 `json:"classes,omitempty"`

	Generator generator `json:"generator"`
	accepted  int
}

// NewPoint is the line of a policy that was run alone, by the report of that run. It is not
// ok when that has no requests.
func NewPoint(r *Report, load float64) (pt Point, ok bool) {
	p := r.Policies[0]
	pt = Point{Policy: p.Name, Load: load, Reasons: map[string]int{}}
	var length time.Duration
	var refused, late, errs, good int
	var calls, callsOK, attempts int64
	classes := map[string]Class{}
	var accepted []Block
	for _, b := range p.Blocks {
		length += b.Length
		errs += b.Errors
		late += b.Late
		good += len(b.Latencies)
		calls += b.Calls
		callsOK += b.CallsOK
		attempts += b.Attempts
		for reason, n := range b.Refused {
			pt.Reasons[reason] += n
			refused += n
			b.Errors -= n
		}
		for name, c := range b.Classes {
			sum := classes[name]
			classes[name] = Class{sum.Calls + c.Calls, sum.OK + c.OK}
		}
		if b.requests() > 0 {
			accepted = append(accepted, b)
		}
	}
	pt.Calls = good + errs
	if pt.Calls == 0 || length == 0 {
		return pt, false
	}
	pt.OfferedPerS = float64(pt.Calls) / length.Seconds()
	pt.GoodputPerS = float64(good) / length.Seconds()
	pt.GoodputShare = pt.GoodputPerS / min(pt.OfferedPerS, cmp.Or(r.Scenario.Capacity(), pt.OfferedPerS))
	share := func(n int) float64 { return float64(n) / float64(pt.Calls) }
	pt.Refused, pt.Late, pt.Failed = share(refused), share(late), share(errs-refused-late)
	pt.AttemptsPerCall = quotient(float64(attempts), float64(calls))
	pt.WastedPerCall = quotient(float64(attempts-callsOK), float64(calls))
	for name, c := range classes {
		if pt.Classes == nil {
			pt.Classes = map[string]float64{}
		}
		pt.Classes[name] = float64(c.OK) / float64(c.Calls)
	}

	pt.accepted = pt.Calls - refused
	s := newSample(accepted)
	qs := []float64{0.5, 0.99}
	points, intervals := s.quantiles(qs), s.bootstrap(r.Seed, qs)
	if pt.accepted >= Needs(qs[0]) {
		pt.P50 = points[0]
	}
	if pt.accepted >= Needs(qs[1]) {
		pt.P99, pt.P99CI = points[1], intervals[1]
	}
	g := r.Generator
	why := g.saturated([]Run{{P99: pt.P99}})
	pt.Generator = generator{
		LagP99Ms: ms(g.LagP99), CPU: g.CPU, Overflow: g.Overflow, Abandoned: g.Abandoned,
		Saturated: len(why) > 0, Why: why,
	}
	return pt, true
}

// Saturated names the points that are the generator's rather than the policies', and says
// why.
func (s *Sweep) Saturated() []string {
	var all []string
	for _, p := range s.Points {
		if p.Generator.Saturated {
			all = append(all, fmt.Sprintf("%s %s: %s", times(p.Load), p.Policy, strings.Join(p.Generator.Why, "; ")))
		}
	}
	return all
}

// times writes a load: 0.5x.
func times(load float64) string { return strconv.FormatFloat(load, 'g', -1, 64) + "x" }

// Table writes the sweep for reading.
func (s *Sweep) Table(w io.Writer) error {
	var out bytes.Buffer
	sc := s.Scenario
	fmt.Fprintf(&out, "%s · sweep of scenario %s · seed %d\n%s\n", Kind, sc.Name, s.Seed, sc.Description)
	fmt.Fprintf(&out, "%s of %s; 1x is %s requests/s, %s; timeout %v; each load and policy alone for %v, after %v of warm-up\n",
		plural(sc.Backends, "backend"), plural(sc.Workers, "worker"), fixed(0)(sc.Capacity()), sc.Arrivals, sc.Timeout, s.Duration, s.Warmup)

	rows := [][]string{{"load", "policy", "offered/s", "goodput/s", "of best", "p50 ms", "p99 ms", "its interval", "refused", "late", "failed", "attempts", "lag ms", "CPU"}}
	for i, p := range s.Points {
		if i > 0 && p.Load != s.Points[i-1].Load {
			rows = append(rows, nil)
		}
		rows = append(rows, p.cells())
	}
	out.WriteByte('\n')
	columns(&out, rows, 2)
	s.reasons(&out)
	s.classes(&out)

	fmt.Fprintln(&out, "\ngoodput: successes/s, and their share of the best possible, which is what is offered or the capacity")
	fmt.Fprintln(&out, "p50, p99: of what was not refused, from the intended start; late: the deadline passed; attempts: sent per call")
	fmt.Fprintln(&out, "lag: how late the generator sent, at p99; CPU: its share of the processors, the servers' not included")
	for _, why := range s.Saturated() {
		fmt.Fprintf(&out, "SATURATED: the figures of %s\n", why)
	}
	if s.Interrupted {
		fmt.Fprintln(&out, "INTERRUPTED: this is what there was")
	}
	_, err := w.Write(out.Bytes())
	return err
}

func (p Point) cells() []string {
	percentile := func(v *float64, q float64) string {
		switch {
		case p.accepted < Needs(q):
			return fmt.Sprintf("n/a (needs %s)", grouped(Needs(q)))
		case v == nil:
			return "failed"
		}
		return millisText(*v)
	}
	interval := ""
	if p.P99CI != nil {
		interval = millisText(p.P99CI[0]) + "–" + millisText(p.P99CI[1])
	}
	mark := ""
	if p.Generator.Saturated {
		mark = "!"
	}
	return []string{times(p.Load), p.Policy, grouped(int(p.OfferedPerS + 0.5)), grouped(int(p.GoodputPerS + 0.5)), fixed(3)(p.GoodputShare),
		percentile(p.P50, 0.5), percentile(p.P99, 0.99), interval, percent(p.Refused), percent(p.Late), percent(p.Failed),
		optional(p.AttemptsPerCall, fixed(3)), mark + millisText(p.Generator.LagP99Ms), fixed(0)(100*p.Generator.CPU) + "%"}
}

// reasons writes why requests were refused, over all loads of a policy.
func (s *Sweep) reasons(w *bytes.Buffer) {
	var policies []string
	counts := map[string]map[string]int{}
	for _, p := range s.Points {
		if len(p.Reasons) == 0 {
			continue
		}
		if counts[p.Policy] == nil {
			policies = append(policies, p.Policy)
			counts[p.Policy] = map[string]int{}
		}
		for reason, n := range p.Reasons {
			counts[p.Policy][reason] += n
		}
	}
	if len(policies) > 0 {
		w.WriteByte('\n')
	}
	for _, policy := range policies {
		var parts []string
		for _, reason := range sortedKeys(counts[policy]) {
			parts = append(parts, fmt.Sprintf("%s %s", reason, grouped(counts[policy][reason])))
		}
		fmt.Fprintf(w, "refused by %s: %s\n", policy, strings.Join(parts, ", "))
	}
}

// classes writes what share of each class succeeded.
func (s *Sweep) classes(w *bytes.Buffer) {
	names := map[string]int{}
	for _, p := range s.Points {
		for name := range p.Classes {
			names[name]++
		}
	}
	if len(names) == 0 {
		return
	}
	columnNames := sortedKeys(names)
	rows := [][]string{append([]string{"load", "policy"}, columnNames...)}
	for _, p := range s.Points {
		row := []string{times(p.Load), p.Policy}
		for _, name := range columnNames {
			cell := "-"
			if v, ok := p.Classes[name]; ok {
				cell = fixed(2)(100*v) + "%"
			}
			row = append(row, cell)
		}
		rows = append(rows, row)
	}
	w.WriteString("\nsucceeded, by criticality\n")
	columns(w, rows, 2)
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

type sweepDocument struct {
	Schema      int                `json:"schema"`
	Kind        string             `json:"kind"`
	Scenario    *scenario.Scenario `json:"scenario"`
	Seed        uint64             `json:"seed"`
	CapacityPer float64            `json:"capacity_per_s"`
	DurationS   float64            `json:"duration_s"`
	WarmupS     float64            `json:"warmup_s"`
	Interrupted bool               `json:"interrupted"`
	Points      []Point            `json:"points"`
}

// JSON writes the sweep as one document. What the samples cannot give is null.
func (s *Sweep) JSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(sweepDocument{
		Schema: schema, Kind: Kind, Scenario: s.Scenario, Seed: s.Seed, CapacityPer: s.Scenario.Capacity(),
		DurationS: s.Duration.Seconds(), WarmupS: s.Warmup.Seconds(), Interrupted: s.Interrupted,
		Points: append([]Point{}, s.Points...),
	})
}

// CSV writes a line per point, for a plot. What the samples cannot give is empty.
func (s *Sweep) CSV(w io.Writer) error {
	out := csv.NewWriter(w)
	text := func(v float64) string { return strconv.FormatFloat(v, 'g', 6, 64) }
	maybe := func(v *float64) string {
		if v == nil {
			return ""
		}
		return text(*v)
	}
	out.Write([]string{"policy", "load", "offered_per_s", "goodput_per_s", "goodput_share", "p50_ms", "p99_ms", "refused", "late", "failed", "attempts_per_call", "saturated"}) //nolint:errcheck // Error tells
	for _, p := range s.Points {
		out.Write([]string{p.Policy, text(p.Load), text(p.OfferedPerS), text(p.GoodputPerS), text(p.GoodputShare), maybe(p.P50), maybe(p.P99), //nolint:errcheck // Error tells
			text(p.Refused), text(p.Late), text(p.Failed), maybe(p.AttemptsPerCall), strconv.FormatBool(p.Generator.Saturated)})
	}
	out.Flush()
	return out.Error()
}
