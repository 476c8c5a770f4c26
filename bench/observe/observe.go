// Package observe tells OpenTelemetry what the policies of a comparison do: spans and metrics
// over OTLP, metrics for a Prometheus that scrapes.
//
// Each policy has a tracer provider and a meter provider of its own, so that nothing of
// one is mixed with another's: all that they tell carries the name of the policy, as
// the resource attribute bobtail.bench.policy and as a label of each scraped series.
//
// Above what bobtail's own client tells stands, for every policy, one span and one histogram
// of the requests as the report counts them: from when each was meant to start.
package observe

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/bench/report"
	"github.com/bobtail-rpc/bobtail/internal/telemetry"
)

// Names of what is told here; docs/benchmarks.md has them too.
const (
	scope   = "github.com/bobtail-rpc/bobtail/bench"
	service = "bobtail-bench"

	attrPolicy  = attribute.Key("bobtail.bench.policy")  // resource
	attrRequest = attribute.Key("bobtail.bench.request") // span: the number of the request
	attrTime    = attribute.Key("bobtail.bench.time")    // span: intended start, seconds of the scenario's time
	attrLag     = attribute.Key("bobtail.bench.lag")     // span: how late it was sent, seconds
	attrCounted = attribute.Key("bobtail.bench.counted") // span: whether the report has it

	spanRequest    = "request"
	eventSent      = "sent"
	metricDuration = "bobtail.bench.request.duration"
)

const (
	// exportTimeout ends an export that a receiver does not answer.
	exportTimeout = 2 * time.Second
	// closeTimeout bounds how long the last exports may hold the report back: it is longer
	// than that of one export, and shorter than a reader's patience.
	closeTimeout = 3 * time.Second
	// metricsEvery is how often metrics are sent: the SDK's minute is longer than most runs.
	metricsEvery = 10 * time.Second
)

// Config says where to tell it.
type Config struct {
	// OTLP is the URL of an OTLP/gRPC receiver, as [ParseEndpoint] returns it; "": none.
	OTLP string
	// Ratio is the share of the requests that are traced, in (0, 1].
	Ratio float64
	// Scrape is where the metrics are scraped, at /metrics. The observer closes it. nil: nowhere.
	Scrape net.Listener
	// Tell is told once that a receiver does not take what it is sent. It is called from
	// any goroutine.
	Tell func(string)
}

// Observer is what all policies of a run share. Close it.
type Observer struct {
	cfg      Config
	registry *prometheus.Registry
	server   *http.Server
	serving  chan struct{} // closed when the server has ended
	policies []*Policy
	tell     sync.Once
	close    sync.Once
}

// ParseEndpoint returns the URL of a receiver that is given as host:port, which is without
// TLS, or as a URL http://host:port or, with TLS, https://host:port.
func ParseEndpoint(text string) (string, error) {
	const want = "want host:port, http://host:port or https://host:port"
	u, err := url.Parse(text)
	if err != nil || u.Host == "" { // "localhost:4317" has the scheme "localhost"
		u = &url.URL{Scheme: "http", Host: text}
	}
	host, port, err := net.SplitHostPort(u.Host)
	if err != nil {
		return "", fmt.Errorf("%w, %s", err, want)
	}
	n, err := strconv.Atoi(port)
	switch {
	case err != nil || n < 1 || n > 65535:
		return "", fmt.Errorf("port %q, want 1 to 65535", port)
	case host == "":
		return "", fmt.Errorf("no host, %s", want)
	case u.Scheme != "http" && u.Scheme != "https":
		return "", fmt.Errorf("scheme %q, %s", u.Scheme, want)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Path != "" && u.Path != "/":
		return "", fmt.Errorf("more than a host and a port, %s", want)
	}
	return u.Scheme + "://" + net.JoinHostPort(host, port), nil
}

// Start begins to serve the metrics, if they are to be scraped. No receiver is needed yet.
func Start(cfg Config) *Observer {
	o := &Observer{cfg: cfg, registry: prometheus.NewRegistry(), serving: make(chan struct{})}
	if cfg.Scrape == nil {
		close(o.serving)
		return o
	}
	mux := http.NewServeMux()
	// OpenMetrics has exemplars: the trace of a request in each bucket.
	mux.Handle("GET /metrics", promhttp.HandlerFor(o.registry, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	o.server = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		defer close(o.serving)
		_ = o.server.Serve(cfg.Scrape) // until Close; it has no other end that a caller could mend
	}()
	return o
}

// Close sends what has not been sent, waiting for at most three seconds, and ends what
// Start and Policy began. It may be called twice.
func (o *Observer) Close() {
	o.close.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		var all sync.WaitGroup
		for _, p := range o.policies {
			all.Go(func() { p.shutdown(ctx) })
		}
		all.Wait()
		if o.server != nil {
			if o.server.Shutdown(ctx) != nil { // a scrape is under way
				o.server.Close()
			}
		}
		<-o.serving
		var lost, begun int64
		for _, p := range o.policies {
			begun += p.begun.Load()
			lost += p.begun.Load() - p.delivered.Load()
		}
		if lost > 0 {
			o.failed(fmt.Errorf("%d of %d traces were dropped", lost, begun))
		}
	})
}

// failed tells, the first time, that something was not delivered.
func (o *Observer) failed(err error) {
	o.tell.Do(func() {
		if o.cfg.Tell != nil {
			o.cfg.Tell(fmt.Sprintf("%s: %v; the figures of the report do not depend on it", o.cfg.OTLP, err))
		}
	})
}

// Policy is what observes one policy.
type Policy struct {
	observer *Observer
	tracers  *sdktrace.TracerProvider // nil: nothing is traced
	meters   *sdkmetric.MeterProvider
	tracer   trace.Tracer
	duration metric.Float64Histogram
	delivery // of its traces
}

// Policy begins to observe a policy, under its name. Call it for one after the other, before
// anything is measured.
func (o *Observer) Policy(name string) (*Policy, error) {
	p := &Policy{observer: o}
	// Beside what the environment says of this process (OTEL_RESOURCE_ATTRIBUTES).
	res, err := resource.Merge(resource.Default(), resource.NewSchemaless(
		semconv.ServiceName(service), attrPolicy.String(name)))
	if err != nil {
		return nil, err
	}
	meters := []sdkmetric.Option{sdkmetric.WithResource(res)}
	if o.cfg.Scrape != nil {
		scraped, err := otelprometheus.New(otelprometheus.WithRegisterer(o.registry),
			otelprometheus.WithResourceAsConstantLabels(attribute.NewAllowKeysFilter(attrPolicy)))
		if err != nil {
			return nil, err
		}
		meters = append(meters, sdkmetric.WithReader(scraped))
	}
	if o.cfg.OTLP != "" {
		spans, metrics, err := o.exporters()
		if err != nil {
			return nil, err
		}
		p.tracers = sdktrace.NewTracerProvider(sdktrace.WithResource(res),
			sdktrace.WithSampler(sdktrace.ParentBased(sampler{o.cfg.Ratio})),
			// It never blocks who ends a span: what it has no room for is dropped.
			sdktrace.WithBatcher(spanExporter{spans, p}, sdktrace.WithExportTimeout(exportTimeout)))
		p.tracer = p.tracers.Tracer(scope)
		meters = append(meters, sdkmetric.WithReader(sdkmetric.NewPeriodicReader(metricExporter{metrics, o},
			sdkmetric.WithInterval(metricsEvery), sdkmetric.WithTimeout(exportTimeout))))
	}
	p.meters = sdkmetric.NewMeterProvider(meters...)
	o.policies = append(o.policies, p) // from here on Close ends it
	p.duration, err = p.meters.Meter(scope).Float64Histogram(metricDuration, metric.WithUnit("s"),
		metric.WithDescription("Time from when a request was meant to start to its end, all its leaf calls together; the warm-up is in it."),
		metric.WithExplicitBucketBoundaries(buckets()...))
	return p, err
}

// exporters connects to the receiver, when there is something to send. What the environment
// says of headers and certificates (OTEL_EXPORTER_OTLP_...) holds.
func (o *Observer) exporters() (sdktrace.SpanExporter, sdkmetric.Exporter, error) {
	ctx := context.Background() // nothing is waited for
	// No retries: what waits for them holds memory, and their work would be done while
	// the policies are measured.
	spans, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpointURL(o.cfg.OTLP),
		otlptracegrpc.WithTimeout(exportTimeout), otlptracegrpc.WithRetry(otlptracegrpc.RetryConfig{}))
	if err != nil {
		return nil, nil, err
	}
	metrics, err := otlpmetricgrpc.New(ctx, otlpmetricgrpc.WithEndpointURL(o.cfg.OTLP),
		otlpmetricgrpc.WithTimeout(exportTimeout), otlpmetricgrpc.WithRetry(otlpmetricgrpc.RetryConfig{}))
	if err != nil {
		_ = spans.Shutdown(ctx) // which has done nothing yet
		return nil, nil, err
	}
	return spans, metrics, nil
}

// buckets are those of the library's latencies, so that the two can be compared.
func buckets() []float64 {
	all := telemetry.Instruments()
	i := slices.IndexFunc(all, func(i telemetry.Instrument) bool { return i.Name == "bobtail.client.call.duration" })
	return all[i].Buckets
}

// Options have bobtail's client of the policy told.
func (p *Policy) Options() []bobtail.Option {
	opts := []bobtail.Option{bobtail.WithMeterProvider(p.meters)}
	if p.tracers != nil {
		opts = append(opts, bobtail.WithTracerProvider(p.tracers))
	}
	return opts
}

// DialOptions have the spans of requests say where each went, if there is no client of
// bobtail's that has a span for each attempt.
func (p *Policy) DialOptions() []grpc.DialOption {
	if p.tracers == nil {
		return nil
	}
	return []grpc.DialOption{grpc.WithStatsHandler(sent{})}
}

// Slowest returns, after Close, the slowest requests that the report has, of those whose
// traces the receiver has taken.
func (p *Policy) Slowest() []report.Traced {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.slowest.List()
}

// shutdown sends what is left. Errors have been told by the exporters, or say that the
// time was up: then traces are missing, which is told.
func (p *Policy) shutdown(ctx context.Context) {
	if p.tracers != nil {
		_ = p.tracers.Shutdown(ctx)
	}
	_ = p.meters.Shutdown(ctx)
}
