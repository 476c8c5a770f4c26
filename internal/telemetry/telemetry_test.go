package telemetry

import (
	"context"
	"flag"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc/codes"
)

var update = flag.Bool("update", false, "write the tables of docs/telemetry.md")

// The document says what the code says.
func TestDocument(t *testing.T) {
	const file, begin, end = "../../docs/telemetry.md", "<!-- tables: begin -->\n", "<!-- tables: end -->"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(text), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no %q and %q", file, begin, end)
	}
	want := head + begin + Table() + end + tail
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if want != string(text) {
		t.Errorf("%s is not what names.go says: go test ./internal/telemetry -run Document -update writes it", file)
	}
}

// Every instrument that is made is listed, with the unit, the meaning, the labels and the
// buckets that it has; and the other way round.
func TestInstruments(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	tel, err := New(nil, sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)), true)
	if err != nil {
		t.Fatal(err)
	}
	m := tel.Method("dns:///kv.example:443", "/kv.KV/Get", true)
	var c Call
	ctx := context.Background()
	c.Begin(ctx, m, "/kv.KV/Get")
	_, a := c.Attempt(ctx, 1, First)
	a.End(Won, codes.OK, "", "10.0.0.7:443")
	c.Hedged(1, time.Second, "budget", time.Now())
	c.Retried(1, time.Second, "budget")
	c.Refused("THROTTLED", false)
	c.End(codes.OK, "")
	m.BreakerChanged(ctx, "open", "failures")
	tel.RotationChanged(ctx, "dns:///kv.example:443", "ejected", "latency")
	owner := new(int)
	if err := Watch(tel, owner, func(_ *int, g Gauges) {
		g.Budget("dns:///kv.example:443", 1)
		g.HedgingDelay(m, time.Second)
		g.HedgingP99(m, 2*time.Second, time.Second)
		g.Breaker(m, 2)
		g.Throttle(m, 0.5)
		// Methods that share a series have no gauges: whose would it be?
		g.Breaker(tel.Method("dns:///kv.example:443", "/evil/1", false), 1)
	}); err != nil {
		t.Fatal(err)
	}
	got := describe(t, reader)
	runtime.KeepAlive(owner)
	compare(t, got, Instruments())
}

// describe says a reader sees of each instrument.
func describe(t *testing.T, reader *sdkmetric.ManualReader) map[string]string {
	got := map[string]string{}
	for _, m := range collect(t, reader) {
		var keys []string
		var kind string
		var bounds []float64
		switch d := m.Data.(type) {
		case metricdata.Histogram[int64]:
			kind, keys, bounds = "histogram", keysOf(d.DataPoints[0].Attributes.MarshalJSON()), d.DataPoints[0].Bounds
		case metricdata.Histogram[float64]:
			kind, keys, bounds = "histogram", keysOf(d.DataPoints[0].Attributes.MarshalJSON()), d.DataPoints[0].Bounds
		case metricdata.Sum[int64]:
			kind, keys = "counter", keysOf(d.DataPoints[0].Attributes.MarshalJSON())
		case metricdata.Gauge[float64]:
			kind, keys = "gauge", keysOf(d.DataPoints[0].Attributes.MarshalJSON())
			want := 1
			if m.Name == metricP99.Name {
				want = 2
			}
			if len(d.DataPoints) != want {
				t.Errorf("%s has %d points, want %d", m.Name, len(d.DataPoints), want)
			}
		}
		got[m.Name] = fmt.Sprint(kind, m.Unit, m.Description, keys, bounds)
	}
	return got
}

func compare(t *testing.T, got map[string]string, instruments []Instrument) {
	t.Helper()
	want := map[string]string{}
	for _, i := range instruments {
		keys := slices.Clone(i.Labels)
		slices.Sort(keys)
		want[i.Name] = fmt.Sprint(i.Type, i.Unit, i.Meaning, keys, i.Buckets)
	}
	for name := range want {
		if got[name] != want[name] {
			t.Errorf("%s: %s\nwant %s", name, got[name], want[name])
		}
	}
	for name := range got {
		if want[name] == "" {
			t.Errorf("%s is not listed", name)
		}
	}
}

// keysOf reads the keys of a marshalled attribute set, sorted as the set is.
func keysOf(text []byte, err error) []string {
	var keys []string
	for _, part := range strings.Split(string(text), `"Key":"`)[1:] {
		key, _, _ := strings.Cut(part, `"`)
		keys = append(keys, key)
	}
	return keys
}

func collect(t *testing.T, reader *sdkmetric.ManualReader) []metricdata.Metrics {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := reader.Collect(context.Background(), &rm); err != nil {
		t.Fatal(err)
	}
	if len(rm.ScopeMetrics) == 0 {
		return nil
	}
	if name := rm.ScopeMetrics[0].Scope.Name; name != Scope {
		t.Errorf("scope %q, want %q", name, Scope)
	}
	return rm.ScopeMetrics[0].Metrics
}

func TestServer(t *testing.T) {
	for target, want := range map[string]string{
		"dns:///kv.example:443":         "kv.example 443",
		"dns://8.8.8.8/kv.example:443":  "kv.example 443",
		"dns:///kv.example":             "kv.example 0",
		"dns:kv.example:443":            "kv.example 443",
		"passthrough:///[::1]:50051":    "::1 50051",
		"xds:///kv":                     "kv 0",
		"unix:/run/kv.sock":             "/run/kv.sock 0",
		"unix:///run/kv.sock":           "/run/kv.sock 0",
		"kv.example:443":                "kv.example 443",
		"etcd-endpoints://0xc0/m0:2379": "m0 2379",
		"fleet:///kv:http":              "kv:http 0",
		"weird://only-authority:1":      "only-authority 1",
		"":                              " 0",
	} {
		address, port := server(target)
		if got := fmt.Sprint(address, " ", port); got != want {
			t.Errorf("%s: %s, want %s", target, got, want)
		}
	}
}

// The names are those of the specification, and codes that a server makes up are UNKNOWN.
func TestStatusNames(t *testing.T) {
	for i, name := range statusNames {
		var c codes.Code
		if err := c.UnmarshalJSON([]byte(`"` + name + `"`)); err != nil || int(c) != i {
			t.Errorf("%d is %s, which is %d: %v", i, name, c, err)
		}
	}
	if known(16) != 16 || known(17) != codes.Unknown || known(1<<31) != codes.Unknown {
		t.Error("a code beyond those of the specification is UNKNOWN")
	}
}

// Beyond the bound methods share one of the target "other"; those that are not recognized share
// one of their target, and take no room beyond it.
func TestMethodBound(t *testing.T) {
	tel, err := New(nil, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 * MaxMethods {
		if m := tel.Method("a", fmt.Sprintf("/evil/%d", i), false); m != tel.Method("a", "/other/evil", false) || m == tel.shared {
			t.Fatal("a method of nobody has series of its own")
		}
	}
	own := map[*Method]bool{}
	for i := range 2 * MaxMethods {
		m := tel.Method("b", fmt.Sprintf("/kv.KV/%d", i), true)
		if m != tel.shared {
			own[m] = true
		}
	}
	if len(own) != MaxMethods-1 || len(tel.methods) != MaxMethods {
		t.Errorf("%d methods of their own in %d, want %d in %d", len(own), len(tel.methods), MaxMethods-1, MaxMethods)
	}
	if tel.Method("a", "/evil/new", false) == tel.shared || tel.Method("b", "/kv.KV/0", true) == tel.shared {
		t.Error("what had series before the bound has lost them")
	}
	var none *Telemetry
	if m := none.Method("a", "/kv.KV/Get", true); m != nil || m.Looked(context.Background()) {
		t.Error("no telemetry looks at a method")
	}
}

var installed bool

// Nobody looks until a provider is installed, globally and late.
func TestGlobalInstalledLate(t *testing.T) {
	if installed {
		t.Skip("what takes the place of the API's own providers cannot be taken away in the same process")
	}
	installed = true
	tel, err := New(nil, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	m := tel.Method("a", "/kv.KV/Get", true)
	ctx := context.Background()
	if m.Looked(ctx) {
		t.Fatal("looked at before anything is installed: the API has moved its placeholder")
	}
	call := func() {
		var c Call
		c.Begin(ctx, m, "/kv.KV/Get")
		_, a := c.Attempt(ctx, 1, First)
		a.End(Won, codes.OK, "", "")
		c.End(codes.OK, "")
		c.End(codes.Unknown, "again") // the first end counts
	}
	call()
	spans := tracetest.NewInMemoryExporter()
	otel.SetTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans)))
	if !m.Looked(ctx) {
		t.Error("the tracer provider is installed, and nobody looks")
	}
	call()
	var names []string
	for _, s := range spans.GetSpans() {
		names = append(names, s.Name)
		if s.InstrumentationScope.Name != Scope {
			t.Errorf("scope %q", s.InstrumentationScope.Name)
		}
	}
	if !slices.Equal(names, []string{"attempt", "kv.KV/Get"}) {
		t.Errorf("spans %q, want those of one call", names)
	}
	reader := sdkmetric.NewManualReader()
	otel.SetMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)))
	call()
	if n := len(collect(t, reader)); n != 2 {
		t.Errorf("%d metrics after the meter provider was installed, want 2", n)
	}
}

// Of two attempts that answer at once one has won.
func TestOneWinner(t *testing.T) {
	spans := tracetest.NewInMemoryExporter()
	tel, err := New(sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans)), nil, false)
	if err != nil {
		t.Fatal(err)
	}
	var c Call
	c.Begin(context.Background(), tel.Method("a", "/kv.KV/Get", true), "/kv.KV/Get")
	for i, k := range []Kind{First, Hedge} {
		_, a := c.Attempt(&c, i+1, k)
		a.End(Won, codes.OK, "", "x")
	}
	var got []string
	for _, s := range spans.GetSpans() {
		for _, kv := range s.Attributes {
			if kv.Key == attrOutcome {
				got = append(got, kv.Value.AsString())
			}
		}
	}
	if !slices.Equal(got, []string{"won", "superseded"}) {
		t.Errorf("outcomes %q", got)
	}
}

// Being watched keeps nothing alive, and what is gone is not asked.
func TestWatchHoldsNothing(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	tel, err := New(nil, sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)), false)
	if err != nil {
		t.Fatal(err)
	}
	type owner struct{ _ [64]byte } // too large for the tiny allocator, whose blocks live together
	o := &owner{}
	gone := make(chan struct{})
	runtime.AddCleanup(o, func(struct{}) { close(gone) }, struct{}{})
	if err := Watch(tel, o, func(_ *owner, g Gauges) { g.Budget("a", 1) }); err != nil {
		t.Fatal(err)
	}
	if n := len(collect(t, reader)); n != 1 {
		t.Fatalf("%d gauges, want 1", n)
	}
	runtime.KeepAlive(o)
	o = nil
	for {
		runtime.GC()
		select {
		case <-gone:
			if n := len(collect(t, reader)); n != 0 {
				t.Errorf("%d gauges of an owner that is gone", n)
			}
			return
		default:
			runtime.Gosched()
		}
	}
}
