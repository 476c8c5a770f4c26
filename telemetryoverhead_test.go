package bobtail_test

import (
	"context"
	"testing"

	"go.opentelemetry.io/otel"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// noop dials a connection whose last interceptor answers in the place of the transport.
func noop(t testing.TB, c *bobtail.Client) *grpc.ClientConn {
	t.Helper()
	answer := func(context.Context, string, any, any, *grpc.ClientConn, grpc.UnaryInvoker, ...grpc.CallOption) error {
		return nil
	}
	cc, err := grpc.NewClient("passthrough:///noop", append(c.DialOptions(),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithChainUnaryInterceptor(answer))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return cc
}

// looks are who may look at a call, with what a call may allocate beyond one WithoutTelemetry.
func looks() []struct {
	name string
	opts []bobtail.Option
	most float64
} {
	sampled, never, both := newSink(), newSink(sdktrace.WithSampler(sdktrace.NeverSample())), newSink(sdktrace.WithSampler(sdktrace.NeverSample()))
	return []struct {
		name string
		opts []bobtail.Option
		most float64
	}{
		{"without", []bobtail.Option{bobtail.WithoutTelemetry()}, 0},
		{"globals, nothing installed", nil, 2},
		{"metrics", []bobtail.Option{bobtail.WithMeterProvider(sampled.mp)}, 6},
		{"never sampled", []bobtail.Option{bobtail.WithTracerProvider(never.tp)}, 6},
		// The same: metrics add nothing.
		{"never sampled, metrics", []bobtail.Option{bobtail.WithTracerProvider(both.tp), bobtail.WithMeterProvider(both.mp)}, 6},
	}
}

// What looking at a call that is not hedged costs in allocations.
func TestTelemetryOverhead(t *testing.T) {
	if testenv.Race {
		t.Skip("the race detector drops at random what pools hold")
	}
	ctx, req, res := context.Background(), &kvpb.Request{}, &kvpb.Response{}
	for _, method := range []string{"/kv.KV/Get", "/kv.KV/Put", "/kv.KV/Increment"} { // hedged, retried, neither
		costs := map[string]float64{}
		for _, look := range looks() {
			c, err := bobtail.NewClient(bobtail.DefaultPolicy(), append(look.opts, bobtail.WithLogger(nil))...)
			if err != nil {
				t.Fatal(err)
			}
			cc := noop(t, c)
			costs[look.name] = testenv.Allocs(200, func() {
				if err := cc.Invoke(ctx, method, req, res); err != nil {
					t.Fatal(err)
				}
			})
			if more := costs[look.name] - costs["without"]; more > look.most {
				t.Errorf("%s, %s: %v allocations more than without, want at most %v", method, look.name, more, look.most)
			}
		}
		if costs["never sampled, metrics"] > costs["never sampled"] {
			t.Errorf("%s: metrics cost allocations: %v", method, costs)
		}
		t.Log(method, costs)
	}
}

func BenchmarkTelemetry(b *testing.B) {
	all := append(looks(), struct {
		name string
		opts []bobtail.Option
		most float64
	}{"recorded", []bobtail.Option{bobtail.WithTracerProvider(sdktrace.NewTracerProvider()), bobtail.WithMeterProvider(otel.GetMeterProvider())}, 0})
	for _, look := range all {
		b.Run(look.name, func(b *testing.B) {
			c, err := bobtail.NewClient(bobtail.DefaultPolicy(), append(look.opts, bobtail.WithLogger(nil))...)
			if err != nil {
				b.Fatal(err)
			}
			cc := noop(b, c)
			ctx, req, res := context.Background(), &kvpb.Request{}, &kvpb.Response{}
			b.ReportAllocs()
			for b.Loop() {
				if err := cc.Invoke(ctx, "/kv.KV/Get", req, res); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
