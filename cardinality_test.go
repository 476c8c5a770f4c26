package bobtail

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/telemetry"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// mostServer is the bound that docs/telemetry.md gives for the series of a server, whatever is
// called: 1000 methods, with all that can become of their calls, and what has no method.
const (
	methodStatuses  = 17
	mostServer      = telemetry.MaxMethods*(methodStatuses+6*4*2) + 4 + 2 + 4
	randomCalls     = 1_000_000
	randomCallsFast = 20_000
)

// series counts the series of each metric, and fails if the SDK has hidden some.
func series(t *testing.T, reader *sdkmetric.ManualReader) (n map[string]int, total int) {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := reader.Collect(context.Background(), &rm); err != nil {
		t.Fatal(err)
	}
	n = map[string]int{}
	for _, sm := range rm.ScopeMetrics {
		for _, m := range sm.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Histogram[int64]:
				n[m.Name] = len(d.DataPoints)
			case metricdata.Histogram[float64]:
				n[m.Name] = len(d.DataPoints)
			case metricdata.Sum[int64]:
				n[m.Name] = len(d.DataPoints)
				for _, p := range d.DataPoints {
					if p.Attributes.HasValue("otel.metric.overflow") {
						t.Errorf("%s: the SDK has cut series off", m.Name)
					}
				}
			case metricdata.Gauge[float64]:
				n[m.Name] = len(d.DataPoints)
			}
			total += n[m.Name]
		}
	}
	return n, total
}

// unlimited is a meter provider that hides no series, as the SDK's default does beyond 2000 of a
// metric.
func unlimited() (*sdkmetric.MeterProvider, *sdkmetric.ManualReader) {
	reader := sdkmetric.NewManualReader()
	return sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader), sdkmetric.WithCardinalityLimit(0)), reader
}

func howMany() int {
	if testing.Short() || testenv.Race {
		return randomCallsFast
	}
	return randomCalls
}

// A million calls of names that nobody but their callers has given, with tenants and classes
// alike, make no series of their own at a server; nor do the same calls, if they are those of
// methods that somebody has registered, make more than the bound.
func TestServerCardinality(t *testing.T) {
	for _, tc := range []struct {
		name    string
		methods int // at most
		server  any // of the interceptor's info
		calls   int
	}{{"nobody's", 1, nil, howMany()}, {"registered", telemetry.MaxMethods, t, howMany() / 4}} {
		t.Run(tc.name, func(t *testing.T) {
			// A quarter of the calls has room in the bucket that the tenants beyond the bound share.
			p, err := ParseServerPolicy(fmt.Appendf(nil, `{"limiter": {"algorithm": "static", "limit": 1}, "maxCriticality": "critical",
				"tenants": {"metadataKey": "x-tenant", "perSecond": 1, "burst": %d, "max": 100}}`, tc.calls/4))
			if err != nil {
				t.Fatal(err)
			}
			meters, reader := unlimited()
			s, err := NewServer(p, WithMeterProvider(meters), WithLogger(nil))
			if err != nil {
				t.Fatal(err)
			}
			rnd := rand.New(rand.NewPCG(1, 2))
			n := tc.calls
			errs := make([]error, methodStatuses+3)
			for c := range errs {
				errs[c] = status.Error(codes.Code(c), "") // nil of OK; some that there are not
			}
			handle := func(_ context.Context, req any) (any, error) { return nil, errs[req.(int)] }
			refused := 0
			for range n {
				method := fmt.Sprintf("/evil.S%d/M%d", rnd.IntN(1000), rnd.IntN(1_000_000))
				ctx := metadata.NewIncomingContext(context.Background(), metadata.MD{
					"x-tenant":              {fmt.Sprint("tenant", rnd.Uint64())},
					shedding.CriticalityKey: {[]string{"sheddable", "critical_plus", fmt.Sprint("evil", rnd.Uint64())}[rnd.IntN(3)]},
				})
				ran := false
				_, _ = s.unary(ctx, rnd.IntN(len(errs)), &grpc.UnaryServerInfo{Server: tc.server, FullMethod: method}, func(ctx context.Context, req any) (any, error) {
					ran = true
					return handle(ctx, req)
				})
				if !ran {
					refused++
				}
			}
			got, total := series(t, reader)
			t.Logf("%d calls, %d refused: %d series, %v", n, refused, total, got)
			if refused == 0 || refused == n {
				t.Errorf("%d of %d calls refused, want some", refused, n)
			}
			// Of refusals one reason, two classes and no shadow come up here.
			for name, most := range map[string]int{
				"bobtail.server.call.duration": tc.methods * methodStatuses, "bobtail.server.refusals": tc.methods * 2,
				"bobtail.server.limit": 1, "bobtail.server.in_flight": 1, "bobtail.server.queue.length": 1, "bobtail.server.tenants": 1,
			} {
				if got[name] == 0 || got[name] > most {
					t.Errorf("%s has %d series, want 1 to %d", name, got[name], most)
				}
				delete(got, name)
			}
			if tc.server == nil && total != 23 {
				t.Errorf("%d series, docs/telemetry.md says 23", total)
			}
			if len(got) > 0 || total > mostServer {
				t.Errorf("%d series in all, want at most %d; more than asked for: %v", total, mostServer, got)
			}
		})
	}
}

// The same for a client, whose policy hedges all methods, and counts by endpoint.
func TestClientCardinality(t *testing.T) {
	p, err := ParsePolicy([]byte(`{"extraLoad": {"max": 0.1}, "methodConfig": [{"name": [{}], "idempotent": true, "circuitBreaker": {}, "adaptiveThrottling": {},
		"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "1s"}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	meters, reader := unlimited()
	c, err := NewClient(p, WithMeterProvider(meters), WithLogger(nil), WithEndpointMetrics())
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	n := howMany()
	failed := status.Error(codes.NotFound, "")
	invoke := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
		if rnd.IntN(2) == 0 {
			return failed
		}
		return nil
	}
	for range n {
		ctx := metadata.NewOutgoingContext(context.Background(), metadata.MD{
			"x-tenant":              {fmt.Sprint("tenant", rnd.Uint64())},
			shedding.CriticalityKey: {fmt.Sprint("evil", rnd.Uint64())},
		})
		_ = c.unary(ctx, fmt.Sprintf("/evil.S%d/M%d", rnd.IntN(1000), rnd.IntN(1_000_000)), nil, nil, nil, invoke)
	}
	got, total := series(t, reader)
	t.Logf("%d calls: %d series, %v", n, total, got)
	// Two statuses and two outcomes of one method, and the budget: there are no endpoints.
	if total != 5 {
		var names []string
		for name, n := range got {
			names = append(names, fmt.Sprint(name, " ", n))
		}
		t.Errorf("%d series, docs/telemetry.md says 5: %s", total, strings.Join(names, ", "))
	}
}
