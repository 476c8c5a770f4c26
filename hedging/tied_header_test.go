package hedging

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// The goroutine that reads a connection does not wait until a hedge of a large request has
// been made, under the lock; what it has read is heeded after that.
func TestHeaderDoesNotWait(t *testing.T) {
	for _, busy := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			h, err := New(Config{MaxAttempts: 2, Tied: true})
			if err != nil {
				t.Fatal(err)
			}
			r := &race{h: h, ctx: t.Context(), tied: true, core: core{max: 2, delay: noTime, deadline: noTime}}
			r.begin(time.Now())
			r.core.start(0, r)
			r.mu.Lock()
			r.needs().hedges = append(r.rare.hedges, &branch{own: &own{}})
			hedge := r.rare.hedges[0]
			r.open(hedge, 0, 2, 0)
			r.core.number, r.core.sent, r.core.running = 2, 2, 2
			if !busy {
				r.mu.Unlock()
			}
			r.header(&r.first, true) // returns, or the test hangs
			if busy {
				if hedge.withdrawn || hedge.Err() != nil {
					t.Error("withdrawn without the lock")
				}
				r.mu.Unlock()
			}
			synctest.Wait()
			r.mu.Lock()
			defer r.mu.Unlock()
			if !hedge.withdrawn || hedge.Err() != context.Canceled || r.core.withdrawn != 1 || r.first.Err() != nil {
				t.Errorf("busy %v: withdrawn %v, %v, %d, the first %v", busy, hedge.withdrawn, hedge.Err(), r.core.withdrawn, r.first.Err())
			}
			r.first.cancel()
			if r.timer != nil {
				r.timer.Stop()
			}
		})
	}
}
