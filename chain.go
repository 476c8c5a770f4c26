package bobtail

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/breaker"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
	"github.com/bobtail-rpc/bobtail/internal/rpc"
	"github.com/bobtail-rpc/bobtail/loadbalance"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// The order of a call is fixed here and nowhere else, in one interceptor for each
// kind of call: a link of an interceptor chain costs every call an allocation.
//
//	deadline -> bulkhead -> rate limit -> breaker -> adaptive throttle -> hedging or
//	retry (opens attempts, each extra one paid from the target's budget) -> the
//	connection's own interceptors, picker and transport
//
// So what refuses calls counts calls, not attempts, and a refusal is never retried. Why the
// breaker comes before the throttle: docs/adr/0006.

// unary is the interceptor of unary calls.
func (c *Client) unary(ctx context.Context, name string, req, reply any, cc *grpc.ClientConn,
	invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	m := c.method(cc, name).overridden(ctx, opts)
	o := m.look(ctx, name)
	if o == nil {
		return m.call(c.listening(ctx, false), name, req, reply, cc, invoker, opts...)
	}
	o.invoker = invoker
	// In case of a panic below: nobody knows how the call ended.
	err := errAbandoned
	defer func() { o.end(err) }()
	err = m.call(c.listening(o, true), name, req, reply, cc, attemptUnary, opts...)
	return err
}

// call makes a unary call of the method.
func (m *method) call(ctx context.Context, name string, req, reply any, cc *grpc.ClientConn,
	invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	ctx = shedding.PropagateCriticality(ctx)
	if m.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, m.timeout)
		defer cancel()
	}
	if m.guard == nil {
		return m.invoke(ctx, name, req, reply, cc, invoker, opts...)
	}
	p, err := m.guard.enter(ctx)
	if err != nil {
		rpc.Finish(opts, err)
		return err
	}
	// In case of a panic below: nobody knows how the call ended.
	err = errAbandoned
	defer func() { p.leave(err) }()
	err = m.invoke(ctx, name, req, reply, cc, invoker, opts...)
	return err
}

// listening makes a call take the events of its balancer, if anybody wants them.
func (c *Client) listening(ctx context.Context, observed bool) context.Context {
	take := c.options.balancerEvents
	if observed {
		take = c.observedEvents
	}
	if take == nil {
		return ctx
	}
	return loadbalance.WithEventHandler(ctx, take)
}

// errAbandoned is the end of a call that panicked: a refusal, so that it counts for
// nobody.
var errAbandoned error = &outcome.Refusal{Cause: errors.New("bobtail: abandoned"), Code: codes.Canceled}

// invoke makes a unary call that has been let in.
func (m *method) invoke(ctx context.Context, name string, req, reply any, cc *grpc.ClientConn,
	invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	switch {
	case m.hedger != nil:
		return m.hedger.InvokeUnary(ctx, name, req, reply, cc, invoker, opts...)
	case m.retrier != nil:
		return m.retrier.InvokeUnary(ctx, name, req, reply, cc, invoker, opts...)
	}
	m.first()
	err := invoker(ctx, name, req, reply, cc, opts...)
	m.ended(ctx, err)
	return err
}

// stream is the interceptor of streams.
func (c *Client) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, name string,
	streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	m := c.method(cc, name).overridden(ctx, opts)
	o := m.look(ctx, name)
	if o == nil {
		return m.begin(c.listening(ctx, false), desc, cc, name, streamer, opts...)
	}
	o.streamer = streamer
	opened := errAbandoned // in case of a panic below
	defer func() {
		if opened != nil {
			o.end(opened)
		}
	}()
	opts, watch := rpc.Watch(o, desc, opts, o.end, nil)
	s, err := m.begin(c.listening(o, true), desc, cc, name, attemptStream, opts...)
	if opened = err; err != nil {
		return s, err
	}
	return watch(s), nil
}

// begin begins a stream of the method.
func (m *method) begin(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, name string,
	streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	ctx = shedding.PropagateCriticality(ctx)
	if m.timeout == 0 && m.guard == nil {
		return m.open(ctx, desc, cc, name, streamer, opts...)
	}
	// What the stream holds it holds until its end, which may be that it does not open.
	held := &holding{cancel: func() {}}
	if m.timeout > 0 {
		ctx, held.cancel = context.WithTimeout(ctx, m.timeout)
	}
	if m.guard != nil {
		p, err := m.guard.enter(ctx)
		if err != nil {
			held.cancel()
			rpc.Finish(opts, err)
			return nil, err
		}
		held.pass = p
	}
	opened := errAbandoned // in case of a panic below
	defer func() {
		if opened != nil {
			held.end(opened)
		}
	}()
	var first func()
	if held.pass.permit.Probe() {
		first = held.passed
	}
	opts, watch := rpc.Watch(ctx, desc, opts, held.end, first)
	s, err := m.open(ctx, desc, cc, name, streamer, opts...)
	if opened = err; err != nil {
		return s, err
	}
	return watch(s), nil
}

// holding is what a stream holds until its end.
type holding struct {
	mu     sync.Mutex // guards the rest: the end is told from several sides
	ended  bool
	pass   pass
	cancel context.CancelFunc
}

func (h *holding) end(err error) {
	h.mu.Lock()
	again := h.ended
	h.ended = true
	h.mu.Unlock()
	if again {
		return
	}
	defer h.cancel() // a change of the breaker is told to somebody's logger
	h.pass.leaveStream(err)
}

// passed ends the probe that a stream is, with its first message: that proves what there
// is to prove, and a stream may live for longer than a probe has time.
func (h *holding) passed() {
	h.mu.Lock()
	var p breaker.Permit
	if !h.ended { // else it is the end's
		p, h.pass.permit = h.pass.permit, breaker.Permit{}
	}
	h.mu.Unlock()
	p.DoneStream(nil)
}

// open opens a stream that has been let in.
func (m *method) open(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, name string,
	streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	if desc.ServerStreams && !desc.ClientStreams {
		switch {
		case m.hedger != nil:
			return m.hedger.OpenStream(ctx, desc, cc, name, streamer, opts...)
		case m.retrier != nil:
			return m.retrier.OpenStream(ctx, desc, cc, name, streamer, opts...)
		}
	}
	m.first()
	if m.throttle != nil {
		opts = append(slices.Clip(opts), grpc.OnFinish(func(err error) { m.ended(ctx, err) }))
	}
	return streamer(ctx, desc, cc, name, opts...)
}

// first deposits a call that makes one attempt: extraLoad counts all first attempts
// of the target, whatever their method.
func (m *method) first() {
	if m.budget != nil {
		m.budget.Deposit(time.Now())
	}
}

// ended tells A6 throttling of a call that makes one attempt. As a rule no code is
// retryable for such a method, so only its successes count.
func (m *method) ended(ctx context.Context, err error) {
	switch {
	case m.throttle == nil:
	case err == nil:
		m.throttle.Success()
	case m.counts != nil && m.counts(status.Code(err)) && !outcome.IsRefusal(err) && ctx.Err() == nil:
		m.throttle.Failure()
	}
}

// refusal returns what the caller sees of a refusal.
func refusal(err error) (codes.Code, string) {
	var r *outcome.Refusal
	if errors.As(err, &r) {
		return r.Code, r.Reason
	}
	return codes.Unknown, ""
}
