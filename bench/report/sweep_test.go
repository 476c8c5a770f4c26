package report

import (
	"bytes"
	"math"
	"strings"
	"testing"
	"time"
)

// swept is a point of a policy that answers ok of calls requests in each of ten blocks, and
// refuses so many of the others; the last of these are late.
func swept(t *testing.T, name string, load float64, calls, ok, refused int, g Generator) Point {
	t.Helper()
	sc := *named(t, "overload")
	p := drawn(name, 10, ok, 10*time.Millisecond, 0)
	for i := range p.Blocks {
		b := &p.Blocks[i]
		b.Errors = calls - ok
		b.Late = b.Errors - refused
		if refused > 0 {
			b.Refused = map[string]int{"OVERLOADED": refused - 1, "QUEUE_TIMEOUT": 1}
		}
		b.Calls = int64(calls)
		b.Attempts = int64(calls - refused)
	}
	pt, okay := NewPoint(&Report{Scenario: &sc, Seed: 7, Policies: []Policy{p}, Generator: g}, load)
	if !okay {
		t.Fatal("no point")
	}
	return pt
}

func TestSweepGolden(t *testing.T) {
	good := Generator{LagP99: 420 * time.Microsecond, CPU: 0.213}
	classes := swept(t, "shed+client", 2, 1600, 780, 820, good)
	classes.Classes = map[string]float64{"critical": 1, "sheddable": 0.25}
	s := &Sweep{
		Scenario: named(t, "overload"), Seed: 7, Duration: 10 * time.Second, Warmup: 2 * time.Second,
		Points: []Point{
			swept(t, "none", 0.5, 400, 400, 0, good),
			swept(t, "shed", 0.5, 4, 4, 0, good), // too few for a p99
			swept(t, "none", 2, 1600, 12, 0, good),
			swept(t, "shed", 2, 1600, 790, 810, Generator{LagP99: time.Second, CPU: 0.97, Overflow: 3}),
			classes,
		},
		Interrupted: true,
	}
	for name, write := range map[string]func(*bytes.Buffer) error{
		"sweep.txt":  func(w *bytes.Buffer) error { return s.Table(w) },
		"sweep.json": func(w *bytes.Buffer) error { return s.JSON(w) },
		"sweep.csv":  func(w *bytes.Buffer) error { return s.CSV(w) },
	} {
		var out bytes.Buffer
		if err := write(&out); err != nil {
			t.Fatal(err)
		}
		golden(t, name, out.Bytes())
	}
	if why := s.Saturated(); len(why) != 1 || !strings.HasPrefix(why[0], "2x shed: it sent requests late") {
		t.Errorf("saturated: %q, want the one point", why)
	}
}

// What is refused is not accepted, so it moves no percentile; what is late does.
func TestPoint(t *testing.T) {
	sc := named(t, "overload") // 800/s
	block := Block{Length: time.Second, Errors: 700, Late: 50, Refused: map[string]int{"OVERLOADED": 600, "THROTTLED": 40},
		Calls: 1700, CallsOK: 1000, Attempts: 1660,
		Classes: map[string]Class{"critical": {Calls: 800, OK: 800}, "sheddable": {Calls: 900, OK: 200}}}
	for range 1000 {
		block.Latencies = append(block.Latencies, 10*time.Millisecond)
	}
	p, ok := NewPoint(&Report{Scenario: sc, Policies: []Policy{{Name: "x", Blocks: []Block{block, block}}}}, 2)
	if !ok {
		t.Fatal("no point")
	}
	near := func(what string, got, want float64) {
		if math.Abs(got-want) > 1e-9 {
			t.Errorf("%s %v, want %v", what, got, want)
		}
	}
	near("offered", p.OfferedPerS, 1700)
	near("goodput", p.GoodputPerS, 1000)
	near("of the best", p.GoodputShare, 1000./800)
	near("refused", p.Refused, 640./1700)
	near("late", p.Late, 50./1700)
	near("failed", p.Failed, 10./1700)
	near("attempts", *p.AttemptsPerCall, 1660./1700)
	near("critical", p.Classes["critical"], 1)
	near("sheddable", p.Classes["sheddable"], 2./9)
	if p.Calls != 3400 || p.Reasons["OVERLOADED"] != 1200 || p.Reasons["THROTTLED"] != 80 || block.Errors != 700 {
		t.Errorf("%d calls, %v", p.Calls, p.Reasons)
	}
	// 60 of 1060 accepted ones in each block failed: that is beyond p90 only.
	if p.P50 == nil || math.Abs(*p.P50-10) > 0.01 || p.P99 != nil {
		t.Errorf("%+v, want a p50 of 10 ms and no p99", p)
	}
	// Less is offered than can be done.
	p, _ = NewPoint(&Report{Scenario: sc, Policies: []Policy{{Name: "x", Blocks: []Block{{Length: 10 * time.Second, Latencies: block.Latencies}}}}}, 0.125)
	near("of the best", p.GoodputShare, 1)
	if _, ok := NewPoint(&Report{Scenario: sc, Policies: []Policy{{Name: "x", Blocks: []Block{{Length: time.Second}}}}}, 1); ok {
		t.Error("a point without requests")
	}
}
