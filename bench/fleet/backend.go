package fleet

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/bench/load"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// Backend serves kv.KV/Get as the scenario says. It waits; it does not work: the
// processor stays free for the generator.
//
// A fault comes first: a call that it hits needs no worker. Then a worker, if they
// are numbered, then the work. All moments are those of the scenario's timeline.
type Backend struct {
	kvpb.UnimplementedKVServer
	scenario *scenario.Scenario
	seed     uint64
	index    int
	name     string
	sleep    load.Sleep
	started  time.Time
	queue    *queue // nil: as many workers as calls

	// Atomic because every call adds to them.
	runs           atomic.Int64
	worked, unused atomic.Int64 // ns

	begin sync.Once
	begun chan struct{} // closed once epoch is known
	epoch time.Time     // the zero of the timeline, as the first call told it
}

// NewBackend is backend index of the scenario, which waits by sleep. Its queue, if
// the scenario has one, starts empty and belongs to one run of the timeline.
func NewBackend(s *scenario.Scenario, seed uint64, index int, sleep load.Sleep) *Backend {
	b := &Backend{scenario: s, seed: seed, index: index, name: fmt.Sprintf("backend-%d", index),
		sleep: sleep, started: time.Now(), begun: make(chan struct{})}
	if s.Workers > 0 {
		b.queue = newQueue(s.Workers)
	}
	return b
}

// Work is what the handlers of a backend did.
type Work struct {
	// Runs is how many have begun.
	Runs int64
	// Worked is the time for which they had a worker, Unused that of those whose caller
	// did not stay to the end. Work that is served in spite of that is in neither.
	Worked, Unused time.Duration
}

// Work returns what the handlers did so far.
func (b *Backend) Work() Work {
	return Work{b.runs.Load(), time.Duration(b.worked.Load()), time.Duration(b.unused.Load())}
}

// work counts that of a handler that ended with err.
func (b *Backend) work(d time.Duration, err error) {
	b.worked.Add(int64(d))
	if err != nil {
		b.unused.Add(int64(d))
	}
}

// Get implements kvpb.KVServer. It leaves as soon as the caller has.
func (b *Backend) Get(ctx context.Context, req *kvpb.Request) (*kvpb.Response, error) {
	epoch := b.started
	if req.EpochUnixNs != 0 {
		epoch = time.Unix(0, req.EpochUnixNs)
	}
	b.begin.Do(func() {
		b.epoch = epoch
		close(b.begun)
	})
	b.runs.Add(1)
	c := &call{b: b, epoch: epoch, at: time.Since(epoch)}
	n := attempt(ctx)
	var err error
	switch f := b.scenario.Fault(b.seed, req.Id, n, b.index, c.at); {
	case f == nil:
		err = c.serve(ctx, req.Id, n)
	case f.Kind == scenario.Error:
		err = status.Errorf(codes.Code(f.Code), "%s: a fault of the scenario's", b.name)
	default:
		err = c.vanish(ctx)
	}
	if err != nil {
		return nil, err
	}
	return &kvpb.Response{Id: req.Id, Backend: b.name}, nil
}

// call is one attempt at a backend.
type call struct {
	b     *Backend
	epoch time.Time
	at    time.Duration // when it came
}

// serve waits for a worker and for the work.
func (c *call) serve(ctx context.Context, id uint64, attempt int) error {
	finish := func(start time.Duration) time.Duration {
		return start + c.b.scenario.Service(c.b.seed, id, attempt, c.b.index, start)
	}
	switch {
	case c.b.queue == nil:
		end := finish(c.at)
		err := c.wait(ctx, end)
		c.b.work(min(end, time.Since(c.epoch))-c.at, err)
		return err
	case c.b.scenario.ServeAbandoned:
		return c.wait(ctx, c.b.queue.book(c.at, finish))
	}
	start, err := c.b.queue.acquire(ctx, c.at)
	if err != nil {
		return status.FromContextError(err).Err()
	}
	end := finish(start)
	if err := c.wait(ctx, end); err != nil {
		now := time.Since(c.epoch)
		c.b.queue.release(now)
		c.b.work(now-start, err)
		return err
	}
	c.b.work(end-start, nil)
	// Not now: this goroutine may wake late, the worker was free on time.
	c.b.queue.release(end)
	return nil
}

// wait waits until the moment end, or until the proxy's or the caller's patience ends.
func (c *call) wait(ctx context.Context, end time.Duration) error {
	until := end
	if t := time.Duration(c.b.scenario.ServerTimeout); t > 0 {
		until = min(end, c.at+t)
	}
	if err := c.b.sleep(ctx, until-time.Since(c.epoch)); err != nil {
		return status.FromContextError(err).Err()
	}
	if until < end {
		return status.Errorf(codes.Unavailable, "%s: no answer in %v", c.b.name, c.b.scenario.ServerTimeout)
	}
	return nil
}

// vanish is what a black hole does.
func (c *call) vanish(ctx context.Context) error {
	if c.b.scenario.ServerTimeout > 0 {
		return c.wait(ctx, c.at+24*time.Hour)
	}
	<-ctx.Done()
	return status.FromContextError(ctx.Err()).Err()
}

// attempt is how many attempts of this call came before: gRFC A6's
// "grpc-previous-rpc-attempts", absent on the first.
func attempt(ctx context.Context) int {
	v := metadata.ValueFromIncomingContext(ctx, "grpc-previous-rpc-attempts")
	if len(v) == 0 {
		return 0
	}
	n, err := strconv.ParseUint(v[0], 10, 16)
	if err != nil {
		return 0
	}
	return int(n)
}
