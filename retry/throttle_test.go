package retry

import (
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

// TestThrottleSteps holds the sentences of A6 one by one.
func TestThrottleSteps(t *testing.T) {
	type step struct {
		op     rune // 's'uccess or 'f'ailure
		n      int
		tokens float64
		allow  bool
	}
	for _, test := range []struct {
		name  string
		cfg   ThrottleConfig
		steps []step
	}{
		{"initially set to maxTokens", ThrottleConfig{10, 0.1}, []step{{'s', 0, 10, true}}},
		{"every failed RPC decrements by 1; at maxTokens/2 it stops", ThrottleConfig{10, 0.1}, []step{
			{'f', 4, 6, true}, {'f', 1, 5, false}, {'f', 1, 4, false},
		}},
		{"every successful RPC increments by tokenRatio; above the threshold it resumes", ThrottleConfig{10, 0.1}, []step{
			{'f', 6, 4, false}, {'s', 10, 5, false}, {'s', 1, 5.1, true},
		}},
		{"between 0 and maxTokens", ThrottleConfig{3, 2}, []step{
			{'s', 5, 3, true}, {'f', 7, 0, false}, {'s', 1, 2, true}, {'s', 1, 3, true},
		}},
		{"decimals beyond 3 are ignored", ThrottleConfig{10, 0.5466}, []step{{'f', 2, 8, true}, {'s', 1, 8.546, true}}},
		{"a decimal that float64 holds a hair too low", ThrottleConfig{10, 1.001}, []step{{'f', 3, 7, true}, {'s', 1, 8.001, true}}},
		{"a thousand of a thousandth are exactly one", ThrottleConfig{4, 0.001}, []step{
			{'f', 3, 1, false}, {'s', 1000, 2, false}, {'s', 1, 2.001, true},
		}},
		{"an odd maxTokens: the threshold is not rounded", ThrottleConfig{1.001, 0.001}, []step{
			{'f', 1, 0.001, false}, {'s', 499, 0.5, false}, {'s', 1, 0.501, true},
		}},
		{"a ratio above maxTokens", ThrottleConfig{1000, math.MaxFloat64}, []step{{'f', 2000, 0, false}, {'s', 1, 1000, true}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			th, err := NewThrottle(test.cfg)
			if err != nil {
				t.Fatal(err)
			}
			for i, s := range test.steps {
				for range s.n {
					if s.op == 's' {
						th.Success()
					} else {
						th.Failure()
					}
				}
				if got, allow := th.Tokens(), th.Allow(); got != s.tokens || allow != s.allow {
					t.Fatalf("step %d: %v tokens, allow %v, want %v, %v", i, got, allow, s.tokens, s.allow)
				}
			}
		})
	}
}

func TestNewThrottleFaults(t *testing.T) {
	for _, test := range []struct {
		cfg  ThrottleConfig
		want string // "" is none
	}{
		{ThrottleConfig{1000, 0.001}, ""},
		{ThrottleConfig{0.001, 1e9}, ""},
		{ThrottleConfig{1000.5, 1}, "retry: throttle maxTokens 1000.5, want (0, 1000]"},
		{ThrottleConfig{math.NaN(), 1}, "retry: throttle maxTokens NaN, want (0, 1000]"},
		{ThrottleConfig{0.0001, 1}, "retry: throttle maxTokens 0.0001, want at least 0.001"},
		{ThrottleConfig{1, 0.0009}, "retry: throttle tokenRatio 0.0009, want at least 0.001"},
		{ThrottleConfig{1, math.Inf(1)}, "retry: throttle tokenRatio +Inf, want (0, +Inf)"},
		{ThrottleConfig{}, "retry: throttle maxTokens 0, want (0, 1000]\nretry: throttle tokenRatio 0, want (0, +Inf)"},
	} {
		th, err := NewThrottle(test.cfg)
		switch {
		case test.want == "" && err != nil:
			t.Errorf("NewThrottle(%+v): %v", test.cfg, err)
		case test.want != "" && (err == nil || err.Error() != test.want):
			t.Errorf("NewThrottle(%+v): %v, want %s", test.cfg, err, test.want)
		case (th == nil) == (err == nil):
			t.Errorf("NewThrottle(%+v) = %v, %v", test.cfg, th, err)
		}
	}
}

func TestThrottleModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		maxTokens := rapid.IntRange(1, 1_000_000).Draw(t, "max")
		ratio := rapid.OneOf(rapid.IntRange(1, 2000), rapid.IntRange(1, 2_000_000)).Draw(t, "ratio")
		th, err := NewThrottle(ThrottleConfig{float64(maxTokens) / 1000, float64(ratio) / 1000})
		if err != nil {
			t.Fatal(err)
		}
		tokens := maxTokens
		for _, failed := range rapid.SliceOfN(rapid.Bool(), 1, 300).Draw(t, "failed") {
			if failed {
				th.Failure()
				tokens = max(tokens-1000, 0)
			} else {
				th.Success()
				tokens = min(tokens+ratio, maxTokens)
			}
			if got := th.Tokens(); got != float64(tokens)/1000 {
				t.Fatalf("%v tokens, want %v", got, float64(tokens)/1000)
			}
			if got := th.Allow(); got != (tokens*2 > maxTokens) {
				t.Fatalf("allow %v with %d of %d", got, tokens, maxTokens)
			}
		}
	})
}

// TestThrottleConcurrent keeps the count away from its ends, where order would
// matter: no change may be lost.
func TestThrottleConcurrent(t *testing.T) {
	const goroutines, each = 4, 200_000
	th, err := NewThrottle(ThrottleConfig{1000, 0.001})
	if err != nil {
		t.Fatal(err)
	}
	for range 500 {
		th.Failure()
	}
	failures := make([]int, goroutines)
	var wg sync.WaitGroup
	start := make(chan struct{})
	for g := range goroutines {
		wg.Go(func() {
			<-start
			rng := rand.New(rand.NewPCG(uint64(g), 7))
			for range each {
				if rng.IntN(1000) == 0 {
					failures[g]++
					th.Failure()
				} else {
					th.Success()
				}
				if n := th.Tokens(); n < 0 || n > 1000 {
					t.Errorf("%v tokens", n)
				}
			}
		})
	}
	close(start)
	wg.Wait()
	failed := 0
	for _, n := range failures {
		failed += n
	}
	if got, want := th.tokens.Load(), int64(500_000-1000*failed+(goroutines*each-failed)); got != want {
		t.Errorf("%d thousandths after %d failures, want %d", got, failed, want)
	}
}

func BenchmarkThrottle(b *testing.B) {
	full, _ := NewThrottle(ThrottleConfig{1000, 0.1})
	b.Run("SuccessWhenFull", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				full.Success()
			}
		})
	})
	mixed, _ := NewThrottle(ThrottleConfig{1000, 0.1})
	b.Run("SuccessAndFailure", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for i := 0; pb.Next(); i++ {
				if i%11 == 0 {
					mixed.Failure()
				} else {
					mixed.Success()
				}
			}
		})
	})
}
