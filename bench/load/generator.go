// Package load sends requests on a schedule and says how long they took.
//
// It is an open loop: a request is sent when its time has come, whatever became
// of those before it, and its latency counts from that intended moment, not
// from when the generator got round to it. A closed loop waits for the slow
// answer and forgets all the requests it should have sent meanwhile: with a
// server that stalls for one second in five, such a tool reports a p99 of 5 ms
// where it is 961 ms (coordinated omission).
package load

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Sleep waits for d or until ctx ends.
type Sleep func(ctx context.Context, d time.Duration) error

// Block is a stretch of the schedule, all for one policy.
type Block struct {
	// Start is the moment that At counts from.
	Start time.Time
	// At is when each request is to begin, in order.
	At []time.Duration
	// FirstID is the id of the first request; the others count on from it.
	FirstID uint64
	// Send makes request id. It is called from many goroutines at once.
	Send func(ctx context.Context, id uint64) error
	// Record takes each request's latency from its intended moment. It is called
	// from many goroutines at once; ErrOverflow is a request that was not sent.
	Record func(latency time.Duration, err error)
}

// Generator sends blocks, of several policies at once if each has a Run of its own.
// Its fields are fixed before the first Run.
type Generator struct {
	// Sleep is how it waits for the next request's time.
	Sleep Sleep
	// Timeout ends each request, counted from when it is sent.
	Timeout time.Duration
	// MaxInFlight bounds the requests under way and so the generator's memory.
	// One more is not sent: it is recorded as failed, counted as overflow, and
	// makes the run invalid.
	MaxInFlight int

	inFlight  sync.WaitGroup
	flying    atomic.Int64 // atomic: dispatcher and requests share it
	abandoned atomic.Int64 // likewise

	mu       sync.Mutex // guards what follows
	lag      *hdrhistogram.Histogram
	overflow int64
}

// ErrOverflow is recorded for a request beyond MaxInFlight.
var ErrOverflow error = overflowError{}

type overflowError struct{}

func (overflowError) Error() string { return "load: too many requests in flight" }

// Run sends block b and returns when its last request has been sent; they may
// be under way still: see [Generator.Drain]. Ending ctx stops the sending at
// once. Requests run in the context base, which outlives ctx; one that base's
// end cuts off is not recorded but counted as abandoned. Run returns how many
// requests it sent.
func (g *Generator) Run(ctx, base context.Context, b Block) int {
	for i, at := range b.At {
		intended := b.Start.Add(at)
		if g.Sleep(ctx, time.Until(intended)) != nil {
			return i
		}
		if g.flying.Load() >= int64(g.MaxInFlight) {
			g.mu.Lock()
			g.overflow++
			g.mu.Unlock()
			b.Record(time.Since(intended), ErrOverflow)
			continue
		}
		g.flying.Add(1)
		g.inFlight.Go(func() {
			defer g.flying.Add(-1)
			g.send(base, b, b.FirstID+uint64(i), intended)
		})
	}
	return len(b.At)
}

func (g *Generator) send(base context.Context, b Block, id uint64, intended time.Time) {
	// Taken here, not by the dispatcher: the wait for a processor is lag too.
	g.late(time.Since(intended))
	ctx, cancel := context.WithTimeout(base, g.Timeout)
	defer cancel()
	err := b.Send(ctx, id)
	took := time.Since(intended)
	if err != nil && base.Err() != nil {
		g.abandoned.Add(1)
		return
	}
	b.Record(took, err)
}

func (g *Generator) late(d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.lag == nil {
		g.lag = NewHistogram()
	}
	Record(g.lag, d)
}

// Drain waits until no request is under way, or ctx ends: then it says false.
func (g *Generator) Drain(ctx context.Context) bool {
	done := make(chan struct{})
	go func() {
		g.inFlight.Wait()
		close(done)
	}()
	select {
	case <-done:
		return true
	case <-ctx.Done():
		return false
	}
}

// Health is how well the generator itself did.
type Health struct {
	// LagP99 is how late the 99th of 100 requests was sent.
	LagP99 time.Duration
	// Overflow counts requests that were not sent, Abandoned those cut off by an interrupt.
	Overflow, Abandoned int64
}

// Health returns the figures so far.
func (g *Generator) Health() Health {
	g.mu.Lock()
	defer g.mu.Unlock()
	h := Health{Overflow: g.overflow, Abandoned: g.abandoned.Load()}
	if g.lag != nil {
		h.LagP99 = time.Duration(g.lag.ValueAtQuantile(99)) * time.Microsecond
	}
	return h
}

// NewHistogram holds latencies in microseconds up to an hour and a bit, with three
// significant digits: 0.1% is less than any difference worth a report.
func NewHistogram() *hdrhistogram.Histogram {
	const most = int64(2 * time.Hour / time.Microsecond)
	return hdrhistogram.New(1, most, 3)
}

// Record adds d to a histogram of [NewHistogram].
func Record(h *hdrhistogram.Histogram, d time.Duration) {
	// Only a latency beyond two hours fails, and every request has a timeout of at most one.
	_ = h.RecordValue(min(max(d.Microseconds(), 0), h.HighestTrackableValue()))
}
