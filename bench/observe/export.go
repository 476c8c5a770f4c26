package observe

import (
	"context"
	"sync"
	"sync/atomic"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"

	"github.com/bobtail-rpc/bobtail/bench/report"
)

// delivery is what became of a policy's traces.
type delivery struct {
	// Requests traced, and those of them whose span the receiver has. Atomics because
	// requests and exports count at the same time.
	begun, delivered atomic.Int64

	mu      sync.Mutex // guards slowest
	slowest report.Slowest
}

// spanExporter remembers the slowest requests that it has delivered: so each trace id in
// the report is one that the receiver knows.
type spanExporter struct {
	sdktrace.SpanExporter
	policy *Policy
}

// ExportSpans never fails for the SDK, which would tell of each failure.
func (e spanExporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	if err := e.SpanExporter.ExportSpans(ctx, spans); err != nil {
		e.policy.observer.failed(err)
		return nil
	}
	for _, s := range spans {
		if s.InstrumentationScope().Name == scope {
			e.policy.deliver(s)
		}
	}
	return nil
}

// deliver takes the span of a request that the receiver has.
func (d *delivery) deliver(s sdktrace.ReadOnlySpan) {
	d.delivered.Add(1)
	t := report.Traced{Ms: report.Millis(s.EndTime().Sub(s.StartTime())), TraceID: s.SpanContext().TraceID().String()}
	counted := false
	for _, kv := range s.Attributes() {
		switch kv.Key {
		case attrRequest:
			t.Request = uint64(kv.Value.AsInt64())
		case attrTime:
			t.T = kv.Value.AsFloat64()
		case attrCounted:
			counted = kv.Value.AsBool()
		case semconv.ErrorTypeKey:
			t.Error = kv.Value.AsString()
		}
	}
	if !counted {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.slowest.Add(t)
}

// metricExporter likewise fails for nobody but its reader.
type metricExporter struct {
	sdkmetric.Exporter
	observer *Observer
}

func (e metricExporter) Export(ctx context.Context, m *metricdata.ResourceMetrics) error {
	if err := e.Exporter.Export(ctx, m); err != nil {
		e.observer.failed(err)
	}
	return nil
}
