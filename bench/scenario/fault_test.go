package scenario

import (
	"math"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"pgregory.net/rapid"
)

const sec = time.Second

func at(d time.Duration) Duration { return Duration(d) }

// When a fault is in force: a pure table.
func TestWindow(t *testing.T) {
	once := Fault{From: at(10 * sec), For: at(5 * sec)}
	periodic := Fault{From: at(5 * sec), For: at(5 * sec), Every: at(15 * sec)}
	atOnce := Fault{For: at(2 * sec), Every: at(4 * sec)}
	staying := Fault{From: at(3 * sec)}
	for _, c := range []struct {
		what  string
		fault Fault
		at    time.Duration
		want  Span
		ok    bool
	}{
		{"always, in the warm-up", Fault{}, -sec, always, true},
		{"always, late", Fault{}, 1000 * sec, always, true},
		{"once, before", once, -sec, Span{10 * sec, 15 * sec}, true},
		{"once, its last moment", once, 15*sec - 1, Span{10 * sec, 15 * sec}, true},
		{"once, after", once, 15 * sec, Span{10 * sec, 15 * sec}, false},
		{"staying, before", staying, 0, Span{3 * sec, math.MaxInt64}, true},
		{"staying, late", staying, 1000 * sec, Span{3 * sec, math.MaxInt64}, true},
		{"periodic, in the warm-up", periodic, -100 * sec, Span{5 * sec, 10 * sec}, true},
		{"periodic, in the first", periodic, 7 * sec, Span{5 * sec, 10 * sec}, true},
		{"periodic, as the first ends", periodic, 10 * sec, Span{20 * sec, 25 * sec}, true},
		{"periodic, in the third", periodic, 36 * sec, Span{35 * sec, 40 * sec}, true},
		{"from 0, in the warm-up", atOnce, -1, Span{0, 2 * sec}, true},
		{"from 0, between", atOnce, 3 * sec, Span{4 * sec, 6 * sec}, true},
	} {
		got, ok := c.fault.window(c.at)
		if ok != c.ok || ok && got != c.want {
			t.Errorf("%s: %v, %v, want %v, %v", c.what, got, ok, c.want, c.ok)
		}
	}
}

// Which fault an attempt meets: kind, backend and moment decide, the first counts.
func TestFaultMet(t *testing.T) {
	sc := &Scenario{Faults: []Fault{
		{Kind: Stall, From: at(sec), For: at(sec)},
		{Kind: Error, From: at(sec), For: at(sec), Backends: []int{1}, Code: Code(codes.Internal), Probability: 1},
		{Kind: Blackhole, Backends: []int{1, 2}},
	}}
	for _, c := range []struct {
		backend int
		at      time.Duration
		want    int // -1: none
	}{
		{0, 1500 * time.Millisecond, -1}, // stalled: served, but late
		{1, 1500 * time.Millisecond, 1},
		{1, 2 * sec, 2},
		{1, -sec, 2},
		{2, 1500 * time.Millisecond, 2},
		{3, 0, -1},
	} {
		got := sc.Fault(1, 2, 0, c.backend, c.at)
		switch {
		case c.want < 0 && got != nil:
			t.Errorf("backend %d at %v: %+v, want none", c.backend, c.at, *got)
		case c.want >= 0 && got != &sc.Faults[c.want]:
			t.Errorf("backend %d at %v: %+v, want fault %d", c.backend, c.at, got, c.want)
		}
	}
}

// Errors hit their share of attempts, whichever backend a policy picks and
// whenever; attempts of a call, and two faults, are independent.
func TestErrorLuck(t *testing.T) {
	sc := &Scenario{Faults: []Fault{{Kind: Error, Probability: 0.2}, {Kind: Error, Backends: []int{1}, Probability: 0.2}}}
	const n = 50_000
	var hits, both, either float64
	for id := range uint64(n) {
		first := sc.Fault(1, id, 0, 0, 0) != nil
		if first != (sc.Fault(1, id, 0, 2, time.Hour) != nil) {
			t.Fatalf("call %d has other luck at another backend an hour later", id)
		}
		if first {
			hits++
			if sc.Fault(1, id, 1, 0, 0) != nil {
				both++
			}
		}
		if sc.Fault(1, id, 0, 1, 0) != nil {
			either++
		}
	}
	for what, c := range map[string][2]float64{"first attempts": {hits / n, 0.2}, "two in a row": {both / n, 0.04}, "of two faults": {either / n, 0.36}} {
		if math.Abs(c[0]-c[1]) > 5*math.Sqrt(c[1]*(1-c[1])/n) {
			t.Errorf("%s: a share of %.4f, want %v", what, c[0], c[1])
		}
	}
}

// Work waits while a backend stands still, whatever makes it so.
func TestFinish(t *testing.T) {
	sc := &Scenario{Faults: []Fault{
		{Kind: Stall, From: at(10 * sec), For: at(10 * sec)},
		{Kind: Stall, From: at(18 * sec), For: at(4 * sec), Backends: []int{0}},
		{Kind: Error, From: at(0), For: at(sec), Probability: 1},
	}}
	for _, c := range []struct {
		what           string
		backend        int
		at, work, want time.Duration
	}{
		{"before", 0, 0, 10 * sec, 10 * sec},
		{"caught", 0, 9 * sec, 2 * sec, 23 * sec},
		{"begins in the first", 1, 15 * sec, sec, 21 * sec},
		{"begins in both", 0, 19 * sec, sec, 23 * sec},
		{"begins in the second", 0, 21 * sec, sec, 23 * sec},
		{"no work, in it", 1, 15 * sec, 0, 20 * sec},
		{"after", 0, 22 * sec, sec, 23 * sec},
	} {
		if got := sc.Finish(1, c.backend, c.at, c.work); got != c.want {
			t.Errorf("%s: done at %v, want %v", c.what, got, c.want)
		}
	}

	// Against a model that steps through time: stalls of all three sources at once.
	rapid.Check(t, func(t *rapid.T) {
		const ms = time.Millisecond
		draw := func(name string, lo, hi int) time.Duration {
			return time.Duration(rapid.IntRange(lo, hi).Draw(t, name)) * ms
		}
		sc := &Scenario{Faults: []Fault{
			{Kind: Stall, From: at(draw("from", 0, 50)), For: at(draw("for", 1, 50))},
			{Kind: Stall, From: at(draw("from 2", 0, 20)), For: at(draw("for 2", 1, 20)), Every: at(draw("every", 40, 60))},
		}}
		begin, work := draw("at", -20, 150), draw("work", 1, 100)
		now := begin
		for left := work; left > 0; now += ms {
			stalled := false
			for i := range sc.Faults {
				w, ok := sc.Faults[i].window(now)
				stalled = stalled || ok && w.Contains(now)
			}
			if !stalled {
				left -= ms
			}
		}
		if got := sc.Finish(1, 0, begin, work); got != now {
			t.Errorf("%v of work begun at %v is done at %v, want %v", work, begin, got, now)
		}
	})
}

func TestSpan(t *testing.T) {
	w := Span{sec, 2 * sec}
	if w.Contains(sec-1) || !w.Contains(sec) || !w.Contains(2*sec-1) || w.Contains(2*sec) {
		t.Error("a span has its beginning and not its end")
	}
}

func TestFaultSpans(t *testing.T) {
	for _, c := range []struct {
		what   string
		faults []Fault
		want   []Span
	}{
		{"none", nil, nil},
		{"always", []Fault{{}}, nil},
		{"periodic", []Fault{{From: at(5 * sec), For: at(5 * sec), Every: at(15 * sec)}}, []Span{{5 * sec, 10 * sec}, {20 * sec, 25 * sec}}},
		{"ends beyond", []Fault{{From: at(29 * sec), For: at(5 * sec)}}, []Span{{29 * sec, 34 * sec}}},
		{"begins beyond", []Fault{{From: at(30 * sec), For: at(5 * sec)}}, nil},
		{"never ends", []Fault{{From: at(10 * sec)}}, []Span{{10 * sec, math.MaxInt64}}},
		{"overlapping, in disorder", []Fault{{From: at(8 * sec), For: at(2 * sec)}, {From: at(12 * sec), For: at(sec)}, {From: at(2 * sec), For: at(6 * sec)}, {From: at(3 * sec), For: at(sec)}},
			[]Span{{2 * sec, 10 * sec}, {12 * sec, 13 * sec}}},
	} {
		sc := &Scenario{Faults: c.faults}
		if got := sc.FaultSpans(30 * sec); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.what, got, c.want)
		}
		if timed := sc.TimedFaults(); timed != (c.what != "none" && c.what != "always") {
			t.Errorf("%s: timed %v", c.what, timed)
		}
	}
}

// Work takes longer if it begins while the backend is slow, whatever came before, and two
// faults at once multiply.
func TestSlowed(t *testing.T) {
	const ms = time.Millisecond
	sc := &Scenario{
		ServiceTime: []Component{{Weight: 1, Constant: &Constant{at(10 * ms)}}},
		Slow:        []Slow{{Backend: 1, Factor: 2}},
		Faults: []Fault{
			{Kind: Slowed, From: at(sec), For: at(sec), Factor: 2, Add: at(100 * ms), Backends: []int{0, 1}},
			{Kind: Slowed, From: at(sec + sec/2), Factor: 3},
			{Kind: Stall, From: at(5 * sec), For: at(sec)},
		},
	}
	for _, c := range []struct {
		backend  int
		at, want time.Duration
	}{
		{0, -sec, 10 * ms},
		{0, sec - 1, 10 * ms},
		{0, sec, 120 * ms},
		{1, sec, 140 * ms},
		{2, sec, 10 * ms},
		{0, sec + sec/2, 360 * ms},
		{2, sec + sec/2, 30 * ms},
		{0, 2 * sec, 30 * ms},
		{0, 5 * sec, sec + 30*ms},
	} {
		if got := sc.Service(1, 2, 0, c.backend, c.at); got != c.want {
			t.Errorf("backend %d at %v: %v, want %v", c.backend, c.at, got, c.want)
		}
	}
	if f := sc.Fault(1, 2, 0, 0, sec); f != nil {
		t.Errorf("%+v: a slow backend answers all the same", *f)
	}
}

// Going from one stretch to the next finds every moment that a backend is down, and no
// other: against a model that steps through time.
func TestDown(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const ms, end = time.Millisecond, 200
		draw := func(name string, lo, hi int) time.Duration {
			return time.Duration(rapid.IntRange(lo, hi).Draw(t, name)) * ms
		}
		sc := &Scenario{Faults: []Fault{
			{Kind: Down, From: at(draw("from", 0, 50)), For: at(draw("for", 1, 50)), Backends: []int{1}},
			{Kind: Down, From: at(draw("from 2", 0, 20)), For: at(draw("for 2", 1, 20)), Every: at(draw("every", 40, 60))},
			{Kind: Down, For: at(sec), Backends: []int{0}},
			{Kind: Blackhole},
		}}
		var down [end]bool
		for w, ok := sc.Down(1, 0); ok && w.From < end*ms; w, ok = sc.Down(1, w.To) {
			for i := max(w.From, 0) / ms; i < min(w.To/ms, end); i++ {
				down[i] = true
			}
		}
		for i := range down {
			now := time.Duration(i) * ms
			if want := sc.Faults[0].holds(1, now) || sc.Faults[1].holds(1, now); down[i] != want {
				t.Errorf("down %v at %v, want %v", down[i], now, want)
			}
		}
		if _, ok := (&Scenario{Faults: sc.Faults[:1]}).Down(2, 0); ok {
			t.Error("a backend without the fault is down")
		}
	})
}
