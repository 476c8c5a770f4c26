package telemetry

import (
	"context"
	"slices"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/codes"
)

// Call is one call under way, and the context that it is made under. Begin it before use,
// and End it; it must not be copied. What tells of it may be called from any goroutine.
type Call struct {
	context.Context // with the span

	m         *Method
	span      trace.Span // nil if there is none
	recording bool
	begun     time.Time

	// Atomics because attempts end on goroutines of their own.
	ended atomic.Bool
	won   atomic.Bool
	// idle is when an attempt last ended, in nanoseconds since begun.
	idle atomic.Int64
}

// Looked reports whether anybody looks at the calls of m. If not, Begin would be for
// nothing.
func (m *Method) Looked(ctx context.Context) bool {
	return m != nil && (m.t.tracing() || m.t.metering(ctx))
}

// Begin begins a call, made under ctx, of a method that was called by the given name,
// "/service/method".
func (c *Call) Begin(ctx context.Context, m *Method, name string) {
	c.Context, c.m, c.begun = ctx, m, time.Now()
	if !m.t.tracing() {
		return
	}
	c.Context, c.span = m.t.tracer.Start(ctx, m.name, m.start...)
	c.recording = c.span.IsRecording()
	if c.recording && !m.own {
		c.span.SetAttributes(semconv.RPCMethodOriginal(name))
	}
}

// End ends the call, the first time.
func (c *Call) End(code codes.Code, message string) {
	if c.ended.Swap(true) {
		return
	}
	code = known(code)
	c.m.t.duration.Record(c.Context, time.Since(c.begun).Seconds(), c.m.statusSet(code).record...)
	if c.span == nil {
		return
	}
	if c.recording {
		setStatus(c.span, code, message)
	}
	c.span.End()
}

// setStatus says how a span ended, as the semantic conventions have it for a client.
func setStatus(span trace.Span, code codes.Code, message string) {
	span.SetAttributes(semconv.RPCResponseStatusCode(statusNames[code]))
	if code != codes.OK {
		span.SetAttributes(semconv.ErrorTypeKey.String(statusNames[code]))
		span.SetStatus(otelcodes.Error, message)
	}
}

// Hedged tells what hedging did: how many attempts followed the first, at which delay
// (negative: unknown), and why and when the last hedge that was due was not sent, or "".
func (c *Call) Hedged(extra int, delay time.Duration, suppressed string, at time.Time) {
	if extra > 0 {
		c.m.t.hedges.Record(c.Context, int64(extra), c.m.base.record...)
	}
	if suppressed != "" {
		c.m.t.hedgesSuppressed.Add(c.Context, 1, c.m.with(attribute.String(labelReason, suppressed)).add...)
	}
	if !c.recording {
		return
	}
	c.span.SetAttributes(attribute.Int(attrAttempts, extra+1))
	if delay >= 0 {
		c.span.SetAttributes(attribute.Float64(attrHedging, delay.Seconds()))
	}
	if suppressed != "" {
		c.span.AddEvent(eventHedgeSuppressed, trace.WithTimestamp(at), trace.WithAttributes(attribute.String(attrReason, suppressed)))
	}
}

// Retried tells what retrying did: how many attempts followed the first, how long the call
// waited between them, and why a failure was the last. Reasons that say no more than that
// the failure was final are not told.
func (c *Call) Retried(extra int, waited time.Duration, stopped string) {
	if extra > 0 {
		c.m.t.retries.Record(c.Context, int64(extra), c.m.base.record...)
		c.m.t.retryDelay.Record(c.Context, waited.Seconds(), c.m.base.record...)
	}
	suppressed := slices.Contains(retryReasons, stopped)
	if suppressed {
		c.m.t.retriesStopped.Add(c.Context, 1, c.m.with(attribute.String(labelReason, stopped)).add...)
	}
	if !c.recording {
		return
	}
	c.span.SetAttributes(attribute.Int(attrAttempts, extra+1))
	if suppressed {
		c.span.AddEvent(eventRetrySuppressed, trace.WithAttributes(attribute.String(attrReason, stopped)))
	}
}

// Refused tells that the call was refused, or in mode shadow would have been.
func (c *Call) Refused(reason string, shadow bool) {
	c.m.t.refusals.Add(c.Context, 1, c.m.with(attribute.String(labelReason, reason), attribute.Bool(labelShadow, shadow)).add...)
	if c.recording {
		c.span.AddEvent(eventRefused, trace.WithAttributes(attribute.String(attrReason, reason), attribute.Bool(attrShadow, shadow)))
	}
}

// ByEndpoint reports whether attempts are counted by the endpoint that they are sent to.
func (c *Call) ByEndpoint() bool { return c.m.t.endpointAttempts != nil }

// Attempt is one attempt of a call under way.
type Attempt struct {
	call *Call
	kind Kind
	span trace.Span // nil if it is not recorded
}

// Attempt begins an attempt, number 1 being the first, under ctx. It returns the context to
// make it under.
func (c *Call) Attempt(ctx context.Context, number int, kind Kind) (context.Context, Attempt) {
	a := Attempt{call: c, kind: kind}
	if !c.recording {
		return ctx, a
	}
	now := time.Now()
	since := now.Sub(c.begun)
	if kind == Retry {
		idle := time.Duration(c.idle.Load())
		c.span.AddEvent(eventBackoff, trace.WithTimestamp(c.begun.Add(idle)),
			trace.WithAttributes(attribute.Float64(attrWait, (since-idle).Seconds())))
	}
	ctx, a.span = c.m.t.tracer.Start(ctx, spanAttempt, trace.WithTimestamp(now), trace.WithAttributes(
		attribute.Int(attrNumber, number),
		attribute.String(attrKind, kindNames[kind]),
		attribute.Float64(attrDelay, since.Seconds())))
	return ctx, a
}

// Recording reports whether the attempt has a span.
func (a Attempt) Recording() bool { return a.span != nil }

// End ends the attempt. backend is where it was sent, or "". Of several attempts of a call
// that won, which is a matter of microseconds, the later ones were superseded.
func (a Attempt) End(outcome Outcome, code codes.Code, message, backend string) {
	c := a.call
	if outcome == Won && c.won.Swap(true) {
		outcome = Superseded
	}
	c.m.t.attempts.Add(c.Context, 1, c.m.attemptSet(a.kind, outcome).add...)
	if c.ByEndpoint() && backend != "" {
		c.m.t.endpointAttempts.Add(c.Context, 1, c.m.t.endpoint(c.m.target, backend).outcomeSet(outcome).add...)
	}
	if a.span == nil {
		return
	}
	c.idle.Store(int64(time.Since(c.begun)))
	code = known(code)
	a.span.SetAttributes(attribute.String(attrOutcome, outcomeNames[outcome]))
	if backend != "" {
		a.span.SetAttributes(attribute.String(attrBackend, backend))
	}
	if outcome == Superseded {
		// No error: that a sibling was quicker is what it was sent for.
		a.span.SetAttributes(semconv.RPCResponseStatusCode(statusNames[code]))
	} else {
		setStatus(a.span, code, message)
	}
	a.span.End()
}
