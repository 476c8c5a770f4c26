package main

import (
	"context"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/examples/telemetry/shoppb"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// behaviour is what is wrong with the servers now.
type behaviour struct {
	payFails, sick atomic.Bool
}

// server is one of the shop's.
type server struct {
	shoppb.UnimplementedShopServer
	behaviour *behaviour
	sick      bool // it is the one that fails everything while one does
}

// work takes a time, unless nobody waits for its result any more.
func (s *server) work(ctx context.Context, d time.Duration, failed bool, code codes.Code) (*shoppb.Reply, error) {
	if s.sick && s.behaviour.sick.Load() {
		failed, code = true, codes.Unavailable
	}
	select {
	case <-time.After(d):
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if failed {
		return nil, status.Error(code, "it did not work")
	}
	return &shoppb.Reply{}, nil
}

// Search takes 2 to 4 ms, and in one call of twenty-five 60 ms more.
func (s *server) Search(ctx context.Context, _ *shoppb.Request) (*shoppb.Reply, error) {
	d := 2*time.Millisecond + rand.N(2*time.Millisecond)
	if rand.N(25) == 0 {
		d += 60 * time.Millisecond
	}
	return s.work(ctx, d, false, codes.OK)
}

// Order fails in one call of four.
func (s *server) Order(ctx context.Context, _ *shoppb.Request) (*shoppb.Reply, error) {
	return s.work(ctx, 2*time.Millisecond, rand.N(4) == 0, codes.Unavailable)
}

// Pay fails for a while.
func (s *server) Pay(ctx context.Context, _ *shoppb.Request) (*shoppb.Reply, error) {
	return s.work(ctx, 2*time.Millisecond, s.behaviour.payFails.Load(), codes.Internal)
}

// Quote serves one call of ten.
func (s *server) Quote(ctx context.Context, _ *shoppb.Request) (*shoppb.Reply, error) {
	return s.work(ctx, time.Millisecond, rand.N(10) > 0, codes.ResourceExhausted)
}

// Render takes 20 ms, of which its server does two at once: a hundred a second.
func (s *server) Render(ctx context.Context, _ *shoppb.Request) (*shoppb.Reply, error) {
	return s.work(ctx, 20*time.Millisecond, false, codes.OK)
}

// turn is how long it takes until the same things go wrong again.
const turn = 14 * time.Second

// traffic makes calls until ctx ends, and closes what it returns when all have ended.
func (w *world) traffic(ctx context.Context) <-chan struct{} {
	begun := time.Now()
	var all sync.WaitGroup
	// every makes a call again and again, whether or not the last has returned.
	every := func(interval time.Duration, call func(context.Context)) {
		all.Go(func() {
			tick := time.NewTicker(interval)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
					// Its own end is its policy's: not that of the traffic.
					all.Go(func() { call(context.WithoutCancel(ctx)) })
				}
			}
		})
	}
	// What becomes of the calls is for the dashboard to tell.
	every(10*time.Millisecond, func(ctx context.Context) { _, _ = w.shop.Search(ctx, &shoppb.Request{}) })
	every(25*time.Millisecond, func(ctx context.Context) { _, _ = w.shop.Order(ctx, &shoppb.Request{}) })
	every(25*time.Millisecond, func(ctx context.Context) { _, _ = w.shop.Pay(ctx, &shoppb.Request{}) })
	every(15*time.Millisecond, func(ctx context.Context) { _, _ = w.shop.Quote(ctx, &shoppb.Request{}) })
	every(15*time.Millisecond, func(ctx context.Context) { _, _ = w.shadow.Search(ctx, &shoppb.Request{}) })
	every(5*time.Millisecond, func(ctx context.Context) {
		// Two seconds of twice what can be done, then two of a fifth.
		if time.Since(begun)%(4*time.Second) > 2*time.Second && rand.N(10) > 0 {
			return
		}
		ctx = shedding.WithCriticality(ctx, shedding.Sheddable+shedding.Criticality(rand.N(4)))
		ctx = metadata.AppendToOutgoingContext(ctx, "x-tenant-id", "tenant-"+strconv.Itoa(rand.N(3)))
		_, _ = w.render.Render(ctx, &shoppb.Request{})
	})
	every(50*time.Millisecond, func(context.Context) {
		// One server at first, which the balancer can do something about; then one method at
		// all servers, which only a breaker can.
		now := time.Since(begun) % turn
		w.behaviour.sick.Store(now > time.Second && now < 5*time.Second)
		w.behaviour.payFails.Store(now > 6*time.Second && now < 9*time.Second)
	})
	done := make(chan struct{})
	go func() {
		all.Wait()
		close(done)
	}()
	return done
}
