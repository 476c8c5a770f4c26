package experiment

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

// separate is fixture with a fleet for each policy, in a scenario side by side.
func separate(t *testing.T, serve func(id uint64) time.Duration, names ...string) (Config, map[string]*seen) {
	all := map[string]*seen{}
	var c Config
	for _, name := range names {
		one, saw := fixture(t, serve, name)
		all[name] = saw[name]
		one.Arms = append(c.Arms, one.Arms...)
		c = one
	}
	c.Scenario.SideBySide = true
	return c, all
}

// Every policy faces the same calls at the same moments of the timeline, and each a
// fraction of a gap later than the one before it by the clock, so that they do not
// collide; a policy that is slow holds no other up.
func TestSideBySide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, all := separate(t, quick, "a", "b", "c")
		c.Warmup = 1500 * time.Millisecond
		var blocks []int
		sent := 0
		c.Progress = func(p Progress) {
			blocks = append(blocks, p.Block)
			sent = p.Sent
			if p.Policy != "" {
				t.Errorf("progress names policy %q", p.Policy)
			}
		}
		begun := time.Now()
		r, err := Run(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(blocks, []int{1, 2, 3, 4, 5}) {
			t.Errorf("progress after blocks %v, want 5, one for all", blocks)
		}
		if took := time.Since(begun); took > 6*time.Second {
			t.Errorf("took %v, want 2 s of warm-up and 3 s for all", took)
		}
		for i, name := range []string{"a", "b", "c"} {
			phase := 10 * time.Millisecond * time.Duration(i) / 3
			shifted := func(a, b time.Time) bool { return b.Sub(a) == phase }
			if !slices.Equal(all["a"].ids, all[name].ids) || len(all[name].ids)*3 != sent {
				t.Errorf("%s saw other calls than a, or not all of %d", name, sent/3)
			}
			if !slices.Equal(all["a"].at, all[name].at) || !slices.EqualFunc(all["a"].begun, all[name].begun, shifted) {
				t.Errorf("%s saw its calls at other moments than a", name)
			}
		}
		// The warm-up comes before the timeline's zero.
		at := all["a"].at
		if at[0] < -2*time.Second || at[0] > -1900*time.Millisecond {
			t.Errorf("the first call is at %v of the timeline, want just after -2s", at[0])
		}
		for _, p := range r.Policies {
			n := 0
			for i, b := range p.Blocks {
				n += len(b.Latencies) + b.Errors
				if b.At != time.Duration(i)*time.Second {
					t.Errorf("%s: block %d at %v", p.Name, i, b.At)
				}
			}
			if n != 300 || len(p.Blocks) != 3 {
				t.Errorf("%s: %d requests in %d blocks, want 300 in 3", p.Name, n, len(p.Blocks))
			}
		}
	})
}

// A request counts in the block in which it began, and its attempts too.
func TestSideBySideSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var names []string
		slow := func(id uint64) time.Duration {
			if id < 100 {
				return 8 * time.Second
			}
			return 5 * time.Millisecond
		}
		c, _ := separate(t, slow, "a", "b")
		r, err := Run(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range r.Policies {
			names = append(names, p.Name)
			n := 0
			for _, d := range p.Blocks[0].Latencies {
				if d == 8*time.Second {
					n++
				}
			}
			b := p.Blocks[0]
			if n < 80 || b.Attempts != b.Calls {
				t.Errorf("%s: %d slow requests, %d attempts of %d calls in the first block", p.Name, n, b.Attempts, b.Calls)
			}
		}
		if !slices.Equal(names, []string{"a", "b"}) {
			t.Errorf("policies %v", names)
		}
	})
}

// An interrupt ends all of them at the same moment, and leaves a report.
func TestSideBySideInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := separate(t, quick, "a", "b")
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(1500*time.Millisecond, cancel)
		r, err := Run(ctx, c)
		if err != nil {
			t.Fatal(err)
		}
		if !r.Interrupted {
			t.Error("not marked as interrupted")
		}
		for _, p := range r.Policies {
			if len(p.Blocks) != 2 || p.Blocks[1].Length != 500*time.Millisecond {
				t.Errorf("%s: %d blocks, want one and a half", p.Name, len(p.Blocks))
			}
		}
	})
}

// Faults begin on time, however long the warm-up; in turns too each policy meets them.
func TestTimelineOfFaults(t *testing.T) {
	for _, sideBySide := range []bool{true, false} {
		for _, warmup := range []time.Duration{0, time.Second, 3 * time.Second} {
			c := Config{
				Scenario: &scenario.Scenario{Rate: 100, Arrivals: "uniform", Requests: 300, SideBySide: sideBySide,
					Faults: []scenario.Fault{{Kind: scenario.Blackhole}}},
				Block: time.Second, Warmup: warmup,
			}
			p := newPlan(c)
			for b, ok := p.next(); ok; b, ok = p.next() {
				if b.warmup != (b.offset < 0) {
					t.Fatalf("warm-up of %v: block at %v, warm-up %v", warmup, b.offset, b.warmup)
				}
			}
		}
	}
}
