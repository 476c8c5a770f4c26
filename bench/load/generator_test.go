package load

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sleep waits in the bubble's time.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// recorder collects what a generator records.
type recorder struct {
	mu   sync.Mutex
	took []time.Duration
	errs []error
}

func (r *recorder) record(d time.Duration, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.errs = append(r.errs, err)
		return
	}
	r.took = append(r.took, d)
}

// The story of coordinated omission (FIGURES): a server that stalls for one
// second in every five, 200 requests/s. A closed loop says p99 5 ms; whoever
// should have called during the stall says 960.
func TestOpenLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &Generator{Sleep: sleep, Timeout: 10 * time.Second, MaxInFlight: 1000}
		var r recorder
		start := time.Now()
		n := g.Run(t.Context(), t.Context(), Block{
			Start: start, At: NewArrivals(1, 200, "uniform").Next(20 * time.Second),
			Send: func(ctx context.Context, id uint64) error {
				if in := time.Since(start) % (5 * time.Second); in < time.Second {
					return sleep(ctx, time.Second-in)
				}
				return sleep(ctx, 5*time.Millisecond)
			},
			Record: r.record,
		})
		if !g.Drain(t.Context()) {
			t.Fatal("not drained")
		}
		slices.Sort(r.took)
		if n != 3999 || len(r.took) != n {
			t.Fatalf("%d sent, %d recorded, want 3,999", n, len(r.took))
		}
		p99 := r.took[n*99/100]
		if p99 < 940*time.Millisecond || p99 > 960*time.Millisecond {
			t.Errorf("p99 %v, want 950 ms", p99)
		}
		if h := g.Health(); h != (Health{}) {
			t.Errorf("health %+v, want no lag in virtual time", h)
		}
	})
}

// A generator that is late says so, and its lateness counts for the latency.
func TestLag(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &Generator{Timeout: time.Second, MaxInFlight: 10}
		g.Sleep = func(ctx context.Context, d time.Duration) error { return sleep(ctx, d+3*time.Millisecond) }
		var r recorder
		g.Run(t.Context(), t.Context(), Block{
			Start: time.Now(), At: []time.Duration{10 * time.Millisecond, 20 * time.Millisecond},
			Send:   func(ctx context.Context, _ uint64) error { return sleep(ctx, time.Millisecond) },
			Record: r.record,
		})
		g.Drain(t.Context())
		if want := []time.Duration{4e6, 4e6}; !slices.Equal(r.took, want) {
			t.Errorf("latencies %v, want %v", r.took, want)
		}
		if lag := g.Health().LagP99; lag < 2999*time.Microsecond || lag > 3002*time.Microsecond {
			t.Errorf("lag %v, want 3ms", lag)
		}
	})
}

// Beyond MaxInFlight nothing is sent, and nothing forgotten.
func TestOverflow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &Generator{Sleep: sleep, Timeout: time.Minute, MaxInFlight: 3}
		var r recorder
		g.Run(t.Context(), t.Context(), Block{
			Start: time.Now(), At: []time.Duration{0, 1, 2, 3, 4, 2 * 1e9},
			Send:   func(ctx context.Context, _ uint64) error { return sleep(ctx, time.Second) },
			Record: r.record,
		})
		g.Drain(t.Context())
		if len(r.took) != 4 || len(r.errs) != 2 || r.errs[0] != ErrOverflow {
			t.Errorf("%d done, errors %v, want 4 and 2 overflows", len(r.took), r.errs)
		}
		if n := g.Health().Overflow; n != 2 {
			t.Errorf("overflow %d, want 2", n)
		}
	})
}

// A timeout is a failure; an interrupt is not: what it cuts off is abandoned.
func TestEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &Generator{Sleep: sleep, Timeout: 5 * time.Second, MaxInFlight: 10}
		ctx, interrupt := context.WithCancel(t.Context())
		base, cutOff := context.WithCancel(t.Context())
		defer cutOff()
		time.AfterFunc(8500*time.Millisecond, interrupt)
		var r recorder
		sent := g.Run(ctx, base, Block{
			Start: time.Now(), At: []time.Duration{1e9, 6e9, 7e9, 8e9, 9e9},
			Send: func(ctx context.Context, id uint64) error {
				return sleep(ctx, map[uint64]time.Duration{40: time.Minute, 41: time.Millisecond}[id]+2*time.Second)
			},
			FirstID: 40,
			Record:  r.record,
		})
		if sent != 4 {
			t.Errorf("%d sent, want 4: the interrupt came before the fifth", sent)
		}
		brief, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if g.Drain(brief) {
			t.Error("drained, with a request under way")
		}
		cutOff()
		if !g.Drain(t.Context()) {
			t.Error("not drained")
		}
		if len(r.errs) != 1 || !errors.Is(r.errs[0], context.DeadlineExceeded) || len(r.took) != 2 {
			t.Errorf("errors %v, latencies %v, want one timeout and two", r.errs, r.took)
		}
		if n := g.Health().Abandoned; n != 1 {
			t.Errorf("%d abandoned, want 1", n)
		}
	})
}
