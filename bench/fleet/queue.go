package fleet

import (
	"container/list"
	"context"
	"math"
	"slices"
	"sync"
	"time"
)

// queue is a first-come-first-served queue before a number of workers. It reads
// no clock and has no goroutine: it computes moments, as a timetable does, and a
// wait that ends late makes no later call later. A backend of 300 calls/s thus
// serves 300, where sleeping for each in turn would lose the lateness of each sleep.
//
// It is used in one of two ways, not both. With book, work is done whatever becomes
// of its caller, so all moments are known on arrival. With acquire and release a
// caller may leave before its turn or before its end, and those behind move up.
type queue struct {
	mu sync.Mutex // guards what follows
	// free is when each worker has done what it was given (book), or was freed
	// (acquire: those of idle workers only).
	free    []time.Duration
	waiting list.List // of *waiter, in order of arrival
}

// waiter is a call without a worker.
type waiter struct {
	at    time.Duration
	start time.Duration
	ready chan struct{} // closed once start is known
}

func newQueue(workers int) *queue {
	// Free before any moment of the timeline: the warm-up's are negative.
	return &queue{free: slices.Repeat([]time.Duration{math.MinInt64}, workers)}
}

// earliest is the index of the worker that is free first.
func (q *queue) earliest() int {
	return slices.Index(q.free, slices.Min(q.free))
}

// book gives work that comes at the moment at to the worker that is free first,
// and returns when it will be done: finish says when work begun at start is.
func (q *queue) book(at time.Duration, finish func(start time.Duration) time.Duration) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	w := q.earliest()
	q.free[w] = finish(max(at, q.free[w]))
	return q.free[w]
}

// acquire waits for a worker and returns when it began with this call, which came
// at the moment at. Every acquire without an error is followed by one release.
func (q *queue) acquire(ctx context.Context, at time.Duration) (start time.Duration, err error) {
	q.mu.Lock()
	if len(q.free) > 0 {
		defer q.mu.Unlock()
		w := q.earliest()
		start = max(at, q.free[w])
		q.free = slices.Delete(q.free, w, w+1)
		return start, nil
	}
	me := &waiter{at: at, ready: make(chan struct{})}
	place := q.waiting.PushBack(me)
	q.mu.Unlock()

	select {
	case <-me.ready:
		return me.start, nil
	case <-ctx.Done():
	}
	q.mu.Lock()
	select {
	case <-me.ready: // its turn came as it left: the next one's
		q.mu.Unlock()
		q.release(me.start)
	default:
		q.waiting.Remove(place)
		q.mu.Unlock()
	}
	return 0, ctx.Err()
}

// release frees a worker at the moment at: for the call that has waited longest.
func (q *queue) release(at time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	first := q.waiting.Front()
	if first == nil {
		q.free = append(q.free, at)
		return
	}
	next := q.waiting.Remove(first).(*waiter)
	// The worker may have been free before this call came: its goroutine woke late.
	next.start = max(at, next.at)
	close(next.ready)
}
