package shedding

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

func newAdmission(t testing.TB, cfg AdmissionConfig) *Admission {
	t.Helper()
	a, err := NewAdmission(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// static is an admission with so many slots and so many places in the queue.
func static(slots, length int) AdmissionConfig {
	return AdmissionConfig{Limiter: LimiterConfig{Algorithm: Static, Limit: slots}, Queue: &QueueConfig{MaxLength: length}}
}

func TestNewAdmission(t *testing.T) {
	_, err := NewAdmission(AdmissionConfig{Limiter: LimiterConfig{Min: -1}, Queue: &QueueConfig{MaxLength: -1}})
	for _, want := range []string{"limiter min -1", "queue maxLength -1"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func (d Decision) String() string {
	return []string{"refused ", "admitted", "queued"}[d.Verb] + d.Reason.String()
}

func TestAdmissionSteps(t *testing.T) {
	a := newAdmission(t, static(1, 2))
	tickets := map[string]Ticket{}
	for i, s := range []struct {
		at      int
		do      string // a name arrives, "done", "leave NAME" or "tick"
		r       Request
		want    string
		settled string
	}{
		{at: 0, do: "a", want: "admitted"},
		{at: 1, do: "b", want: "queued"},
		{at: 2, do: "c", r: Request{Criticality: Sheddable}, want: "queued"},
		{at: 3, do: "d", r: Request{Criticality: Sheddable}, want: "refused OVERLOADED"},
		{at: 4, do: "e", r: Request{Extra: true}, want: "queued", settled: "c refused OVERLOADED after 2ms"},
		{at: 5, do: "f", want: "queued", settled: "e refused OVERLOADED after 1ms"},
		{at: 6, do: "g", want: "refused OVERLOADED"},
		{at: 7, do: "done", settled: "b admitted after 6ms"},
		{at: 8, do: "leave f", want: "true"},
		{at: 8, do: "leave f", want: "false"},
		{at: 8, do: "leave b", want: "false"},
		{at: 9, do: "h", r: Request{Deadline: at(30), Median: 22 * ms}, want: "refused DEADLINE_HOPELESS"},
		{at: 9, do: "i", r: Request{Deadline: at(30), Median: 11 * ms}, want: "queued"},
		{at: 10, do: "j", want: "queued"},
		{at: 18, do: "tick"},
		{at: 19, do: "tick", settled: "i refused QUEUE_TIMEOUT after 10ms"},
		{at: 20, do: "done", settled: "j admitted after 10ms"},
		{at: 21, do: "done"},
		{at: 22, do: "k", r: Request{Deadline: at(22)}, want: "refused DEADLINE_HOPELESS"},
		{at: 23, do: "l", want: "admitted"},
		{at: 24, do: "m", want: "queued"},
		{at: 124, do: "tick", settled: "m refused QUEUE_TIMEOUT after 100ms"},
		{at: 125, do: "done"},
	} {
		var got string
		name, left := strings.CutPrefix(s.do, "leave ")
		switch {
		case s.do == "done":
			a.Done(at(s.at), ms, Served)
		case s.do == "tick":
			if w := a.NextWake(); s.settled != "" && !w.Equal(at(s.at)) {
				t.Errorf("step %d: next wake %v, want now", i, w.Sub(at(0)))
			}
			a.Tick(at(s.at))
		case left:
			got = fmt.Sprint(a.Leave(at(s.at), tickets[name]))
		default:
			s.r.Owner = s.do
			d := a.Arrive(at(s.at), s.r)
			got = d.String()
			tickets[s.do] = d.Ticket
			if (d.RetryAfter > 0) != (d.Verb == Refused && d.Reason != Hopeless) {
				t.Errorf("step %d: %v, retry after %v", i, d, d.RetryAfter)
			}
		}
		var settled []string
		for _, e := range a.Settled() {
			settled = append(settled, fmt.Sprintf("%v %v after %v", e.Owner, e.Decision, e.Wait))
		}
		if got != s.want || strings.Join(settled, ", ") != s.settled {
			t.Fatalf("step %d, %s: %q, settled %q; want %q, %q", i, s.do, got, settled, s.want, s.settled)
		}
	}
	if st := a.Stats(); st.InFlight != 0 || st.Queued != 0 || !a.NextWake().IsZero() {
		t.Errorf("at the end: %+v, next wake %v", st, a.NextWake())
	}
}

func TestAdmissionWithoutQueue(t *testing.T) {
	a := newAdmission(t, AdmissionConfig{Limiter: LimiterConfig{Algorithm: Static, Limit: 1}})
	if d := a.Arrive(at(0), Request{}); d.Verb != Admitted {
		t.Error(d)
	}
	if d := a.Arrive(at(1), Request{Criticality: CriticalPlus}); d.Verb != Refused || d.Reason != AtLimit || d.Reason.String() != "OVERLOADED" {
		t.Error(d)
	}
	if a.Leave(at(2), Ticket{}) || !a.NextWake().IsZero() {
		t.Error("somebody waits")
	}
	a.Done(at(3), ms, Served)
	if d := a.Arrive(at(3), Request{}); d.Verb != Admitted {
		t.Error(d)
	}
}

// overload brings so many requests a millisecond, from and to, and lets one slot serve one
// of them.
func overload(a *Admission, from, to, perMs int, c Criticality) (events []Event) {
	for m := from; m < to; m++ {
		for i := range perMs {
			a.Arrive(at(m), Request{Criticality: c, Cohort: uint32(m*perMs + i)})
		}
		if a.Stats().InFlight > 0 {
			a.Done(at(m), ms, Served)
		}
		a.Settled()
		events = append(events, a.Events()...)
	}
	return events
}

// An overload begins when the wait has been over its target for an interval, and not
// before; it raises the cursor, which refuses the lowest; and it ends.
func TestAdmissionOverload(t *testing.T) {
	a := newAdmission(t, static(1, 1000))
	if e := overload(a, 0, 100, 3, Sheddable); a.Stats().Overloaded || len(e) != 0 {
		t.Fatalf("a burst of 100 ms is an overload: %v", e)
	}
	events := overload(a, 100, 1000, 3, Sheddable)
	if len(events) == 0 || events[0].Kind != OverloadBegan || events[0].At.After(at(115)) {
		t.Fatalf("events %v, want an overload at 106 ms", events)
	}
	st := a.Stats()
	if !st.Overloaded || st.Cursor == 0 || st.Cursor.Criticality() != Sheddable || st.Queued > 30 {
		t.Fatalf("%+v, want a cursor in the lowest class, and a short queue", st)
	}
	v := a.Verdict()
	if !v.Refuses(st.Cursor-1) || v.Refuses(st.Cursor) || v.RetryAfter() < 200*ms || v.RetryAfter() > 400*ms {
		t.Errorf("verdict at %d: retry after %v, want about 3 intervals", st.Cursor, v.RetryAfter())
	}
	if d := a.Arrive(at(1000), Request{Criticality: Sheddable, Cohort: uint32(st.Cursor%Cohorts) - 1}); d.Verb != Refused || d.Reason != BelowCursor {
		t.Errorf("below the cursor: %v", d)
	}
	// Nobody comes any more: the timer alone ends it.
	for range 100 {
		for a.Stats().InFlight > 0 {
			a.Done(a.now, ms, Served)
		}
		if w := a.NextWake(); w.IsZero() {
			break
		} else {
			a.Tick(w)
		}
	}
	if st := a.Stats(); st.Overloaded || st.Cursor != 0 || a.Verdict().Refuses(0) {
		t.Errorf("afterwards: %+v", st)
	}
	kinds := func(e Event) EventKind { return e.Kind }
	var got []EventKind
	for _, e := range a.Events() {
		got = append(got, kinds(e))
	}
	if !slices.Contains(got, OverloadEnded) || !slices.Contains(got, CursorMoved) {
		t.Errorf("events %v", got)
	}
}

// Soon after its end an overload begins again in a quarter of the time, and later not.
func TestAdmissionBeginsAgain(t *testing.T) {
	for _, tc := range []struct {
		pause, least, most time.Duration // from the first that has to wait
	}{
		{100 * ms, 25 * ms, 50 * ms},
		{1400 * ms, 25 * ms, 50 * ms},
		{1700 * ms, 100 * ms, 120 * ms},
	} {
		a := newAdmission(t, static(1, 1000))
		overload(a, 0, 500, 3, Sheddable)
		var m int
		for m = 500; a.Stats().Overloaded; m++ {
			overload(a, m, m+1, 0, Sheddable)
			a.Tick(at(m))
			if m > 10_000 {
				t.Fatal("the overload does not end")
			}
		}
		a.Events()
		from := m + int(tc.pause/ms)
		events := overload(a, from, from+200, 3, Sheddable)
		if len(events) == 0 || events[0].Kind != OverloadBegan {
			t.Fatalf("%v after the end: %v, want it to begin again", tc.pause, events)
		}
		if took := events[0].At.Sub(at(from)); took < tc.least || took > tc.most {
			t.Errorf("%v after the end it begins again in %v, want %v to %v", tc.pause, took, tc.least, tc.most)
		}
	}
}

// While an overload ends more and more is let in, to see what the server can do. What it is known
// to do stays: if it did not, the next overload would be met with a queue for many times that, and
// with classes that seem to fit.
func TestRoomIsNoCapacity(t *testing.T) {
	a := newAdmission(t, static(1, 1000))
	overload(a, 0, 1000, 10, Sheddable)
	known := a.Stats().Capacity
	m := 1000
	for ; a.Stats().Overloaded; m++ {
		// Half of what it can do, in which nothing can be seen of the rest.
		overload(a, m, m+1, m%2, Sheddable)
		a.Tick(at(m))
		if m > 10_000 {
			t.Fatal("the overload does not end")
		}
	}
	if got := a.Stats().Capacity; got > 1.1*known || got < 0.9*known {
		t.Errorf("capacity %.0f/s after the overload, was %.0f/s", got, known)
	}
	var longest time.Duration
	for end := m + 500; m < end; m++ {
		for i := range 2 {
			a.Arrive(at(m), Request{Criticality: Sheddable, Cohort: uint32(2*m + i)})
		}
		a.Done(at(m), ms, Served)
		for _, s := range a.Settled() {
			if s.Verb == Admitted {
				longest = max(longest, s.Wait)
			}
		}
	}
	if longest > 35*ms {
		t.Errorf("in the next one somebody waits %v and is admitted, want no more than the 25 ms until it is told", longest)
	}
}

// Demand that a tap has refused counts; without it the cursor comes down.
func TestAdmissionRefusedEarly(t *testing.T) {
	for _, report := range []bool{true, false} {
		a := newAdmission(t, static(1, 1000))
		overload(a, 0, 1000, 4, Sheddable)
		var g Gate
		if _, refused := g.Refuse(0); refused {
			t.Fatal("the zero gate refuses")
		}
		before := a.Stats().Cursor
		lowest := before
		cohort := uint32(0)
		for m := 1000; m < 6000; m++ {
			for range 4 {
				cohort++
				g.Publish(a.Verdict())
				if _, refused := g.Refuse(LevelOf(Sheddable, false, cohort)); !refused {
					a.Arrive(at(m), Request{Criticality: Sheddable, Cohort: cohort})
				}
			}
			if a.Stats().InFlight > 0 {
				a.Done(at(m), ms, Served)
			}
			a.Settled()
			if report {
				g.Report(a)
				a.Tick(at(m))
			}
			lowest = min(lowest, a.Stats().Cursor)
		}
		if !report && lowest > 0 {
			t.Errorf("cursor %d at the lowest: nobody told of those below", lowest)
		}
		if st := a.Stats(); report && (st.Demand < 3600 || st.Demand > 4400 || st.Cursor+15 < before) {
			t.Errorf("%+v, cursor was %d", st, before)
		}
	}
}

func TestAdmissionReconfigure(t *testing.T) {
	a := newAdmission(t, static(1, 10))
	for i := range 9 {
		a.Arrive(at(0), Request{Owner: i})
	}
	if err := a.Reconfigure(at(1), static(0, 10)); err == nil || a.Stats().Limit != 1 {
		t.Errorf("%v, limit %d", err, a.Stats().Limit)
	}
	if err := a.Reconfigure(at(1), static(3, 4)); err != nil {
		t.Fatal(err)
	}
	admitted, refused := 0, 0
	for _, s := range a.Settled() {
		if s.Verb == Admitted {
			admitted++
		} else {
			refused++
		}
	}
	if st := a.Stats(); st.Limit != 3 || st.InFlight != 3 || st.Queued != 2 || admitted != 2 || refused != 4 {
		t.Errorf("%+v, %d admitted, %d refused", st, admitted, refused)
	}
	if err := a.Reconfigure(at(2), AdmissionConfig{Limiter: LimiterConfig{Max: 5}}); err != nil {
		t.Fatal(err)
	}
	if st := a.Stats(); st.Limit != 5 || st.Queued != 0 || len(a.Settled()) != 2 {
		t.Errorf("without a queue: %+v", st)
	}
	a.limiter.set(3)
	if err := a.Reconfigure(at(3), AdmissionConfig{Limiter: LimiterConfig{Max: 5, Min: 2}, Queue: &QueueConfig{}}); err != nil || a.Stats().Limit != 3 {
		t.Errorf("%v: limit %d, was found to be 3", err, a.Stats().Limit)
	}
}

// What holds of every admission: each request is answered once; never more are admitted
// than the limit lets; nobody waits while a slot is free; of two of the same moment, the
// lower is not admitted from the queue when the higher is refused for want of room; the
// places of the queue are bounded.
func TestAdmissionProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const maxLength = 8
		cfg := AdmissionConfig{Limiter: LimiterConfig{Initial: 3, Max: 6}, Queue: &QueueConfig{MaxLength: maxLength}}
		a, err := NewAdmission(cfg)
		if err != nil {
			t.Fatal(err)
		}
		type request struct {
			id      int
			level   Level
			arrived time.Time
			ticket  Ticket
			ends    bool // has a deadline of its own
		}
		now, id := simEpoch, 0
		waiting := map[int]request{}
		type began struct{ at time.Time }
		var running []began
		var admittedOf, refusedOf []request // from the queue
		for range rapid.IntRange(1, 400).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(0, 3).Draw(t, "ms")) * ms)
			before := a.Stats()
			ended := false
			switch op := rapid.IntRange(0, 9).Draw(t, "op"); {
			case op < 6:
				r := Request{
					Criticality: Criticality(rapid.IntRange(-2, 1).Draw(t, "class")), Extra: rapid.Bool().Draw(t, "extra"),
					Cohort: rapid.Uint32Range(0, 63).Draw(t, "cohort"), Owner: id,
				}
				if rapid.IntRange(0, 3).Draw(t, "deadline") == 0 {
					r.Deadline = now.Add(time.Duration(rapid.IntRange(1, 60).Draw(t, "left")) * ms)
					r.Median = 5 * ms
				}
				req := request{id: id, level: LevelOf(r.Criticality, r.Extra, r.Cohort), arrived: now, ends: !r.Deadline.IsZero()}
				switch d := a.Arrive(now, r); d.Verb {
				case Admitted:
					running = append(running, began{now})
				case Queued:
					req.ticket = d.Ticket
					waiting[id] = req
				case Refused:
					if d.Reason == NotRefused {
						t.Fatal("refused for no reason")
					}
					if d.Reason != Hopeless {
						refusedOf = append(refusedOf, req)
					}
				}
				id++
			case op < 8 && len(running) > 0:
				i := rapid.IntRange(0, len(running)-1).Draw(t, "which")
				a.Done(now, now.Sub(running[i].at), Result(rapid.IntRange(0, 2).Draw(t, "result")))
				running = slices.Delete(running, i, i+1)
				ended = true
			case op == 8:
				for _, w := range waiting {
					// It may have ended at this very moment: then it is settled below.
					if a.Leave(now, w.ticket) {
						delete(waiting, w.id)
					}
					break
				}
			default:
				a.Tick(now)
			}
			for _, s := range a.Settled() {
				w, ok := waiting[s.Owner.(int)]
				if !ok || s.Verb == Queued || s.Ticket != w.ticket || s.Wait != now.Sub(w.arrived) {
					t.Fatalf("settled %+v of %+v", s, w)
				}
				delete(waiting, w.id)
				if s.Verb == Admitted {
					running = append(running, began{now})
					admittedOf = append(admittedOf, w)
				} else if !w.ends {
					refusedOf = append(refusedOf, w)
				}
			}
			st := a.Stats()
			if st.InFlight != len(running) || st.Queued != len(waiting) || st.Queued > maxLength || len(a.queue.places) > maxLength+1 {
				t.Fatalf("%+v, want %d in flight, %d queued of %d", st, len(running), len(waiting), maxLength)
			}
			if st.InFlight > st.Limit && st.InFlight > before.InFlight {
				t.Fatalf("%d in flight, limit %d", st.InFlight, st.Limit)
			}
			if st.Queued > 0 && st.InFlight < st.Limit {
				t.Fatalf("%+v: somebody waits for nothing", st)
			}
			if ended && st.Queued > 0 && a.NextWake().IsZero() {
				t.Fatal("nobody will wake those who wait")
			}
		}
		for _, r := range refusedOf {
			for _, w := range admittedOf {
				if w.arrived.Equal(r.arrived) && w.level.lane() < r.level.lane() {
					t.Fatalf("%+v was refused, %+v admitted from the queue", r, w)
				}
			}
		}
	})
}

func TestParseCriticality(t *testing.T) {
	last := Level(0)
	for c := Sheddable; c <= CriticalPlus; c++ {
		if got, ok := ParseCriticality(c.String()); !ok || got != c {
			t.Errorf("%v: %v, %v", c, got, ok)
		}
		for _, extra := range []bool{true, false} {
			for cohort := range uint32(Cohorts) {
				l := LevelOf(c, extra, cohort+Cohorts*9)
				if l != last || l.Criticality() != c {
					t.Fatalf("level %d of %v, want %d", l, l.Criticality(), last)
				}
				last++
			}
		}
	}
	if c, ok := ParseCriticality("Critical"); ok || c != Critical {
		t.Errorf("%v, %v", c, ok)
	}
	if LevelOf(99, false, 0) != LevelOf(CriticalPlus, false, 0) || LevelOf(-99, true, 0) != 0 {
		t.Error("what is out of range is not the nearest")
	}
}

func TestAdmissionDoesNotAllocate(t *testing.T) {
	a := newAdmission(t, AdmissionConfig{Queue: &QueueConfig{}})
	m := 0
	work := func() {
		m++
		for i := range 3 {
			a.Arrive(at(m), Request{Cohort: uint32(m + i), Deadline: at(m + 100), Median: ms})
		}
		a.Done(at(m), 10*ms, Served)
		a.Settled()
		a.Events()
		a.Verdict()
		a.NextWake()
	}
	for range 5000 {
		work()
	}
	if n := testenv.Allocs(2000, work); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkAdmission(b *testing.B) {
	step := func(b *testing.B, cfg AdmissionConfig, perDone int) {
		a := newAdmission(b, cfg)
		now := simEpoch
		n := uint32(0)
		b.ReportAllocs()
		for b.Loop() {
			now = now.Add(100 * time.Microsecond)
			for range perDone {
				n++
				a.Arrive(now, Request{Cohort: n, Deadline: now.Add(100 * ms), Median: ms})
			}
			a.Done(now, 10*ms, Served)
			a.Settled()
			a.NextWake()
		}
	}
	b.Run("free", func(b *testing.B) { step(b, AdmissionConfig{Queue: &QueueConfig{}}, 1) })
	b.Run("overload 4x", func(b *testing.B) { step(b, static(20, 1000), 4) })
	b.Run("gate", func(b *testing.B) {
		var g Gate
		g.Publish(verdict(100, time.Second))
		b.ReportAllocs()
		for b.Loop() {
			g.Refuse(50)
		}
	})
}
