package goldentest

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	experimental "google.golang.org/grpc/experimental/opentelemetry"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/stats/opentelemetry"
	"google.golang.org/grpc/test/bufconn"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// backend is a server that runs one handler at a time.
type backend struct {
	kvpb.UnimplementedKVServer
	server *bobtail.Server
	lis    *bufconn.Listener
	free   chan struct{} // closed when the one who holds the slot is to leave
	leave  func()        // closes it, once
}

// Get serves a call at once, but for that of the one who holds the slot.
func (b *backend) Get(_ context.Context, req *kvpb.Request) (*kvpb.Response, error) {
	if req.Id > 0 {
		<-b.free
	}
	return &kvpb.Response{}, nil
}

func (b *backend) dial(ctx context.Context, _ string) (net.Conn, error) {
	return grpctest.Dial(ctx, b.lis)
}

// hold takes the slot, under a trace that is not sampled.
func (b *backend) hold(t *testing.T, held *sync.WaitGroup) {
	cc, err := grpc.NewClient("passthrough:///holder", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(b.dial))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	held.Go(func() {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
		if _, err := kvpb.NewKVClient(cc).Get(ctx, &kvpb.Request{Id: 1}); err != nil {
			t.Error(err)
		}
	})
}

// A server's admission beside otelgrpc and grpc's own plugin, at both ends: its attributes are
// on the span that they have made, and it counts what it admits and refuses, once.
func TestServerBesideOthers(t *testing.T) {
	const limit = `"limiter": {"algorithm": "static", "limit": 1}`
	for _, with := range []string{"none", "otelgrpc", "grpc"} {
		for _, st := range []struct {
			name, client, server string
			backends             int
		}{
			{"server refused", `{}`, "{" + limit + "}", 1},
			{"server tied", `{"methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}],
				"hedgingPolicy": {"maxAttempts": 2, "tied": true, "tieDelay": "0.005s"}}]}`,
				"{" + limit + `, "queue": {"target": "1s", "maxWait": "1s"}}`, 2},
		} {
			t.Run(with+"/"+st.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					spans := tracetest.NewInMemoryExporter()
					reader := sdkmetric.NewManualReader()
					tp := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
					mp := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
					plugin := opentelemetry.Options{
						MetricsOptions: opentelemetry.MetricsOptions{MeterProvider: mp},
						TraceOptions:   experimental.TraceOptions{TracerProvider: tp, TextMapPropagator: propagation.TraceContext{}},
					}
					theirs := []otelgrpc.Option{otelgrpc.WithTracerProvider(tp), otelgrpc.WithMeterProvider(mp), otelgrpc.WithPropagators(propagation.TraceContext{})}

					var backends []*backend
					var state resolver.State
					for i := range st.backends {
						p, err := bobtail.ParseServerPolicy([]byte(st.server))
						if err != nil {
							t.Fatal(err)
						}
						b := &backend{lis: bufconn.Listen(64 << 10), free: make(chan struct{})}
						b.leave = sync.OnceFunc(func() { close(b.free) })
						if b.server, err = bobtail.NewServer(p, bobtail.WithLogger(nil), bobtail.WithMeterProvider(mp)); err != nil {
							t.Fatal(err)
						}
						opts := append(b.server.ServerOptions(), grpc.WaitForHandlers(true))
						switch with {
						case "otelgrpc":
							opts = append(opts, grpc.StatsHandler(otelgrpc.NewServerHandler(theirs...)))
						case "grpc":
							opts = append(opts, opentelemetry.ServerOption(plugin))
						}
						srv := grpc.NewServer(opts...)
						kvpb.RegisterKVServer(srv, b)
						go srv.Serve(b.lis) //nolint:errcheck // it returns when the test stops the server
						t.Cleanup(srv.Stop)
						backends = append(backends, b)
						state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: fmt.Sprint(i)}}})
					}
					r := manual.NewBuilderWithScheme("fleet")
					r.InitialState(state)

					p, err := bobtail.ParsePolicy([]byte(st.client))
					if err != nil {
						t.Fatal(err)
					}
					c, err := bobtail.NewClient(p, bobtail.WithLogger(nil), bobtail.WithTracerProvider(tp), bobtail.WithMeterProvider(mp))
					if err != nil {
						t.Fatal(err)
					}
					opts := []grpc.DialOption{grpc.WithResolvers(r), grpc.WithTransportCredentials(insecure.NewCredentials()),
						grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
							return backends[addr[0]-'0'].dial(ctx, addr)
						})}
					if with == "grpc" {
						opts = append(opts, opentelemetry.DialOption(plugin))
					}
					opts = append(opts, c.DialOptions()...)
					if with == "otelgrpc" {
						opts = append(opts, grpc.WithStatsHandler(otelgrpc.NewClientHandler(theirs...)))
					}
					cc, err := grpc.NewClient("fleet:///kv", opts...)
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { cc.Close() })
					cc.Connect()
					var held sync.WaitGroup
					for _, b := range backends {
						b.hold(t, &held)
					}
					time.Sleep(time.Second)

					called := make(chan struct{})
					go func() {
						defer close(called)
						_, _ = kvpb.NewKVClient(cc).Get(t.Context(), &kvpb.Request{}) // how it ends is in the spans
					}()
					if st.backends == 2 {
						// The slot where the copy waits, not that where the first attempt does, becomes
						// free: so the copy is started, and the first attempt withdrawn.
						time.Sleep(2 * time.Millisecond)
						copied := backends[0]
						if copied.server.Stats().Queued > 0 {
							copied = backends[1]
						}
						time.Sleep(8 * time.Millisecond)
						copied.leave()
					}
					<-called
					synctest.Wait() // the first attempt, which nobody needs any more, leaves the queue
					for _, b := range backends {
						b.leave()
					}
					held.Wait()
					synctest.Wait()
					golden(t, with+" "+st.name, tree(spans.GetSpans())+"\n"+counts(t, reader))
				})
			})
		}
	}
}
