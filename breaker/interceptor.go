package breaker

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
	"github.com/bobtail-rpc/bobtail/internal/permethod"
	"github.com/bobtail-rpc/bobtail/internal/rpc"
)

// UnaryClientInterceptor returns an interceptor that has a [Breaker] of cfg for each method
// of each target. Install it outside of retries and hedging, so that it counts calls:
// inside, it would refuse the retries of the failures that it counts. Methods beyond the
// first thousand share one. With a faulty cfg every call fails with INTERNAL and names the
// fault; [Config.Validate] tells it at the start.
func UnaryClientInterceptor(cfg Config) grpc.UnaryClientInterceptor { return breakers(cfg).unary }

// StreamClientInterceptor is [UnaryClientInterceptor] for streams. A stream counts when it
// ends and is never slow; as a probe it succeeds with its first message, because a stream
// may live for long.
func StreamClientInterceptor(cfg Config) grpc.StreamClientInterceptor { return breakers(cfg).stream }

// ThrottleUnaryClientInterceptor returns an interceptor that has a [Throttle] of cfg for
// each method of each target, as [UnaryClientInterceptor] has a breaker.
func ThrottleUnaryClientInterceptor(cfg ThrottleConfig) grpc.UnaryClientInterceptor {
	return throttles(cfg).unary
}

// ThrottleStreamClientInterceptor is [ThrottleUnaryClientInterceptor] for streams. A stream
// counts when it ends; those that never do count for nothing.
func ThrottleStreamClientInterceptor(cfg ThrottleConfig) grpc.StreamClientInterceptor {
	return throttles(cfg).stream
}

// gate lets calls in.
type gate interface {
	pass() (pass, error)
}

// pass is what a call that was let in holds: of a breaker, or of a throttle. It is a value,
// so that holding it allocates nothing.
type pass struct {
	permit   Permit
	throttle *Throttle
}

func (p *pass) leave(err error, stream bool) {
	switch {
	case p.throttle != nil:
		p.throttle.Record(time.Now(), err)
	case stream:
		p.permit.DoneStream(err)
	default:
		p.permit.Done(err)
	}
}

func (b *Breaker) pass() (pass, error) {
	p, err := b.Admit()
	return pass{permit: p}, err
}

func (t *Throttle) pass() (pass, error) {
	return pass{throttle: t}, t.Admit(time.Now(), rand.Float64())
}

// gates has a gate for each method of each target.
type gates struct {
	*permethod.Map[gate]
	err error // every call fails with it
}

func breakers(cfg Config) *gates {
	return newGates(cfg.Validate(), func(method string) gate {
		cfg := cfg
		cfg.Method = method
		return build(cfg)
	})
}

func throttles(cfg ThrottleConfig) *gates {
	return newGates(cfg.Validate(), func(method string) gate {
		cfg := cfg
		cfg.Method = method
		return buildThrottle(cfg, time.Now())
	})
}

func newGates(fault error, build func(method string) gate) *gates {
	g := &gates{Map: permethod.New(build)}
	if fault != nil {
		g.err = status.Error(codes.Internal, fault.Error())
	}
	return g
}

// enter lets a call in, or returns the error that it fails with.
func (g *gates) enter(cc *grpc.ClientConn, method string, opts []grpc.CallOption) (pass, error) {
	if g.err != nil {
		rpc.Finish(opts, g.err)
		return pass{}, g.err
	}
	p, err := g.Of(cc, method).pass()
	if err != nil {
		// grpc runs these at the end of every call that it sees, and this one it does not.
		rpc.Finish(opts, err)
	}
	return p, err
}

// errPanicked is the end of a call that panicked below. As a refusal it counts for nobody:
// nobody knows what the server did.
var errPanicked error = &outcome.Refusal{Cause: errors.New("breaker: panicked"), Code: codes.Canceled}

func (g *gates) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
	invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	p, err := g.enter(cc, method, opts)
	if err != nil {
		return err
	}
	err = errPanicked
	defer func() { p.leave(err, false) }()
	err = invoker(ctx, method, req, reply, cc, opts...)
	return err
}

func (g *gates) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string,
	streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	p, err := g.enter(cc, method, opts)
	if err != nil {
		return nil, err
	}
	s := &stream{pass: p}
	var first func()
	if p.permit.Probe() {
		first = func() { s.end(nil) } // a message is proof enough, and a stream may live for long
	}
	opts, watch := rpc.Watch(ctx, desc, opts, s.end, first)
	err = errPanicked
	defer func() {
		if err != nil {
			s.end(err)
		}
	}()
	cs, err := streamer(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, err
	}
	return watch(cs), nil
}

// stream holds a pass until its end, which is told from several sides, by several
// goroutines.
type stream struct {
	ended atomic.Bool
	pass  pass
}

func (s *stream) end(err error) {
	if s.ended.CompareAndSwap(false, true) {
		s.pass.leave(err, true)
	}
}
