package clock

import (
	"container/heap"
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

type waits struct {
	fd   int
	file *os.File
	done chan struct{} // closed when the reader has returned

	mu     sync.Mutex // guards what follows, and the setting of the timerfd
	queue  queue
	closed bool
}

func (c *waits) open() error {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("clock: timerfd: %w", err)
	}
	// Nonblocking, so the runtime's poller takes it: Read parks a goroutine, not a thread.
	c.fd, c.file, c.done = fd, os.NewFile(uintptr(fd), "timerfd"), make(chan struct{})
	go c.read()
	return nil
}

func (c *waits) close() error {
	c.mu.Lock()
	c.closed = true // the descriptor's number may soon be somebody else's
	c.mu.Unlock()
	err := c.file.Close()
	<-c.done
	return err
}

// read wakes whoever is due each time the timerfd expires.
func (c *waits) read() {
	defer close(c.done)
	var buf [8]byte
	for {
		if _, err := c.file.Read(buf[:]); err != nil {
			return // closed
		}
		c.mu.Lock()
		now := time.Now()
		for len(c.queue) > 0 && !c.queue[0].until.After(now) {
			close(heap.Pop(&c.queue).(*wait).ready)
		}
		c.arm(now)
		c.mu.Unlock()
	}
}

// arm sets the timerfd to the earliest wait. c.mu is held.
func (c *waits) arm(now time.Time) {
	if len(c.queue) == 0 || c.closed {
		return // an early expiry finds nothing due: harmless
	}
	d := max(c.queue[0].until.Sub(now), 1) // 0 would disarm it
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(d))}
	if err := unix.TimerfdSettime(c.fd, 0, &spec, nil); err != nil {
		panic(fmt.Sprintf("clock: timerfd_settime(%v): %v", d, err)) // no input reaches this
	}
}

func (c *waits) sleep(ctx context.Context, d time.Duration) error {
	now := time.Now()
	w := &wait{until: now.Add(d), ready: make(chan struct{})}
	c.mu.Lock()
	heap.Push(&c.queue, w)
	if w.at == 0 {
		c.arm(now)
	}
	c.mu.Unlock()
	select {
	case <-w.ready:
		return nil
	case <-ctx.Done():
		c.mu.Lock()
		if w.at >= 0 {
			heap.Remove(&c.queue, w.at)
		}
		c.mu.Unlock()
		return ctx.Err()
	}
}

// A wait is one sleeper; at is its place in the queue, -1 once out of it.
type wait struct {
	until time.Time
	ready chan struct{}
	at    int
}

// queue is a heap by time.
type queue []*wait

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].until.Before(q[j].until) }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].at, q[j].at = i, j
}

func (q *queue) Push(x any) {
	w := x.(*wait)
	w.at = len(*q)
	*q = append(*q, w)
}

func (q *queue) Pop() any {
	old := *q
	w := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	w.at = -1
	return w
}
