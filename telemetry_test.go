package bobtail_test

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	grpccodes "google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/loadbalance"
)

var update = flag.Bool("update", false, "write the golden files of telemetry")

// sink is an SDK that keeps what it is told.
type sink struct {
	spans  *tracetest.InMemoryExporter
	reader *sdkmetric.ManualReader
	tp     *sdktrace.TracerProvider
	mp     *sdkmetric.MeterProvider
}

func newSink(opts ...sdktrace.TracerProviderOption) *sink {
	s := &sink{spans: tracetest.NewInMemoryExporter(), reader: sdkmetric.NewManualReader()}
	s.tp = sdktrace.NewTracerProvider(append(opts, sdktrace.WithSyncer(s.spans))...)
	s.mp = sdkmetric.NewMeterProvider(sdkmetric.WithReader(s.reader))
	return s
}

func (s *sink) options() []bobtail.Option {
	return []bobtail.Option{bobtail.WithTracerProvider(s.tp), bobtail.WithMeterProvider(s.mp), bobtail.WithLogger(nil)}
}

// tree writes the spans as an indented list, times as they are since the root began. What
// is the same each time, or differs each time, is left out.
func (s *sink) tree() string {
	spans := s.spans.GetSpans()
	slices.SortStableFunc(spans, func(a, b tracetest.SpanStub) int { return a.StartTime.Compare(b.StartTime) })
	var b strings.Builder
	var write func(parent trace.SpanID, root time.Time, indent string)
	write = func(parent trace.SpanID, root time.Time, indent string) {
		for _, sp := range spans {
			if sp.Parent.SpanID() != parent {
				continue
			}
			zero := root
			if zero.IsZero() {
				zero = sp.StartTime
			}
			fmt.Fprintf(&b, "%s%s, %s, %v to %v, %s\n", indent, sp.Name, sp.SpanKind, sp.StartTime.Sub(zero), sp.EndTime.Sub(zero), statusOf(sp))
			for _, kv := range sp.Attributes {
				fmt.Fprintf(&b, "%s  %s = %s\n", indent, kv.Key, kv.Value.String())
			}
			for _, e := range sp.Events {
				fmt.Fprintf(&b, "%s  event %q at %v: %s\n", indent, e.Name, e.Time.Sub(zero), labels(attribute.NewSet(e.Attributes...)))
			}
			write(sp.SpanContext.SpanID(), zero, indent+"    ")
		}
	}
	write(trace.SpanID{}, time.Time{}, "")
	return b.String()
}

func statusOf(s tracetest.SpanStub) string {
	if s.Status.Code == codes.Unset {
		return "unset"
	}
	return strings.TrimSpace(strings.ToLower(s.Status.Code.String()) + " " + s.Status.Description)
}

func labels(set attribute.Set) string {
	var all []string
	for _, kv := range set.ToSlice() {
		all = append(all, fmt.Sprintf("%s=%s", kv.Key, kv.Value.String()))
	}
	return strings.Join(all, " ")
}

// points writes the metrics, one point in each line, sorted.
func (s *sink) points(t testing.TB) string {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := s.reader.Collect(context.Background(), &rm); err != nil {
		t.Fatal(err)
	}
	var lines []string
	add := func(name, unit string, set attribute.Set, format string, args ...any) {
		lines = append(lines, fmt.Sprintf("%s [%s] %s: %s", name, unit, labels(set), fmt.Sprintf(format, args...)))
	}
	for _, sm := range rm.ScopeMetrics {
		for _, m := range sm.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Histogram[int64]:
				for _, p := range d.DataPoints {
					add(m.Name, m.Unit, p.Attributes, "count %d, sum %d", p.Count, p.Sum)
				}
			case metricdata.Histogram[float64]:
				for _, p := range d.DataPoints {
					add(m.Name, m.Unit, p.Attributes, "count %d, sum %.6g", p.Count, p.Sum)
				}
			case metricdata.Sum[int64]:
				for _, p := range d.DataPoints {
					add(m.Name, m.Unit, p.Attributes, "%d", p.Value)
				}
			case metricdata.Gauge[float64]:
				for _, p := range d.DataPoints {
					add(m.Name, m.Unit, p.Attributes, "%.6g", p.Value)
				}
			default:
				t.Fatalf("%s is a %T", m.Name, d)
			}
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n"
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", "telemetry", name+".golden")
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-want +got; go test -update writes it):\n%s", file, d)
	}
}

// handler serves attempt k of each call as serve says.
func handler(serve func(ctx context.Context, k int) error) grpctest.Handlers {
	number := func(ctx context.Context) int {
		md, _ := metadata.FromIncomingContext(ctx)
		k := 1
		for _, v := range md.Get(attempt.PreviousAttempts) {
			fmt.Sscan(v, &k)
			k++
		}
		return k
	}
	return grpctest.Handlers{
		Unary: func(ctx context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
			return &kvpb.Response{Id: req.Id}, serve(ctx, number(ctx))
		},
		Scan: func(b *grpctest.Backend, req *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
			if err := serve(s.Context(), number(s.Context())); err != nil {
				return err
			}
			return s.Send(&kvpb.Response{Id: req.Id})
		},
	}
}

// after waits, or ends with the call.
func after(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

const (
	hedgeAt10 = `"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.010s"}`
	// The wait is drawn from [initialBackoff, ...) and capped by the same: 50 ms.
	retryOnce = `"retryPolicy": {"maxAttempts": 2, "initialBackoff": "0.05s", "maxBackoff": "0.05s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"], "jitter": "decorrelated"}`
	onGet     = `{"extraLoad": {"max": 0.1}, "methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}], `
	onScan    = `{"extraLoad": {"max": 0.1}, "methodConfig": [{"name": [{"service": "kv.KV", "method": "Scan"}], `
)

// story is a call that a golden file tells the telemetry of.
type story struct {
	name, policy string
	serve        func(ctx context.Context, k int) error
	before       func(ctx context.Context, kv kvpb.KVClient) // what is not told as a trace
	call         string                                      // Get by default
	want         grpccodes.Code
}

func stories() []story {
	slowFirst := func(ctx context.Context, k int) error {
		if k == 1 {
			return after(ctx, time.Hour)
		}
		return after(ctx, ms)
	}
	downFirst := func(ctx context.Context, k int) error {
		if k == 1 {
			_ = after(ctx, 2*ms) // the call has no deadline
			return status.Error(grpccodes.Unavailable, "down")
		}
		return after(ctx, ms)
	}
	return []story{
		{name: "plain", policy: `{}`, serve: func(ctx context.Context, _ int) error { return after(ctx, 2*ms) }},
		{name: "unhedged", policy: onGet + hedgeAt10 + `}]}`, serve: func(ctx context.Context, _ int) error { return after(ctx, 2*ms) }},
		{name: "hedged", policy: onGet + hedgeAt10 + `}]}`, serve: slowFirst},
		{name: "hedged stream", policy: onScan + hedgeAt10 + `}]}`, serve: slowFirst, call: "Scan"},
		{name: "shadow", policy: onGet + `"mode": "shadow", ` + hedgeAt10 + `}]}`,
			serve: func(ctx context.Context, _ int) error { return after(ctx, 20*ms) }},
		{name: "retried", policy: onGet + retryOnce + `}]}`, serve: downFirst},
		{name: "overloaded", policy: onGet + retryOnce + `}]}`, want: grpccodes.Unavailable,
			serve: func(context.Context, int) error {
				full, err := status.New(grpccodes.Unavailable, "full").WithDetails(&errdetails.ErrorInfo{Domain: "bobtail", Reason: "OVERLOADED"})
				if err != nil {
					return err
				}
				return full.Err()
			}},
		{name: "failed", policy: onGet + retryOnce + `}]}`, want: grpccodes.Unavailable,
			serve: func(context.Context, int) error { return status.Error(grpccodes.Unavailable, "down") }},
		{name: "refused", policy: onGet + `"circuitBreaker": {"minimumCalls": 1}}]}`, want: grpccodes.Unavailable,
			serve: func(context.Context, int) error { return status.Error(grpccodes.Unavailable, "down") },
			before: func(ctx context.Context, kv kvpb.KVClient) {
				_, _ = kv.Get(ctx, &kvpb.Request{}) // opens the breaker
			}},
		{name: "tied", policy: onGet + `"hedgingPolicy": {"maxAttempts": 2, "tied": true, "tieDelay": "0.005s"}}]}`, serve: slowFirst},
		// The copy's server says at once that it starts, and the first attempt, which is still
		// queued elsewhere, is withdrawn.
		{name: "withdrawn", policy: onGet + `"hedgingPolicy": {"maxAttempts": 2, "tied": true, "tieDelay": "0.005s"}}]}`,
			serve: func(ctx context.Context, k int) error {
				if k == 1 {
					return after(ctx, time.Hour)
				}
				if err := grpc.SendHeader(ctx, metadata.Pairs(attempt.TiedKey, "1")); err != nil {
					return err
				}
				return after(ctx, 10*ms)
			}},
	}
}

// What a call tells: its span, with those of its attempts, and its metrics.
func TestTelemetryStories(t *testing.T) {
	for _, st := range stories() {
		t.Run(st.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSink()
				f := grpctest.NewFleet(t, 3, handler(st.serve))
				kv, _ := client(t, f, policy(t, st.policy), s.options()...)
				if st.before != nil {
					st.before(t.Context(), kv)
					s.spans.Reset()
				}
				call := st.call
				if call == "" {
					call = "Get"
				}
				ctx, cancel := context.WithCancel(t.Context())
				if err := calls[call](ctx, kv); status.Code(err) != st.want {
					t.Fatal(err)
				}
				cancel() // of a stream nobody receives the end
				synctest.Wait()
				golden(t, st.name, withoutBackends(s.tree()+"\n"+s.points(t)))
			})
		})
	}
}

// withoutBackends hides which of the backends was drawn, but for whether they differ.
func withoutBackends(s string) string {
	letter := map[string]string{}
	words := strings.Fields(s)
	for _, w := range words {
		if strings.HasPrefix(w, "backend-") && letter[w] == "" {
			letter[w] = fmt.Sprintf("backend %c", 'A'+len(letter))
		}
	}
	for from, to := range letter {
		s = strings.ReplaceAll(s, from, to)
	}
	return s
}

// A call that is not sampled has no spans, and the same metrics.
func TestTelemetryUnsampled(t *testing.T) {
	for _, st := range stories() {
		t.Run(st.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSink(sdktrace.WithSampler(sdktrace.NeverSample()))
				f := grpctest.NewFleet(t, 3, handler(st.serve))
				kv, _ := client(t, f, policy(t, st.policy), s.options()...)
				if st.before != nil {
					st.before(t.Context(), kv)
				}
				call := st.call
				if call == "" {
					call = "Get"
				}
				ctx, cancel := context.WithCancel(t.Context())
				if err := calls[call](ctx, kv); status.Code(err) != st.want {
					t.Fatal(err)
				}
				cancel()
				synctest.Wait()
				if n := len(s.spans.GetSpans()); n > 0 {
					t.Errorf("%d spans", n)
				}
				want, err := os.ReadFile(filepath.Join("testdata", "telemetry", st.name+".golden"))
				if err != nil {
					t.Fatal(err)
				}
				_, points, _ := strings.Cut(string(want), "\n\n")
				if d := cmp.Diff(points, s.points(t)); d != "" {
					t.Errorf("metrics differ (-sampled +unsampled):\n%s", d)
				}
			})
		})
	}
}

// A method that only its caller has named has no series, and no span name, of its own; and
// however many methods there are, the series are bounded.
func TestTelemetryCardinality(t *testing.T) {
	s := newSink()
	c, err := bobtail.NewClient(policy(t, `{"methodConfig": [{"name": [{"service": "dynamic.D", "method": "Call"}], "timeout": "1s"}]}`), s.options()...)
	if err != nil {
		t.Fatal(err)
	}
	cc := noop(t, c)
	const hostile = 5000
	// "/kv/KV" is the name of a service, and that of no method.
	methods := []string{"/kv.KV/Get", "/dynamic.D/Call", "/kv/KV"}
	for i := range hostile - 1 {
		methods = append(methods, fmt.Sprintf("/evil.E%d/M%d", i%7, i))
	}
	for _, m := range methods {
		if err := cc.Invoke(t.Context(), m, &kvpb.Request{}, &kvpb.Response{}); err != nil {
			t.Fatal(err)
		}
	}
	want := `bobtail.client.attempts [{attempt}] bobtail.attempt.kind=first bobtail.attempt.outcome=won grpc.method=dynamic.D/Call grpc.target=passthrough:///noop: 1
` + `bobtail.client.attempts [{attempt}] bobtail.attempt.kind=first bobtail.attempt.outcome=won grpc.method=kv.KV/Get grpc.target=passthrough:///noop: 1
bobtail.client.attempts [{attempt}] bobtail.attempt.kind=first bobtail.attempt.outcome=won grpc.method=other grpc.target=passthrough:///noop: 5000
`
	var got strings.Builder
	series := 0
	for line := range strings.Lines(s.points(t)) {
		series++
		if strings.HasPrefix(line, "bobtail.client.attempts") {
			got.WriteString(line)
		}
	}
	if d := cmp.Diff(want, got.String()); d != "" || series != 6 {
		t.Errorf("%d series, want 6; attempts (-want +got):\n%s", series, d)
	}
	names := map[string]int{}
	for _, sp := range s.spans.GetSpans() {
		names[sp.Name]++
		for _, kv := range sp.Attributes {
			if kv.Key == "rpc.method_original" {
				names[kv.Value.AsString()]++
			}
		}
	}
	for i := range hostile - 1 {
		m := fmt.Sprintf("/evil.E%d/M%d", i%7, i)
		if names[m] != 1 {
			t.Fatalf("%s is the original method of %d spans", m, names[m])
		}
		delete(names, m)
	}
	if want := map[string]int{"kv.KV/Get": 1, "dynamic.D/Call": 1, "/kv/KV": 1, "grpc": hostile, "attempt": hostile + 2}; !cmp.Equal(names, want) {
		t.Errorf("spans %v, want %v", names, want)
	}
}

// Calls at the same time: each has one span, ended, with all its attempts.
func TestTelemetryConcurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSink()
		f := grpctest.NewFleet(t, 3, handler(func(ctx context.Context, k int) error {
			if k == 1 {
				return after(ctx, 20*ms)
			}
			return after(ctx, 5*ms)
		}))
		var reports atomic.Int64
		kv, _ := client(t, f, policy(t, `{"methodConfig": [{"name": [{"service": "kv.KV"}], `+hedgeAt10+`}]}`),
			append(s.options(), bobtail.WithHedgeReports(func(context.Context, hedging.Report) { reports.Add(1) }))...)
		const n = 50
		var wg sync.WaitGroup
		for range n {
			wg.Go(func() {
				if _, err := kv.Get(t.Context(), &kvpb.Request{}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		synctest.Wait()
		if reports.Load() != n {
			t.Errorf("%d reports to the user's hook, want %d", reports.Load(), n)
		}
		roots, won, lost := 0, 0, 0
		parents := map[trace.SpanID]int{}
		for _, sp := range s.spans.GetSpans() {
			if !sp.Parent.IsValid() {
				roots++
				continue
			}
			parents[sp.Parent.SpanID()]++
			for _, kv := range sp.Attributes {
				switch {
				case kv.Key == "bobtail.attempt.outcome" && kv.Value.AsString() == "won":
					won++
				case kv.Key == "bobtail.attempt.outcome" && kv.Value.AsString() == "superseded":
					lost++
				}
			}
		}
		if roots != n || won != n || lost != n || len(parents) != n {
			t.Errorf("%d calls, %d won and %d superseded attempts under %d spans, want %d of each", roots, won, lost, len(parents), n)
		}
	})
}

// The breaker, the delay and the budget as gauges, at each collection; and a client that
// is gone is not watched any more.
func TestTelemetryGauges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSink()
		f := grpctest.NewFleet(t, 3, handler(func(context.Context, int) error { return status.Error(grpccodes.Unavailable, "down") }))
		kv, _ := client(t, f, policy(t, onGet+`"circuitBreaker": {"minimumCalls": 1}, "adaptiveThrottling": {}, `+hedgeAt10+`}]}`), s.options()...)
		see := func(state string) {
			t.Helper()
			var got strings.Builder
			for line := range strings.Lines(s.points(t)) {
				for _, g := range []string{"bobtail.client.breaker.state", "bobtail.client.hedging.delay", "bobtail.client.throttle", "bobtail.client.budget"} {
					if strings.HasPrefix(line, g) {
						got.WriteString(line)
					}
				}
			}
			want := `bobtail.client.breaker.state [1] grpc.method=kv.KV/Get grpc.target=fleet:///kv: ` + state + `
bobtail.client.budget.balance [{attempt}] grpc.target=fleet:///kv: 1.1
bobtail.client.hedging.delay [s] grpc.method=kv.KV/Get grpc.target=fleet:///kv: 0.01
bobtail.client.throttle.probability [1] grpc.method=kv.KV/Get grpc.target=fleet:///kv: 0
`
			if d := cmp.Diff(want, got.String()); d != "" {
				t.Errorf("gauges (-want +got):\n%s", d)
			}
		}
		_, _ = kv.Get(t.Context(), &kvpb.Request{}) // opens the breaker
		see("2")
		time.Sleep(7 * time.Second)
		see("1")
	})
}

// The slow bucket links to the trace of the call that is in it.
func TestTelemetryExemplar(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSink()
		f := grpctest.NewFleet(t, 3, handler(func(ctx context.Context, _ int) error { return after(ctx, 30*ms) }))
		kv, _ := client(t, f, policy(t, `{}`), s.options()...)
		if _, err := kv.Get(t.Context(), &kvpb.Request{}); err != nil {
			t.Fatal(err)
		}
		var rm metricdata.ResourceMetrics
		if err := s.reader.Collect(t.Context(), &rm); err != nil {
			t.Fatal(err)
		}
		call := s.spans.GetSpans()[1] // it ends after its attempt
		found := false
		for _, m := range rm.ScopeMetrics[0].Metrics {
			h, ok := m.Data.(metricdata.Histogram[float64])
			if !ok || m.Name != "bobtail.client.call.duration" {
				continue
			}
			for _, e := range h.DataPoints[0].Exemplars {
				found = found || trace.TraceID(e.TraceID) == call.SpanContext.TraceID() &&
					trace.SpanID(e.SpanID) == call.SpanContext.SpanID() && e.Value == 0.03
			}
		}
		if !found {
			t.Error("no exemplar of the call's span")
		}
	})
}

// Who leaves the rotation, and comes back, is counted and logged, and the user's hook is told as
// well.
func TestTelemetryRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSink()
		var ill atomic.Bool
		f := grpctest.NewFleet(t, 4, grpctest.Handlers{
			Unary: func(ctx context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
				time.Sleep(2 * ms)
				// Every second: so it is never good three times in a row, and goes on being picked.
				if b.Index == 2 && ill.Load() && b.Started.Load()%2 == 0 {
					return nil, status.Error(grpccodes.Internal, "ill")
				}
				return &kvpb.Response{}, nil
			},
		})
		var log bytes.Buffer
		var told []string
		kv, _ := client(t, f, policy(t, `{}`), append(s.options(), bobtail.WithLogger(slog.New(slog.NewTextHandler(&log, nil))),
			bobtail.WithBalancerEvents(func(e loadbalance.Event) { told = append(told, string(e.Kind)) }))...)
		call := func(d time.Duration) {
			for range d / (5 * ms) {
				_, _ = kv.Get(t.Context(), &kvpb.Request{})
				time.Sleep(3 * ms)
			}
		}
		call(2 * time.Second)
		ill.Store(true)
		call(20 * time.Second)
		ill.Store(false)
		call(60 * time.Second)
		var got strings.Builder
		for line := range strings.Lines(s.points(t)) {
			if strings.HasPrefix(line, "bobtail.client.balancer") {
				got.WriteString(line)
			}
		}
		want := `bobtail.client.balancer.transitions [{transition}] bobtail.event=ejected bobtail.reason=failures grpc.target=fleet:///kv: 1
bobtail.client.balancer.transitions [{transition}] bobtail.event=readmitted bobtail.reason=probes grpc.target=fleet:///kv: 1
`
		if d := cmp.Diff(want, got.String()); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
		if !slices.Equal(told, []string{"ejected", "readmitted"}) || strings.Count(log.String(), "endpoint=backend-2") != 2 {
			t.Errorf("told %q, log:\n%s", told, log.String())
		}
	})
}

// Why a hedge was not sent, and who it was that refused.
func TestTelemetryReasons(t *testing.T) {
	slow := func(ctx context.Context, _ int) error { return after(ctx, 40*ms) }
	for _, tc := range []struct {
		name, policy, event string
		backends, calls     int
		code                grpccodes.Code // of all attempts; OK is slow
	}{
		{"budget", `{"extraLoad": {"max": 0.000001}, "methodConfig": [{"name": [{"service": "kv.KV"}], ` + hedgeAt10 + `}]}`, "hedge suppressed bobtail.reason=budget", 3, 2, grpccodes.OK},
		{"no other backend", onGet + hedgeAt10 + `}]}`, "hedge suppressed bobtail.reason=no other backend", 1, 1, grpccodes.OK},
		{"rate", `{"methodConfig": [{"name": [{}], "rateLimit": {"perSecond": 0.01, "burst": 1}, "timeout": "1s"}]}`, "refused bobtail.reason=RATE_LIMITED bobtail.shadow=false", 1, 2, grpccodes.OK},
		{"rate, shadow", `{"mode": "shadow", "methodConfig": [{"name": [{}], "rateLimit": {"perSecond": 0.01, "burst": 1}, "timeout": "1s"}]}`, "refused bobtail.reason=RATE_LIMITED bobtail.shadow=true", 1, 2, grpccodes.OK},
		{"throttled", `{"retryThrottling": {"maxTokens": 1, "tokenRatio": 0.1}, "methodConfig": [{"name": [{"service": "kv.KV"}], ` + retryOnce + `}]}`, "retry suppressed bobtail.reason=throttle", 3, 1, grpccodes.Unavailable},
		{"a final failure is no news", `{"methodConfig": [{"name": [{"service": "kv.KV"}], ` + retryOnce + `}]}`, "", 3, 1, grpccodes.Internal},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSink()
				serve := slow
				if tc.code != grpccodes.OK {
					serve = func(context.Context, int) error { return status.Error(tc.code, "down") }
				}
				f := grpctest.NewFleet(t, tc.backends, handler(serve))
				kv, _ := client(t, f, policy(t, tc.policy), s.options()...)
				for range tc.calls {
					_, _ = kv.Get(t.Context(), &kvpb.Request{})
				}
				synctest.Wait()
				var got []string
				for _, sp := range s.spans.GetSpans() {
					for _, e := range sp.Events {
						got = append(got, e.Name+" "+labels(attribute.NewSet(e.Attributes...)))
					}
				}
				if tc.event == "" {
					if p := s.points(t); len(got) > 0 || strings.Contains(p, "suppressed") {
						t.Errorf("events %q, want none; metrics:\n%s", got, p)
					}
					return
				}
				if !slices.Equal(got, []string{tc.event}) {
					t.Errorf("events %q, want %q", got, tc.event)
				}
				counted := strings.TrimPrefix(tc.event[strings.Index(tc.event, "bobtail.reason"):], " ")
				p := s.points(t)
				// A hedge that goes nowhere is no failure.
				if nowhere := strings.Contains(p, "kind=hedge bobtail.attempt.outcome=refused"); nowhere != (tc.name == "no other backend") {
					t.Errorf("a hedge was refused: %v", nowhere)
				}
				if strings.Count(p, counted+" grpc.method=kv.KV/Get grpc.target=fleet:///kv: 1\n") != 1 {
					t.Errorf("%s is not counted once:\n%s", counted, p)
				}
			})
		})
	}
}

// A call made under an attempt, as an interceptor's own, is not that attempt, nor part of its
// call.
func TestTelemetryNested(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		outer, inner := newSink(), newSink()
		f := grpctest.NewFleet(t, 3, handler(func(ctx context.Context, k int) error {
			if k == 1 {
				return after(ctx, 20*ms)
			}
			return after(ctx, ms)
		}))
		below, _ := client(t, grpctest.NewFleet(t, 1, grpctest.Handlers{}), policy(t, `{}`), inner.options()...)
		c, err := bobtail.NewClient(policy(t, onGet+hedgeAt10+`}]}`), outer.options()...)
		if err != nil {
			t.Fatal(err)
		}
		cc := f.Dial(append(c.DialOptions(), grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any,
			cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if _, err := below.Increment(ctx, &kvpb.Request{}); err != nil {
				t.Error(err)
			}
			return invoker(ctx, method, req, reply, cc, opts...)
		}))...)
		cc.Connect()
		time.Sleep(time.Second)
		if _, err := kvpb.NewKVClient(cc).Get(t.Context(), &kvpb.Request{}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		want := `bobtail.client.attempts [{attempt}] bobtail.attempt.kind=first bobtail.attempt.outcome=won grpc.method=kv.KV/Increment grpc.target=fleet:///kv: 2
bobtail.client.call.duration [s] grpc.method=kv.KV/Increment grpc.status=OK grpc.target=fleet:///kv: count 2, sum 0
`
		if d := cmp.Diff(want, inner.points(t)); d != "" {
			t.Errorf("inner calls (-want +got):\n%s", d)
		}
		if p := outer.points(t); !strings.Contains(p, "kind=hedge bobtail.attempt.outcome=won") {
			t.Errorf("outer call:\n%s", p)
		}
	})
}

// A stream that is received to its end has ended, also where an interceptor below keeps the
// options to itself and nobody but the stream tells.
func TestTelemetryStreamEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSink()
		c, err := bobtail.NewClient(policy(t, `{}`), s.options()...)
		if err != nil {
			t.Fatal(err)
		}
		cc := grpctest.NewFleet(t, 1, grpctest.Handlers{}).Dial(append(c.DialOptions(), grpc.WithChainStreamInterceptor(
			func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				return streamer(ctx, desc, cc, method)
			}))...)
		str, err := kvpb.NewKVClient(cc).Scan(t.Context(), &kvpb.Request{})
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = str.Recv()
		}
		if err != io.EOF {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, sp := range s.spans.GetSpans() {
			for _, kv := range sp.Attributes {
				if kv.Key == "rpc.response.status_code" || kv.Key == "bobtail.attempt.outcome" {
					got[sp.Name] += kv.Value.AsString()
				}
			}
		}
		if want := map[string]string{"kv.KV/Scan": "OK", "attempt": "wonOK"}; !cmp.Equal(got, want) {
			t.Errorf("ended spans %v, want %v", got, want)
		}
	})
}

// Whatever is installed, nobody is told without telemetry.
func TestWithoutTelemetry(t *testing.T) {
	s := newSink()
	c, err := bobtail.NewClient(policy(t, `{}`), append(s.options(), bobtail.WithoutTelemetry())...)
	if err != nil {
		t.Fatal(err)
	}
	if err := noop(t, c).Invoke(t.Context(), "/kv.KV/Get", &kvpb.Request{}, &kvpb.Response{}); err != nil {
		t.Fatal(err)
	}
	if n := len(s.spans.GetSpans()); n > 0 || s.points(t) != "\n" {
		t.Errorf("%d spans, metrics %s", n, s.points(t))
	}
}
