package bobtail

import (
	"context"
	"time"

	"google.golang.org/grpc"
)

// NoHedge makes one call without hedges, whatever the policy says: for a request that
// must not be executed twice, of a method that otherwise may be.
//
//	kv.Get(ctx, req, bobtail.NoHedge())
func NoHedge() grpc.CallOption { return noHedge{} }

// NoRetry makes one call without retries, whatever the policy says.
func NoRetry() grpc.CallOption { return noRetry{} }

// NoRefusal lets one call through the circuit breaker, adaptive throttling, rate limit
// and bulkhead of the policy, and counts it in none of them: for a health check or an
// operator's call, which must go out especially when others may not.
func NoRefusal() grpc.CallOption { return noRefusal{} }

// CallTimeout gives one call d in place of the timeout of the policy, be it longer or
// shorter. 0 is none; less than 0 is over already, as of a time that has passed. The deadline
// of the call's context holds beside it.
func CallTimeout(d time.Duration) grpc.CallOption {
	if d < 0 {
		d = time.Nanosecond
	}
	return callTimeout{after: d}
}

type (
	noHedge     struct{ grpc.EmptyCallOption }
	noRetry     struct{ grpc.EmptyCallOption }
	noRefusal   struct{ grpc.EmptyCallOption }
	callTimeout struct {
		grpc.EmptyCallOption
		after time.Duration
	}
)

// WithCallPolicy returns a context under which calls are made as if they had been given
// these options of ours too: where the call options are out of reach, as below a
// framework. Options of grpc's own in it are not obeyed. What is given with the call
// wins over what the context says.
func WithCallPolicy(ctx context.Context, opts ...grpc.CallOption) context.Context {
	o, _ := ctx.Value(callPolicyKey{}).(override)
	o.add(opts)
	return context.WithValue(ctx, callPolicyKey{}, o)
}

type callPolicyKey struct{}

// override is what a call changes of its method's policy.
type override struct {
	noHedge, noRetry, noRefusal, timed bool
	timeout                            time.Duration
}

func (o *override) add(opts []grpc.CallOption) {
	for _, opt := range opts {
		switch opt := opt.(type) {
		case noHedge:
			o.noHedge = true
		case noRetry:
			o.noRetry = true
		case noRefusal:
			o.noRefusal = true
		case callTimeout:
			o.timed, o.timeout = true, opt.after
		}
	}
}

// overridden returns the method as the call wants it, m itself as a rule.
func (m *method) overridden(ctx context.Context, opts []grpc.CallOption) *method {
	o, _ := ctx.Value(callPolicyKey{}).(override)
	if len(opts) > 0 {
		o.add(opts)
	}
	if o == (override{}) {
		return m
	}
	other := *m
	// What opts out of further attempts still says how the server is.
	if o.noHedge && m.hedger != nil {
		other.hedger, other.counts = nil, m.hedger.Counts
	}
	if o.noRetry && m.retrier != nil {
		other.retrier, other.counts = nil, m.retrier.Counts
	}
	if o.noRefusal {
		other.guard = nil
	}
	if o.timed {
		other.timeout = o.timeout
	}
	return &other
}
