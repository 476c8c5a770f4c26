package load

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"

	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/loadbalance"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// Caller makes a scenario's requests: Fanout leaf calls of kv.KV/Get at once,
// each with an id of its own.
type Caller struct {
	Client kvpb.KVClient
	// Fanout is the number of leaf calls per request, at least 1.
	Fanout int
	// Epoch is the zero of the scenario's timeline.
	Epoch time.Time
	// Key returns the key of a leaf call, "" for none. It goes into the request, and
	// into the context, where a balancer finds it. nil: no call has one.
	Key func(id uint64) string
	// Class returns the criticality of a request, "" for none told. nil: none tells one.
	Class func(id uint64) string
	// Attempts counts what was sent, if the connection has [CountAttempts].
	Attempts *Attempts
}

// Send makes request id and returns when its last leaf has answered, or the first has failed.
func (c *Caller) Send(ctx context.Context, id uint64) error {
	ctx = context.WithValue(ctx, attemptsKey{}, c.Attempts)
	if c.Class != nil {
		if class := c.Class(id); class != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, shedding.CriticalityKey, class)
		}
	}
	if c.Fanout == 1 {
		return c.leaf(ctx, id)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		wg    sync.WaitGroup
		once  sync.Once
		first error
	)
	for i := range c.Fanout {
		wg.Go(func() {
			if err := c.leaf(ctx, id*uint64(c.Fanout)+uint64(i)); err != nil {
				once.Do(func() { first = err })
				cancel() // the request has failed: its other leaves are work for nothing
			}
		})
	}
	wg.Wait()
	return first
}

func (c *Caller) leaf(ctx context.Context, id uint64) error {
	req := &kvpb.Request{Id: id, EpochUnixNs: c.Epoch.UnixNano()}
	if c.Key != nil {
		req.Key = c.Key(id)
		ctx = loadbalance.WithKey(ctx, req.Key)
	}
	res, err := c.Client.Get(ctx, req)
	if err != nil {
		return err
	}
	if res.Id != id {
		return fmt.Errorf("load: call %d was given the answer to %d", id, res.Id)
	}
	c.Attempts.ok.Add(1)
	return nil
}

// Attempts counts the leaf calls that succeeded and the attempts that were
// really sent for all. Its zero value is ready.
type Attempts struct {
	sent, ok atomic.Int64 // atomic: every call of a block adds to them
}

// Sent is the number of attempts that reached the wire.
func (a *Attempts) Sent() int64 { return a.sent.Load() }

// OK is the number of leaf calls that succeeded.
func (a *Attempts) OK() int64 { return a.ok.Load() }

type attemptsKey struct{}

// CountAttempts makes a connection count each attempt when its headers leave,
// whoever decided to send it: a policy of bobtail's, or grpc's own retry.
func CountAttempts() grpc.DialOption { return grpc.WithStatsHandler(counter{}) }

type counter struct{}

func (counter) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

func (counter) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if _, sent := s.(*stats.OutHeader); !sent {
		return
	}
	if a, _ := ctx.Value(attemptsKey{}).(*Attempts); a != nil {
		a.sent.Add(1)
	}
}

func (counter) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

func (counter) HandleConn(context.Context, stats.ConnStats) {}
