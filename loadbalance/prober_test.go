package loadbalance

import (
	"context"
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// How many probes are due, step by step.
func TestPacer(t *testing.T) {
	cfg := defaultPrequal()
	cfg.maxProbes = 100 // one in 10 ms, three at once
	p := pacer{}
	for i, step := range []struct {
		now   time.Duration
		picks uint64
		want  int
	}{
		{0, 1, 0}, // it begins with no tokens
		{100 * ms, 0, 3},
		{100 * ms, 0, 0},
		{200 * ms, 0, 0}, // no picks, no probes
		{200 * ms, 1, 3},
		{205 * ms, 1000, 0},
		{210 * ms, 1000, 1},
		{220 * ms, 0, 1}, // of what is owed for the picks before
		{1000 * ms, 0, 1},
		{2000 * ms, 0, 0}, // and no more: they came too fast
	} {
		if got := p.take(step.now, step.picks, cfg); got != step.want {
			t.Errorf("step %d: %d probes, want %d", i, got, step.want)
		}
	}
	cfg.probesPerPick = 0.25
	p = pacer{last: -time.Hour}
	for i, want := range []int{0, 0, 0, 1, 0, 0, 0, 1} {
		if got := p.take(time.Duration(i)*time.Second, 1, cfg); got != want {
			t.Errorf("pick %d at a quarter of a probe each: %d, want %d", i, got, want)
		}
	}
}

// In no span of time are there more probes than its part of the second's, and a burst;
// and no more than the picks of it and before it want.
func TestPacerBound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := defaultPrequal()
		cfg.maxProbes = int64(rapid.IntRange(1, 5000).Draw(t, "max"))
		cfg.probesPerPick = rapid.Float64Range(0.1, 16).Draw(t, "probesPerPick")
		type at struct {
			now time.Duration
			n   int
		}
		var sent []at
		var p pacer
		now, picks, sum := time.Duration(0), 0.0, 0.0
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			now += time.Duration(rapid.IntRange(0, 50_000).Draw(t, "us")) * time.Microsecond
			k := rapid.IntRange(0, 100).Draw(t, "picks")
			picks += float64(k)
			n := p.take(now, uint64(k), cfg)
			sum += float64(n)
			sent = append(sent, at{now, n})
			if sum > picks*cfg.probesPerPick+1e-6 {
				t.Fatalf("%v probes for %v picks of %v each", sum, picks, cfg.probesPerPick)
			}
		}
		for i := range sent {
			n := 0
			for _, s := range sent[i:] {
				n += s.n
				most := (s.now-sent[i].now).Seconds()*float64(cfg.maxProbes) + p.burst(cfg)
				if float64(n) > most+1e-6 {
					t.Fatalf("%d probes within %v, want at most %v", n, s.now-sent[i].now, most)
				}
			}
		}
	})
	if got := (&pacer{}).burst(&prequalConfig{maxProbes: 100_000, probesPerPick: 0.1}); got != 100 {
		t.Errorf("burst %v of 100,000 probes a second, want those of a millisecond", got)
	}
}

// Every member is probed once before any is again; who is being asked, or has no such service,
// is left out.
func TestProbeTargets(t *testing.T) {
	c := told(6, nil)
	p := newProber()
	c.of[1].asked.Store(true)
	c.of[2].quiet.Store(10)
	counts := make([]int, 6)
	for range 40 {
		counts[p.target(c, 9)]++
	}
	for i, n := range counts {
		if want := 10; i != 1 && i != 2 && math.Abs(float64(n-want)) > 1 || (i == 1 || i == 2) && n != 0 {
			t.Errorf("member %d was probed %d times: %v", i, n, counts)
		}
	}
	seen := false
	for range 12 {
		seen = seen || p.target(c, 10) == 2
	}
	if !seen {
		t.Error("a member is never probed again")
	}
	for _, r := range c.of {
		r.asked.Store(true)
	}
	if got := p.target(c, 10); got != -1 {
		t.Errorf("member %d is probed twice at once", got)
	}
	if got := p.target(told(1, nil), 0); got != 0 {
		t.Errorf("member %d of another chooser, want 0", got)
	}
}

// The first pick may come before the prober has slept.
func TestAPickIsNeverWithoutItsChooser(t *testing.T) {
	start := time.Now()
	for i := 0; time.Since(start) < 200*time.Millisecond; i++ {
		p := newProber()
		c := p.replicas.choose(simMembers(0), defaultPrequal(), p)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan any, 1)
		go func() {
			defer func() { done <- recover() }()
			p.run(ctx, func() time.Duration { return 0 })
		}()
		p.note(c)
		cancel()
		if r := <-done; r != nil {
			t.Fatalf("iteration %d: panic %v", i, r)
		}
	}
}
