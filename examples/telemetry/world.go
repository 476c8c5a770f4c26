package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	prom "github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	exporter "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/examples/telemetry/shoppb"
)

// sampled is the share of the calls whose traces are recorded.
const sampled = 0.2

// backends is how many servers the shop has. A balancer ejects one of three at most.
const backends = 4

// clientPolicy has something for each row of the dashboard. Its times are shorter than one
// would want in earnest, so that a run of seconds shows what else takes minutes.
const clientPolicy = `{
  "loadBalancingConfig": [{"bobtail_p2c": {"ejection": {"baseEjectionTime": "2s", "minimumCalls": 10}}}],
  "extraLoad": {"max": 0.1, "minPerSecond": 1},
  "methodConfig": [{
    "name": [{"service": "shop.Shop", "method": "Search"}], "timeout": "1s",
    "hedgingPolicy": {"maxAttempts": 2, "hedgingPercentile": 95, "hedgingDelay": "0.020s", "nonFatalStatusCodes": ["UNAVAILABLE"]}
  }, {
    "name": [{"service": "shop.Shop", "method": "Order"}], "timeout": "1s",
    "retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.01s", "maxBackoff": "0.1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}
  }, {
    "name": [{"service": "shop.Shop", "method": "Pay"}], "timeout": "1s",
    "circuitBreaker": {"minimumCalls": 10, "window": "2s", "openFor": "1s"}
  }, {
    "name": [{"service": "shop.Shop", "method": "Quote"}], "timeout": "1s",
    "adaptiveThrottling": {"k": 1.5, "window": "10s"}
  }, {
    "name": [{"service": "shop.Shop", "method": "Render"}], "timeout": "0.5s"
  }]
}`

// shadowPolicy is what a client has that has not been turned on yet.
const shadowPolicy = `{
  "mode": "shadow",
  "extraLoad": {"max": 0.05},
  "methodConfig": [{
    "name": [{"service": "shop.Shop", "method": "Search"}], "timeout": "1s", "maxInFlight": 1,
    "hedgingPolicy": {"maxAttempts": 2, "hedgingPercentile": 90, "hedgingDelay": "0.020s"}
  }]
}`

// renderPolicy is that of a server that is asked for more than it can do.
const renderPolicy = `{
  "limiter": {"algorithm": "static", "limit": 2},
  "queue": {"maxLength": 50, "target": "0.005s", "maxWait": "0.100s"},
  "tenants": {"metadataKey": "x-tenant-id", "perSecond": 100, "burst": 50}
}`

// world is all that there is but for who looks at it. What would be processes of their own in
// earnest have providers of their own, for the gauges of two servers are one series otherwise.
type world struct {
	metrics string // the address at which metrics are, a path for each process
	web     *http.Server

	processes []*process
	servers   []*grpc.Server
	conns     []*grpc.ClientConn

	shop, render, shadow shoppb.ShopClient
	behaviour            *behaviour
}

// process is the telemetry of what stands for a process.
type process struct {
	instance
	registry *prom.Registry
	meters   *sdkmetric.MeterProvider
	tracers  *sdktrace.TracerProvider
}

// newWorld starts the servers and dials them. Traces go to an OTLP receiver.
func newWorld(ctx context.Context, otlp string) (w *world, err error) {
	w = &world{behaviour: &behaviour{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	creds := grpc.WithTransportCredentials(insecure.NewCredentials())

	shop, render := manual.NewBuilderWithScheme("demo"), manual.NewBuilderWithScheme("demo")
	var endpoints []resolver.Endpoint
	for i := range backends {
		address, err := w.serve(ctx, otlp, fmt.Sprintf("shop-%c", 'a'+i), bobtail.DefaultServerPolicy(), &server{behaviour: w.behaviour, sick: i == 0})
		if err != nil {
			return w, err
		}
		endpoints = append(endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: address}}})
	}
	shop.InitialState(resolver.State{Endpoints: endpoints})
	policy, err := bobtail.ParseServerPolicy([]byte(renderPolicy))
	if err != nil {
		return w, err
	}
	address, err := w.serve(ctx, otlp, "render-a", policy, &server{behaviour: w.behaviour})
	if err != nil {
		return w, err
	}
	render.InitialState(resolver.State{Endpoints: []resolver.Endpoint{{Addresses: []resolver.Address{{Addr: address}}}}})

	dial := func(name, document string, targets map[string]*manual.Resolver) (map[string]shoppb.ShopClient, error) {
		policy, err := bobtail.ParsePolicy([]byte(document))
		if err != nil {
			return nil, err
		}
		p, err := w.process(ctx, otlp, "web", name)
		if err != nil {
			return nil, err
		}
		client, err := bobtail.NewClient(policy, bobtail.WithLogger(nil), bobtail.WithEndpointMetrics(),
			bobtail.WithMeterProvider(p.meters), bobtail.WithTracerProvider(p.tracers))
		if err != nil {
			return nil, err
		}
		clients := map[string]shoppb.ShopClient{}
		for target, builder := range targets {
			// otelgrpc sends the trace context, so that the servers' spans hang below the attempts.
			conn, err := grpc.NewClient(target, append(client.DialOptions(), creds, grpc.WithResolvers(builder), grpc.WithStatsHandler(
				otelgrpc.NewClientHandler(otelgrpc.WithTracerProvider(p.tracers), otelgrpc.WithMeterProvider(noop.NewMeterProvider()),
					otelgrpc.WithPropagators(propagation.TraceContext{}))))...)
			if err != nil {
				return nil, err
			}
			w.conns = append(w.conns, conn)
			clients[target] = shoppb.NewShopClient(conn)
		}
		return clients, nil
	}
	clients, err := dial("web-a", clientPolicy, map[string]*manual.Resolver{"demo:///shop": shop, "demo:///render": render})
	if err != nil {
		return w, err
	}
	w.shop, w.render = clients["demo:///shop"], clients["demo:///render"]
	// A resolver of its own: a manual one serves one connection.
	again := manual.NewBuilderWithScheme("demo")
	again.InitialState(resolver.State{Endpoints: endpoints})
	if clients, err = dial("web-shadow", shadowPolicy, map[string]*manual.Resolver{"demo:///shop": again}); err != nil {
		return w, err
	}
	w.shadow = clients["demo:///shop"]
	return w, w.expose()
}

// serve starts a server and returns its address.
func (w *world) serve(ctx context.Context, otlp, name string, policy bobtail.ServerPolicy, handlers shoppb.ShopServer) (string, error) {
	p, err := w.process(ctx, otlp, strings.TrimRight(strings.TrimRight(name, "abcd"), "-"), name)
	if err != nil {
		return "", err
	}
	admission, err := bobtail.NewServer(policy, bobtail.WithLogger(nil), bobtail.WithMeterProvider(p.meters))
	if err != nil {
		return "", err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	s := grpc.NewServer(append(admission.ServerOptions(), grpc.StatsHandler(otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(p.tracers),
		otelgrpc.WithMeterProvider(noop.NewMeterProvider()), otelgrpc.WithPropagators(propagation.TraceContext{}))))...)
	admission.Register(s)
	shoppb.RegisterShopServer(s, handlers)
	w.servers = append(w.servers, s)
	go s.Serve(listener) // until Stop
	return listener.Addr().String(), nil
}

// process makes the telemetry of one.
func (w *world) process(ctx context.Context, otlp, job, name string) (*process, error) {
	p := &process{instance: instance{job: job, name: name, path: "/metrics/" + name}, registry: prom.NewRegistry()}
	res := resource.NewSchemaless(attribute.String("service.name", name))
	reader, err := exporter.New(exporter.WithRegisterer(p.registry))
	if err != nil {
		return nil, err
	}
	traces, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpoint(otlp), otlptracegrpc.WithInsecure())
	if err != nil {
		return nil, err
	}
	// Exemplars are on: the SDK takes them from calls whose trace is sampled.
	p.meters = sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader), sdkmetric.WithResource(res))
	p.tracers = sdktrace.NewTracerProvider(sdktrace.WithResource(res), sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(sampled))),
		sdktrace.WithBatcher(traces, sdktrace.WithBatchTimeout(500*time.Millisecond), sdktrace.WithMaxQueueSize(1<<14)))
	w.processes = append(w.processes, p)
	return p, nil
}

// expose serves the metrics of all processes, in OpenMetrics, which has exemplars.
func (w *world) expose() error {
	mux := http.NewServeMux()
	for _, p := range w.processes {
		mux.Handle(p.path, promhttp.HandlerFor(p.registry, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	w.metrics, w.web = listener.Addr().String(), &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go w.web.Serve(listener) // until Close
	return nil
}

func (w *world) instances() []instance {
	var all []instance
	for _, p := range w.processes {
		all = append(all, p.instance)
	}
	return all
}

// scrape returns the names of all series that are exported.
func (w *world) scrape(ctx context.Context) (map[string]bool, error) {
	names := map[string]bool{}
	for _, p := range w.processes {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+w.metrics+p.path, nil)
		if err != nil {
			return nil, err
		}
		answer, err := http.DefaultClient.Do(request)
		if err != nil {
			return nil, err
		}
		lines := bufio.NewScanner(answer.Body)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			if name, _, ok := strings.Cut(lines.Text(), "{"); ok && !strings.HasPrefix(name, "#") {
				names[name] = true
			}
		}
		if err := cmp.Or(lines.Err(), answer.Body.Close()); err != nil {
			return nil, err
		}
	}
	return names, nil
}

// flush sends the spans that wait.
func (w *world) flush(ctx context.Context) {
	for _, p := range w.processes {
		_ = p.tracers.ForceFlush(ctx) // what is missing will be seen to be missing
	}
}

// close ends it all, whatever of it has been begun.
func (w *world) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var errs []error
	for _, c := range w.conns {
		errs = append(errs, c.Close())
	}
	for _, s := range w.servers {
		s.Stop()
	}
	if w.web != nil {
		errs = append(errs, w.web.Close())
	}
	for _, p := range w.processes {
		errs = append(errs, p.tracers.Shutdown(ctx), p.meters.Shutdown(ctx))
	}
	return errors.Join(errs...)
}
