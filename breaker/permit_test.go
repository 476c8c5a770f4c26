package breaker

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/sony/gobreaker/v2"
)

// halfOpen returns a breaker whose first probe is due. Its open time, and the lease of its
// probes, is 5 s.
func halfOpen(t *testing.T, cfg Config) *rig {
	t.Helper()
	cfg.MinimumCalls = 1
	r := newRig(t, cfg, 0)
	r.calls("f")
	r.is(t, Open)
	time.Sleep(5 * sec)
	r.is(t, HalfOpen)
	return r
}

// fill takes all places, and returns the probes.
func (r *rig) fill(t *testing.T, want int) []Permit {
	t.Helper()
	var out []Permit
	for len(out) < want {
		out = append(out, r.probe(t))
	}
	if d := r.next(t); d != 0 {
		t.Errorf("with %d probes out a call is told to come back in %v; nobody knows", want, d)
	}
	return out
}

// One probe; after each success one more at a time; closed after the fifth.
func TestRamp(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := halfOpen(t, Config{})
		for n := 1; n <= 5; n++ {
			r.is(t, HalfOpen)
			out := r.fill(t, n)
			out[0].Done(nil)
			if out[0].Probe() {
				t.Error("a probe that has ended is one still")
			}
			for _, p := range out[1:] {
				p.Ignore()
			}
		}
		r.is(t, Closed)
		r.told(t, TooManyFailures, ProbeDue, ProbesSucceeded)
		p, err := r.Admit()
		if err != nil || p.Probe() {
			t.Errorf("after it closed: %v, probe %v", err, p.Probe())
		}
	})
}

// In three round trips.
func TestRampIsThreeRoundTrips(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := halfOpen(t, Config{})
		for _, n := range []int{1, 2, 4} {
			r.is(t, HalfOpen)
			out := r.fill(t, n)
			for _, p := range out {
				p.Done(nil)
			}
		}
		r.is(t, Closed)
	})
}

// Traffic that is all NOT_FOUND can close it.
func TestAnswersOfAnyKindClose(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := halfOpen(t, Config{})
		r.calls("nnann")
		r.is(t, Closed)
	})
}

// A failed probe opens it again, whatever the others will say.
func TestFailedProbe(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := halfOpen(t, Config{})
		r.calls("sss")
		out := r.fill(t, 4)
		out[0].Done(nil)
		out[1].Done(ends['d'])
		r.told(t, TooManyFailures, ProbeDue, ProbeFailed)
		if d := r.next(t); d != 10*sec {
			t.Errorf("open for %v, want 10s", d)
		}
		out[2].Done(nil)
		out[3].Done(ends['f'])
		time.Sleep(10 * sec)
		r.calls("ssss")
		r.is(t, HalfOpen) // it takes five once more
		r.calls("s")
		r.is(t, Closed)
	})
}

// An outcome that says nothing frees its place at once, and counts for nothing.
func TestIgnoredProbe(t *testing.T) {
	for _, letter := range "cql" {
		bubble(t, func(t *testing.T) {
			r := halfOpen(t, Config{})
			for range 10 {
				out := r.fill(t, 1)
				out[0].Done(ends[letter])
			}
			r.is(t, HalfOpen)
			r.calls("sssss")
			r.is(t, Closed)
		})
	}
}

// A slow probe opens it again; a stream is never slow.
func TestSlowProbe(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := halfOpen(t, Config{SlowCallDuration: sec})
		r.slowCalls("s", sec)
		p := r.probe(t)
		time.Sleep(2 * sec)
		p.DoneStream(nil)
		r.is(t, HalfOpen)
		p = r.probe(t)
		time.Sleep(2 * sec)
		p.Ignore()
		r.is(t, HalfOpen)
		r.slowCalls("s", sec+1)
		r.told(t, TooManyFailures, ProbeDue, ProbeSlow)
		r.is(t, Open)
	})
}

// The fault that this package works around: gobreaker alone never hears of a probe that
// was lost, and refuses for ever.
func TestLostProbeWedgesGobreaker(t *testing.T) {
	bubble(t, func(t *testing.T) {
		cb := gobreaker.NewTwoStepCircuitBreaker[any](gobreaker.Settings{
			Timeout:     5 * sec,
			ReadyToTrip: func(n gobreaker.Counts) bool { return n.TotalFailures > 0 },
		})
		done, err := cb.Allow()
		if err != nil {
			t.Fatal(err)
		}
		done(ends['f'])
		time.Sleep(6 * sec)
		if _, err := cb.Allow(); err != nil { // the probe, whose end nobody reports
			t.Fatal(err)
		}
		for range 365 {
			time.Sleep(24 * time.Hour)
			if _, err := cb.Allow(); err == nil {
				t.Fatal("gobreaker recovers by itself: the leases of package breaker are not needed any more")
			}
		}
	})
}

// And ours: a lost probe keeps its place for OpenFor, and no longer, at every step of the
// ramp.
func TestLostProbeNeverWedges(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := halfOpen(t, Config{})
		for n := range 5 {
			r.fill(t, n+1) // all lost
			time.Sleep(5*sec - 1)
			if _, err := r.Admit(); err == nil {
				t.Fatal("a place is given to another before its lease is over")
			}
			time.Sleep(time.Nanosecond)
			out := r.fill(t, n+1)
			for _, p := range out[1:] {
				p.Ignore()
			}
			out[0].Done(nil)
		}
		r.is(t, Closed)
	})
}

// Nor does one that was lost before the breaker opened again take a place afterwards.
func TestLostProbeOfAnEarlierPhase(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := halfOpen(t, Config{OpenFor: 5 * sec})
		r.calls("s")
		out := r.fill(t, 2)
		time.Sleep(4 * sec)
		out[1].Failure() // out[0] is lost
		time.Sleep(10 * sec)
		r.fill(t, 1)
	})
}

// What is reported too late is dropped: after its lease, after the state has changed, and
// a second time.
func TestLateReports(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  rune
		run  func(t *testing.T, r *rig) Permit // returns the permit to end
		want []Reason                          // after it was ended
	}{
		{"a failure in time opens", 'f', func(t *testing.T, r *rig) Permit {
			p := r.probe(t)
			time.Sleep(5*sec - 1)
			return p
		}, []Reason{TooManyFailures, ProbeDue, ProbeFailed}},
		{"a failure at the end of the lease does not", 'f', func(t *testing.T, r *rig) Permit {
			p := r.probe(t)
			time.Sleep(5 * sec)
			return p
		}, []Reason{TooManyFailures, ProbeDue}},
		{"nor does one whose place has another", 'f', func(t *testing.T, r *rig) Permit {
			p := r.probe(t)
			time.Sleep(5 * sec)
			r.probe(t)
			return p
		}, []Reason{TooManyFailures, ProbeDue}},
		{"a fifth success in time closes", 's', func(t *testing.T, r *rig) Permit {
			r.calls("ssss")
			p := r.probe(t)
			time.Sleep(5*sec - 1)
			return p
		}, []Reason{TooManyFailures, ProbeDue, ProbesSucceeded}},
		{"one at the end of the lease does not", 's', func(t *testing.T, r *rig) Permit {
			r.calls("ssss")
			p := r.probe(t)
			time.Sleep(5 * sec)
			return p
		}, []Reason{TooManyFailures, ProbeDue}},
		{"a copy of a probe that has ended", 'f', func(t *testing.T, r *rig) Permit {
			p := r.probe(t)
			copied := p
			p.Done(nil)
			return copied
		}, []Reason{TooManyFailures, ProbeDue}},
		{"a probe of the half-open time before", 'f', func(t *testing.T, r *rig) Permit {
			r.calls("s")
			p := r.probe(t)
			r.calls("f")
			time.Sleep(10 * sec)
			r.probe(t)
			return p
		}, []Reason{TooManyFailures, ProbeDue, ProbeFailed, ProbeDue}},
		{"a probe when it has closed", 'f', func(t *testing.T, r *rig) Permit {
			r.calls("ssss")
			p := r.probe(t)
			r.calls("s")
			return p
		}, []Reason{TooManyFailures, ProbeDue, ProbesSucceeded}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := halfOpen(t, Config{})
				p := tc.run(t, r)
				p.Done(ends[tc.end])
				r.told(t, tc.want...)
			})
		})
	}
}

// A call that was let in before the latest change says nothing about the present.
func TestCallsOfAnEarlierPhase(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, Config{MinimumCalls: 1, SlowCallDuration: sec}, 0)
		old := make([]Permit, 4)
		for i := range old {
			old[i], _ = r.Admit()
		}
		r.calls("f")
		old[0].Done(nil) // while it is open
		time.Sleep(5 * sec)
		r.calls("s")
		old[1].Done(ends['f']) // half-open
		r.is(t, HalfOpen)
		r.calls("ssss")
		r.is(t, Closed)
		old[2].Done(ends['f']) // closed again
		old[3].Done(nil)       // and slow
		r.is(t, Closed)
		r.told(t, TooManyFailures, ProbeDue, ProbesSucceeded)
	})
}

// FuzzBreaker plays any sequence of events, two bytes each, and holds what must never fail.
func FuzzBreaker(f *testing.F) {
	f.Add([]byte("\x00\x01\x00\x01\x00\x01\x00\x01\x03\xff\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x00\x01\x00\x01\x00\x01\x00\x01\x03\xff\x01\x00\x01\x00\x03\x90\x02\x01\x01\x00\x02\x00\x02\x01"))
	f.Fuzz(func(t *testing.T, events []byte) {
		if len(events) > 400 {
			return
		}
		bubble(t, func(t *testing.T) {
			const openFor = sec
			r := newRig(t, Config{MinimumCalls: 3, Window: 2 * sec, OpenFor: openFor, SlowCallDuration: 300 * ms}, 0.5)
			type probe struct {
				Permit
				until time.Time
			}
			var calls []Permit
			var probes []probe
			succeeded := 0 // since the latest change
			seen := 0
			end := func(p *Permit, how byte) {
				switch how % 4 {
				case 0:
					p.Success()
				case 1:
					p.Failure()
				case 2:
					p.Ignore()
				case 3:
					p.DoneStream(nil)
				}
			}
			for ; len(events) >= 2; events = events[2:] {
				arg := events[1]
				switch events[0] % 4 {
				case 0, 1: // a call, which ends at once or stays out
					before := r.State()
					p, err := r.Admit()
					var live []probe
					for _, q := range probes {
						if time.Now().Before(q.until) {
							live = append(live, q)
						}
					}
					probes = live
					switch {
					case (before == Closed) != (err == nil && !p.Probe()):
						t.Fatalf("%v: let in %v, probe %v", before, err == nil, p.Probe())
					case before == Open && err == nil:
						t.Fatal("let in while open")
					case before == HalfOpen && (err == nil) != (len(probes) < succeeded+1):
						t.Fatalf("probe %v with %d out after %d successes", err == nil, len(probes), succeeded)
					}
					if err != nil {
						break
					}
					if events[0]%4 == 0 {
						if p.Probe() && (arg%4 == 0 || arg%4 == 3) {
							succeeded++
						}
						end(&p, arg)
					} else if p.Probe() {
						probes = append(probes, probe{p, time.Now().Add(openFor)})
					} else {
						calls = append(calls, p)
					}
				case 2: // one that is out ends
					if len(probes) > 0 {
						i := int(arg/4) % len(probes)
						q := probes[i]
						probes = append(probes[:i], probes[i+1:]...)
						// One that was slow opens the breaker, which clears this below.
						if time.Now().Before(q.until) && (arg%4 == 0 || arg%4 == 3) {
							succeeded++
						}
						end(&q.Permit, arg)
					} else if len(calls) > 0 {
						i := int(arg/4) % len(calls)
						end(&calls[i], arg)
						calls = append(calls[:i], calls[i+1:]...)
					}
				case 3:
					time.Sleep(time.Duration(arg) * 10 * ms)
				}
				from := Closed
				if seen > 0 {
					from = r.changes[seen-1].To
				}
				for ; seen < len(r.changes); seen++ {
					c := r.changes[seen]
					if c.From != from || c.From == c.To || c.From == Closed && c.To == HalfOpen || c.From == Open && c.To == Closed {
						t.Fatalf("changed from %v to %v after %v", c.From, c.To, from)
					}
					if c.To == Open {
						if d := c.Next.Sub(c.At); d < openFor || d > 8*openFor*5/4 {
							t.Fatalf("open for %v", d)
						}
					}
					if from = c.To; c.To != HalfOpen {
						succeeded, probes = 0, nil
					}
				}
			}
			// Whatever was lost: it closes once the server answers.
			time.Sleep(8*openFor*5/4 + openFor)
			r.calls("sssss")
			r.is(t, Closed)
		})
	})
}

// io.EOF is how a good stream ends, and a context error that an interceptor returns as it
// is counts as its status would.
func TestPlainErrors(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b, err := New(Config{MinimumCalls: 1})
		if err != nil {
			t.Fatal(err)
		}
		for _, end := range []func(p *Permit){
			func(p *Permit) { p.DoneStream(io.EOF) },
			func(p *Permit) { p.Done(context.Canceled) },
		} {
			p, err := b.Admit()
			if err != nil {
				t.Fatal(err)
			}
			end(&p)
			if b.State() != Closed {
				t.Fatal("it opens")
			}
		}
		p, _ := b.Admit()
		if p.Done(context.DeadlineExceeded); b.State() != Open {
			t.Error("a deadline is no failure")
		}
	})
}
