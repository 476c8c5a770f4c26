package breaker

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// What opens a closed breaker, and what does not.
func TestTrips(t *testing.T) {
	four := Config{MinimumCalls: 4}
	for _, tc := range []struct {
		name, calls string
		cfg         Config
		want        State
	}{
		{"not below the minimum", "fff", four, Closed},
		{"at the minimum", "ffff", four, Open},
		{"at the ratio", "ssff", four, Open},
		{"not below the ratio", "sssff", four, Closed},
		{"at the ratio later", "sssfff", four, Open},
		{"a success opens nothing", "sffs", four, Closed},
		{"but the next failure does", "sffsf", four, Open},
		{"deadlines and errors without a status are failures", "ssdp", four, Open},
		{"NOT_FOUND and INVALID_ARGUMENT are successes", "nanaff", four, Closed},
		{"and as many as others", "naff", four, Open},
		{"CANCELLED is no call at all", "cccfff", four, Closed},
		{"RESOURCE_EXHAUSTED neither", "qqqqqqqqfff", four, Closed},
		{"nor a refusal made here", "llllllfff", four, Closed},
		{"by default at 20 calls", strings.Repeat("sf", 9) + "f", Config{}, Closed},
		{"by default at half of 20", strings.Repeat("sf", 10), Config{}, Open},
		// 0.07 x 100 is 7.000000000000001 in float64.
		{"7 of 100 are 7%", strings.Repeat("s", 93) + strings.Repeat("f", 7), Config{FailureRatio: 0.07, MinimumCalls: 10}, Open},
		{"6 are not", strings.Repeat("s", 93) + strings.Repeat("f", 6), Config{FailureRatio: 0.07, MinimumCalls: 10}, Closed},
		{"all must fail at ratio 1", "sfffffff", Config{FailureRatio: 1, MinimumCalls: 1}, Closed},
		{"and do", "f", Config{FailureRatio: 1, MinimumCalls: 1}, Open},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, tc.cfg, 0)
				if n := r.calls(tc.calls); n != len(tc.calls) {
					t.Errorf("%d of %d calls were let in", n, len(tc.calls))
				}
				r.is(t, tc.want)
			})
		})
	}
}

// Failures count for a window, to a tenth of it.
func TestWindowForgets(t *testing.T) {
	for _, tc := range []struct {
		after time.Duration
		want  State
	}{{0, Open}, {10*sec - 1, Open}, {10 * sec, Closed}, {time.Hour, Closed}} {
		bubble(t, func(t *testing.T) {
			r := newRig(t, Config{MinimumCalls: 4}, 0)
			r.calls("fff")
			time.Sleep(tc.after)
			r.calls("f")
			if r.State() != tc.want {
				t.Errorf("3 failures and one %v later: %v, want %v", tc.after, r.State(), tc.want)
			}
		})
	}
}

// Against a model that remembers every call: the breaker opens at the first failure, and at
// no other time, at which the ratio is reached in the last ten parts of the window.
func TestTripsAsTheModel(t *testing.T) {
	trips := 0
	for seed := range uint64(200) {
		bubble(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			cfg := Config{FailureRatio: []float64{0.07, 0.25, 0.5, 1}[seed%4], MinimumCalls: 1 + rng.IntN(30), Window: sec}
			r := newRig(t, cfg, 0)
			begin := time.Now()
			type event struct {
				part   int64
				failed bool
			}
			var log []event
			for i := range 500 {
				time.Sleep(time.Duration(rng.ExpFloat64() * float64(20*ms)))
				e := event{int64(time.Since(begin) / (cfg.Window / windowParts)), rng.Float64() < cfg.FailureRatio*0.9}
				log = append(log, e)
				calls, failures := 0, 0
				for _, old := range log {
					if old.part > e.part-windowParts {
						calls++
						if old.failed {
							failures++
						}
					}
				}
				want := Closed
				if e.failed && calls >= cfg.MinimumCalls && float64(failures)/float64(calls) >= cfg.FailureRatio {
					want = Open
				}
				r.calls(map[bool]string{true: "f", false: "s"}[e.failed])
				if r.State() != want {
					t.Fatalf("seed %d, call %d: %v with %d of %d failed, want %v", seed, i, r.State(), failures, calls, want)
				}
				if want == Open {
					trips++
					if c := r.changes[0]; c.Calls != calls || c.Bad != failures {
						t.Fatalf("seed %d: told of %d of %d, want %d of %d", seed, c.Bad, c.Calls, failures, calls)
					}
					return
				}
			}
		})
	}
	if trips < 50 || trips == 200 {
		t.Errorf("%d of 200 runs opened the breaker: vacuous", trips)
	}
}

// Slow calls open it on their own account.
func TestSlowCalls(t *testing.T) {
	cfg := Config{MinimumCalls: 5, SlowCallDuration: 100 * ms}
	half := cfg
	half.SlowCallRatio = 0.5
	slow, limit := 100*ms+1, 100*ms
	for _, tc := range []struct {
		name string
		cfg  Config
		run  func(r *rig)
		want []Reason
	}{
		{"four of five", cfg, func(r *rig) { r.calls("s"); r.slowCalls("ssss", slow) }, []Reason{TooManySlow}},
		{"not below the minimum", cfg, func(r *rig) { r.slowCalls("ssss", slow) }, nil},
		{"not below the ratio", cfg, func(r *rig) { r.calls("ss"); r.slowCalls("sss", slow) }, nil},
		{"a ratio of its own", half, func(r *rig) { r.calls("sss"); r.slowCalls("sss", slow) }, []Reason{TooManySlow}},
		{"the limit itself is not slow", cfg, func(r *rig) { r.slowCalls("sssssss", limit) }, nil},
		{"off by default", Config{MinimumCalls: 5}, func(r *rig) { r.slowCalls("sssss", time.Second) }, nil},
		{"a NOT_FOUND can be slow", cfg, func(r *rig) { r.slowCalls("nnnnn", slow) }, []Reason{TooManySlow}},
		{"a failure is a call too: quick ones dilute", Config{MinimumCalls: 5, SlowCallDuration: 100 * ms, FailureRatio: 1},
			func(r *rig) { r.calls("ff"); r.slowCalls("sss", slow) }, nil},
		{"slow ones add", Config{MinimumCalls: 5, SlowCallDuration: 100 * ms, FailureRatio: 1},
			func(r *rig) { r.slowCalls("sfsfs", slow) }, []Reason{TooManySlow}},
		{"that of a cancelled call says nothing", cfg, func(r *rig) { r.slowCalls("ccccccqqqqqq", slow) }, nil},
		{"failures come first", cfg, func(r *rig) { r.slowCalls("fffff", slow) }, []Reason{TooManyFailures}},
		{"streams never", cfg, func(r *rig) {
			for range 10 {
				p, _ := r.Admit()
				time.Sleep(time.Second)
				p.DoneStream(nil)
			}
		}, nil},
		{"nor do they dilute", cfg, func(r *rig) {
			for range 10 {
				p, _ := r.Admit()
				p.DoneStream(nil)
			}
			r.slowCalls("sssss", slow)
		}, []Reason{TooManySlow}},
		{"the window forgets", cfg, func(r *rig) { r.slowCalls("ssss", slow); time.Sleep(10 * sec); r.slowCalls("s", slow) }, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, tc.cfg, 0)
				tc.run(r)
				r.told(t, tc.want...)
				if len(tc.want) > 0 {
					r.is(t, Open)
				}
			})
		})
	}
}

// Streams that fail count.
func TestStreamsFail(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, Config{MinimumCalls: 4, SlowCallDuration: ms}, 0)
		for range 4 {
			p, _ := r.Admit()
			p.DoneStream(ends['f'])
		}
		r.told(t, TooManyFailures)
	})
}

// Without gRPC: the three ends by name.
func TestEndsByName(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, Config{MinimumCalls: 4}, 0)
		for _, end := range []func(*Permit){(*Permit).Success, (*Permit).Ignore, (*Permit).Success, (*Permit).Failure, (*Permit).Ignore} {
			p, _ := r.Admit()
			end(&p)
			r.is(t, Closed)
		}
		p, _ := r.Admit()
		p.Failure()
		r.is(t, Open)
		if c := r.changes[0]; c.Calls != 4 || c.Bad != 2 {
			t.Errorf("%d of %d calls failed, want 2 of 4", c.Bad, c.Calls)
		}
	})
}

// A permit counts once, however often it is ended; one that was refused for nothing.
func TestPermitEndsOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, Config{MinimumCalls: 2}, 0)
		p, _ := r.Admit()
		for range 5 {
			p.Done(ends['f'])
			p.DoneStream(ends['f'])
			p.Failure()
		}
		if p.Probe() {
			t.Error("an ended permit is a probe")
		}
		r.is(t, Closed)
		r.calls("f")
		r.is(t, Open)
		p, err := r.Admit()
		if err == nil {
			t.Fatal("let in")
		}
		p.Done(nil)
		var zero Permit
		zero.Failure()
		zero.Done(nil)
		if zero.Probe() {
			t.Error("the zero permit is a probe")
		}
	})
}

// An open breaker refuses with a status that says why and when to come back, and tells.
func TestOpenRefuses(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, Config{Method: "/kv.KV/Get", MinimumCalls: 4}, 0.8)
		begin := time.Now()
		time.Sleep(sec)
		r.calls("sfff")
		wait := 6 * sec // 5 s x (1 + 0.8/4)
		if got, want := r.changes, []Change{{
			Method: "/kv.KV/Get", From: Closed, To: Open, At: begin.Add(sec), Reason: TooManyFailures,
			Calls: 4, Bad: 3, Next: begin.Add(sec + wait),
		}}; !slices.EqualFunc(got, want, sameChange) {
			t.Errorf("told %+v, want %+v", got, want)
		}
		time.Sleep(2 * sec)
		p, err := r.Admit()
		if !errors.Is(err, ErrOpen) || status.Code(err) != codes.Unavailable || p != (Permit{}) {
			t.Fatalf("%v, %v", p, err)
		}
		var info *errdetails.ErrorInfo
		var retry *errdetails.RetryInfo
		for _, d := range status.Convert(err).Details() {
			switch d := d.(type) {
			case *errdetails.ErrorInfo:
				info = d
			case *errdetails.RetryInfo:
				retry = d
			}
		}
		if info.GetDomain() != "bobtail" || info.GetReason() != "BREAKER_OPEN" || info.GetMetadata()["method"] != "/kv.KV/Get" {
			t.Errorf("ErrorInfo %v", info)
		}
		if d := retry.GetRetryDelay().AsDuration(); d != 4*sec {
			t.Errorf("RetryInfo %v, want 4s", d)
		}
		if got, want := err.Error(), "rpc error: code = Unavailable desc = breaker: open: /kv.KV/Get"; got != want {
			t.Errorf("error %q, want %q", got, want)
		}
		// Calls that were let in before it opened, and refused ones, change nothing.
		r.calls("ssss")
		r.is(t, Open)
	})
}

func sameChange(a, b Change) bool {
	return a.At.Equal(b.At) && a.Next.Equal(b.Next) && a.Method == b.Method && a.From == b.From && a.To == b.To &&
		a.Reason == b.Reason && a.Calls == b.Calls && a.Bad == b.Bad
}

// The whole circle, as it is told.
func TestChangesTellTheStory(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, Config{MinimumCalls: 4, SlowCallDuration: sec}, 0)
		begin := time.Now()
		r.calls("ffff")
		time.Sleep(5 * sec)
		r.slowCalls("s", sec+1) // a probe that is slow
		time.Sleep(10 * sec)
		r.calls("f") // one that fails
		time.Sleep(20 * sec)
		r.calls("ssnas")
		r.is(t, Closed)
		at := func(d time.Duration) time.Time { return begin.Add(d) }
		want := []Change{
			{From: Closed, To: Open, At: at(0), Reason: TooManyFailures, Calls: 4, Bad: 4, Next: at(5 * sec)},
			{From: Open, To: HalfOpen, At: at(5 * sec), Reason: ProbeDue},
			{From: HalfOpen, To: Open, At: at(6*sec + 1), Reason: ProbeSlow, Next: at(16*sec + 1)},
			{From: Open, To: HalfOpen, At: at(16*sec + 1), Reason: ProbeDue},
			{From: HalfOpen, To: Open, At: at(16*sec + 1), Reason: ProbeFailed, Next: at(36*sec + 1)},
			{From: Open, To: HalfOpen, At: at(36*sec + 1), Reason: ProbeDue},
			{From: HalfOpen, To: Closed, At: at(36*sec + 1), Reason: ProbesSucceeded},
		}
		if !slices.EqualFunc(r.changes, want, sameChange) {
			t.Errorf("told\n%s\nwant\n%s", lines(r.changes), lines(want))
		}
	})
}

func lines(changes []Change) string {
	var b strings.Builder
	for _, c := range changes {
		fmt.Fprintf(&b, "%+v\n", c)
	}
	return b.String()
}

// The open time doubles with each opening, up to 8 x OpenFor, and is never shorter than
// without jitter.
func TestBackoff(t *testing.T) {
	for _, u := range []float64{0, 0.4, math.Nextafter(1, 0)} {
		bubble(t, func(t *testing.T) {
			r := newRig(t, Config{MinimumCalls: 1, OpenFor: sec}, u)
			r.calls("f")
			for i, times := range []time.Duration{1, 2, 4, 8, 8, 8} {
				least := times * sec
				want := least + time.Duration(u*0.25*float64(least))
				if got := r.next(t); got != want || got < least || got > least*5/4 {
					t.Fatalf("opening %d is for %v, want %v", i+1, got, want)
				}
				time.Sleep(want - 1)
				if n := r.calls("s"); n != 0 || r.State() != Open {
					t.Fatalf("a probe before its time")
				}
				time.Sleep(time.Nanosecond)
				r.is(t, HalfOpen)
				r.reopen(t)
			}
		})
	}
}

// The jitter of a breaker as it is made spreads over the whole of its range.
func TestJitterSpreads(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var low, high int
		for range 200 {
			b, err := New(Config{MinimumCalls: 1, OpenFor: sec})
			if err != nil {
				t.Fatal(err)
			}
			r := &rig{Breaker: b}
			r.calls("f")
			switch d := r.next(t); {
			case d < sec || d > sec*5/4:
				t.Fatalf("open for %v, want [1s, 1.25s]", d)
			case d < 1050*ms:
				low++
			case d > 1200*ms:
				high++
			}
		}
		// 40 each on average; at 10 the odds are one to millions.
		if low < 10 || high < 10 {
			t.Errorf("%d in the lowest fifth, %d in the highest: no spread", low, high)
		}
	})
}

// One that flaps backs off though it closes in between, until it has been calm for two
// windows.
func TestFlapping(t *testing.T) {
	for _, tc := range []struct {
		calm time.Duration
		want []time.Duration
	}{
		{0, []time.Duration{1, 2, 4, 8, 8}},
		{10 * sec, []time.Duration{1, 2, 4, 8, 8}},
		{20*sec - 1, []time.Duration{1, 2, 4, 8, 8}},
		{20 * sec, []time.Duration{1, 1, 1, 1, 1}},
	} {
		bubble(t, func(t *testing.T) {
			r := newRig(t, Config{MinimumCalls: 1, OpenFor: sec}, 0)
			for i, want := range tc.want {
				r.calls("f")
				if got := r.next(t); got != want*sec {
					t.Fatalf("closed for %v in between: opening %d is for %v, want %v", tc.calm, i+1, got, want*sec)
				}
				time.Sleep(want * sec)
				r.calls("sssss")
				r.is(t, Closed)
				time.Sleep(tc.calm)
			}
		})
	}
}

// Time that is spent open or half-open is no calm.
func TestNoCalmWhileOpen(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, Config{MinimumCalls: 1, OpenFor: sec}, 0)
		r.calls("f")
		time.Sleep(time.Hour)
		r.probe(t) // lost
		time.Sleep(time.Hour)
		r.is(t, HalfOpen)
		r.reopen(t)
		if got := r.next(t); got != 2*sec {
			t.Errorf("open for %v, want 2s", got)
		}
	})
}

// Of several who see that it is time to open, one does.
func TestOpensOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, Config{MinimumCalls: 1}, 0)
		closed := r.phase.Load()
		r.calls("f")
		r.trip(closed) // as one who was slower
		r.told(t, TooManyFailures)
		if got := r.next(t); got != 5*sec {
			t.Errorf("open for %v, want 5s", got)
		}
	})
}

// After it closed the breaker counts from nothing, slow calls too.
func TestClosedCountsAnew(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, Config{MinimumCalls: 10, OpenFor: 10 * ms, SlowCallDuration: ms}, 0)
		r.slowCalls("ssssssssss", 2*ms)
		r.told(t, TooManySlow)
		time.Sleep(10 * ms)
		r.calls("sssss")
		r.is(t, Closed)
		r.calls("fffffffff") // neither the five probes nor what was before
		r.is(t, Closed)
		r.slowCalls("s", 2*ms)
		r.is(t, Closed)
		r.calls("f")
		r.is(t, Open)
	})
}

// A callback may use the breaker: no lock is held, and what it causes is told after it,
// in order.
func TestCallbackUsesTheBreaker(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var r *rig
		var told []string
		r = newRig(t, Config{MinimumCalls: 1, OpenFor: sec, OnStateChange: func(c Change) {
			told = append(told, fmt.Sprintf("%v>%v", c.From, c.To))
			n := len(told)
			r.State()
			if p, err := r.Admit(); err == nil {
				p.Done(ends['f'])
			} else if n == 1 {
				time.Sleep(sec) // until the next call is a probe, which fails
				p, err := r.Admit()
				if err != nil {
					t.Error(err)
				}
				p.Done(ends['f'])
			}
			if len(told) != n {
				t.Error("told of a change while being told of another")
			}
		}}, 0)
		r.calls("f")
		if got, want := strings.Join(told, " "), "closed>open open>half-open half-open>open"; got != want {
			t.Errorf("told %q, want %q", got, want)
		}
		if got := r.next(t); got != 2*sec {
			t.Errorf("open for %v, want 2s", got)
		}
	})
}

// A callback that panics panics at whoever made the call, once; those after it are told.
func TestCallbackPanics(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var told []Reason
		r := newRig(t, Config{MinimumCalls: 1, OpenFor: sec, OnStateChange: func(c Change) {
			told = append(told, c.Reason)
			if len(told) == 1 {
				panic("the user's")
			}
		}}, 0)
		func() {
			defer func() {
				if recover() != "the user's" {
					t.Error("the panic did not pass")
				}
			}()
			r.calls("f")
		}()
		r.is(t, Open)
		time.Sleep(sec)
		r.calls("sssss")
		r.is(t, Closed)
		if want := []Reason{TooManyFailures, ProbeDue, ProbesSucceeded}; !slices.Equal(told, want) {
			t.Errorf("told %q, want %q", told, want)
		}
	})
}

// The time that a callback takes is not the probe's.
func TestSlowCallbackIsNoSlowProbe(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, Config{MinimumCalls: 1, OpenFor: 10 * sec, SlowCallDuration: sec, OnStateChange: func(Change) { time.Sleep(2 * sec) }}, 0)
		r.calls("f")
		time.Sleep(10 * sec)
		r.calls("sssss")
		r.is(t, Closed)
	})
}

// While one goroutine tells, the changes that others make are told by it, one at a time.
func TestChangesAreToldOneAtATime(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var telling, at atomic.Int32
		var told []Reason
		r := newRig(t, Config{MinimumCalls: 1, OpenFor: sec, OnStateChange: func(c Change) {
			if telling.Add(1) != 1 {
				t.Error("two callbacks at once")
			}
			told = append(told, c.Reason)
			time.Sleep(5 * sec)
			at.Add(1)
			telling.Add(-1)
		}}, 0)
		done := make(chan struct{})
		go func() {
			r.calls("f") // tells all three
			close(done)
		}()
		time.Sleep(sec)
		r.calls("sssss")
		if at.Load() != 0 {
			t.Error("a caller waited for a callback of another's change")
		}
		r.is(t, Closed)
		<-done
		if want := []Reason{TooManyFailures, ProbeDue, ProbesSucceeded}; !slices.Equal(told, want) {
			t.Errorf("told %q, want %q", told, want)
		}
	})
}

// A state is asked for without changing it: that the open time is over is told by the
// call that is the probe.
func TestStateChangesNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, Config{MinimumCalls: 1}, 0)
		r.calls("f")
		time.Sleep(time.Hour)
		r.is(t, HalfOpen)
		r.told(t, TooManyFailures)
		r.probe(t)
		r.told(t, TooManyFailures, ProbeDue)
	})
}

// Many goroutines, a server that is down every other second, and what must hold at all
// times.
func TestConcurrent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const openFor = 100 * ms
		var last atomic.Uint32 // the state that was told last
		var changes atomic.Int64
		cfg := Config{MinimumCalls: 10, Window: sec, OpenFor: openFor, SlowCallDuration: 50 * ms, OnStateChange: func(c Change) {
			if State(last.Swap(uint32(c.To))) != c.From {
				t.Errorf("told %v to %v out of order", c.From, c.To)
			}
			changes.Add(1)
		}}
		r := newRig(t, cfg, 0.5)
		begin := time.Now()
		var letIn, refused, probes atomic.Int64
		// For each half-open phase: probes out at least, and successes at most, so that the
		// ramp can be held without a lock.
		type ramp struct{ out, succeeded atomic.Int64 }
		var ramps sync.Map
		var wg sync.WaitGroup
		for g := range 16 {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(g), 3))
				for range 3000 {
					time.Sleep(time.Duration(rng.IntN(10)) * ms)
					down := int(time.Since(begin)/sec)%2 == 1
					p, err := r.Admit()
					if err != nil {
						if !errors.Is(err, ErrOpen) {
							t.Error(err)
						}
						refused.Add(1)
						continue
					}
					letIn.Add(1)
					end := []func(){p.Success, p.Ignore, p.Failure}
					how := 0
					switch {
					case down:
						how = 2
					case rng.IntN(10) == 0:
						how = 1
					}
					var of *ramp
					if p.Probe() {
						probes.Add(1)
						known, _ := ramps.LoadOrStore(p.phase, &ramp{})
						of = known.(*ramp)
						if out, most := of.out.Add(1), of.succeeded.Load()+1; out > most {
							t.Errorf("%d probes out, want at most %d", out, most)
						}
					}
					time.Sleep(time.Duration(rng.IntN(20)) * ms)
					if of != nil {
						of.out.Add(-1)
						if how == 0 {
							of.succeeded.Add(1)
						}
					}
					end[how]()
					end[how]() // a second end is nothing
				}
			})
		}
		wg.Wait()
		t.Logf("%d let in, %d probes, %d refused, %d changes", letIn.Load(), probes.Load(), refused.Load(), changes.Load())
		if letIn.Load()+refused.Load() != 16*3000 || probes.Load() == 0 || refused.Load() == 0 || changes.Load() < 10 {
			t.Error("vacuous")
		}
		// It always comes back.
		time.Sleep(8 * openFor * 5 / 4)
		for range 5 {
			r.calls("s")
		}
		r.is(t, Closed)
	})
}

// In real time, for the race detector: every call of a closed breaker is counted once.
func TestConcurrentCounts(t *testing.T) {
	r := newRig(t, Config{MinimumCalls: maxMinimumCalls, Window: time.Hour, SlowCallDuration: time.Hour}, 0)
	const n, each = 8, 2000
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for i := range each {
				r.calls([]string{"s", "f", "c"}[i%3])
			}
		})
	}
	wg.Wait()
	c := r.phase.Load().calls.cb.Counts()
	s := r.phase.Load().slow.cb.Counts()
	if c.TotalSuccesses != n*667 || c.TotalFailures != n*667 || c.Requests != n*2*667 || s.TotalSuccesses != n*2*667 {
		t.Errorf("counted %+v and slow %+v, want %d of each", c, s, n*667)
	}
}

// A breaker that changes all the time under fire, with a callback that asks it.
func TestConcurrentlyUnderFire(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var r *rig
		changes, last := 0, Closed // unguarded: callbacks come one after the other, or the race detector says so
		r = newRig(t, Config{MinimumCalls: 5, Window: 100 * ms, OpenFor: 10 * ms, OnStateChange: func(c Change) {
			if c.From != last {
				t.Errorf("told %v to %v after %v", c.From, c.To, last)
			}
			last = c.To
			r.State()
			if p, err := r.Admit(); err == nil {
				p.Ignore()
			}
			changes++
		}}, 0)
		var wg sync.WaitGroup
		for g := range 8 {
			wg.Go(func() {
				for i := range 500 {
					for k := range 20 {
						r.calls([]string{"s", "f", "s", "c", "f", "f"}[(i+k+g)%6])
					}
					time.Sleep(ms)
				}
			})
		}
		wg.Wait()
		if changes < 10 {
			t.Errorf("%d changes: vacuous", changes)
		}
	})
}

func TestAllocations(t *testing.T) {
	closed := newRig(t, Config{SlowCallDuration: time.Hour}, 0)
	if n := testenv.Allocs(1000, func() {
		p, _ := closed.Admit()
		p.Done(nil)
	}); n != 0 {
		t.Errorf("closed: %v allocations per call, want none", n)
	}
	rare := newRig(t, Config{FailureRatio: 1}, 0)
	rare.calls("s")
	if n := testenv.Allocs(1000, func() {
		p, _ := rare.Admit()
		p.Failure()
	}); n != 0 {
		t.Errorf("closed, failing: %v allocations per call, want none", n)
	}
	open := newRig(t, Config{MinimumCalls: 1, OpenFor: time.Hour}, 0)
	open.calls("f")
	if n := testenv.Allocs(1000, func() { open.Admit() }); n > 1 {
		t.Errorf("open: %v allocations per refusal, want its error alone", n)
	}
}
