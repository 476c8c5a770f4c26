package breaker

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
	"github.com/bobtail-rpc/bobtail/internal/permethod"
)

// UnaryClientInterceptor returns an interceptor that has a [Breaker] of cfg for each method
// of each target; cfg.Method is set for each. Install it outside of retries and hedging,
// so that it counts calls: a breaker inside would refuse the retries of the failures that it
// counts. With a faulty cfg every call fails with INTERNAL and names the fault;
// [Config.Validate] tells it at the start.
func UnaryClientInterceptor(cfg Config) grpc.UnaryClientInterceptor { return breakers(cfg).unary }

// StreamClientInterceptor is [UnaryClientInterceptor] for streams, which count when they
// end, and are never slow.
func StreamClientInterceptor(cfg Config) grpc.StreamClientInterceptor { return breakers(cfg).stream }

// ThrottleUnaryClientInterceptor returns an interceptor that has a [Throttle] of cfg for
// each method of each target, as [UnaryClientInterceptor] has a breaker.
func ThrottleUnaryClientInterceptor(cfg ThrottleConfig) grpc.UnaryClientInterceptor {
	return throttles(cfg).unary
}

// ThrottleStreamClientInterceptor is [ThrottleUnaryClientInterceptor] for streams, which
// count when they end.
func ThrottleStreamClientInterceptor(cfg ThrottleConfig) grpc.StreamClientInterceptor {
	return throttles(cfg).stream
}

// A gate lets calls in. What it returns is told how the call ended.
type gate interface {
	letIn() (leave, error)
}

// leave is what a call holds: a permit of a breaker, or a request of a throttle. A value, so
// that holding it allocates nothing.
type leave struct {
	permit   Permit
	throttle *Throttle
}

func (l *leave) end(err error, stream bool) {
	switch {
	case l.throttle != nil:
		l.throttle.Record(time.Now(), err)
	case stream:
		l.permit.DoneStream(err)
	default:
		l.permit.Done(err)
	}
}

func (b *Breaker) letIn() (leave, error) {
	p, err := b.Admit()
	return leave{permit: p}, err
}

func (t *Throttle) letIn() (leave, error) {
	return leave{throttle: t}, t.Admit(time.Now(), rand.Float64())
}

// gates has a gate for each method of each target.
type gates struct {
	*permethod.Map[gate]
	err error // what is wrong with the configuration
}

func breakers(cfg Config) *gates {
	return &gates{err: internal(cfg.Validate()), Map: permethod.New(func(method string) gate {
		cfg := cfg
		cfg.Method = method
		b, err := New(cfg)
		if err != nil {
			return nil // never asked for: err is set
		}
		return b
	})}
}

func throttles(cfg ThrottleConfig) *gates {
	return &gates{err: internal(cfg.Validate()), Map: permethod.New(func(method string) gate {
		cfg := cfg
		cfg.Method = method
		t, err := NewThrottle(cfg, time.Now())
		if err != nil {
			return nil // likewise
		}
		return t
	})}
}

func internal(err error) error {
	if err == nil {
		return nil
	}
	return status.Error(codes.Internal, err.Error())
}

// errPanicked is the end of a call that panicked below: nobody knows what the server did.
var errPanicked error = &outcome.Refusal{Cause: errors.New("breaker: panicked"), Code: codes.Canceled}

func (g *gates) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
	invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if g.err != nil {
		return g.err
	}
	l, err := g.Of(cc, method).letIn()
	if err != nil {
		return err
	}
	err = errPanicked
	defer func() { l.end(err, false) }()
	err = invoker(ctx, method, req, reply, cc, opts...)
	return err
}

func (g *gates) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string,
	streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	if g.err != nil {
		return nil, g.err
	}
	l, err := g.Of(cc, method).letIn()
	if err != nil {
		return nil, err
	}
	// The end is told from several sides: grpc's, and ours if the stream does not open.
	var once sync.Once
	end := func(err error) { once.Do(func() { l.end(err, true) }) }
	opened := errPanicked
	defer func() {
		if opened != nil {
			end(opened)
		}
	}()
	s, err := streamer(ctx, desc, cc, method, append(slices.Clip(opts), grpc.OnFinish(end))...)
	opened = err
	return s, err
}
