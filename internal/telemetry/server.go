package telemetry

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/codes"
)

// Server is where the calls of a server are told. It makes no spans: where it finds one in
// the context of a call, it adds attributes. It is safe for concurrent use. A nil Server
// tells nobody anything.
type Server struct {
	meter metric.Meter

	duration, wait                   metric.Float64Histogram
	refusals, overloads              metric.Int64Counter
	limit, inFlight, queued, tenants metric.Float64ObservableGauge

	methods bounded[string, *ServerMethod]
	waits   [len(criticalityNames)]*set
}

// NewServer returns a Server that tells the given provider; nil is the global one. An error
// says which instruments it has not made: they record nothing.
func NewServer(meters MeterProvider) (*Server, error) {
	if meters == nil {
		meters = otel.GetMeterProvider()
	}
	s := &Server{meter: meters.Meter(Scope, metric.WithSchemaURL(semconv.SchemaURL))}
	m := maker{meter: s.meter}
	s.duration, s.wait = m.times(metricServed), m.times(metricQueueWait)
	s.refusals, s.overloads = m.counter(metricServerRefusals), m.counter(metricOverloads)
	s.limit, s.inFlight = m.gauge(metricLimit), m.gauge(metricInFlight)
	s.queued, s.tenants = m.gauge(metricQueueLength), m.gauge(metricTenants)
	for i, name := range criticalityNames {
		s.waits[i] = newSet(attribute.String(labelCriticality, name))
	}
	return s, errors.Join(m.errs...)
}

// Measured reports whether anybody takes the durations of calls.
func (s *Server) Measured(ctx context.Context) bool { return s != nil && s.duration.Enabled(ctx) }

// ServerMethod is one method of a server, with its attributes prepared.
type ServerMethod struct {
	s     *Server
	label attribute.KeyValue

	// As those of a [Method].
	status   [len(statusNames)]atomic.Pointer[set]
	refusals [len(admissionReasons) + 1][len(criticalityNames)][2]atomic.Pointer[set] // the last reason is "other"
}

// Known returns what tells of the calls of a method, given as "/service/method", if it has
// series of its own already, else nil.
func (s *Server) Known(method string) *ServerMethod {
	m, _ := s.methods.known(strings.TrimPrefix(method, "/"))
	return m
}

// Method returns what tells of the calls of a method, given as "/service/method". One that is
// not recognized, because nobody but its caller has named it, shares the series of method
// "other", and so do those beyond [MaxMethods].
func (s *Server) Method(method string, recognized bool) *ServerMethod {
	name := strings.TrimPrefix(method, "/")
	if !recognized {
		name = other
	}
	if m, ok := s.methods.known(name); ok {
		return m
	}
	return s.methods.learn(name, other, MaxMethods, func(name string) *ServerMethod {
		return &ServerMethod{s: s, label: attribute.String(labelMethod, name)}
	})
}

// Served tells that the handler of a call has ended, so long after the call had arrived.
func (m *ServerMethod) Served(ctx context.Context, took time.Duration, code codes.Code) {
	code = known(code)
	p := &m.status[code]
	set := p.Load()
	if set == nil {
		set = newSet(m.label, attribute.String(labelStatus, statusNames[code]))
		p.Store(set)
	}
	m.s.duration.Record(ctx, took.Seconds(), set.record...)
}

// Admission is what became of a call at the door of a server.
type Admission struct {
	Criticality string        // as it travels in the metadata
	Reason      string        // of the refusal; "": it was admitted
	Wait        time.Duration // 0: it did not wait
	Shadow      bool          // not obeyed
}

// Counting reports whether anybody takes the refusals, which is when Decided has use for a
// method.
func (s *Server) Counting(ctx context.Context) bool { return s.refusals.Enabled(ctx) }

// Decided tells what became of a call. The method is that of a call which was refused, and may
// be nil if nobody is Counting.
func (s *Server) Decided(ctx context.Context, m *ServerMethod, a Admission) {
	class := max(slices.Index(criticalityNames[:], a.Criticality), 0)
	if a.Wait > 0 {
		s.wait.Record(ctx, a.Wait.Seconds(), s.waits[class].record...)
	}
	if a.Reason != "" && m != nil {
		s.refusals.Add(ctx, 1, m.refusalSet(a.Reason, class, a.Shadow).add...)
	}
	if span := trace.SpanFromContext(ctx); span.IsRecording() {
		annotate(span, a)
	}
}

func annotate(span trace.Span, a Admission) {
	became := "admitted"
	if a.Reason != "" && !a.Shadow {
		became = "refused"
	}
	span.SetAttributes(attribute.String(attrCriticality, a.Criticality), attribute.String(attrAdmission, became),
		attribute.Bool(attrShadow, a.Shadow))
	if a.Reason != "" {
		span.SetAttributes(attribute.String(attrReason, a.Reason))
	}
	if a.Wait > 0 {
		span.SetAttributes(attribute.Float64(attrQueueWait, a.Wait.Seconds()))
	}
}

func (m *ServerMethod) refusalSet(reason string, class int, shadow bool) *set {
	why := slices.Index(admissionReasons[:], reason)
	if why < 0 {
		why, reason = len(admissionReasons), other
	}
	p := &m.refusals[why][class][0]
	if shadow {
		p = &m.refusals[why][class][1]
	}
	s := p.Load()
	if s == nil {
		s = newSet(m.label, attribute.String(labelReason, reason),
			attribute.String(labelCriticality, criticalityNames[class]), attribute.Bool(labelShadow, shadow))
		p.Store(s)
	}
	return s
}

// OverloadChanged tells that an overload has begun or ended.
func (s *Server) OverloadChanged(ctx context.Context, began bool) {
	if s == nil || !s.overloads.Enabled(ctx) {
		return
	}
	state := "ended"
	if began {
		state = "began"
	}
	s.overloads.Add(ctx, 1, newSet(attribute.String(labelState, state)).add...)
}

// ServerGauges takes the state of a server at the moment of a collection.
type ServerGauges struct {
	s *Server
	o metric.Observer
}

// WatchServer is [Watch] for a server.
func WatchServer[T any](s *Server, owner *T, collect func(*T, ServerGauges)) error {
	return watch(s.meter, owner, func(owner *T, o metric.Observer) { collect(owner, ServerGauges{s, o}) },
		s.limit, s.inFlight, s.queued, s.tenants)
}

// Admission tells how many calls may run, run and wait.
func (g ServerGauges) Admission(limit, inFlight, queued int) {
	g.o.ObserveFloat64(g.s.limit, float64(limit))
	g.o.ObserveFloat64(g.s.inFlight, float64(inFlight))
	g.o.ObserveFloat64(g.s.queued, float64(queued))
}

// Tenants tells how many tenants are remembered.
func (g ServerGauges) Tenants(n int) { g.o.ObserveFloat64(g.s.tenants, float64(n)) }
