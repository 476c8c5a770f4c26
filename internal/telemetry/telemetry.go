// Package telemetry tells OpenTelemetry what a client and a server do. It is the only
// importer of OpenTelemetry in the library, and of its API only.
//
// A client's call has one span, of kind client; each of its attempts has a child, under
// which the spans of otelgrpc nest, if it is installed. What was not done, and why, is an
// event of the call's span. A server makes no spans: what it decides is told as attributes of
// the span that others have made for the call. names.go has every name.
//
// A call that nobody looks at costs next to nothing: no span is started while no tracer
// provider is installed, attribute sets are made once, and a call whose span is not recorded
// has no spans for its attempts.
package telemetry

import (
	"context"
	"errors"
	"net"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/codes"
)

// The providers, so that nobody else need import OpenTelemetry.
type (
	TracerProvider = trace.TracerProvider
	MeterProvider  = metric.MeterProvider
)

// MaxMethods bounds how many methods, of all targets together, have series of their own.
// Those beyond share the series of method and target "other".
const MaxMethods = 1000

// Telemetry is where the calls of a client are told. It is safe for concurrent use.
type Telemetry struct {
	tracer trace.Tracer
	meter  metric.Meter
	// placeholder is what stands for the global tracer provider until one is installed, if
	// the tracer came from it; else nil.
	placeholder trace.TracerProvider

	retries, hedges                    metric.Int64Histogram
	retryDelay, duration               metric.Float64Histogram
	attempts                           metric.Int64Counter
	hedgesSuppressed, retriesStopped   metric.Int64Counter
	refusals, transitions, rotation    metric.Int64Counter
	endpointAttempts                   metric.Int64Counter // nil: not asked for
	budget, delay, breaker, throttling metric.Float64ObservableGauge
	p99                                metric.Float64ObservableGauge

	endpoints bounded[endpointKey, *endpoint]

	mu      sync.Mutex // guards methods
	methods map[methodKey]*Method
	shared  *Method // of those beyond the bound
}

type methodKey struct{ target, method string }

// New returns a Telemetry that tells the given providers; nil is the global one. byEndpoint
// counts attempts by endpoint as well. An error says which instruments the meter provider has
// not made: they record nothing.
func New(tracers TracerProvider, meters MeterProvider, byEndpoint bool) (*Telemetry, error) {
	t := &Telemetry{methods: map[methodKey]*Method{}}
	if tracers == nil {
		tracers = otel.GetTracerProvider()
	}
	if isPlaceholder(tracers) {
		t.placeholder = tracers
	}
	if meters == nil {
		meters = otel.GetMeterProvider()
	}
	t.tracer = tracers.Tracer(Scope, trace.WithSchemaURL(semconv.SchemaURL))
	t.meter = meters.Meter(Scope, metric.WithSchemaURL(semconv.SchemaURL))
	m := maker{meter: t.meter}
	t.instruments(&m, byEndpoint)
	err := errors.Join(m.errs...)
	t.shared = t.newMethod(other, "", false)
	return t, err
}

// isPlaceholder reports whether p stands for a provider that nobody has installed yet. The
// API does not tell. Should it move the type, a call that nobody looks at costs the three
// allocations of a span that is not recorded, and no more.
func isPlaceholder(p trace.TracerProvider) bool {
	t := reflect.TypeOf(p)
	return t.Kind() == reflect.Pointer && t.Elem().PkgPath() == "go.opentelemetry.io/otel/internal/global"
}

// tracing reports whether a span would be anybody's. The global provider is compared with
// its placeholder, a pointer, and so comparable.
func (t *Telemetry) tracing() bool {
	return t.placeholder == nil || otel.GetTracerProvider() != t.placeholder
}

// metering reports whether anybody takes what every call records.
func (t *Telemetry) metering(ctx context.Context) bool {
	return t.duration.Enabled(ctx) || t.attempts.Enabled(ctx) || t.hedges.Enabled(ctx) || t.retries.Enabled(ctx)
}

func (t *Telemetry) instruments(m *maker, byEndpoint bool) {
	t.retries, t.hedges = m.counts(metricRetries), m.counts(metricHedges)
	t.retryDelay, t.duration = m.times(metricRetryDelay), m.times(metricDuration)
	t.attempts = m.counter(metricAttempts)
	t.hedgesSuppressed, t.retriesStopped = m.counter(metricHedgesSuppressed), m.counter(metricRetriesSuppressed)
	t.refusals, t.transitions, t.rotation = m.counter(metricRefusals), m.counter(metricTransitions), m.counter(metricRotation)
	if byEndpoint {
		t.endpointAttempts = m.counter(metricEndpoints)
	}
	t.budget, t.delay, t.p99 = m.gauge(metricBudget), m.gauge(metricDelay), m.gauge(metricP99)
	t.breaker, t.throttling = m.gauge(metricBreaker), m.gauge(metricThrottle)
}

// maker makes instruments, and keeps what went wrong.
type maker struct {
	meter metric.Meter
	errs  []error
}

func (m *maker) counts(i Instrument) metric.Int64Histogram {
	h, err := m.meter.Int64Histogram(i.Name, metric.WithUnit(i.Unit), metric.WithDescription(i.Meaning), metric.WithExplicitBucketBoundaries(i.Buckets...))
	m.errs = append(m.errs, err)
	return h
}

func (m *maker) times(i Instrument) metric.Float64Histogram {
	h, err := m.meter.Float64Histogram(i.Name, metric.WithUnit(i.Unit), metric.WithDescription(i.Meaning), metric.WithExplicitBucketBoundaries(i.Buckets...))
	m.errs = append(m.errs, err)
	return h
}

func (m *maker) counter(i Instrument) metric.Int64Counter {
	c, err := m.meter.Int64Counter(i.Name, metric.WithUnit(i.Unit), metric.WithDescription(i.Meaning))
	m.errs = append(m.errs, err)
	return c
}

func (m *maker) gauge(i Instrument) metric.Float64ObservableGauge {
	g, err := m.meter.Float64ObservableGauge(i.Name, metric.WithUnit(i.Unit), metric.WithDescription(i.Meaning))
	m.errs = append(m.errs, err)
	return g
}

// Method is one method of one target, with its attributes prepared. A nil Method tells
// nobody anything.
type Method struct {
	t    *Telemetry
	own  bool   // it has series of its own, so its gauges are its own
	name string // of its spans

	target string
	// labels are grpc.method and grpc.target; base is a set of them.
	labels []attribute.KeyValue
	base   *set
	start  []trace.SpanStartOption

	// The sets that calls need, made when first needed. Atomics because every call reads
	// them; two that make one at once make the same.
	status   [len(statusNames)]atomic.Pointer[set]
	attempts [kinds][outcomes]atomic.Pointer[set]
}

// set is a set of attributes, ready to be handed to an instrument without an allocation.
type set struct {
	record []metric.RecordOption
	add    []metric.AddOption
}

func newSet(kvs ...attribute.KeyValue) *set {
	o := metric.WithAttributeSet(attribute.NewSet(kvs...))
	return &set{record: []metric.RecordOption{o}, add: []metric.AddOption{o}}
}

// Method returns what tells of the calls of a method, given as "/service/method", of a
// target. One that is not recognized, because nobody but its caller has named it, shares the
// series of method "other", as gRFC A66 has it: names of no service must not make series.
func (t *Telemetry) Method(target, method string, recognized bool) *Method {
	if t == nil {
		return nil
	}
	key := methodKey{target, strings.TrimPrefix(method, "/")}
	if !recognized {
		key.method = "" // no method is called that
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	m := t.methods[key]
	if m == nil {
		if len(t.methods) >= MaxMethods {
			return t.shared
		}
		m = t.newMethod(target, key.method, recognized)
		t.methods[key] = m
	}
	return m
}

func (t *Telemetry) newMethod(target, method string, recognized bool) *Method {
	label, span, name := method, method, method
	if !recognized {
		label, span, name = other, methodOther, semconv.RPCSystemNameGRPC.Value.AsString()
	}
	m := &Method{t: t, own: recognized, name: name, target: target}
	m.labels = []attribute.KeyValue{attribute.String(labelMethod, label), attribute.String(labelTarget, target)}
	m.base = newSet(m.labels...)
	attrs := []attribute.KeyValue{semconv.RPCSystemNameGRPC, semconv.RPCMethod(span)}
	if target != other {
		address, port := server(target)
		attrs = append(attrs, semconv.ServerAddress(address))
		if port > 0 {
			attrs = append(attrs, semconv.ServerPort(port))
		}
	}
	m.start = []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(attrs...)}
	return m
}

// server returns the address and port of a target, which is a URI whose path, after
// "scheme://authority/", is the endpoint, or the endpoint alone.
func server(target string) (address string, port int) {
	if scheme, rest, ok := strings.Cut(target, "://"); ok {
		if _, target, ok = strings.Cut(rest, "/"); !ok {
			target = rest
		}
		if scheme == "unix" {
			target = "/" + target
		}
	} else if scheme, rest, ok := strings.Cut(target, ":"); ok && (scheme == "unix" || scheme == "dns" || scheme == "passthrough") {
		target = rest
	}
	host, p, err := net.SplitHostPort(target)
	if err != nil {
		return target, 0
	}
	if port, err = strconv.Atoi(p); err != nil {
		return target, 0
	}
	return host, port
}

func (m *Method) with(kvs ...attribute.KeyValue) *set {
	return newSet(append(m.labels[:len(m.labels):len(m.labels)], kvs...)...)
}

// BreakerChanged tells that the method's circuit breaker is in another state.
func (m *Method) BreakerChanged(ctx context.Context, state, reason string) {
	if m == nil || !m.t.transitions.Enabled(ctx) {
		return
	}
	m.t.transitions.Add(ctx, 1, m.with(attribute.String(labelState, state), attribute.String(labelReason, reason)).add...)
}

// RotationChanged tells that a balancer of the target has ejected or readmitted an endpoint.
func (t *Telemetry) RotationChanged(ctx context.Context, target, event, reason string) {
	if t == nil || !t.rotation.Enabled(ctx) {
		return
	}
	t.rotation.Add(ctx, 1, newSet(attribute.String(labelTarget, target), attribute.String(labelEvent, event),
		attribute.String(labelReason, reason)).add...)
}

// Gauges takes what is in force at the moment of a collection.
type Gauges struct {
	t *Telemetry
	o metric.Observer
}

// Watch has collect called at each collection of metrics, with owner, for as long as
// anything else holds on to owner: being watched keeps nothing alive.
func Watch[T any](t *Telemetry, owner *T, collect func(*T, Gauges)) error {
	return watch(t.meter, owner, func(owner *T, o metric.Observer) { collect(owner, Gauges{t, o}) },
		t.budget, t.delay, t.p99, t.breaker, t.throttling)
}

func watch[T any](meter metric.Meter, owner *T, collect func(*T, metric.Observer), gauges ...metric.Observable) error {
	held := weak.Make(owner)
	reg, err := meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		if owner := held.Value(); owner != nil {
			collect(owner, o)
		}
		return nil
	}, gauges...)
	if err != nil {
		return err
	}
	runtime.AddCleanup(owner, func(reg metric.Registration) {
		_ = reg.Unregister() // nobody is left to be told
	}, reg)
	return nil
}

// Budget tells how many extra attempts a target could have now.
func (g Gauges) Budget(target string, balance float64) {
	g.o.ObserveFloat64(g.t.budget, balance, metric.WithAttributes(attribute.String(labelTarget, target)))
}

// HedgingDelay tells the hedging delay in force.
func (g Gauges) HedgingDelay(m *Method, d time.Duration) { g.observe(g.t.delay, m, d.Seconds()) }

// HedgingP99 tells the 99th percentile without hedging, and the estimate of that with it.
func (g Gauges) HedgingP99(m *Method, unhedged, hedged time.Duration) {
	g.observe(g.t.p99, m, unhedged.Seconds(), attribute.Bool(labelHedged, false))
	g.observe(g.t.p99, m, hedged.Seconds(), attribute.Bool(labelHedged, true))
}

// Breaker tells the state of a circuit breaker: 0 is closed, 1 half-open, 2 open.
func (g Gauges) Breaker(m *Method, state int) { g.observe(g.t.breaker, m, float64(state)) }

// Throttle tells the probability with which calls are refused.
func (g Gauges) Throttle(m *Method, p float64) { g.observe(g.t.throttling, m, p) }

// observe leaves out methods that share a series: whichever came last would stand for all.
func (g Gauges) observe(gauge metric.Float64Observable, m *Method, v float64, more ...attribute.KeyValue) {
	if m != nil && m.own {
		g.o.ObserveFloat64(gauge, v, metric.WithAttributes(append(m.labels[:len(m.labels):len(m.labels)], more...)...))
	}
}

func (m *Method) statusSet(c codes.Code) *set {
	p := &m.status[c]
	s := p.Load()
	if s == nil {
		s = m.with(attribute.String(labelStatus, statusNames[c]))
		p.Store(s)
	}
	return s
}

func (m *Method) attemptSet(k Kind, o Outcome) *set {
	p := &m.attempts[k][o]
	s := p.Load()
	if s == nil {
		s = m.with(attribute.String(labelKind, kindNames[k]), attribute.String(labelOutcome, outcomeNames[o]))
		p.Store(s)
	}
	return s
}
