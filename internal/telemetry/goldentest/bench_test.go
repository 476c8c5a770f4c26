package goldentest

import (
	"context"
	"testing"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// What being looked at costs a call that is not hedged, over a connection in memory, beside
// otelgrpc.
func BenchmarkCall(b *testing.B) {
	never := func() *sdktrace.TracerProvider {
		return sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.NeverSample()))
	}
	meters := func() *sdkmetric.MeterProvider {
		return sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader()))
	}
	ours := func(opts ...bobtail.Option) []grpc.DialOption {
		c, err := bobtail.NewClient(bobtail.DefaultPolicy(), append(opts, bobtail.WithLogger(nil))...)
		if err != nil {
			b.Fatal(err)
		}
		return c.DialOptions()
	}
	theirs := func(opts ...otelgrpc.Option) []grpc.DialOption {
		return []grpc.DialOption{grpc.WithStatsHandler(otelgrpc.NewClientHandler(append(opts, otelgrpc.WithPropagators(propagation.TraceContext{}))...))}
	}
	for _, bm := range []struct {
		name string
		opts []grpc.DialOption
	}{
		{"bare", nil},
		{"bobtail, without telemetry", ours(bobtail.WithoutTelemetry())},
		{"bobtail, nothing installed", ours()},
		{"bobtail, metrics", ours(bobtail.WithMeterProvider(meters()))},
		{"bobtail, never sampled", ours(bobtail.WithTracerProvider(never()))},
		{"bobtail, never sampled, metrics", ours(bobtail.WithTracerProvider(never()), bobtail.WithMeterProvider(meters()))},
		{"bobtail, recorded, metrics", ours(bobtail.WithTracerProvider(sdktrace.NewTracerProvider()), bobtail.WithMeterProvider(meters()))},
		{"otelgrpc, nothing installed", theirs()},
		{"otelgrpc, never sampled", theirs(otelgrpc.WithTracerProvider(never()))},
		{"otelgrpc, never sampled, metrics", theirs(otelgrpc.WithTracerProvider(never()), otelgrpc.WithMeterProvider(meters()))},
		{"otelgrpc, recorded, metrics", theirs(otelgrpc.WithTracerProvider(sdktrace.NewTracerProvider()), otelgrpc.WithMeterProvider(meters()))},
	} {
		b.Run(bm.name, func(b *testing.B) {
			kv := kvpb.NewKVClient(grpctest.NewFleet(b, 1, grpctest.Handlers{}).Dial(bm.opts...))
			ctx, req := context.Background(), &kvpb.Request{}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := kv.Get(ctx, req); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// The same for a server that admits the call, whose client is bare, beside otelgrpc's handler.
func BenchmarkServedCall(b *testing.B) {
	never := func() *sdktrace.TracerProvider {
		return sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.NeverSample()))
	}
	meters := func() *sdkmetric.MeterProvider {
		return sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader()))
	}
	ours := func(opts ...bobtail.Option) []grpc.ServerOption {
		s, err := bobtail.NewServer(bobtail.DefaultServerPolicy(), append(opts, bobtail.WithLogger(nil))...)
		if err != nil {
			b.Fatal(err)
		}
		return s.ServerOptions()
	}
	theirs := func(opts ...otelgrpc.Option) []grpc.ServerOption {
		return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(append(opts, otelgrpc.WithPropagators(propagation.TraceContext{}))...))}
	}
	recorded := func() *sdktrace.TracerProvider { return sdktrace.NewTracerProvider() }
	for _, bm := range []struct {
		name string
		opts []grpc.ServerOption
	}{
		{"bare", nil},
		{"bobtail, without telemetry", ours(bobtail.WithoutTelemetry())},
		{"bobtail, nothing installed", ours()},
		{"bobtail, metrics", ours(bobtail.WithMeterProvider(meters()))},
		{"otelgrpc, nothing installed", theirs()},
		{"otelgrpc, never sampled, metrics", theirs(otelgrpc.WithTracerProvider(never()), otelgrpc.WithMeterProvider(meters()))},
		{"otelgrpc, recorded, metrics", theirs(otelgrpc.WithTracerProvider(recorded()), otelgrpc.WithMeterProvider(meters()))},
		{"both, recorded, metrics", append(ours(bobtail.WithMeterProvider(meters())),
			theirs(otelgrpc.WithTracerProvider(recorded()), otelgrpc.WithMeterProvider(meters()))...)},
		{"both, recorded, metrics, ours without telemetry", append(ours(bobtail.WithoutTelemetry()),
			theirs(otelgrpc.WithTracerProvider(recorded()), otelgrpc.WithMeterProvider(meters()))...)},
	} {
		b.Run(bm.name, func(b *testing.B) {
			kv := kvpb.NewKVClient(grpctest.NewFleet(b, 1, grpctest.Handlers{}, bm.opts...).Dial())
			ctx, req := context.Background(), &kvpb.Request{}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := kv.Get(ctx, req); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
