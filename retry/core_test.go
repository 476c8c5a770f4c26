package retry

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// allow is a gate that always answers the same, and counts how often it is asked.
type allow struct {
	why   Reason
	asked int
}

func (a *allow) permit(time.Duration) Reason { a.asked++; return a.why }

// The rules of core as tables: what each failure in turn leads to.
func TestCore(t *testing.T) {
	yes := failure{retryable: true}
	after := func(d time.Duration) failure { return failure{retryable: true, hasWait: true, wait: d} }
	type step struct {
		f       failure
		remains time.Duration // 0: no deadline
		median  time.Duration
		u       float64
		gate    Reason

		wait time.Duration
		why  Reason
	}
	for _, tc := range []struct {
		name  string
		max   int
		b     Backoff
		steps []step
	}{{
		"A6: initialBackoff x multiplier^(n-1), capped, x 0.8 to 1.2", 9, Backoff{10 * ms, 50 * ms, 2, GRPCJitter}, []step{
			{f: yes, u: 0.5, wait: 10 * ms}, {f: yes, u: 0.5, wait: 20 * ms}, {f: yes, u: 0, wait: 32 * ms},
			{f: yes, u: 0.5, wait: 50 * ms}, {f: yes, u: 0.9999999999, wait: 60*ms - 1}},
	}, {
		"full: U(0, v)", 9, Backoff{10 * ms, 50 * ms, 2, FullJitter}, []step{
			{f: yes, u: 0, wait: 0}, {f: yes, u: 0.5, wait: 10 * ms}, {f: yes, u: 0.25, wait: 10 * ms}, {f: yes, u: 0.5, wait: 25 * ms}},
	}, {
		"equal: v/2 + U(0, v/2)", 9, Backoff{10 * ms, 50 * ms, 2, EqualJitter}, []step{
			{f: yes, u: 0, wait: 5 * ms}, {f: yes, u: 0.5, wait: 15 * ms}, {f: yes, u: 0, wait: 20 * ms}, {f: yes, u: 0.5, wait: 37500 * time.Microsecond}},
	}, {
		"decorrelated: min(max, U(initial, 3 x the last))", 9, Backoff{10 * ms, 50 * ms, 2, DecorrelatedJitter}, []step{
			{f: yes, u: 0, wait: 10 * ms}, {f: yes, u: 0.5, wait: 20 * ms}, {f: yes, u: 0.5, wait: 35 * ms}, {f: yes, u: 0.9, wait: 50 * ms}, {f: yes, u: 0, wait: 10 * ms}},
	}, {
		"a cap below the initial wait is the wait", 9, Backoff{10 * ms, 3 * ms, 2, GRPCJitter}, []step{{f: yes, u: 0.5, wait: 3 * ms}},
	}, {
		"a multiplier below 1 shrinks", 9, Backoff{10 * ms, time.Second, 0.5, GRPCJitter}, []step{{f: yes, u: 0.5, wait: 10 * ms}, {f: yes, u: 0.5, wait: 5 * ms}},
	}, {
		"no wait overflows", 9, Backoff{1 << 61, 1<<63 - 1, 1e300, GRPCJitter}, []step{{f: yes, u: 0.5, wait: 1 << 61}, {f: yes, u: 0.9, wait: 1<<62 - 1}},
	}, {
		"attempts are counted, the first included", 2, doubling, []step{{f: yes, u: 0.5, wait: 10 * ms}, {f: yes, u: 0.5, why: Exhausted}},
	}, {
		"pushback is exact, and resets the backoff", 9, doubling, []step{
			{f: yes, u: 0.5, wait: 10 * ms}, {f: yes, u: 0.5, wait: 20 * ms}, {f: after(123 * ms), u: 0.5, wait: 123 * ms}, {f: yes, u: 0.5, wait: 10 * ms}},
	}, {
		"pushback resets the decorrelated wait too", 9, Backoff{10 * ms, time.Hour, 2, DecorrelatedJitter}, []step{
			{f: yes, u: 0.5, wait: 20 * ms}, {f: after(0), wait: 0}, {f: yes, u: 0.5, wait: 20 * ms}},
	}, {
		"RetryInfo is a minimum", 9, doubling, []step{
			{f: failure{retryable: true, atLeast: 50 * ms}, u: 0.5, wait: 50 * ms}, {f: failure{retryable: true, atLeast: 5 * ms}, u: 0.5, wait: 20 * ms}},
	}, {
		"pushback not to retry stops, whatever the code", 9, doubling, []step{{f: failure{stop: true}, why: Pushback}},
	}, {
		"a local refusal is never retried", 9, doubling, []step{{f: failure{refused: true, retryable: true}, why: Refused}},
	}, {
		"a wait that reaches the deadline is not begun", 9, doubling, []step{
			{f: yes, u: 0.5, remains: 10*ms + 1, wait: 10 * ms}, {f: yes, u: 0.5, remains: 20 * ms, why: NoTime}, {f: after(time.Hour), remains: time.Hour, why: NoTime}},
	}, {
		"nor one that leaves less than half of the answers time", 9, doubling, []step{
			{f: yes, u: 0.5, remains: 15 * ms, median: 5 * ms, wait: 10 * ms}, {f: yes, u: 0.5, remains: 25*ms - 1, median: 5 * ms, why: NoTime}},
	}, {
		"past the deadline", 9, doubling, []step{{f: yes, u: 0.5, remains: -1, why: NoTime}},
	}, {
		"the gate has the last word", 9, doubling, []step{{f: yes, u: 0.5, gate: NoBudget, why: NoBudget}},
	}} {
		t.Run(tc.name, func(t *testing.T) {
			c := core{max: tc.max, number: 1, backoff: tc.b}
			for i, s := range tc.steps {
				if s.remains == 0 {
					s.remains = noTime
				}
				g := &allow{why: s.gate}
				before := c.number
				wait, why := c.failed(s.f, s.remains, s.median, s.u, g)
				if d := wait - s.wait; d < -2 || d > 2 || why != s.why { // 2 ns of rounding
					t.Errorf("step %d: wait %v, %q, want %v, %q", i+1, wait, why, s.wait, s.why)
				}
				if made := c.number - before; made != 0 != (why == "") {
					t.Errorf("step %d: %d attempts more, for %q", i+1, made, why)
				}
				// The gate takes a token, so it is asked when nothing else speaks against.
				if asked := g.asked == 1; asked != (s.why == "" || s.gate != "") {
					t.Errorf("step %d: the gate was asked %d times", i+1, g.asked)
				}
			}
		})
	}
}

func TestConfigFaults(t *testing.T) {
	good := Config{MaxAttempts: 2, Backoff: doubling, RetryableCodes: unavailable}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		change func(c *Config)
		want   string
	}{
		{func(c *Config) { c.MaxAttempts = 1 }, "retry: max attempts 1, want at least 2"},
		{func(c *Config) { c.RetryableCodes = nil }, "retry: no retryable codes, want at least one, or an attempt timeout"},
		{func(c *Config) { c.RetryableCodes = nil; c.AttemptTimeout = 1 }, ""},
		{func(c *Config) { c.RetryableCodes = nil; c.UnsentOnly = true }, ""},
		{func(c *Config) { c.RetryableCodes = []codes.Code{codes.OK, 99} },
			"retry: retryable code OK, want a code other than OK\nretry: retryable code Code(99), want a code other than OK"},
		{func(c *Config) { c.AttemptTimeout = -1 }, "retry: attempt timeout -1ns, want at least 0"},
		{func(c *Config) { c.Backoff = Backoff{Jitter: 9} },
			"retry: backoff initial 0s, want more than 0s\nretry: backoff max 0s, want more than 0s\nretry: backoff multiplier 0, want (0, +Inf)\nretry: backoff jitter 9, want one of the constants"},
	} {
		c := good
		tc.change(&c)
		got := ""
		if err := c.Validate(); err != nil {
			got = err.Error()
		}
		if got != tc.want {
			t.Errorf("got %q\nwant %q", got, tc.want)
		}
		if _, err := New(c); (err == nil) != (tc.want == "") {
			t.Errorf("New: %v, want the fault of Validate", err)
		}
	}
}

func TestJitterNames(t *testing.T) {
	for _, j := range []Jitter{FullJitter, EqualJitter, DecorrelatedJitter, GRPCJitter} {
		if got, err := ParseJitter(j.String()); got != j || err != nil {
			t.Errorf("%v is read as %v, %v", j, got, err)
		}
	}
	if _, err := ParseJitter("fulll"); err == nil || err.Error() != `retry: jitter "fulll", want "full", "equal", "decorrelated" or "grpc"` {
		t.Errorf("%v", err)
	}
}
