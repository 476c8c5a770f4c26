package bobtail

import (
	"context"
	"slices"
	"time"

	"google.golang.org/grpc"
)

// The order of a call is fixed here and nowhere else, in one interceptor for each
// kind of call: a link of an interceptor chain costs every call an allocation.
//
//	deadline -> hedging (opens attempts, each extra one paid from the target's
//	budget) -> the connection's own interceptors, picker and transport

// unary is the interceptor of unary calls.
func (c *Client) unary(ctx context.Context, name string, req, reply any, cc *grpc.ClientConn,
	invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	m := c.method(cc, name)
	if m.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, m.timeout)
		defer cancel()
	}
	if m.hedger != nil {
		return m.hedger.InvokeUnary(ctx, name, req, reply, cc, invoker, opts...)
	}
	m.first()
	err := invoker(ctx, name, req, reply, cc, opts...)
	m.ended(err)
	return err
}

// stream is the interceptor of streams.
func (c *Client) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, name string,
	streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	m := c.method(cc, name)
	if m.timeout > 0 {
		limited, cancel := context.WithTimeout(ctx, m.timeout)
		// The deadline is the stream's, not this function's, unless it does not open.
		opts = append(slices.Clip(opts), grpc.OnFinish(func(error) { cancel() }))
		s, err := c.open(limited, m, desc, cc, name, streamer, opts...)
		if err != nil {
			cancel()
		}
		return s, err
	}
	return c.open(ctx, m, desc, cc, name, streamer, opts...)
}

// open opens a stream within its deadline.
func (c *Client) open(ctx context.Context, m *method, desc *grpc.StreamDesc, cc *grpc.ClientConn, name string,
	streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	if m.hedger != nil && desc.ServerStreams && !desc.ClientStreams {
		return m.hedger.OpenStream(ctx, desc, cc, name, streamer, opts...)
	}
	m.first()
	if m.throttle != nil {
		opts = append(slices.Clip(opts), grpc.OnFinish(m.ended))
	}
	return streamer(ctx, desc, cc, name, opts...)
}

// first deposits a call that is not hedged: extraLoad counts all first attempts
// of the target, whatever their method.
func (m *method) first() {
	if m.budget != nil {
		m.budget.Deposit(time.Now())
	}
}

// ended tells A6 throttling of a call that is not hedged. No code is retryable for
// such a method, so only its successes count.
func (m *method) ended(err error) {
	if m.throttle != nil && err == nil {
		m.throttle.Success()
	}
}
