package hedging

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What the start of a handler does to a tied call. The delay of begin is the hedging
// delay, which holds from then on; -1 is none.
func TestTiedSteps(t *testing.T) {
	for _, tc := range []struct {
		name   string
		max    int16
		gate   script
		events []event
	}{{
		name: "a call that is served at once has no copy", max: 2,
		events: []event{
			{0, "start", "launch 1, wake 1"},
			{ms / 2, "begin -1", ""},
			{1 * ms, "tick", ""},
			{9 * ms, "ok 1", "winner 1"},
		},
	}, {
		name: "the copy that is still queued is withdrawn", max: 2,
		events: []event{
			{0, "start", "launch 1, wake 1"},
			{1 * ms, "tick", "launch 1"},
			{5 * ms, "begin -1", "withdraw"},
			{9 * ms, "ok 1", "winner 1"},
		},
	}, {
		name: "only the first start withdraws", max: 2,
		events: []event{
			{0, "start", "launch 1, wake 1"},
			{1 * ms, "tick", "launch 1"},
			{5 * ms, "begin -1", "withdraw"},
			{5 * ms, "begin -1", ""},
		},
	}, {
		name: "one that was withdrawn too late and has succeeded decides", max: 2,
		events: []event{
			{0, "start", "launch 1, wake 1"},
			{1 * ms, "tick", "launch 1"},
			{5 * ms, "begin -1", "withdraw"},
			{6 * ms, "save 2", "winner 2"},
			{7 * ms, "save 2", ""},
			{7 * ms, "ok 1", ""},
		},
	}, {
		name: "a withdrawn copy gives its place back to one that follows a failure", max: 2,
		events: []event{
			{0, "start", "launch 1, wake 1"},
			{1 * ms, "tick", "launch 1"},
			{5 * ms, "begin -1", "withdraw"},
			{9 * ms, "fail 1", "launch 1"},
			{12 * ms, "fail 3", "winner 3"},
		},
	}, {
		name: "a slow handler is hedged, the delay after its start", max: 2,
		events: []event{
			{0, "start", "launch 1, wake 1"},
			{1 * ms, "tick", "launch 1"},
			{5 * ms, "begin 20", "withdraw, wake 25"},
			{25 * ms, "tick", "launch 1"},
			{26 * ms, "begin 20", ""},
			{29 * ms, "ok 3", "winner 3"},
		},
	}, {
		name: "copies go out one tie delay apart, up to the maximum", max: 3,
		events: []event{
			{0, "start", "launch 1, wake 1"},
			{1 * ms, "tick", "launch 1, wake 2"},
			{2 * ms, "tick", "launch 1"},
			{5 * ms, "begin -1", "withdraw"},
			{9 * ms, "fatal 2", "winner 2"},
		},
	}, {
		name: "a failure while all are queued sends the next at once", max: 3,
		events: []event{
			{0, "start", "launch 1, wake 1"},
			{1 * ms, "tick", "launch 1, wake 2"},
			{1 * ms, "fail 2", "launch 1"},
			{5 * ms, "begin -1", "withdraw"},
			{9 * ms, "ok 3", "winner 3"},
		},
	}, {
		name: "without a budget there is no copy, and nothing to withdraw", max: 2, gate: script{later, later},
		events: []event{
			{0, "start", "launch 1, wake 1"},
			{1 * ms, "tick", "wake 2"},
			{2 * ms, "tick", "wake 4"},
			{3 * ms, "begin -1", ""},
			{4 * ms, "tick", ""},
		},
	}, {
		name: "the time that a server named outlives the start of a sibling", max: 3,
		events: []event{
			{0, "start", "launch 1, wake 1"},
			{1 * ms, "tick", "launch 1, wake 2"},
			{1 * ms, "push 2 40", "wake 41"},
			{5 * ms, "begin -1", "wake 41"},
		},
	}} {
		t.Run(tc.name, func(t *testing.T) {
			c := &core{max: tc.max, delay: ms, deadline: noTime}
			play(t, c, &tc.gate, tc.events)
		})
	}
}

// The estimate goes by the calls that did not queue, and follows a path that changes.
func TestDistance(t *testing.T) {
	var e distance
	now := time.Duration(0)
	tell := func(n int, d ...time.Duration) {
		for i := range n {
			now += 10 * ms
			e.told(now, d[i%len(d)])
		}
	}
	check := func(when string, lo, hi time.Duration) {
		t.Helper()
		if d := e.tie(); d < lo || d > hi {
			t.Errorf("%s: tie delay %v, want in [%v, %v]", when, d, lo, hi)
		}
	}
	check("unknown", minTie, minTie)
	tell(7, 300*ms)
	check("seen too rarely", minTie, minTie)
	tell(1, 300*ms)
	check("eight calls that waited for a connection", maxTie, maxTie)
	tell(1, 4*ms)
	check("the first that did not", 4*ms, 12*ms)
	tell(200, 4*ms)
	check("steady", 4*ms, 4*ms+ms/10)
	tell(200, 3*ms, 5*ms)
	check("varying by 1 ms", 7*ms, 9*ms)
	tell(200, 4*ms, 80*ms, 500*ms)
	check("two thirds of the calls queue", 4*ms, 5*ms)
	tell(200, 100*time.Microsecond)
	check("a short path", minTie, minTie)
	tell(100, 30*ms)
	check("a longer path is taken for queueing at first", minTie, minTie)
	tell(2500, 30*ms)
	check("and believed when it stays", 30*ms, 31*ms)
	now += time.Hour
	tell(20, 90*ms)
	check("and at once after a silence", 60*ms, maxTie)
}

// Servers that tell are known by what they do.
func TestDistanceTells(t *testing.T) {
	var e distance
	now := time.Hour
	expect := func(when string, want bool) {
		t.Helper()
		if got := e.tells(now); got != want {
			t.Errorf("%s: tells is %v, want %v", when, got, want)
		}
	}
	expect("unknown", false)
	e.told(now, ms)
	expect("one has told", true)
	e.untold(now)
	now += Window - 1
	e.told(now, ms)
	expect("one has not, in the last window", false)
	now++
	expect("a window later", true)
}

// Another configuration goes on with the distance that is known.
func TestTiedWith(t *testing.T) {
	cfg := Config{MaxAttempts: 2, Tied: true}
	h, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for range distanceKnown {
		h.distance.told(0, 9*ms)
	}
	if h, err = h.With(cfg); err != nil || h.tieDelay() < 9*ms {
		t.Errorf("tie delay %v, %v, want at least the 9ms that were learned", h.tieDelay(), err)
	}
}

// scripted is an operation whose attempts end as they are told.
type scripted struct{ ends map[int16]error }

func (s *scripted) prepare(*branch)           {}
func (s *scripted) try(b *branch) error       { return s.ends[b.number()] }
func (s *scripted) code(err error) codes.Code { return status.Code(err) }

// tiedRace is a race of a first attempt and its copy, both in flight.
func tiedRace(t *testing.T) (r *race, first, copied *branch) {
	h, err := New(Config{MaxAttempts: 2, Tied: true})
	if err != nil {
		t.Fatal(err)
	}
	r = &race{h: h, ctx: t.Context(), op: &scripted{ends: map[int16]error{}}, tied: true}
	r.begin(time.Now())
	r.core = core{max: 2, delay: ms, deadline: noTime}
	r.core.start(0, r)
	if s := r.core.tick(ms, r); s.launch != 1 {
		t.Fatalf("%+v, want a copy", s)
	}
	return r, &r.first, r.openHedge(ms, 2, false)
}

// Whose header is there first goes on. Of two that are in hand at once it is the earlier
// attempt; one that has ended is out of it.
func TestTiedRule(t *testing.T) {
	for _, tc := range []struct {
		name  string
		given func(first, copied *branch)
		leads int16
	}{
		{"the copy's alone", func(*branch, *branch) {}, 2},
		{"both in hand", func(first, _ *branch) { first.begun.Store(true) }, 1},
		{"the first has ended", func(first, _ *branch) { first.begun.Store(true); first.ended = true }, 2},
	} {
		r, first, copied := tiedRace(t)
		tc.given(first, copied)
		r.header(copied, true)
		for _, b := range []*branch{first, copied} {
			cut := b.number() != tc.leads && !b.ended
			if b.withdrawn != cut || b.attempt.Superseded() != cut || (b.Err() != nil) != cut {
				t.Errorf("%s: attempt %d: withdrawn %v, superseded %v, %v; want %v", tc.name, b.number(), b.withdrawn, b.attempt.Superseded(), b.Err(), cut)
			}
		}
	}
}

// An attempt that was withdrawn and has an answer all the same decides the call; one that
// failed, whatever it says, does not.
func TestTiedWithdrawnTooLate(t *testing.T) {
	for _, failed := range []bool{false, true} {
		r, first, copied := tiedRace(t)
		r.header(copied, true)
		if failed {
			r.op.(*scripted).ends[1] = status.Error(codes.NotFound, "cut off")
		}
		first.inline = false
		r.attempt(first)
		if decided := r.decided == first; decided == failed || r.core.over == failed {
			t.Errorf("failed %v: it has decided the call: %v", failed, decided)
		}
		r.close()
	}
}
