// Package goldentest holds what the telemetry of clients and servers looks like beside that of others. It is
// a module of its own, so that nobody who uses the library need load theirs.
package goldentest

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	experimental "google.golang.org/grpc/experimental/opentelemetry"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats/opentelemetry"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

var update = flag.Bool("update", false, "write the golden files")

// A story is a call: its policy, and what attempt k meets.
type story struct {
	name, policy string
	serve        func(ctx context.Context, k int) error
	opens        bool // the call is the second: the first has opened the breaker
}

func stories() []story {
	const get = `{"methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}], `
	return []story{
		{name: "plain", policy: `{}`, serve: func(context.Context, int) error { return nil }},
		{name: "hedged", policy: get + `"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.010s"}}]}`,
			serve: func(ctx context.Context, k int) error {
				if k > 1 {
					return nil
				}
				<-ctx.Done()
				return status.FromContextError(ctx.Err()).Err()
			}},
		{name: "retried", policy: get + `"retryPolicy": {"maxAttempts": 2, "initialBackoff": "0.05s", "maxBackoff": "0.05s",
			"backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`,
			serve: func(_ context.Context, k int) error {
				if k > 1 {
					return nil
				}
				return status.Error(codes.Unavailable, "down")
			}},
		{name: "tied", policy: get + `"hedgingPolicy": {"maxAttempts": 2, "tied": true, "tieDelay": "0.005s"}}]}`,
			serve: func(ctx context.Context, k int) error {
				if k > 1 { // its handler starts, so the one that is still queued is withdrawn
					return grpc.SendHeader(ctx, metadata.Pairs("bobtail-tied", "1"))
				}
				<-ctx.Done()
				return status.FromContextError(ctx.Err()).Err()
			}},
		{name: "refused", policy: get + `"circuitBreaker": {"minimumCalls": 1}}]}`, opens: true,
			serve: func(context.Context, int) error { return status.Error(codes.Unavailable, "down") }},
	}
}

// Spans nest, and nothing is counted twice, with otelgrpc, with grpc's own plugin listed
// before bobtail, and with both. Listed after bobtail the plugin counts attempts as calls,
// which docs/telemetry.md warns of.
func TestBesideOthers(t *testing.T) {
	for _, with := range []string{"none", "otelgrpc", "grpc", "both", "grpc last"} {
		for _, st := range stories() {
			if with == "grpc last" && st.name != "hedged" {
				continue
			}
			t.Run(with+"/"+st.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					spans := tracetest.NewInMemoryExporter()
					reader := sdkmetric.NewManualReader()
					tp := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
					mp := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
					var served []grpc.ServerOption
					if with != "none" { // else nobody sends the trace context
						served = append(served, grpc.StatsHandler(otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(tp),
							otelgrpc.WithPropagators(propagation.TraceContext{}), otelgrpc.WithMeterProvider(sdkmetric.NewMeterProvider()))))
					}
					f := grpctest.NewFleet(t, 3, handlers(st.serve), served...)
					p, err := bobtail.ParsePolicy([]byte(st.policy))
					if err != nil {
						t.Fatal(err)
					}
					c, err := bobtail.NewClient(p, bobtail.WithLogger(nil), bobtail.WithTracerProvider(tp), bobtail.WithMeterProvider(mp))
					if err != nil {
						t.Fatal(err)
					}
					plugin := opentelemetry.DialOption(opentelemetry.Options{
						MetricsOptions: opentelemetry.MetricsOptions{MeterProvider: mp},
						TraceOptions:   experimental.TraceOptions{TracerProvider: tp, TextMapPropagator: propagation.TraceContext{}},
					})
					var opts []grpc.DialOption
					if with == "grpc" || with == "both" {
						opts = append(opts, plugin)
					}
					opts = append(opts, c.DialOptions()...)
					if with == "grpc last" {
						opts = append(opts, plugin)
					}
					if with == "otelgrpc" || with == "both" {
						opts = append(opts, grpc.WithStatsHandler(otelgrpc.NewClientHandler(
							otelgrpc.WithTracerProvider(tp), otelgrpc.WithMeterProvider(mp), otelgrpc.WithPropagators(propagation.TraceContext{}))))
					}
					cc := f.Dial(opts...)
					cc.Connect()
					time.Sleep(time.Second)
					kv := kvpb.NewKVClient(cc)
					get := func() { _, _ = kv.Get(t.Context(), &kvpb.Request{}) } // how it ends is in the spans
					if st.opens {
						get()
						synctest.Wait()
						spans.Reset()
					}
					get()
					synctest.Wait()
					golden(t, with+" "+st.name, tree(spans.GetSpans())+"\n"+counts(t, reader))
				})
			})
		}
	}
}

func handlers(serve func(ctx context.Context, k int) error) grpctest.Handlers {
	return grpctest.Handlers{Unary: func(ctx context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		k := 1
		for _, v := range md.Get("grpc-previous-rpc-attempts") {
			fmt.Sscan(v, &k)
			k++
		}
		return &kvpb.Response{}, serve(ctx, k)
	}}
}

// tree writes the spans, with what of them is ours.
func tree(spans tracetest.SpanStubs) string {
	slices.SortStableFunc(spans, func(a, b tracetest.SpanStub) int { return a.StartTime.Compare(b.StartTime) })
	var b strings.Builder
	var write func(parent trace.SpanID, indent string)
	write = func(parent trace.SpanID, indent string) {
		for _, s := range spans {
			if s.Parent.SpanID() != parent {
				continue
			}
			fmt.Fprintf(&b, "%s%s (%s)", indent, s.Name, s.SpanKind)
			for _, kv := range s.Attributes {
				switch kv.Key {
				case "bobtail.attempt.number", "bobtail.attempt.kind", "bobtail.attempt.outcome", "bobtail.call.attempts", "rpc.response.status_code",
					"bobtail.admission", "bobtail.reason", "bobtail.criticality", "bobtail.queue.wait":
					fmt.Fprintf(&b, " %s=%s", kv.Key[strings.LastIndex(string(kv.Key), ".")+1:], kv.Value.String())
				}
			}
			for _, e := range s.Events {
				if s.InstrumentationScope.Name == "github.com/bobtail-rpc/bobtail" {
					fmt.Fprintf(&b, " event=%q", e.Name)
				}
			}
			b.WriteString("\n")
			write(s.SpanContext.SpanID(), indent+"    ")
		}
	}
	write(trace.SpanID{}, "")
	return b.String()
}

// counts writes how often each metric that counts calls or attempts was recorded.
func counts(t *testing.T, reader *sdkmetric.ManualReader) string {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &rm); err != nil {
		t.Fatal(err)
	}
	var lines []string
	add := func(name string, set attribute.Set, n any) {
		line := fmt.Sprintf("%s: %v", name, n)
		for _, key := range []attribute.Key{"grpc.status", "rpc.response.status_code", "bobtail.attempt.kind", "bobtail.attempt.outcome", "bobtail.reason", "bobtail.criticality", "bobtail.shadow"} {
			if v, ok := set.Value(key); ok {
				line += " " + v.String()
			}
		}
		lines = append(lines, line)
	}
	for _, sm := range rm.ScopeMetrics {
		for _, m := range sm.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Histogram[float64]:
				if strings.HasSuffix(m.Name, ".duration") || strings.HasSuffix(m.Name, "delay") || strings.HasSuffix(m.Name, ".wait") {
					for _, p := range d.DataPoints {
						add(m.Name, p.Attributes, p.Count)
					}
				}
			case metricdata.Histogram[int64]:
				if strings.HasSuffix(m.Name, "hedges") || strings.HasSuffix(m.Name, "retries") {
					for _, p := range d.DataPoints {
						add(m.Name, p.Attributes, p.Count)
					}
				}
			case metricdata.Sum[int64]:
				for _, p := range d.DataPoints {
					add(m.Name, p.Attributes, p.Value)
				}
			}
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n"
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-want +got; go test -update writes it):\n%s", file, d)
	}
}
