package fleet

import (
	"context"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// visit is a call of a test: when it comes, how long its work is, how long it stays.
type visit struct{ at, work, patience time.Duration }

func visits(t *rapid.T) []visit {
	const ms = time.Millisecond
	all := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) visit {
		// Odd patience: no call leaves at the very moment at which its turn comes or
		// its work ends, where either may be seen first.
		return visit{
			at:       time.Duration(rapid.IntRange(-20, 200).Draw(t, "at")) * ms,
			work:     time.Duration(rapid.IntRange(1, 40).Draw(t, "work")) * ms,
			patience: time.Duration(rapid.IntRange(0, 60).Draw(t, "patience"))*ms + ms/2,
		}
	}), 1, 40).Draw(t, "visits")
	slices.SortStableFunc(all, func(a, b visit) int { return int(a.at - b.at) })
	return all
}

// stepped serves visits by stepping through time: at every step workers whose call
// is done or gone take the first one in the queue. It returns when each call's work
// was done, -1 for one that left before.
func stepped(all []visit, workers int, leave bool) []time.Duration {
	const step = time.Millisecond / 2
	end := make([]time.Duration, len(all))
	left := make([]time.Duration, len(all))
	for i, v := range all {
		end[i], left[i] = -1, v.work
	}
	var queue, busy []int
	came, open := 0, len(all)
	for now := all[0].at; open > 0; now += step {
		for ; came < len(all) && all[came].at == now; came++ {
			queue = append(queue, came)
		}
		gone := func(i int) bool { return leave && now >= all[i].at+all[i].patience }
		busy = slices.DeleteFunc(busy, func(i int) bool {
			if left[i] == 0 {
				end[i] = now
			}
			if left[i] == 0 || gone(i) {
				open--
				return true
			}
			return false
		})
		queue = slices.DeleteFunc(queue, func(i int) bool {
			if gone(i) {
				open--
			}
			return gone(i)
		})
		for len(busy) < workers && len(queue) > 0 {
			busy, queue = append(busy, queue[0]), queue[1:]
		}
		for _, i := range busy {
			left[i] -= step
		}
	}
	return end
}

// Booking computes what stepping through time finds.
func TestBook(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all, workers := visits(t), rapid.IntRange(1, 4).Draw(t, "workers")
		want := stepped(all, workers, false)
		q := newQueue(workers)
		for i, v := range all {
			if got := q.book(v.at, func(start time.Duration) time.Duration { return start + v.work }); got != want[i] {
				t.Fatalf("call %d is done at %v, want %v", i, got, want[i])
			}
		}
	})
}

// Callers that leave, from the queue or from a worker, make room at once.
func TestAcquire(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		all, workers := visits(rt), rapid.IntRange(1, 4).Draw(rt, "workers")
		// Calls of one moment come in an order that the test would have to force.
		all = slices.CompactFunc(all, func(a, b visit) bool { return a.at == b.at })
		want := stepped(all, workers, true)
		got := make([]time.Duration, len(all))
		synctest.Test(t, func(t *testing.T) {
			q := newQueue(workers)
			epoch := time.Now().Add(-all[0].at)
			var wg sync.WaitGroup
			for i, v := range all {
				wg.Go(func() {
					time.Sleep(v.at - time.Since(epoch))
					ctx, cancel := context.WithTimeout(t.Context(), v.patience)
					defer cancel()
					got[i] = -1
					start, err := q.acquire(ctx, v.at)
					if err != nil {
						return
					}
					if virtualSleep(ctx, start+v.work-time.Since(epoch)) != nil {
						q.release(time.Since(epoch))
						return
					}
					got[i] = time.Since(epoch)
					q.release(start + v.work)
				})
			}
			wg.Wait()
			if len(q.free) != workers || q.waiting.Len() != 0 {
				t.Errorf("%d of %d workers free, %d waiting at the end", len(q.free), workers, q.waiting.Len())
			}
		})
		if !slices.Equal(got, want) {
			rt.Errorf("done at %v, want %v", got, want)
		}
	})
}

// A goroutine that wakes late makes nobody behind it late, but nobody begins
// before having come.
func TestLateRelease(t *testing.T) {
	const ms = time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(1)
		if start, err := q.acquire(t.Context(), 0); start != 0 || err != nil {
			t.Fatalf("start %v, %v", start, err)
		}
		var early, late time.Duration
		go func() { early, _ = q.acquire(t.Context(), 5*ms) }()
		synctest.Wait()
		go func() { late, _ = q.acquire(t.Context(), 25*ms) }()
		synctest.Wait()
		q.release(10 * ms) // said at 30, say
		synctest.Wait()
		q.release(20 * ms)
		synctest.Wait()
		if early != 10*ms || late != 25*ms {
			t.Errorf("starts at %v and %v, want 10ms and 25ms", early, late)
		}
	})
}

// A turn that comes as its call leaves is the next one's: no worker is lost.
func TestLeavesAsCalled(t *testing.T) {
	for range 200 {
		synctest.Test(t, func(t *testing.T) {
			q := newQueue(1)
			q.acquire(t.Context(), 0) //nolint:errcheck // the worker is free
			ctx, cancel := context.WithCancel(t.Context())
			leaver := make(chan error)
			go func() {
				_, err := q.acquire(ctx, 1)
				if err == nil {
					q.release(3)
				}
				leaver <- err
			}()
			synctest.Wait()
			cancel()
			q.release(2) // mostly before the leaver, which is awake, has looked
			<-leaver
			synctest.Wait()
			if len(q.free) != 1 || q.waiting.Len() != 0 {
				t.Fatalf("%d workers free, %d waiting, want 1, 0", len(q.free), q.waiting.Len())
			}
		})
	}
}
