package shedding

import (
	"testing"
	"time"
)

// stepServer is a server with an Admission in front, in steps of a millisecond: workers in
// turn take what has been admitted, 10 ms each.
type stepServer struct {
	a          *Admission
	now        time.Time
	workers    []int       // ms that each has to work on; 0: free
	begun      []time.Time // what each works on
	waiting    []time.Time // admitted, for a worker
	stalled    bool
	come, done int
}

func newStepServer(a *Admission, workers int) *stepServer {
	return &stepServer{a: a, now: simEpoch, workers: make([]int, workers), begun: make([]time.Time, workers)}
}

// step lets n requests come and a millisecond pass.
func (s *stepServer) step(n int) {
	for range n {
		s.come++
		if s.a.Arrive(s.now, Request{Cohort: uint32(s.come)}).Verb == Admitted {
			s.waiting = append(s.waiting, s.now)
		}
	}
	s.settled()
	s.now = s.now.Add(ms)
	for i := range s.workers {
		if s.workers[i] == 0 && len(s.waiting) > 0 {
			s.workers[i], s.begun[i] = 10, s.waiting[0]
			s.waiting = s.waiting[1:]
		}
		if s.workers[i] > 0 && !s.stalled {
			if s.workers[i]--; s.workers[i] == 0 {
				s.a.Done(s.now, s.now.Sub(s.begun[i]), Served)
				s.done++
			}
		}
	}
	s.a.Tick(s.now)
	s.settled()
}

func (s *stepServer) settled() {
	for _, st := range s.a.Settled() {
		if st.Verb == Admitted {
			s.waiting = append(s.waiting, s.now)
		}
	}
}

// Handlers that hang, whatever for, take slots and no more: a probe must not lower the limit
// below them, and a limit at which nothing moves is raised.
func TestHangingHandlers(t *testing.T) {
	for _, algorithm := range []Algorithm{Gradient, Vegas, AIMD} {
		for _, hanging := range []int{1, 9, 12, 19, 20} {
			for _, queue := range []*QueueConfig{nil, {}} {
				a := newAdmission(t, AdmissionConfig{Limiter: LimiterConfig{Algorithm: algorithm}, Queue: queue})
				for range hanging {
					a.Arrive(simEpoch, Request{})
				}
				s := newStepServer(a, 10)
				for range 5_000 { // five seconds to find out, and then five minutes
					s.step(0)
				}
				for minute := range 5 {
					s.done = 0
					for i := range 60_000 {
						n := 0
						if i%10 == 0 {
							n = 1
						}
						s.step(n)
					}
					// The first probe finds out that they do not end, which takes it a second.
					if s.done < 5_940 && minute > 0 || s.done < 5_800 {
						t.Errorf("%s, %d hang, queue %v: %d of 6000 served in minute %d, at a limit of %d", algorithm, hanging,
							queue != nil, s.done, minute, a.Stats().Limit)
						break
					}
				}
			}
		}
	}
}

// A server that has hung for half a minute does again what it did before within a few
// seconds, although those whom it kept waiting have shown it times as no server ever has.
func TestStallIsForgotten(t *testing.T) {
	for _, algorithm := range []Algorithm{Gradient, Vegas} {
		a := newAdmission(t, AdmissionConfig{Limiter: LimiterConfig{Algorithm: algorithm}, Queue: &QueueConfig{}})
		s := newStepServer(a, 10)
		second := func() int {
			s.done = 0
			for i := range 1000 {
				s.step(1 + i%2)
			}
			return s.done
		}
		for range 10 {
			second()
		}
		s.stalled = true
		for range 30 {
			second()
		}
		s.stalled = false
		var all []int
		for range 20 {
			all = append(all, second())
		}
		t.Logf("%s: served in each second after the stall: %v", algorithm, all)
		sum := 0
		for i, n := range all[3:] {
			if sum += n; n < 700 {
				t.Errorf("%s: %d/s of 1000/s in second %d after the stall", algorithm, n, i+3)
			}
		}
		if sum < 16_500 {
			t.Errorf("%s: %d served in 17 seconds, of 17000", algorithm, sum)
		}
	}
}

// What a server has done when little was asked of it is not what it can do.
func TestSparseTrafficThenBurst(t *testing.T) {
	a := newAdmission(t, static(4, 1000))
	now := simEpoch
	for range 60 {
		a.Arrive(now, Request{})
		a.Done(now.Add(10*ms), 10*ms, Served)
		now = now.Add(500 * ms)
	}
	hopeless := 0
	for range 40 {
		if d := a.Arrive(now, Request{Deadline: now.Add(time.Second), Median: 10 * ms}); d.Reason == Hopeless {
			hopeless++
		}
	}
	if hopeless > 0 {
		t.Errorf("%d of 40 are hopeless, of which all would be done in 100 ms", hopeless)
	}
	for range 1000 {
		if d := a.Arrive(now, Request{Deadline: now.Add(time.Second), Median: 10 * ms}); d.Reason == Hopeless {
			hopeless++
		}
	}
	// 396 fit into a second, to the 990 ms before the last handler begins.
	if hopeless < 580 || hopeless > 680 {
		t.Errorf("%d of 1000 more are hopeless, want those that do not fit into the second", hopeless)
	}
}

// A server that does nothing at all for long makes no number overflow.
func TestEndlessStall(t *testing.T) {
	a := newAdmission(t, AdmissionConfig{Queue: &QueueConfig{}})
	s := newStepServer(a, 10)
	for range 10_000 {
		s.step(1)
	}
	s.stalled = true
	for range 1_200 {
		for range 100 {
			s.now = s.now.Add(10 * ms)
			d := a.Arrive(s.now, Request{Deadline: s.now.Add(time.Minute)})
			if d.RetryAfter < 0 || d.RetryAfter > time.Hour {
				t.Fatalf("%+v", d)
			}
			s.settled()
		}
		if e := a.expected(0, 0); e < 0 || e > time.Hour {
			t.Fatalf("a wait of %v is expected", e)
		}
		if a.queue.bound <= 0 {
			t.Fatalf("nobody may wait: %v", a.queue.bound)
		}
		if st := a.Stats(); !(st.Capacity > 0) || !(st.Demand >= 0) {
			t.Fatalf("%+v", st)
		}
	}
}

// A queue that is taken away and put back finds no memory of what nobody looked at.
func TestQueueComesBack(t *testing.T) {
	with := static(10, 1000)
	without := with
	without.Queue = nil
	a := newAdmission(t, without)
	now := simEpoch
	run := func(n int) {
		for range n {
			a.Arrive(now, Request{})
			a.Done(now.Add(5*ms), 5*ms, Served)
			now = now.Add(10 * ms)
		}
	}
	run(360_000)
	if err := a.Reconfigure(now, with); err != nil {
		t.Fatal(err)
	}
	run(200)
	if c := a.Stats().Capacity; c < 90 || c > 110 {
		t.Errorf("a capacity of %v/s, want the 100/s that it has done since", c)
	}
}

// The ticket of one who waited in a queue that was taken away is nobody's in the next.
func TestTicketsOutliveTheirQueue(t *testing.T) {
	a := newAdmission(t, static(1, 10))
	a.Arrive(simEpoch, Request{})
	old := a.Arrive(simEpoch, Request{})
	for _, cfg := range []AdmissionConfig{{Limiter: static(1, 10).Limiter}, static(1, 10)} {
		if err := a.Reconfigure(simEpoch, cfg); err != nil {
			t.Fatal(err)
		}
	}
	d := a.Arrive(simEpoch, Request{})
	if d.Verb != Queued {
		t.Fatal(d)
	}
	if a.Leave(simEpoch, old.Ticket) {
		t.Error("one left with the ticket of another")
	}
	if !a.Leave(simEpoch, d.Ticket) {
		t.Error("and could not leave with the own")
	}
}

// New bounds bind at once, in a probe too, and what was found is kept.
func TestReconfigureLimiter(t *testing.T) {
	for _, c := range []struct {
		name      string
		was, will LimiterConfig
		limit     float64
		probe     int
		want      int
	}{
		{"max", LimiterConfig{Initial: 20}, LimiterConfig{Initial: 20, Max: 100}, 1000, 800, 100},
		{"min", LimiterConfig{Initial: 500}, LimiterConfig{Initial: 500, Min: 400}, 500, 250, 500},
		{"the default initial moves with min", LimiterConfig{}, LimiterConfig{Min: 50}, 300, 0, 300},
		{"and with max", LimiterConfig{Max: 10}, LimiterConfig{Max: 400}, 10, 0, 10},
		{"another initial begins anew", LimiterConfig{}, LimiterConfig{Initial: 7}, 300, 0, 7},
		{"another algorithm, too", LimiterConfig{}, LimiterConfig{Algorithm: Vegas}, 300, 0, 20},
		{"static", LimiterConfig{}, LimiterConfig{Algorithm: Static, Limit: 4}, 300, 0, 4},
		{"static again", LimiterConfig{Algorithm: Static, Limit: 4}, LimiterConfig{Algorithm: Static, Limit: 6}, 4, 0, 6},
	} {
		a := newAdmission(t, AdmissionConfig{Limiter: c.was})
		a.limiter.limit, a.limiter.probe = c.limit, c.probe
		if err := a.Reconfigure(simEpoch, AdmissionConfig{Limiter: c.will}); err != nil {
			t.Fatal(err)
		}
		if got := a.Stats().Limit; got != c.want {
			t.Errorf("%s: limit %d, want %d", c.name, got, c.want)
		}
	}
}

// A limiter that takes over from another learns nothing from those whom that let in.
func TestLimiterInherits(t *testing.T) {
	a := newAdmission(t, AdmissionConfig{Limiter: LimiterConfig{Algorithm: Static, Limit: 200}, Queue: &QueueConfig{}})
	for range 200 {
		a.Arrive(simEpoch, Request{})
	}
	if err := a.Reconfigure(simEpoch, AdmissionConfig{Queue: &QueueConfig{}}); err != nil {
		t.Fatal(err)
	}
	for range 150 {
		a.Done(simEpoch.Add(100*ms), 100*ms, Served)
	}
	if b := a.limiter.Base(); b != 0 {
		t.Errorf("base %v of those that ran among 200", b)
	}
}

// Those that last are not what the limit is for, and not lost either.
func TestLasting(t *testing.T) {
	a := newAdmission(t, static(2, 10))
	now := simEpoch
	for range 2 {
		a.Arrive(now, Request{})
	}
	if d := a.Arrive(now, Request{}); d.Verb != Queued {
		t.Fatal(d)
	}
	a.Lasting(now, 1)
	if st := a.Settled(); len(st) != 1 || st[0].Verb != Admitted {
		t.Errorf("%+v, want the one who waited to be let in", st)
	}
	if st := a.Stats(); st.InFlight != 3 || st.Limit != 3 {
		t.Errorf("%+v, want 3 in flight at a limit of 2, raised by one", st)
	}
	a.Lasting(now, -1)
	a.Done(now, time.Second, Ignored)
	if d := a.Arrive(now, Request{}); d.Verb != Queued {
		t.Errorf("%v, want it to wait: two run", d)
	}
	a.Lasting(now, -5) // more than ever began
	if n := a.busy(); n != 2 {
		t.Errorf("%d are busy, want 2", n)
	}
}

// Nobody knows how long a server needs for streams of which the client sends the messages.
// While they keep the limit it grows, and falls when they run out of time.
func TestUntimed(t *testing.T) {
	l := newLimiter(t, LimiterConfig{})
	now := simEpoch
	for range 60 {
		now = serve(l, now, time.Second, l.Limit(), 150*ms, Untimed)
	}
	if l.Limit() < 200 {
		t.Errorf("limit %d after a minute of nothing but uploads, which have kept it", l.Limit())
	}
	before := l.Limit()
	now = serve(l, now, 10*time.Second, before/2, 150*ms, Untimed)
	if l.Limit() != before {
		t.Errorf("limit %d, was %d: it was not reached", l.Limit(), before)
	}
	serve(l, now, 5*time.Second, before, 150*ms, UntimedDrop)
	if l.Limit() > before/2 {
		t.Errorf("limit %d, was %d: all run out of time", l.Limit(), before)
	}
}

// A few that run out of time, or a few that are slow, say nothing beside many that are not
// timed: neither that the limit is too high nor that it is too low.
func TestUntimedWithOthers(t *testing.T) {
	for _, tt := range []struct {
		name  string
		other Result
		each  int // one of so many ends so
		takes time.Duration
	}{
		{"1% of streams run out of time", UntimedDrop, 100, 500 * ms},
		{"9% of streams do", UntimedDrop, 11, 500 * ms},
		{"now and then a call", Served, 400, 10 * ms},
	} {
		l := newLimiter(t, LimiterConfig{Initial: 100})
		now := simEpoch
		for n := range 60 * 2000 {
			now = now.Add(500 * time.Microsecond)
			l.Begin(now, 100)
			if n%tt.each == 0 {
				l.End(now, 99, tt.takes, tt.other)
			} else {
				l.End(now, 99, 150*ms, Untimed)
			}
		}
		if l.Limit() < 50 || l.Limit() > 200 {
			t.Errorf("%s: limit %d, was 100", tt.name, l.Limit())
		}
	}
}

// A slot that comes free because nothing has moved is that of the one who waits, not of whoever
// comes at that moment.
func TestStuckServesTheQueue(t *testing.T) {
	cfg := static(2, 10)
	cfg.Limiter = LimiterConfig{Initial: 2}
	cfg.Queue.MaxWait, cfg.Queue.Target = time.Minute, time.Minute
	a := newAdmission(t, cfg)
	for range 2 {
		a.Arrive(simEpoch, Request{})
	}
	if d := a.Arrive(simEpoch, Request{Criticality: CriticalPlus, Owner: "plus"}); d.Verb != Queued {
		t.Fatal(d)
	}
	if d := a.Arrive(simEpoch.Add(1100*ms), Request{Criticality: Sheddable, Extra: true}); d.Verb != Queued {
		t.Errorf("%v goes before one that is critical_plus and has waited", d)
	}
	if st := a.Settled(); len(st) != 1 || st[0].Owner != "plus" || st[0].Verb != Admitted {
		t.Errorf("%+v, want the one who waited to be let in", st)
	}
}

// A probe that too few calls came for is given up, not kept for the next burst.
func TestProbeOfAnIdleServer(t *testing.T) {
	l := newLimiter(t, LimiterConfig{})
	now := load(l, simEpoch, 200*ms, 20, 10*ms)
	for l.probe == 0 {
		now = load(l, now, 1, 20, 10*ms)
	}
	now = now.Add(time.Hour)
	l.Begin(now, 1)
	if l.Limit() < 15 {
		t.Errorf("a limit of %d for whoever comes after an hour", l.Limit())
	}
}

// Handlers that had little time left when they came out of the queue, and so run out of it,
// do not lower the limit: they have waited because it is too low.
func TestLateCallsDoNotLowerTheLimit(t *testing.T) {
	l := newLimiter(t, LimiterConfig{})
	now := load(l, simEpoch, 10*time.Second, 20, 10*ms)
	before := l.Limit()
	now = serve(l, now, 2*time.Second, l.Limit(), 9*ms, Dropped)
	if l.Limit() < before {
		t.Errorf("limit %d, was %d, for handlers that were cut off after 9 of their 10 ms", l.Limit(), before)
	}
	serve(l, now, 2*time.Second, l.Limit(), 90*ms, Dropped)
	if l.Limit() > before/2 {
		t.Errorf("limit %d, was %d, for handlers that were cut off after 90 ms", l.Limit(), before)
	}
}

// An overload that is over is over within seconds, however few calls come to tell of it.
func TestOverloadEndsInQuiet(t *testing.T) {
	for _, every := range []int{1000, 200, 50, 20} { // ms
		a := newAdmission(t, AdmissionConfig{Queue: &QueueConfig{}})
		s := newStepServer(a, 10)
		for range 10_000 {
			s.step(8)
		}
		if st := a.Stats(); !st.Overloaded || st.Cursor == 0 {
			t.Fatalf("%+v: this is no overload", st)
		}
		took := 0
		for a.Stats().Overloaded && took < 60_000 {
			n := 0
			if took++; took%every == 0 {
				n = 1
			}
			s.step(n)
		}
		t.Logf("one call in %d ms: over after %d ms", every, took)
		if took > 3_000 {
			t.Errorf("one call in %d ms: over after %d ms, want 3 s", every, took)
		}
	}
}
