package observe

import (
	"context"
	"errors"
	"time"

	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/bench/experiment"
)

// Begin begins the span of a request at its intended start; end ends it, and records how
// long it took. See [experiment.Config].
func (p *Policy) Begin(ctx context.Context, r experiment.Request) (_ context.Context, end func(error)) {
	var span trace.Span
	if p.tracer != nil {
		ctx, span = p.tracer.Start(ctx, spanRequest, trace.WithTimestamp(r.Intended), trace.WithAttributes(attrRequest.Int64(int64(r.ID))))
		if span.IsRecording() {
			p.begun.Add(1)
			ctx = context.WithValue(ctx, rootKey{}, span)
			span.SetAttributes(attrTime.Float64(r.At.Seconds()), attrLag.Float64(time.Since(r.Intended).Seconds()))
		}
	}
	return ctx, func(err error) {
		took := time.Since(r.Intended)
		p.duration.Record(ctx, took.Seconds(), outcomes[known(err)])
		if span == nil {
			return
		}
		if span.IsRecording() {
			span.SetAttributes(attrCounted.Bool(!r.Warmup && !errors.Is(err, experiment.ErrAbandoned)))
			if err != nil {
				span.SetAttributes(semconv.ErrorTypeKey.String(code.Code(known(err)).String()))
				span.SetStatus(otelcodes.Error, err.Error())
			}
		}
		span.End(trace.WithTimestamp(r.Intended.Add(took)))
	}
}

// known is the code of an error's status. One without a status is UNKNOWN, such as an answer
// that is another's; so is a code that a server has made up, or series were without bound.
func known(err error) codes.Code {
	c := status.Code(err)
	if c > codes.Unauthenticated {
		return codes.Unknown
	}
	return c
}

// outcomes are the attributes of the histogram, by status code: made once, for every request
// needs one. Codes have the names of the specification.
var outcomes = func() (all [codes.Unauthenticated + 1]metric.RecordOption) {
	for c := range all {
		all[c] = metric.WithAttributeSet(attribute.NewSet(semconv.RPCResponseStatusCode(code.Code(c).String())))
	}
	return all
}()

// sampler decides which requests are traced: by their number, so that the traces of two policies
// are of the same requests. All other roots are dropped.
type sampler struct{ ratio float64 }

func (s sampler) ShouldSample(p sdktrace.SamplingParameters) sdktrace.SamplingResult {
	result := sdktrace.SamplingResult{Decision: sdktrace.Drop, Tracestate: trace.SpanContextFromContext(p.ParentContext).TraceState()}
	for _, kv := range p.Attributes {
		if kv.Key == attrRequest && share(uint64(kv.Value.AsInt64())) < s.ratio {
			result.Decision = sdktrace.RecordAndSample
		}
	}
	return result
}

func (s sampler) Description() string { return "by the number of the request" }

// share spreads numbers evenly, and without a pattern, over [0, 1): the finalizer of
// splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
func share(n uint64) float64 {
	n += 0x9e3779b97f4a7c15
	n = (n ^ n>>30) * 0xbf58476d1ce4e5b9
	n = (n ^ n>>27) * 0x94d049bb133111eb
	n ^= n >> 31
	return float64(n>>11) / (1 << 53)
}

type rootKey struct{}

// sent adds an event to the span of a request for each attempt that leaves, unless it has
// a span of its own.
type sent struct{}

func (sent) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

func (sent) HandleRPC(ctx context.Context, s stats.RPCStats) {
	out, ok := s.(*stats.OutHeader)
	if !ok || out.RemoteAddr == nil {
		return
	}
	// None if the request is not traced, another if there are spans of attempts.
	if span, _ := ctx.Value(rootKey{}).(trace.Span); span != nil && span == trace.SpanFromContext(ctx) {
		span.AddEvent(eventSent, trace.WithAttributes(semconv.NetworkPeerAddress(out.RemoteAddr.String())))
	}
}

func (sent) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

func (sent) HandleConn(context.Context, stats.ConnStats) {}
