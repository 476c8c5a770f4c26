package hedging

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

const ms = time.Millisecond

// script is a gate that says what it is told, and send when it has run out.
type script []verdict

func (s *script) permit(time.Duration, bool) verdict {
	if len(*s) == 0 {
		return send
	}
	v := (*s)[0]
	*s = (*s)[1:]
	return v
}

// event is one row: what happens at a time, and the step that must follow.
type event struct {
	at   time.Duration
	what string // "start", "tick", "ok K", "fatal K", "fail K", "stop K", "push K N" (N ms), "unsent K", "begin D" (D ms), "save K"
	want string // "launch N", "withdraw", "wake N" (ms), "winner K", in this order, or ""
}

func play(t *testing.T, c *core, g gate, events []event) {
	t.Helper()
	for i, e := range events {
		now := e.at
		var name string
		var k int16
		var n int
		fmt.Sscan(e.what, &name, &k, &n)
		var s step
		switch name {
		case "start":
			s = c.start(now, g)
		case "tick":
			s = c.tick(now, g)
		case "ok":
			s = c.end(now, k, result{class: success}, g)
		case "fatal":
			s = c.end(now, k, result{class: fatal}, g)
		case "fail":
			s = c.end(now, k, result{class: nonFatal}, g)
		case "stop":
			s = c.end(now, k, result{class: nonFatal, stop: true}, g)
		case "push":
			s = c.end(now, k, result{class: nonFatal, hasWait: true, wait: time.Duration(n) * ms}, g)
		case "unsent":
			s = c.unsent(now, k, g)
		case "begin":
			s = c.begin(now, time.Duration(k)*ms)
		case "save":
			s = c.save(k)
		default:
			t.Fatalf("row %d: no event %q", i, e.what)
		}
		var got []string
		if s.launch > 0 {
			got = append(got, fmt.Sprintf("launch %d", s.launch))
		}
		if s.withdraw {
			got = append(got, "withdraw")
		}
		if s.wake != noTime {
			got = append(got, fmt.Sprintf("wake %d", s.wake/ms))
		}
		if s.winner > 0 {
			got = append(got, fmt.Sprintf("winner %d", s.winner))
		}
		if g := strings.Join(got, ", "); g != e.want {
			t.Fatalf("row %d: at %v, %s: got %q, want %q", i, e.at, e.what, g, e.want)
		}
	}
}

// TestA6 names each rule of gRFC A6 on hedging. The same rules are told once more
// over real gRPC in TestA6OverGRPC.
func TestA6(t *testing.T) {
	for _, tc := range []struct {
		name     string
		max      int16
		delay    time.Duration
		deadline time.Duration
		gate     script
		events   []event
	}{{
		name: "attempt k goes out at (k-1) x delay", max: 4, delay: 500 * ms,
		events: []event{
			{0, "start", "launch 1, wake 500"},
			{499 * ms, "tick", "wake 500"},
			{500 * ms, "tick", "launch 1, wake 1000"},
			{1000 * ms, "tick", "launch 1, wake 1500"},
			{1500 * ms, "tick", "launch 1"},
			{5000 * ms, "tick", ""},
		},
	}, {
		name: "a timer that fires late does not shift the schedule", max: 3, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{14 * ms, "tick", "launch 1, wake 20"},
			{20 * ms, "tick", "launch 1"},
		},
	}, {
		name: "a delay of 0 sends all at once", max: 3, delay: 0,
		events: []event{
			{0, "start", "launch 3"},
			{1 * ms, "ok 2", "winner 2"},
		},
	}, {
		name: "the first success wins and the rest is over", max: 3, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", "launch 1, wake 20"},
			{12 * ms, "ok 2", "winner 2"},
			{13 * ms, "ok 1", ""},
			{20 * ms, "tick", ""},
		},
	}, {
		name: "a fatal code ends the call though siblings run", max: 3, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", "launch 1, wake 20"},
			{11 * ms, "fatal 2", "winner 2"},
		},
	}, {
		name: "a non-fatal code sends the next at once, the delay then resumes", max: 4, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{3 * ms, "fail 1", "launch 1, wake 13"},
			{13 * ms, "tick", "launch 1, wake 23"},
			{14 * ms, "fail 2", "launch 1"},
			{15 * ms, "fail 3", ""},
			{16 * ms, "ok 4", "winner 4"},
		},
	}, {
		name: "all fail: the failure that ended last is returned", max: 3, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", "launch 1, wake 20"},
			{20 * ms, "tick", "launch 1"},
			{21 * ms, "fail 3", ""},
			{22 * ms, "fail 1", ""},
			{23 * ms, "fail 2", "winner 2"},
		},
	}, {
		name: "a non-fatal failure waits for its siblings when none is left to send", max: 2, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", "launch 1"},
			{11 * ms, "fail 2", ""},
			{50 * ms, "ok 1", "winner 1"},
		},
	}, {
		name: "pushback that says not to retry stops further hedges, those in flight go on", max: 4, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", "launch 1, wake 20"},
			{12 * ms, "stop 2", ""},
			{20 * ms, "tick", ""},
			{30 * ms, "ok 1", "winner 1"},
		},
	}, {
		name: "pushback that says not to retry, nothing else in flight: the call fails", max: 4, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{2 * ms, "stop 1", "winner 1"},
		},
	}, {
		name: "a non-fatal failure after a stop sends nothing", max: 4, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", "launch 1, wake 20"},
			{12 * ms, "stop 2", ""},
			{13 * ms, "fail 1", "winner 1"},
		},
	}, {
		name: "pushback of n ms delays the next hedge, the rest resume at n + delay", max: 4, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{2 * ms, "push 1 50", "wake 52"},
			{10 * ms, "tick", "wake 52"},
			{52 * ms, "tick", "launch 1, wake 62"},
			{62 * ms, "tick", "launch 1, wake 72"},
		},
	}, {
		name: "pushback of 0 sends the next at once", max: 3, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{2 * ms, "push 1 0", "launch 1, wake 12"},
		},
	}, {
		name: "a sibling's failure does not cut the server's pushback short", max: 4, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", "launch 1, wake 20"},
			{11 * ms, "push 1 30", "wake 41"},
			{12 * ms, "fail 2", "wake 41"},
			{41 * ms, "tick", "launch 1, wake 51"},
		},
	}, {
		name: "pushback beyond maxAttempts changes nothing", max: 2, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", "launch 1"},
			{11 * ms, "push 1 5", ""},
			{12 * ms, "push 2 5", "winner 2"},
		},
	}, {
		name: "pushback past the deadline is not waited for", max: 3, delay: 10 * ms, deadline: 100 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{2 * ms, "push 1 98", "winner 1"},
		},
	}, {
		name: "throttled: the hedge is cancelled, those in flight go on", max: 3, delay: 10 * ms, gate: script{never},
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", ""},
			{20 * ms, "ok 1", "winner 1"},
		},
	}, {
		name: "throttled with nothing in flight: the failure is returned", max: 3, delay: 10 * ms, gate: script{never},
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{1 * ms, "fail 1", "winner 1"},
		},
	}} {
		t.Run(tc.name, func(t *testing.T) {
			c := &core{max: tc.max, delay: tc.delay, deadline: noTime}
			if tc.deadline > 0 {
				c.deadline = tc.deadline
			}
			g := slices.Clone(tc.gate)
			play(t, c, &g, tc.events)
		})
	}
}

// TestBeyondA6 names the rules that A6 does not have.
func TestBeyondA6(t *testing.T) {
	for _, tc := range []struct {
		name   string
		max    int16
		delay  time.Duration
		gate   script
		events []event
		number int16 // of the newest attempt at the end, if it matters
	}{{
		name: "while the delay is unknown none is sent by time", max: 3, delay: -1,
		events: []event{{0, "start", "launch 1"}, {100 * ms, "ok 1", "winner 1"}},
	}, {
		name: "while the delay is unknown a failure still sends the next", max: 3, delay: -1,
		events: []event{
			{0, "start", "launch 1"},
			{1 * ms, "fail 1", "launch 1"},
			{2 * ms, "fail 2", "launch 1"},
			{3 * ms, "fail 3", "winner 3"},
		},
	}, {
		name: "a hedge that the budget refuses is asked for again, ever more rarely", max: 2, delay: 10 * ms,
		gate: script{later, later, later},
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", "wake 20"},
			{20 * ms, "tick", "wake 40"},
			{40 * ms, "tick", "wake 80"},
			{80 * ms, "tick", "launch 1"},
		},
	}, {
		name: "all at once with a budget that runs out", max: 4, delay: 0, gate: script{send, later, send, send},
		events: []event{
			{0, "start", "launch 2, wake 1"},
			{1 * ms, "tick", "launch 2"},
		},
	}, {
		name: "a failure that the budget cannot follow up ends the call", max: 3, delay: 10 * ms, gate: script{later},
		events: []event{{0, "start", "launch 1, wake 10"}, {1 * ms, "fail 1", "winner 1"}},
	}, {
		name: "a failure that the budget cannot follow up waits for a sibling", max: 3, delay: 10 * ms, gate: script{send, later},
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", "launch 1, wake 20"},
			{11 * ms, "fail 1", "wake 21"},
			{15 * ms, "fail 2", "launch 1"},
			{16 * ms, "ok 3", "winner 3"},
		},
	}, {
		name: "the budget refuses after a pushback: the failure is returned", max: 3, delay: 10 * ms, gate: script{later},
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{1 * ms, "push 1 5", "wake 6"},
			{6 * ms, "tick", "winner 1"},
		},
	}, {
		name: "an unsent hedge was never launched and no other takes its place", max: 3, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", "launch 1, wake 20"},
			{10 * ms, "unsent 2", ""},
			{20 * ms, "tick", ""},
			{30 * ms, "ok 1", "winner 1"},
		},
	}, {
		name: "after an unsent hedge a failure frees a place", max: 2, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", "launch 1"},
			{10 * ms, "unsent 2", ""},
			{30 * ms, "fail 1", "launch 1"}, // as number 2 again: the server is told of one attempt before it
			{31 * ms, "ok 2", "winner 2"},
		},
		number: 2,
	}, {
		name: "the failure of the sibling in its way, told before the hedge is known to be unsent", max: 2, delay: 10 * ms,
		events: []event{
			{0, "start", "launch 1, wake 10"},
			{10 * ms, "tick", "launch 1"},
			{11 * ms, "fail 1", ""},
			{11 * ms, "unsent 2", "launch 1"},
			{12 * ms, "fail 2", "winner 2"},
		},
	}, {
		name: "the first attempt had nowhere to go: its own refusal is the result", max: 2, delay: 10 * ms,
		events: []event{{0, "start", "launch 1, wake 10"}, {0, "unsent 1", "winner 1"}},
	}} {
		t.Run(tc.name, func(t *testing.T) {
			g := slices.Clone(tc.gate)
			c := &core{max: tc.max, delay: tc.delay, deadline: noTime}
			play(t, c, &g, tc.events)
			if tc.number != 0 && c.number != tc.number {
				t.Errorf("the newest attempt is number %d, want %d", c.number, tc.number)
			}
		})
	}
}

// firsts notes which asks are the first by time of their attempt, and refuses all.
type firsts []bool

func (f *firsts) permit(_ time.Duration, first bool) verdict {
	*f = append(*f, first)
	return later
}

// A hedge that is due by time for the first time can wait for those that have waited
// longer; one that is asked for again, or that a failure calls for, cannot.
func TestWhoMayWait(t *testing.T) {
	c := &core{max: 3, delay: 10 * ms, deadline: noTime}
	var f firsts
	play(t, c, &f, []event{
		{0, "start", "launch 1, wake 10"},
		{10 * ms, "tick", "wake 20"},
		{20 * ms, "tick", "wake 40"},
		{30 * ms, "fail 1", "winner 1"},
	})
	if want := (firsts{true, false, false}); !slices.Equal(f, want) {
		t.Errorf("first: %v, want %v", f, want)
	}
}
