package bobtail

import (
	"context"
	"log/slog"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/telemetry"
	"github.com/bobtail-rpc/bobtail/loadbalance"
	"github.com/bobtail-rpc/bobtail/retry"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// Option changes how a [Client] or a [Server] is built. One that is about the other of the
// two is without effect.
type Option func(*options)

type options struct {
	log            *logger
	hedgeReports   func(context.Context, hedging.Report)
	retryReports   func(context.Context, retry.Report)
	refusalReports func(context.Context, Refusal)
	balancerEvents func(loadbalance.Event)

	tracers          telemetry.TracerProvider // nil: the global one
	meters           telemetry.MeterProvider  // likewise
	withoutTelemetry bool
	byEndpoint       bool

	serverReports func(context.Context, shedding.ServerEvent)
	withoutTap    bool
	health        interface{ Shutdown() }
}

func newOptions(opts []Option) options {
	o := options{log: newLogger(slog.Default())}
	for _, f := range opts {
		f(&o)
	}
	return o
}

// WithLogger sends the few log records of a client or server to l. They are told at changes
// of state only, and of each kind and subject at most one in 10 s; docs/telemetry.md lists
// them. The default is [slog.Default]; nil is none.
//
// A handler of l must not call Update of the [Client] or [Server] that it is told of: it may be told
// during one.
func WithLogger(l *slog.Logger) Option {
	return func(o *options) {
		if l == nil {
			l = slog.New(slog.DiscardHandler)
		}
		o.log = newLogger(l)
	}
}

// WithHedgeReports tells f about each call that a hedging policy applies to, once
// it is decided: how many attempts it took, which of them won, and why a hedge
// that was due was not sent. In mode shadow that is where to see what would have
// been done. f runs on the caller's goroutine, before the call returns; it must
// be quick, safe for concurrent use, and must not keep the context.
func WithHedgeReports(f func(context.Context, hedging.Report)) Option {
	return func(o *options) { o.hedgeReports = f }
}

// WithRetryReports tells f about each call that a retryPolicy applies to, once it is
// decided: how many attempts it took, how long it waited between them, and why there was
// no further one. In mode shadow that is where to see what would have been done. As with
// [WithHedgeReports], f must be quick, safe for concurrent use, and must not keep the
// context.
func WithRetryReports(f func(context.Context, retry.Report)) Option {
	return func(o *options) { o.retryReports = f }
}

// WithRefusalReports tells f about each call that was refused before anything of it was
// sent, by a circuit breaker, adaptive throttling, a rate limit or a bulkhead; and in mode
// shadow about each that would have been. f must be quick, safe for concurrent use, and
// must not keep the context.
func WithRefusalReports(f func(context.Context, Refusal)) Option {
	return func(o *options) { o.refusalReports = f }
}

// WithBalancerEvents tells f when a balancer of package loadbalance ejects a backend,
// readmits one, or has so few left that the ejected ones take part again; each once, at the
// end of an attempt of some call of its connection. f must be quick, safe for concurrent use,
// and must not block. Without it these events are in gRPC's own log only. It costs each call an
// allocation.
func WithBalancerEvents(f func(loadbalance.Event)) Option {
	return func(o *options) { o.balancerEvents = f }
}

// WithServerReports tells f about each call that a [Server] admits or refuses: why, of which
// class, and after how long in the queue. In mode shadow that is where to see what would
// have been done. f must be quick, safe for concurrent use, and must not keep the context.
func WithServerReports(f func(context.Context, shedding.ServerEvent)) Option {
	return func(o *options) { o.serverReports = f }
}

// WithoutTap leaves the tap out of [Server.ServerOptions], because a grpc.Server can have but
// one and panics when it is given two. Calls are then refused by the interceptors alone,
// which costs more: a unary call has been decoded by then. See [Server.TapHandle].
func WithoutTap() Option {
	return func(o *options) { o.withoutTap = true }
}

// WithHealth has [Server.Drain] tell that the server is not serving any more, by the method
// Shutdown of h, which is a *health.Server of package google.golang.org/grpc/health.
func WithHealth(h interface{ Shutdown() }) Option {
	return func(o *options) { o.health = h }
}
