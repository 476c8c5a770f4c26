package report

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

// A bin tells of its own requests; a percentile only where it is one.
func TestTimeline(t *testing.T) {
	ms := func(values ...int) (all []time.Duration) {
		for _, v := range values {
			all = append(all, time.Duration(v)*time.Millisecond)
		}
		return all
	}
	hundreds := make([]time.Duration, 400)
	for i := range hundreds {
		hundreds[i] = time.Duration(400-i) * time.Millisecond
	}
	f := func(v float64) *float64 { return &v }
	p := Policy{Blocks: []Block{
		{At: 0, Length: 500 * time.Millisecond, Latencies: ms(6, 2, 3, 1, 5), Errors: 1, Calls: 6, Attempts: 9},
		{At: 500 * time.Millisecond, Length: 500 * time.Millisecond, Latencies: ms(1), Errors: 9, Calls: 10, Attempts: 10},
		{At: 2 * time.Second, Length: time.Second, Latencies: ms(1, 2, 3), Calls: 3, Attempts: 3},
		{At: 3 * time.Second, Length: time.Second, Latencies: hundreds, Calls: 400, Attempts: 400},
		{At: 4 * time.Second, Length: time.Second, Latencies: hundreds, Errors: 10, Calls: 410, Attempts: 410},
		{At: 5 * time.Second, Length: 0, Latencies: ms(1), Calls: 1},
	}}
	want := []Bin{
		{T: 0, Offered: 12, Goodput: 10, AttemptsPerCall: f(1.5), Errors: 1, P50: f(3)},
		{T: 0.5, Offered: 20, Goodput: 2, AttemptsPerCall: f(1), Errors: 9},
		{T: 2, Offered: 3, Goodput: 3, AttemptsPerCall: f(1)},
		{T: 3, Offered: 400, Goodput: 400, AttemptsPerCall: f(1), P50: f(200), P99: f(396)},
		{T: 4, Offered: 410, Goodput: 400, AttemptsPerCall: f(1), Errors: 10, P50: f(205)},
	}
	if diff := cmp.Diff(want, p.timeline()); diff != "" {
		t.Errorf("timeline (-want +got):\n%s", diff)
	}
}

func TestTimelineKeys(t *testing.T) {
	r := &Report{Scenario: named(t, "outage"), Policies: []Policy{out(drawn("none", 25, 10, time.Millisecond, 0), 15, 1), {Name: "empty"}}}
	var text bytes.Buffer
	if err := r.JSON(&text); err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Schema int
		Runs   []struct {
			Timeline []map[string]any
			Faults   map[string]any
		}
	}
	if err := json.Unmarshal(text.Bytes(), &doc); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"t_s", "offered_per_s", "goodput_per_s", "attempts_per_call", "errors", "p50_ms"} {
		if _, ok := doc.Runs[0].Timeline[0][key]; !ok {
			t.Errorf("no key %q in %v", key, doc.Runs[0].Timeline[0])
		}
	}
	for _, key := range []string{"before", "during", "after", "recovered_s"} {
		if _, ok := doc.Runs[0].Faults[key]; !ok {
			t.Errorf("no key %q in %v", key, doc.Runs[0].Faults)
		}
	}
	if doc.Schema != 1 || len(doc.Runs[0].Timeline) != 25 || doc.Runs[1].Timeline == nil {
		t.Errorf("schema %d, %d bins, want 1, 25 and an empty list for no blocks", doc.Schema, len(doc.Runs[0].Timeline))
	}
}

// The timeline fits a screen, whatever the run's length.
func TestChart(t *testing.T) {
	for _, c := range []struct {
		length, block time.Duration
		rows          int
		width         string
	}{
		{500 * time.Millisecond, 500 * time.Millisecond, 1, "1 s"},
		{25 * time.Second, 500 * time.Millisecond, 25, "1 s"},
		{24987654321, 500 * time.Millisecond, 25, "1 s"},
		{30 * time.Second, 500 * time.Millisecond, 30, "1 s"},
		{31 * time.Second, 500 * time.Millisecond, 16, "2 s"},
		{200 * time.Second, 500 * time.Millisecond, 20, "10 s"},
		{30 * time.Second, 3 * time.Second, 6, "5 s"},
		{3 * time.Hour, 10 * time.Second, 18, "600 s"},
		{50 * time.Hour, time.Hour, 50, "3,600 s"}, // as wide as they get
	} {
		p := Policy{Name: "none"}
		for at := time.Duration(0); at < c.length; at += c.block {
			p.Blocks = append(p.Blocks, Block{At: at, Length: min(c.block, c.length-at), Latencies: make([]time.Duration, 7)})
		}
		r := &Report{Scenario: &scenario.Scenario{}, Block: c.block, Policies: []Policy{p}}
		var out bytes.Buffer
		r.chart(&out)
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		if len(lines)-2 != c.rows || !strings.HasSuffix(lines[0], "a row is "+c.width) {
			t.Errorf("%v in blocks of %v: %d rows, %q, want %d of %s", c.length, c.block, len(lines)-2, lines[0], c.rows, c.width)
		}
		last := strings.Fields(lines[len(lines)-1])[0]
		if want := strings.Repeat(" ", len(last)-1) + "0 s "; !strings.HasPrefix(lines[2], want) {
			t.Errorf("%v in blocks of %v: the first row %q, want %q before it", c.length, c.block, lines[2], want)
		}
	}
}

// A row says so if any part of it lies in a fault.
func TestChartMarks(t *testing.T) {
	p := Policy{Name: "none"}
	for i := range 10 {
		p.Blocks = append(p.Blocks, Block{At: time.Duration(i) * time.Second, Length: time.Second, Latencies: make([]time.Duration, 7)})
	}
	r := &Report{Block: time.Second, Policies: []Policy{p}, Scenario: &scenario.Scenario{Faults: []scenario.Fault{
		{From: scenario.Duration(3500 * time.Millisecond), For: scenario.Duration(100 * time.Millisecond)},
		{From: scenario.Duration(5500 * time.Millisecond), For: scenario.Duration(1500 * time.Millisecond)},
	}}}
	var out bytes.Buffer
	r.chart(&out)
	var marked []string
	for l := range strings.Lines(out.String()) {
		if strings.HasSuffix(l, "fault\n") {
			marked = append(marked, strings.Fields(l)[0])
		}
	}
	if diff := cmp.Diff([]string{"3", "5", "6"}, marked); diff != "" {
		t.Errorf("rows marked (-want +got):\n%s", diff)
	}
}
