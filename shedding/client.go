package shedding

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/permethod"
	"github.com/bobtail-rpc/bobtail/internal/rpc"
)

// ClientConfig bounds the calls of each method of each target by itself. At least one of
// PerSecond and MaxInFlight is wanted.
type ClientConfig struct {
	// PerSecond and Burst are those of [RateLimitConfig]. PerSecond 0, the default, is no
	// rate limit.
	PerSecond float64
	Burst     int

	// MaxInFlight is how many calls may be in flight at once, those among them that wait
	// for their turn under PerSecond, in [1, 1000000]; see [Bulkhead]. A stream is in
	// flight until its end. 0, the default, is no bound.
	MaxInFlight int
}

// Validate reports every fault of the configuration, joined.
func (c ClientConfig) Validate() error {
	var errs []error
	if c.PerSecond != 0 {
		if err := c.rate("").Validate(); err != nil {
			errs = append(errs, err)
		}
	} else if c.Burst != 0 {
		errs = append(errs, fmt.Errorf("shedding: burst %d without perSecond, want both", c.Burst))
	}
	if c.MaxInFlight < 0 || c.MaxInFlight > maxPlaces {
		errs = append(errs, fmt.Errorf("shedding: max in flight %d, want [1, %d], or 0 for none", c.MaxInFlight, maxPlaces))
	}
	if c == (ClientConfig{}) {
		errs = append(errs, errors.New("shedding: neither perSecond nor max in flight, want at least one"))
	}
	return errors.Join(errs...)
}

func (c ClientConfig) rate(method string) RateLimitConfig {
	return RateLimitConfig{PerSecond: c.PerSecond, Burst: c.Burst, Method: method}
}

// UnaryClientInterceptor returns an interceptor that keeps the unary calls made through
// it to the rate and the number of cfg. It refuses with RESOURCE_EXHAUSTED, and the server
// hears nothing of it. Install it before what makes several attempts of a call (retries,
// hedges): it bounds calls. With a faulty cfg every call fails with INTERNAL and names the
// fault; [ClientConfig.Validate] tells it at the start.
//
// The two interceptors of one cfg count each by itself: no method has both kinds of call.
func UnaryClientInterceptor(cfg ClientConfig) grpc.UnaryClientInterceptor {
	return newGates(cfg).unary
}

// StreamClientInterceptor is [UnaryClientInterceptor] for streams. A stream takes one turn,
// when it is opened, and holds its place until its end: as grpc has it until RecvMsg has
// returned an error (or, of one that the server does not stream, its message), its context
// has ended, or its connection has been closed.
func StreamClientInterceptor(cfg ClientConfig) grpc.StreamClientInterceptor {
	return newGates(cfg).stream
}

// gates has a gate for each method of each target.
type gates struct {
	*permethod.Map[*gate]
	err error
}

// gate is what the calls of one method go through; a nil part is always open.
type gate struct {
	bulkhead *Bulkhead
	rate     *RateLimit
}

func newGates(cfg ClientConfig) *gates {
	g := &gates{Map: permethod.New(func(method string) *gate { return newGate(cfg, method) })}
	if err := cfg.Validate(); err != nil {
		g.err = status.Error(codes.Internal, err.Error())
	}
	return g
}

// newGate builds the gate of a cfg that has been found good.
func newGate(cfg ClientConfig, method string) *gate {
	g := &gate{}
	if cfg.MaxInFlight > 0 {
		g.bulkhead, _ = NewBulkhead(cfg.MaxInFlight, method)
	}
	if cfg.PerSecond > 0 {
		g.rate, _ = NewRateLimit(cfg.rate(method))
	}
	return g
}

// enter lets a call in, or returns the error to refuse it with. The bulkhead comes first,
// so that it also bounds those who wait for their turn.
func (g *gate) enter(ctx context.Context) error {
	if g.bulkhead != nil {
		if err := g.bulkhead.Enter(); err != nil {
			return err
		}
	}
	if g.rate != nil {
		if err := g.rate.Wait(ctx); err != nil {
			g.leave()
			return err
		}
	}
	return nil
}

// leave gives back what a call that was let in holds.
func (g *gate) leave() {
	if g.bulkhead != nil {
		g.bulkhead.Leave()
	}
}

func (gs *gates) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
	invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if gs.err != nil {
		return finish(opts, gs.err)
	}
	g := gs.Of(cc, method)
	if err := g.enter(ctx); err != nil {
		return finish(opts, err)
	}
	defer g.leave() // also when an interceptor below panics
	return invoker(ctx, method, req, reply, cc, opts...)
}

func (gs *gates) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string,
	streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	if gs.err != nil {
		return nil, finish(opts, gs.err)
	}
	g := gs.Of(cc, method)
	if err := g.enter(ctx); err != nil {
		return nil, finish(opts, err)
	}
	if g.bulkhead == nil {
		return streamer(ctx, desc, cc, method, opts...)
	}
	var once sync.Once // the end is told from several sides
	end := func(error) { once.Do(g.leave) }
	opened := false
	defer func() {
		if !opened { // it failed, or an interceptor below panicked
			end(nil)
		}
	}()
	opts, watch := rpc.Watch(ctx, desc, opts, end, nil)
	s, err := streamer(ctx, desc, cc, method, opts...)
	if err != nil {
		return s, err
	}
	opened = true
	return watch(s), nil
}

// finish runs the caller's OnFinish options, as grpc does for a call that it fails itself,
// and returns err.
func finish(opts []grpc.CallOption, err error) error {
	rpc.Finish(opts, err)
	return err
}
