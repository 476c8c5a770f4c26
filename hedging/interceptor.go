package hedging

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/latency"
	"github.com/bobtail-rpc/bobtail/internal/permethod"
	"github.com/bobtail-rpc/bobtail/internal/rpc"
)

// UnaryClientInterceptor returns an interceptor that hedges every unary call made
// through it by cfg: install it where all methods are safe to execute more than
// once, or let package bobtail choose by method. Latencies are learned for each
// method of each target. With a faulty cfg every call fails with INTERNAL and
// names the fault; [Config.Validate] tells it at the start.
func UnaryClientInterceptor(cfg Config) grpc.UnaryClientInterceptor {
	m := newMethods(cfg)
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
		invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if m.err != nil {
			rpc.Finish(opts, m.err)
			return m.err
		}
		return m.Of(cc, method).InvokeUnary(ctx, method, req, reply, cc, invoker, opts...)
	}
}

// StreamClientInterceptor is [UnaryClientInterceptor] for streams: a
// server-streaming call is raced to its first message, see [Hedger.OpenStream].
// Client- and bidi-streaming calls pass.
func StreamClientInterceptor(cfg Config) grpc.StreamClientInterceptor {
	m := newMethods(cfg)
	return func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string,
		streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		if desc.ClientStreams || !desc.ServerStreams {
			return streamer(ctx, desc, cc, method, opts...)
		}
		if m.err != nil {
			rpc.Finish(opts, m.err)
			return nil, m.err
		}
		return m.Of(cc, method).OpenStream(ctx, desc, cc, method, streamer, opts...)
	}
}

// methods has a Hedger for each method of each target. A hedger takes about 64 KiB.
type methods struct {
	*permethod.Map[*Hedger]
	err error
}

func newMethods(cfg Config) *methods {
	m := &methods{}
	if err := cfg.Validate(); err != nil {
		m.err = status.Error(codes.Internal, err.Error())
	}
	m.Map = permethod.New(func(string) *Hedger {
		now := time.Now()
		return build(cfg, latency.New(Window, now), &distance{}, now)
	})
	return m
}
