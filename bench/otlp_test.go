package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	metricspb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	metricpb "go.opentelemetry.io/proto/otlp/metrics/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/bench/report"
)

// receiver is an OTLP receiver on loopback that keeps what it is sent, by policy.
type receiver struct {
	collectorpb.UnimplementedTraceServiceServer
	addr   string
	refuse error // what it answers instead of taking anything

	mu      sync.Mutex // guards what follows
	spans   map[string][]*tracepb.Span
	metrics map[string]map[string]*metricpb.Metric // the last of each name
}

// metricsService is beside receiver because both services have a method Export.
type metricsService struct {
	metricspb.UnimplementedMetricsServiceServer
	*receiver
}

func newReceiver(t *testing.T, refuse error) *receiver {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &receiver{addr: lis.Addr().String(), refuse: refuse,
		spans: map[string][]*tracepb.Span{}, metrics: map[string]map[string]*metricpb.Metric{}}
	s := grpc.NewServer()
	collectorpb.RegisterTraceServiceServer(s, r)
	metricspb.RegisterMetricsServiceServer(s, metricsService{receiver: r})
	ended := make(chan error)
	go func() { ended <- s.Serve(lis) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *receiver) Export(_ context.Context, req *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	if r.refuse != nil {
		return nil, r.refuse
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rs := range req.ResourceSpans {
		policy := policyOf(rs.Resource.Attributes)
		for _, ss := range rs.ScopeSpans {
			r.spans[policy] = append(r.spans[policy], ss.Spans...)
		}
	}
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

func (m metricsService) Export(_ context.Context, req *metricspb.ExportMetricsServiceRequest) (*metricspb.ExportMetricsServiceResponse, error) {
	if m.refuse != nil {
		return nil, m.refuse
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, rm := range req.ResourceMetrics {
		policy := policyOf(rm.Resource.Attributes)
		if m.metrics[policy] == nil {
			m.metrics[policy] = map[string]*metricpb.Metric{}
		}
		for _, sm := range rm.ScopeMetrics {
			for _, one := range sm.Metrics {
				m.metrics[policy][one.Name] = one
			}
		}
	}
	return &metricspb.ExportMetricsServiceResponse{}, nil
}

// policyOf is whom a resource of the benchmark stands for.
func policyOf(attrs []*commonpb.KeyValue) string {
	if name := attr(attrs, "service.name").GetStringValue(); name != "bobtail-bench" {
		return "of service " + name
	}
	return attr(attrs, "bobtail.bench.policy").GetStringValue()
}

func attr(attrs []*commonpb.KeyValue, key string) *commonpb.AnyValue {
	for _, kv := range attrs {
		if kv.Key == key {
			return kv.Value
		}
	}
	return nil
}

// calls is the number of what a histogram has.
func calls(m *metricpb.Metric) (n uint64) {
	for _, p := range m.GetHistogram().GetDataPoints() {
		n += p.Count
	}
	return n
}

// brief is a comparison of two policies, of 60 requests each and about 20 more of warm-up.
var brief = []string{"--rate", "100", "--calls", "60", "--block", "200ms", "--warmup", "200ms", "--policies", "none,hedge", "-O", "json"}

// tracedRuns are those of a document that say what was traced.
type tracedRuns struct {
	TraceRatio float64 `json:"trace_ratio"`
	Runs       []struct {
		Policy  string
		Calls   int
		Slowest []report.Traced
	}
}

// The trace ids of the report are those of the slowest requests that the receiver has, and
// each policy's metrics and spans are under its name.
func TestOTLP(t *testing.T) {
	r := newReceiver(t, nil)
	code, out, errs := bench(t, append(brief, "--otlp", r.addr, "--otlp-ratio", "1")...)
	if code != 0 && code != exitSaturated || strings.Contains(errs, "--otlp") {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	var d tracedRuns
	unmarshal(t, out, &d)
	if d.TraceRatio != 1 || len(r.spans) != 2 || len(r.metrics) != 2 {
		t.Errorf("ratio %v, spans of %d and metrics of %d policies, want 1, 2, 2", d.TraceRatio, len(r.spans), len(r.metrics))
	}
	for _, run := range d.Runs {
		var want []report.Traced
		begun, warmup := 0, 0
		children, attempts, sent := map[string]int{}, map[string]int{}, 0
		for _, s := range r.spans[run.Policy] {
			id := hex.EncodeToString(s.TraceId)
			switch {
			case s.Name == "attempt":
				attempts[id]++
			case s.Name != "request":
				children[id]++
			default:
				begun++
				sent += len(s.Events)
				if len(s.Events) > 0 && attr(s.Events[0].Attributes, "network.peer.address").GetStringValue() == "" {
					t.Errorf("%s: an event %v without the backend", run.Policy, s.Events[0])
				}
				if !attr(s.Attributes, "bobtail.bench.counted").GetBoolValue() {
					warmup++
					continue
				}
				want = append(want, report.Traced{
					Ms: float64(s.EndTimeUnixNano-s.StartTimeUnixNano) / 1e6, TraceID: id,
					Request: uint64(attr(s.Attributes, "bobtail.bench.request").GetIntValue()),
					T:       attr(s.Attributes, "bobtail.bench.time").GetDoubleValue(),
					Error:   attr(s.Attributes, "error.type").GetStringValue(),
				})
			}
		}
		slices.SortFunc(want, func(a, b report.Traced) int { return cmp.Compare(b.Ms, a.Ms) })
		if len(want) != run.Calls || warmup == 0 {
			t.Fatalf("%s: %d requests traced and %d of the warm-up, want %d and some", run.Policy, len(want), warmup, run.Calls)
		}
		if got := run.Slowest; !slices.Equal(got, want[:report.MaxSlowest]) {
			t.Errorf("%s: slowest %+v, the receiver has %+v", run.Policy, got, want[:report.MaxSlowest])
		}
		for _, s := range run.Slowest {
			if run.Policy == "hedge" && (children[s.TraceID] != 1 || attempts[s.TraceID] < 1) {
				t.Errorf("%s: %d calls and %d attempts in trace %s", run.Policy, children[s.TraceID], attempts[s.TraceID], s.TraceID)
			}
		}
		// A policy of grpc's own has no spans of attempts, but says where it sent them.
		if run.Policy == "none" && (sent != begun || len(children) > 0) || run.Policy == "hedge" && sent > 0 {
			t.Errorf("%s: %d requests, %d attempts told by their spans, %d calls", run.Policy, begun, sent, len(children))
		}
		m := r.metrics[run.Policy]
		if n := calls(m["bobtail.bench.request.duration"]); n != uint64(begun) {
			t.Errorf("%s: the histogram has %d requests, want %d", run.Policy, n, begun)
		}
		if _, its := m["bobtail.client.call.duration"]; its != (run.Policy == "hedge") {
			t.Errorf("%s: metrics of bobtail's client: %v", run.Policy, its)
		}
	}
}

// A part of the requests is traced, the same ones under each policy; those that are not make
// no spans at all.
func TestOTLPRatio(t *testing.T) {
	r := newReceiver(t, nil)
	code, out, errs := bench(t, append(brief, "--otlp", "http://"+r.addr, "--otlp-ratio", "0.3")...)
	if code != 0 && code != exitSaturated {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	var d tracedRuns
	unmarshal(t, out, &d)
	traced := map[string][]int64{}
	for policy, spans := range r.spans {
		roots := 0
		for _, s := range spans {
			if s.Name == "request" {
				traced[policy] = append(traced[policy], attr(s.Attributes, "bobtail.bench.request").GetIntValue())
			}
			if len(s.ParentSpanId) == 0 {
				roots++
			}
		}
		slices.Sort(traced[policy])
		if roots != len(traced[policy]) {
			t.Errorf("%s: %d spans without a parent, %d requests", policy, roots, len(traced[policy]))
		}
	}
	if n := len(traced["none"]); d.TraceRatio != 0.3 || n < 10 || n > 40 || !slices.Equal(traced["none"], traced["hedge"]) {
		t.Errorf("ratio %v, traced %v, want about 24 and the same of both", d.TraceRatio, traced)
	}
	if n := calls(r.metrics["none"]["bobtail.bench.request.duration"]); n < 60 {
		t.Errorf("the histogram has %d requests, want all", n)
	}
}

// A receiver that is not there, that refuses, or that says nothing is told once, and the
// report is what it would be.
func TestOTLPDown(t *testing.T) {
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close() // nobody accepts: the kernel does, and says nothing
	for name, addr := range map[string]string{
		"gone":     gone.Addr().String(),
		"refusing": newReceiver(t, status.Error(codes.Unavailable, "full")).addr,
		"silent":   silent.Addr().String(),
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errs := bench(t, append(brief, "--otlp", addr, "--otlp-ratio", "1")...)
			if code != 0 && code != exitSaturated {
				t.Errorf("exit code %d: %s", code, errs)
			}
			if strings.Count(errs, "--otlp") != 1 || !strings.Contains(errs, addr) {
				t.Errorf("%q, want one line about --otlp and %s", errs, addr)
			}
			var d tracedRuns
			unmarshal(t, out, &d)
			for _, run := range d.Runs {
				if run.Calls != 60 || run.Slowest != nil {
					t.Errorf("%s: %d calls, slowest %v, want 60 and no trace that nobody has", run.Policy, run.Calls, run.Slowest)
				}
			}
		})
	}
}

// Without --otlp nothing is said of traces.
func TestNotTraced(t *testing.T) {
	_, out, errs := bench(t, brief...)
	if strings.Contains(out, "slowest") || strings.Contains(out, "trace") {
		t.Errorf("%s\n%s", out, errs)
	}
}

// The metrics of each policy can be scraped while it runs; an interrupt leaves the report,
// and nothing listens any more.
func TestPrometheus(t *testing.T) {
	t.Setenv("BENCH_TEST_MAIN", "1")
	t.Setenv(progressEnv, "1ns")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	errs, w := io.Pipe()
	var out strings.Builder
	code := make(chan int)
	go func() {
		c := run(ctx, []string{"--policies", "none,hedge", "--rate", "200", "--duration", "10m", "--block", "50ms", "--warmup", "0s",
			"--prometheus", "127.0.0.1:0", "-O", "json"}, strings.NewReader(""), &out, w)
		w.Close()
		code <- c
	}()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	var at, text string
	blocks, want := 0, []string{
		`(?m)^bobtail_bench_request_duration_seconds_count\{bobtail_bench_policy="none",.*rpc_response_status_code="OK"\} [1-9]`,
		`(?m)^bobtail_bench_request_duration_seconds_count\{bobtail_bench_policy="hedge",.*rpc_response_status_code="OK"\} [1-9]`,
		`(?m)^bobtail_client_call_duration_seconds_count\{bobtail_bench_policy="hedge",`,
		`(?m)^target_info\{bobtail_bench_policy="none",.*service_name="bobtail-bench"`,
	}
	for lines := bufio.NewScanner(errs); lines.Scan(); {
		if _, url, ok := strings.Cut(lines.Text(), "metrics at "); ok {
			at = url
		} else if blocks++; ctx.Err() == nil {
			var err error
			if text, err = get(client, at); err != nil {
				t.Error(err)
			}
			// The first answers have come, or never will.
			if len(missing(text, want)) == 0 || blocks == 500 {
				cancel()
			}
		}
	}
	if c := <-code; c != exitInterrupted {
		t.Errorf("exit code %d, want %d", c, exitInterrupted)
	}
	if d := decode(t, out.String()); !d.Interrupted || len(d.Runs) != 2 || d.Runs[0].Calls == 0 {
		t.Errorf("report %+v, want what there was", d)
	}
	for _, one := range missing(text, want) {
		t.Errorf("no %s in\n%.2000s", one, text)
	}
	if strings.Contains(text, `bobtail_client_call_duration_seconds_count{bobtail_bench_policy="none"`) {
		t.Error("grpc's own policy has metrics of bobtail's client")
	}
	if _, err := get(client, at); err == nil {
		t.Errorf("%s still answers", at)
	}
}

// missing returns the expressions that text does not match.
func missing(text string, want []string) []string {
	return slices.DeleteFunc(slices.Clone(want), func(one string) bool { return regexp.MustCompile(one).MatchString(text) })
}

func get(client http.Client, url string) (string, error) {
	res, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", res.Status, text)
	}
	return string(text), err
}
