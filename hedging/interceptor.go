package hedging

import (
	"context"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxMethods bounds how many methods an interceptor keeps latencies for; those
// beyond share one. A hedger takes about 64 KiB.
const maxMethods = 1000

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
			return m.err
		}
		return m.hedger(cc, method).InvokeUnary(ctx, method, req, reply, cc, invoker, opts...)
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
			return nil, m.err
		}
		return m.hedger(cc, method).OpenStream(ctx, desc, cc, method, streamer, opts...)
	}
}

// methods has a Hedger for each method of each target.
type methods struct {
	any *Hedger // the configuration, and the hedger of all methods beyond the bound
	err error
	// known is copied on write, so that the read on every call is one atomic load.
	known atomic.Pointer[map[methodKey]*Hedger]
	mu    sync.Mutex // serialises the writers of known
}

type methodKey struct{ target, method string }

func newMethods(cfg Config) *methods {
	m := &methods{}
	h, err := New(cfg)
	if err != nil {
		m.err = status.Error(codes.Internal, err.Error())
	}
	m.any = h
	m.known.Store(&map[methodKey]*Hedger{})
	return m
}

func (m *methods) hedger(cc *grpc.ClientConn, method string) *Hedger {
	key := methodKey{method: method}
	if cc != nil {
		key.target = cc.Target()
	}
	if h := (*m.known.Load())[key]; h != nil {
		return h
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	old := *m.known.Load()
	if h := old[key]; h != nil {
		return h
	}
	if len(old) >= maxMethods {
		return m.any
	}
	h, err := New(m.any.cfg)
	if err != nil {
		return m.any // cannot be: the same configuration was accepted before
	}
	grown := make(map[methodKey]*Hedger, len(old)+1)
	for k, v := range old {
		grown[k] = v
	}
	grown[key] = h
	m.known.Store(&grown)
	return h
}
