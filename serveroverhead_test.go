package bobtail

import (
	"context"
	"testing"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// serverLooks are who may look at the calls of a server; a span, where there is one, is made
// by others and not sampled.
func serverLooks() []struct {
	name   string
	opts   []Option
	traced bool
} {
	meters := func() Option {
		return WithMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader())))
	}
	return []struct {
		name   string
		opts   []Option
		traced bool
	}{
		{"without", []Option{WithoutTelemetry()}, false},
		{"nothing installed", nil, false},
		{"never sampled", nil, true},
		{"metrics", []Option{meters()}, false},
		{"never sampled, metrics", []Option{meters()}, true},
	}
}

// admitOne returns a call of a server that admits it, by its interceptor.
func admitOne(t testing.TB, opts []Option, traced bool) func() {
	s, err := NewServer(DefaultServerPolicy(), append(opts, WithLogger(nil))...)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if traced {
		ctx, _ = sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.NeverSample())).Tracer("").Start(ctx, "of others")
	}
	var req, resp any = &struct{}{}, &struct{}{}
	info := &grpc.UnaryServerInfo{Server: t, FullMethod: "/kv.KV/Get"}
	handler := func(context.Context, any) (any, error) { return resp, nil }
	return func() {
		if _, err := s.unary(ctx, req, info, handler); err != nil {
			t.Fatal(err)
		}
	}
}

// Looking at an admitted call costs a server no allocation, whoever looks, as long as its
// span is not recorded.
func TestServerTelemetryOverhead(t *testing.T) {
	if testenv.Race {
		t.Skip("the race detector drops at random what pools hold")
	}
	costs := map[string]float64{}
	for _, look := range serverLooks() {
		costs[look.name] = testenv.Allocs(1000, admitOne(t, look.opts, look.traced))
		if costs[look.name] > costs["without"] {
			t.Errorf("%s: %v allocations, want at most %v", look.name, costs[look.name], costs["without"])
		}
	}
	t.Log(costs)
}

// What stands between admission and the handlers is used again, and knows nothing of the calls
// before: one that is refused after others were admitted has not been served.
func TestMeasuredIsUsedAgain(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	s, err := NewServer(DefaultServerPolicy(), WithMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))), WithLogger(nil))
	if err != nil {
		t.Fatal(err)
	}
	const n = 100
	info := &grpc.UnaryServerInfo{Server: t, FullMethod: "/kv.KV/Get"}
	call := func() error {
		_, err := s.unary(t.Context(), nil, info, func(context.Context, any) (any, error) { return nil, nil })
		return err
	}
	for range n {
		if err := call(); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range n {
		if call() == nil {
			t.Fatal("a server that drains admits a call")
		}
	}
	var rm metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &rm); err != nil {
		t.Fatal(err)
	}
	counted := map[string]int64{}
	for _, m := range rm.ScopeMetrics[0].Metrics {
		switch d := m.Data.(type) {
		case metricdata.Histogram[float64]:
			for _, p := range d.DataPoints {
				counted[m.Name] += int64(p.Count)
			}
		case metricdata.Sum[int64]:
			for _, p := range d.DataPoints {
				counted[m.Name] += p.Value
			}
		}
	}
	if counted["bobtail.server.call.duration"] != n || counted["bobtail.server.refusals"] != n {
		t.Errorf("%v, want %d served and %d refused", counted, n, n)
	}
}

func BenchmarkServerTelemetry(b *testing.B) {
	for _, look := range serverLooks() {
		b.Run(look.name, func(b *testing.B) {
			call := admitOne(b, look.opts, look.traced)
			b.ReportAllocs()
			for b.Loop() {
				call()
			}
		})
	}
}
