package breaker

import (
	"math"
	"testing"
	"time"
)

func TestFaults(t *testing.T) {
	for _, tc := range []struct {
		cfg  Config
		want string // "" is none
	}{
		{Config{}, ""},
		{Config{FailureRatio: 1, MinimumCalls: 1_000_000, Window: time.Hour, OpenFor: time.Hour, SlowCallDuration: 1, SlowCallRatio: 1}, ""},
		{Config{FailureRatio: 1e-9, MinimumCalls: 1, Window: 100 * ms, OpenFor: 10 * ms}, ""},
		{Config{FailureRatio: 1.5}, "breaker: failure ratio 1.5, want (0, 1]"},
		{Config{FailureRatio: -0.1}, "breaker: failure ratio -0.1, want (0, 1]"},
		{Config{FailureRatio: math.NaN()}, "breaker: failure ratio NaN, want (0, 1]"},
		{Config{MinimumCalls: -1}, "breaker: minimum calls -1, want [1, 1000000]"},
		{Config{MinimumCalls: 1_000_001}, "breaker: minimum calls 1000001, want [1, 1000000]"},
		{Config{Window: 99 * ms}, "breaker: window 99ms, want [100ms, 1h0m0s]"},
		{Config{Window: time.Hour + 1}, "breaker: window 1h0m0.000000001s, want [100ms, 1h0m0s]"},
		{Config{OpenFor: 10*ms - 1}, "breaker: open for 9.999999ms, want [10ms, 1h0m0s]"},
		{Config{OpenFor: time.Hour + 1}, "breaker: open for 1h0m0.000000001s, want [10ms, 1h0m0s]"},
		{Config{SlowCallDuration: -1}, "breaker: slow call duration -1ns, want at least 0"},
		{Config{SlowCallDuration: 1, SlowCallRatio: math.NaN()}, "breaker: slow call ratio NaN, want (0, 1]"},
		{Config{SlowCallRatio: 0.5}, "breaker: slow call ratio 0.5, want a slow call duration beside it"},
		{Config{FailureRatio: 2, MinimumCalls: -3, SlowCallRatio: 2}, "breaker: failure ratio 2, want (0, 1]\n" +
			"breaker: minimum calls -3, want [1, 1000000]\n" +
			"breaker: slow call ratio 2, want (0, 1]\n" +
			"breaker: slow call ratio 2, want a slow call duration beside it"},
	} {
		b, err := New(tc.cfg)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != tc.want || (b == nil) != (err != nil) {
			t.Errorf("%+v: %v, %q, want %q", tc.cfg, b, got, tc.want)
		}
	}
}

func TestStateString(t *testing.T) {
	for s, want := range map[State]string{Closed: "closed", HalfOpen: "half-open", Open: "open", 7: "State(7)"} {
		if s.String() != want {
			t.Errorf("%q, want %q", s, want)
		}
	}
}
