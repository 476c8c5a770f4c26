package bobtail

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/bobtail-rpc/bobtail/breaker"
	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
	"github.com/bobtail-rpc/bobtail/internal/rpc"
	"github.com/bobtail-rpc/bobtail/internal/telemetry"
	"github.com/bobtail-rpc/bobtail/loadbalance"
	"github.com/bobtail-rpc/bobtail/retry"
)

// WithTracerProvider has the spans of calls and attempts made by p, which is a
// trace.TracerProvider of go.opentelemetry.io/otel. The default is the global one
// (otel.GetTracerProvider), also if it is installed later; docs/telemetry.md has the names. A
// server makes no spans: it annotates those that it finds, whoever made them.
func WithTracerProvider(p telemetry.TracerProvider) Option {
	return func(o *options) { o.tracers = p }
}

// WithEndpointMetrics has a client count its attempts by the endpoint that they are sent to
// (bobtail.client.endpoint.attempts), of at most 1000 endpoints: others share one series. It
// is not the default because of these series, and because it costs each call that is neither
// hedged nor retried a few allocations. A server has no use for it.
func WithEndpointMetrics() Option {
	return func(o *options) { o.byEndpoint = true }
}

// WithMeterProvider has metrics recorded by p, which is a metric.MeterProvider of
// go.opentelemetry.io/otel. The default is the global one (otel.GetMeterProvider), also if it
// is installed later; docs/telemetry.md has the names.
func WithMeterProvider(p telemetry.MeterProvider) Option {
	return func(o *options) { o.meters = p }
}

// WithoutTelemetry makes no spans and records no metrics, whatever is installed. It costs
// nothing: not even to find out that nothing is installed.
func WithoutTelemetry() Option {
	return func(o *options) { o.withoutTelemetry = true }
}

// observe installs the client's telemetry beside the hooks that its user has given.
func (c *Client) observe() {
	if c.withoutTelemetry {
		return
	}
	t, err := telemetry.New(c.tracers, c.meters, c.byEndpoint)
	if err != nil {
		c.log.Error("bobtail: some metrics are not recorded", "error", err)
	}
	c.telemetry = t
	if err := telemetry.Watch(t, c, (*Client).gauges); err != nil {
		c.log.Error("bobtail: no gauges are recorded", "error", err)
	}
	c.hedgeReports = both(func(ctx context.Context, r hedging.Report) {
		if o := observedBy(ctx); o != nil {
			o.Hedged(r.Attempts-1, r.Delay, string(r.Suppressed), r.SuppressedAt)
		}
	}, c.hedgeReports)
	c.retryReports = both(func(ctx context.Context, r retry.Report) {
		if o := observedBy(ctx); o != nil {
			o.Retried(r.Attempts-1, r.Waited, string(r.Stopped))
		}
	}, c.retryReports)
	c.refusalReports = both(func(ctx context.Context, r Refusal) {
		if o := observedBy(ctx); o != nil {
			o.Refused(r.Reason, r.Shadow)
		}
	}, c.refusalReports)
	// Who takes the events of a balancer takes them from gRPC's log.
	user := c.balancerEvents
	c.observedEvents = func(e loadbalance.Event) {
		c.rotationChanged(e)
		if user != nil {
			user(e)
		}
	}
}

// both returns what tells ours and, if there is one, the user's.
func both[R any](ours, users func(context.Context, R)) func(context.Context, R) {
	if users == nil {
		return ours
	}
	return func(ctx context.Context, r R) {
		ours(ctx, r)
		users(ctx, r)
	}
}

// rotationChanged counts and logs that a balancer has ejected or readmitted an endpoint.
func (c *Client) rotationChanged(e loadbalance.Event) {
	label := "other" // of a target beyond the bound
	if t := (*c.targets.Load())[e.Target]; t != nil {
		label = t.label
	}
	c.telemetry.RotationChanged(context.Background(), label, string(e.Kind), string(e.Reason))
	level := slog.LevelInfo
	if e.Kind == loadbalance.PanicBegan {
		level = slog.LevelWarn
	}
	c.log.Log(context.Background(), level, "bobtail: balancer: "+string(e.Kind), "target", e.Target,
		"endpoint", e.Endpoint, "reason", string(e.Reason))
}

// gauges tells what is in force now.
func (c *Client) gauges(g telemetry.Gauges) {
	now := time.Now()
	for _, t := range *c.targets.Load() {
		var budget *retry.Budget
		tab := t.table.Load()
		share := 1.0 // of the calls that may be hedged
		if tab.policy != nil && tab.policy.extraLoad != nil {
			share = tab.policy.extraLoad.Max
		}
		for _, m := range tab.methods {
			budget = m.budget
			if m.hedger != nil {
				if d, ok := m.hedger.Delay(now); ok {
					g.HedgingDelay(m.telemetry, d)
				}
				if e, ok := m.hedger.Estimate(now, share); ok {
					g.HedgingP99(m.telemetry, e.Unhedged, e.Hedged)
				}
			}
			if m.guard == nil {
				continue
			}
			if b := m.guard.breaker; b != nil {
				g.Breaker(m.telemetry, breakerState(b.State()))
			}
			if th := m.guard.throttle; th != nil {
				g.Throttle(m.telemetry, th.probability(now))
			}
		}
		if budget != nil {
			g.Budget(t.label, budget.Balance(now))
		}
	}
}

// breakerState numbers the states as docs/telemetry.md does.
func breakerState(s breaker.State) int {
	switch s {
	case breaker.HalfOpen:
		return 1
	case breaker.Open:
		return 2
	}
	return 0
}

// recognized reports whether somebody other than its caller says that there is such a
// method: the linked descriptors do.
func recognized(method string) bool {
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(descriptorName(method))
	if err != nil {
		return false
	}
	_, ok := d.(protoreflect.MethodDescriptor)
	return ok
}

// observed is a call that somebody looks at. It is the context of its attempts.
type observed struct {
	telemetry.Call
	tied bool // its hedges are tied copies
	// One of these makes an attempt.
	invoker  grpc.UnaryInvoker
	streamer grpc.Streamer
}

type observedKey struct{}

// Value answers those who make the attempts, and report of them.
func (o *observed) Value(key any) any {
	if _, ok := key.(observedKey); ok {
		return o
	}
	return o.Call.Value(key)
}

func observedBy(ctx context.Context) *observed {
	o, _ := ctx.Value(observedKey{}).(*observed)
	return o
}

// look begins a call that somebody looks at; nil if nobody does.
func (m *method) look(ctx context.Context, name string) *observed {
	if !m.telemetry.Looked(ctx) {
		return nil
	}
	o := &observed{tied: m.tied}
	o.Begin(ctx, m.telemetry, name)
	return o
}

// end ends the call.
func (o *observed) end(err error) {
	code, message := described(err)
	o.End(code, message)
}

// described returns the status of an error.
func described(err error) (codes.Code, string) {
	if err == nil {
		return codes.OK, ""
	}
	s, ok := status.FromError(err)
	if !ok {
		s = status.FromContextError(err)
	}
	return s.Code(), s.Message()
}

// begin begins the attempt that runs under ctx. A call that is neither hedged nor retried
// has no attempt.Attempt, but for one made here, and makes one attempt.
func (o *observed) begin(ctx context.Context, method string, streaming bool) (context.Context, *attempt.Attempt, telemetry.Attempt) {
	number, kind := 1, telemetry.First
	a := attempt.FromContext(ctx)
	if a != nil && !a.Of(method) {
		a = nil
	}
	if a != nil {
		number = a.Number
		switch {
		case number > 1 && o.tied:
			kind = telemetry.Tied
		case a.Kind == attempt.Hedge:
			kind = telemetry.Hedge
		case a.Kind == attempt.Retry:
			kind = telemetry.Retry
		}
	} else if o.ByEndpoint() {
		// One that has no other use than that the balancer says where it sends it.
		only := &struct {
			call    attempt.Call
			attempt attempt.Attempt
		}{call: attempt.Call{Method: method}}
		a = &only.attempt
		a.Init(&only.call, 1, attempt.First)
		a.Streaming = streaming
		ctx = attempt.NewContext(ctx, a)
	}
	ctx, t := o.Attempt(ctx, number, kind)
	return ctx, a, t
}

// became says what became of an attempt that ended with err.
func became(a *attempt.Attempt, err error) telemetry.Outcome {
	switch {
	case a != nil && a.Superseded():
		return telemetry.Superseded
	case err == nil:
		return telemetry.Won
	case a != nil && a.Unsent() || outcome.IsRefusal(err) || outcome.Overloaded(err):
		return telemetry.Refused
	}
	return telemetry.Failed
}

// sentTo names the backend of an attempt, "" if it is not known.
func sentTo(a *attempt.Attempt, p *peer.Peer) string {
	if a != nil && a.Endpoint() != "" {
		return a.Endpoint()
	}
	if p != nil && p.Addr != nil {
		return p.Addr.String()
	}
	return ""
}

// attemptUnary is the invoker of a call that somebody looks at: it makes one attempt.
func attemptUnary(ctx context.Context, name string, req, reply any, cc *grpc.ClientConn, opts ...grpc.CallOption) error {
	o := observedBy(ctx)
	under, a, t := o.begin(ctx, name, false)
	var p *peer.Peer
	if t.Recording() || o.ByEndpoint() {
		p = &peer.Peer{}
		opts = append(opts[:len(opts):len(opts)], grpc.Peer(p))
	}
	// In case of a panic below: nobody knows how the attempt ended.
	err := errAbandoned
	defer func() {
		code, message := described(err)
		t.End(became(a, err), code, message, sentTo(a, p))
	}()
	err = o.invoker(under, name, req, reply, cc, opts...)
	return err
}

// attemptStream is attemptUnary for streams. An attempt ends with its stream.
func attemptStream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, name string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	o := observedBy(ctx)
	under, a, t := o.begin(ctx, name, true)
	var once sync.Once // the end is told from several sides
	end := func(err error) {
		once.Do(func() {
			code, message := described(err)
			t.End(became(a, err), code, message, sentTo(a, nil))
		})
	}
	opened := errAbandoned // in case of a panic below
	defer func() {
		if opened != nil {
			end(opened)
		}
	}()
	opts, watch := rpc.Watch(under, desc, opts, end, nil)
	s, err := o.streamer(under, desc, cc, name, opts...)
	if opened = err; err != nil {
		return s, err
	}
	return watch(s), nil
}
