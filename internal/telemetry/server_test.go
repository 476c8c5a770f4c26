package telemetry

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc/codes"
)

// Every instrument of a server is listed as it is, and the other way round.
func TestServerInstruments(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	s, err := NewServer(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, m := context.Background(), s.Method("/kv.KV/Get", true)
	if !s.Measured(ctx) || !s.Counting(ctx) {
		t.Fatal("nobody looks")
	}
	m.Served(ctx, time.Second, codes.OK)
	s.Decided(ctx, m, Admission{Criticality: "critical", Reason: "QUEUE_TIMEOUT", Wait: time.Second})
	s.OverloadChanged(ctx, true)
	owner := new(int)
	if err := WatchServer(s, owner, func(_ *int, g ServerGauges) { g.Admission(3, 2, 1); g.Tenants(4) }); err != nil {
		t.Fatal(err)
	}
	got := describe(t, reader)
	runtime.KeepAlive(owner)
	compare(t, got, ServerInstruments())
	var none *Server
	if none.Measured(ctx) {
		t.Error("no telemetry measures a call")
	}
	none.OverloadChanged(ctx, true)
}

// Whatever the words, a refusal has one of the series that are listed.
func TestServerRefusalSets(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	s, err := NewServer(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)))
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	for i := range 100 {
		m := s.Method(fmt.Sprintf("/evil/%d", i), false)
		s.Decided(ctx, m, Admission{Criticality: fmt.Sprint("evil", i), Reason: fmt.Sprint("EVIL", i)})
		for _, reason := range admissionReasons {
			for _, class := range criticalityNames {
				for _, shadow := range []bool{false, true} {
					s.Decided(ctx, m, Admission{Criticality: class, Reason: reason, Shadow: shadow})
				}
			}
		}
	}
	for _, m := range collect(t, reader) {
		d, ok := m.Data.(metricdata.Sum[int64])
		if want := 1 + len(admissionReasons)*len(criticalityNames)*2; !ok || m.Name != metricServerRefusals.Name || len(d.DataPoints) != want {
			t.Fatalf("%s has %d points, want %d", m.Name, len(d.DataPoints), want)
		}
		for _, p := range d.DataPoints {
			if v, _ := p.Attributes.Value(labelMethod); v.AsString() != other || p.Value != 100 {
				t.Errorf("%v counts %d, want 100 of method other", p.Attributes.ToSlice(), p.Value)
			}
		}
	}
}

// A span that is there and recorded is annotated; none is made.
func TestServerSpan(t *testing.T) {
	spans := tracetest.NewInMemoryExporter()
	tracer := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans)).Tracer("")
	s, err := NewServer(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		a    Admission
		want string
	}{
		{Admission{Criticality: "critical"}, "bobtail.admission=admitted bobtail.criticality=critical bobtail.shadow=false "},
		{Admission{Criticality: "sheddable", Wait: 5 * time.Millisecond},
			"bobtail.admission=admitted bobtail.criticality=sheddable bobtail.queue.wait=0.005 bobtail.shadow=false "},
		{Admission{Criticality: "critical", Reason: "QUEUE_TIMEOUT", Wait: 100 * time.Millisecond},
			"bobtail.admission=refused bobtail.criticality=critical bobtail.queue.wait=0.1 bobtail.reason=QUEUE_TIMEOUT bobtail.shadow=false "},
		{Admission{Criticality: "critical", Reason: "OVERLOADED", Shadow: true},
			"bobtail.admission=admitted bobtail.criticality=critical bobtail.reason=OVERLOADED bobtail.shadow=true "},
	} {
		ctx, span := tracer.Start(context.Background(), "of others")
		s.Decided(ctx, nil, tc.a)
		span.End()
		all := spans.GetSpans()
		if len(all) != 1 {
			t.Fatalf("%d spans, want that of others", len(all))
		}
		var got string
		set := attribute.NewSet(all[0].Attributes...)
		for _, kv := range set.ToSlice() {
			got += fmt.Sprintf("%s=%s ", kv.Key, kv.Value.String())
		}
		if got != tc.want {
			t.Errorf("%+v: %s\nwant %s", tc.a, got, tc.want)
		}
		spans.Reset()
		s.Decided(context.Background(), nil, tc.a)
		if n := len(spans.GetSpans()); n > 0 {
			t.Errorf("%d spans were made", n)
		}
	}
}

// To the bound each key has its own value, then all share that of the rest, for which a place
// is kept; and many at once make it no more.
func TestBounded(t *testing.T) {
	var b bounded[int, *int]
	build := func(k int) *int { return &k }
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for k := range 100 {
				v, ok := b.known(k)
				if !ok {
					v = b.learn(k, -1, 10, build)
				}
				if again := b.learn(k, -1, 10, build); again != v || *v != k && *v != -1 {
					t.Errorf("%d: %d, then %d", k, *v, *again)
				}
			}
		})
	}
	wg.Wait()
	if n := len(*b.all.Load()); n != 10 {
		t.Errorf("%d values, want 10", n)
	}
	if rest, ok := b.known(-1); !ok || b.learn(1000, -1, 10, build) != rest || b.learn(-1, -1, 10, build) != rest {
		t.Error("those beyond the bound do not share a value")
	}
	var asked bounded[int, *int] // the rest is asked for first, as by a name of nobody
	rest := asked.learn(-1, -1, 3, build)
	if asked.learn(1, -1, 3, build) == rest || asked.learn(2, -1, 3, build) == rest || asked.learn(3, -1, 3, build) != rest {
		t.Error("of three places one is that of the rest")
	}
}

// Endpoints beyond the bound share one series; where an attempt went nowhere none is counted.
func TestEndpoints(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	tel, err := New(nil, sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)), true)
	if err != nil {
		t.Fatal(err)
	}
	var c Call
	c.Begin(context.Background(), tel.Method("a", "/kv.KV/Get", true), "/kv.KV/Get")
	const n = 2 * MaxEndpoints
	for i := range n {
		_, a := c.Attempt(&c, 1, First)
		a.End(Failed, codes.Unavailable, "", fmt.Sprintf("10.0.0.1:%d", i))
		a.End(Refused, codes.Unavailable, "", "")
	}
	for _, m := range collect(t, reader) {
		if m.Name != metricEndpoints.Name {
			continue
		}
		var total, rest int64
		points := m.Data.(metricdata.Sum[int64]).DataPoints
		for _, p := range points {
			total += p.Value
			if v, _ := p.Attributes.Value(labelEndpoint); v.AsString() == other {
				rest += p.Value
			}
		}
		if len(points) != MaxEndpoints || total != n || rest != n-MaxEndpoints+1 {
			t.Errorf("%d series of %d attempts, %d of them of other endpoints; want %d, %d, %d", len(points), total, rest, MaxEndpoints, n, n-MaxEndpoints+1)
		}
		return
	}
	t.Error("no attempts are counted")
}
