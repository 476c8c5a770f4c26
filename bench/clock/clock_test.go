package clock

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(tb testing.TB) *Clock {
	tb.Helper()
	c, err := New()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

// Many sleepers, in any order, a third of whom give up: none wakes early, all wake.
func TestSleep(t *testing.T) {
	c := open(t)
	rng := rand.New(rand.NewPCG(1, 2))
	var wg sync.WaitGroup
	for i := range 3000 {
		d := time.Duration(rng.Float64() * float64(30*time.Millisecond))
		wg.Go(func() {
			ctx := t.Context()
			if i%3 == 0 {
				var cancel func()
				ctx, cancel = context.WithTimeout(ctx, d/2)
				defer cancel()
			}
			start := time.Now()
			err := c.Sleep(ctx, d)
			if took := time.Since(start); err == nil && took < d {
				t.Errorf("slept %v, want at least %v", took, d)
			}
			if err != nil && ctx.Err() == nil {
				t.Errorf("%v while the context lives", err)
			}
		})
	}
	wg.Wait()
}

func TestSleepEnded(t *testing.T) {
	c := open(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, d := range []time.Duration{-1, 0, time.Hour} {
		if err := c.Sleep(ctx, d); !errors.Is(err, context.Canceled) {
			t.Errorf("Sleep(%v) = %v, want Canceled", d, err)
		}
	}
	if err := c.Sleep(t.Context(), -1); err != nil {
		t.Errorf("nothing to wait for: %v", err)
	}
}

// BenchmarkLate reports how late a wait of 1-5 ms ends, beside time.Sleep.
func BenchmarkLate(b *testing.B) {
	c := open(b)
	for name, sleep := range map[string]func(time.Duration){
		"clock":      func(d time.Duration) { c.Sleep(context.Background(), d) },
		"time.Sleep": time.Sleep,
	} {
		b.Run(name, func(b *testing.B) {
			rng := rand.New(rand.NewPCG(1, 2))
			var late time.Duration
			for b.Loop() {
				d := time.Millisecond + time.Duration(rng.Float64()*4e6)
				start := time.Now()
				sleep(d)
				late += time.Since(start) - d
			}
			b.ReportMetric(float64(late.Microseconds())/float64(b.N), "us-late/op")
		})
	}
}
