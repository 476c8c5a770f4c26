package observe

import (
	"context"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/bench/experiment"
	"github.com/bobtail-rpc/bobtail/bench/report"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseEndpoint(t *testing.T) {
	for text, want := range map[string]string{
		"localhost:4317":              "http://localhost:4317",
		"[::1]:4317":                  "http://[::1]:4317",
		"127.0.0.1:4317":              "http://127.0.0.1:4317",
		"http://collector:4317":       "http://collector:4317",
		"https://collector.example:1": "https://collector.example:1",
		"http://collector:4317/":      "http://collector:4317",
	} {
		if got, err := ParseEndpoint(text); got != want || err != nil {
			t.Errorf("%q: %q, %v, want %q", text, got, err, want)
		}
	}
	for text, want := range map[string]string{
		"":                         "missing port",
		"localhost":                "missing port",
		":4317":                    "no host",
		"localhost:":               `port "", want 1 to 65535`,
		"localhost:http":           `port "http", want 1 to 65535`,
		"localhost:0":              `port "0", want 1 to 65535`,
		"localhost:65536":          `port "65536", want 1 to 65535`,
		"::1:4317":                 "too many colons",
		"https://collector":        "missing port",
		"grpc://collector:4317":    `scheme "grpc"`,
		"http://c:4317/v1/traces":  "more than a host and a port",
		"http://me:pw@c:4317":      "more than a host and a port",
		"http://c:4317?timeout=1s": "more than a host and a port",
	} {
		if got, err := ParseEndpoint(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %q, %v, want %q", text, got, err, want)
		}
	}
}

// The ratio holds, whatever the numbers have in common, and what is traced at a lower ratio is
// traced at a higher one.
func TestShare(t *testing.T) {
	for _, stride := range []uint64{1, 2, 100, 1 << 32} {
		for _, ratio := range []float64{0.01, 0.1, 0.5, 1} {
			const n = 100_000
			hits := 0
			for i := range uint64(n) {
				if share(i*stride) < ratio {
					hits++
				}
			}
			// Five standard deviations of a draw.
			if got, bound := float64(hits)/n, 5*math.Sqrt(ratio*(1-ratio)/n); math.Abs(got-ratio) > bound {
				t.Errorf("every %d. request: %.4f traced, want %v within %.4f", stride, got, ratio, bound)
			}
		}
	}
}

// recorded is a policy whose spans and metrics stay here.
func recorded(ratio float64, exporter sdktrace.SpanExporter, tell func(string)) (*Policy, *metric.ManualReader) {
	p := &Policy{observer: &Observer{cfg: Config{OTLP: "http://here:1", Tell: tell}}}
	p.tracers = sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.ParentBased(sampler{ratio})), sdktrace.WithSyncer(spanExporter{exporter, p}))
	p.tracer = p.tracers.Tracer(scope)
	reader := metric.NewManualReader()
	p.meters = metric.NewMeterProvider(metric.WithReader(reader))
	p.duration, _ = p.meters.Meter(scope).Float64Histogram(metricDuration)
	return p, reader
}

// A request's span begins when it was meant to start, and what the report names are the
// slowest of those that it has.
func TestRequests(t *testing.T) {
	spans := tracetest.NewInMemoryExporter()
	p, reader := recorded(1, spans, nil)
	now := time.Now()
	for i, r := range []struct {
		late   time.Duration
		err    error
		warmup bool
	}{
		{late: 2 * time.Second},
		{late: 9 * time.Second, warmup: true},
		{late: 8 * time.Second, err: experiment.ErrAbandoned},
		{late: 5 * time.Second, err: status.Error(codes.DeadlineExceeded, "too late")},
		{late: 1 * time.Second, err: status.Error(12345, "made up")},
		{late: 1500 * time.Millisecond, err: errors.New("no status")},
	} {
		ctx, end := p.Begin(context.Background(), experiment.Request{ID: uint64(i), Intended: now.Add(-r.late), At: time.Duration(i) * time.Second, Warmup: r.warmup})
		_, child := p.tracers.Tracer("other").Start(ctx, "call")
		child.End()
		end(r.err)
	}
	if n := len(spans.GetSpans()); n != 12 {
		t.Errorf("%d spans, want 12", n)
	}
	var got []report.Traced
	for _, s := range p.Slowest() {
		if len(s.TraceID) != 32 || s.Ms < 1000*math.Floor(s.Ms/1000) || s.Ms > 6000 {
			t.Errorf("%+v", s)
		}
		got = append(got, report.Traced{Request: s.Request, T: s.T, Error: s.Error})
	}
	want := []report.Traced{{Request: 3, T: 3, Error: "DEADLINE_EXCEEDED"}, {Request: 0}, {Request: 5, T: 5, Error: "UNKNOWN"}, {Request: 4, T: 4, Error: "UNKNOWN"}}
	if len(got) != len(want) {
		t.Fatalf("%+v, want %+v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("place %d: %+v, want %+v", i, got[i], want[i])
		}
	}
	for _, s := range spans.GetSpans() {
		if s.Name == spanRequest && s.StartTime.After(now.Add(-time.Second)) {
			t.Errorf("span from %v, want its intended start", s.StartTime)
		}
	}
	var rm metricdata.ResourceMetrics
	if err := reader.Collect(context.Background(), &rm); err != nil {
		t.Fatal(err)
	}
	h := rm.ScopeMetrics[0].Metrics[0].Data.(metricdata.Histogram[float64])
	if len(h.DataPoints) != 3 { // OK, DEADLINE_EXCEEDED, UNKNOWN
		t.Errorf("%d series, want 3: %+v", len(h.DataPoints), h.DataPoints)
	}
}

// What is not sampled has no spans, of the request nor below it.
func TestNotSampled(t *testing.T) {
	spans := tracetest.NewInMemoryExporter()
	p, _ := recorded(1e-18, spans, nil)
	ctx, end := p.Begin(context.Background(), experiment.Request{ID: 1, Intended: time.Now()})
	for _, ctx := range []context.Context{ctx, context.Background()} { // a root that is no request
		_, span := p.tracers.Tracer("other").Start(ctx, "call")
		span.End()
	}
	end(nil)
	if n := len(spans.GetSpans()); n != 0 || p.begun.Load() != 0 || len(p.Slowest()) != 0 {
		t.Errorf("%d spans, want none", n)
	}
}

// A trace that was not taken is not in the report, and that is told once.
func TestNotDelivered(t *testing.T) {
	var told []string
	p, _ := recorded(1, refusing{}, func(what string) { told = append(told, what) })
	p.observer.policies = append(p.observer.policies, p)
	p.observer.serving = make(chan struct{})
	close(p.observer.serving)
	for i := range 3 {
		_, end := p.Begin(context.Background(), experiment.Request{ID: uint64(i), Intended: time.Now()})
		end(nil)
	}
	p.observer.Close()
	p.observer.Close()
	if len(told) != 1 || !strings.Contains(told[0], "http://here:1: refused") || len(p.Slowest()) != 0 {
		t.Errorf("told %q, slowest %v, want one line and nothing", told, p.Slowest())
	}
}

type refusing struct{}

func (refusing) ExportSpans(context.Context, []sdktrace.ReadOnlySpan) error {
	return errors.New("refused")
}

func (refusing) Shutdown(context.Context) error { return nil }

// Traces that the SDK had no room for are told as well.
func TestDropped(t *testing.T) {
	var told []string
	p, _ := recorded(1, tracetest.NewInMemoryExporter(), func(what string) { told = append(told, what) })
	p.observer.policies = append(p.observer.policies, p)
	p.observer.serving = make(chan struct{})
	close(p.observer.serving)
	for i := range 3 {
		_, end := p.Begin(context.Background(), experiment.Request{ID: uint64(i), Intended: time.Now()})
		if i > 0 {
			end(nil)
		}
	}
	p.observer.Close()
	if len(told) != 1 || !strings.Contains(told[0], "1 of 3 traces were dropped") {
		t.Errorf("told %q", told)
	}
}

// What telling of a request costs beside the policy's own spans and metrics.
func BenchmarkRequest(b *testing.B) {
	for name, ratio := range map[string]float64{"not traced": 1e-18, "traced": 1} {
		b.Run(name, func(b *testing.B) {
			p, _ := recorded(ratio, tracetest.NewNoopExporter(), nil)
			intended := time.Now()
			b.ReportAllocs()
			for i := range b.N {
				_, end := p.Begin(b.Context(), experiment.Request{ID: uint64(i), Intended: intended})
				end(nil)
			}
		})
	}
	b.Run("metrics alone", func(b *testing.B) {
		p, _ := recorded(1, tracetest.NewNoopExporter(), nil)
		p.tracer = nil
		intended := time.Now()
		b.ReportAllocs()
		for i := range b.N {
			_, end := p.Begin(b.Context(), experiment.Request{ID: uint64(i), Intended: intended})
			end(nil)
		}
	})
}
