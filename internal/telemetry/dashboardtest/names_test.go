// Package dashboardtest holds that docs/grafana and docs/prometheus ask for metrics, labels and
// values that there are. It is a module of its own because Prometheus's parser is heavier than
// all of the library.
package dashboardtest

import (
	"context"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.opentelemetry.io/otel/attribute"
	exporter "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"google.golang.org/grpc/codes"

	"github.com/bobtail-rpc/bobtail/breaker"
	"github.com/bobtail-rpc/bobtail/internal/telemetry"
	"github.com/bobtail-rpc/bobtail/loadbalance"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// series is what Prometheus knows of a metric.
type series struct {
	kind    string // "counter", "gauge", "bucket", or "total" of a histogram
	seconds bool
	labels  []string
	// values has the labels whose values are a closed list.
	values map[string][]string
	from   string // the name of the instrument
}

// known returns the series of all instruments by the names that the exporter really writes.
func known(t *testing.T) map[string]series {
	t.Helper()
	values := closed(t)
	all := map[string]series{}
	for _, i := range instruments() {
		var f *dto.MetricFamily
		for _, got := range exported(t, func(m metric.Meter) error { return record(m, i) }) {
			if got.GetName() != "target_info" {
				f = got
			}
		}
		s := series{seconds: i.Unit == "s", values: map[string][]string{}, from: i.Name}
		for _, pair := range f.GetMetric()[0].GetLabel() {
			if !strings.HasPrefix(pair.GetName(), "otel_scope_") {
				s.labels = append(s.labels, pair.GetName())
			}
		}
		s.labels = append(s.labels, "job", "instance") // the scraper's own
		for label, v := range values {
			if metric, name, ok := strings.Cut(label, " "); ok && metric == i.Name {
				s.values[name] = v
			} else if !ok && s.values[label] == nil {
				s.values[label] = v
			}
		}
		switch f.GetType() {
		case dto.MetricType_HISTOGRAM:
			s.kind = "total"
			all[f.GetName()+"_count"], all[f.GetName()+"_sum"] = s, s
			s.kind, s.labels = "bucket", append(slices.Clone(s.labels), "le")
			all[f.GetName()+"_bucket"] = s
		case dto.MetricType_COUNTER:
			s.kind = "counter"
			all[f.GetName()] = s
		default:
			s.kind = "gauge"
			all[f.GetName()] = s
		}
	}
	return all
}

func instruments() []telemetry.Instrument {
	return append(telemetry.Instruments(), telemetry.ServerInstruments()...)
}

// record makes the instrument as package telemetry does, and records a value with all labels.
func record(m metric.Meter, i telemetry.Instrument) error {
	var labels []attribute.KeyValue
	for _, l := range i.Labels {
		labels = append(labels, attribute.String(l, "x"))
	}
	with, ctx := metric.WithAttributes(labels...), context.Background()
	switch i.Type {
	case "histogram":
		h, err := m.Float64Histogram(i.Name, metric.WithUnit(i.Unit))
		h.Record(ctx, 1, with)
		return err
	case "counter":
		c, err := m.Int64Counter(i.Name, metric.WithUnit(i.Unit))
		c.Add(ctx, 1, with)
		return err
	}
	g, err := m.Float64Gauge(i.Name, metric.WithUnit(i.Unit))
	g.Record(ctx, 1, with)
	return err
}

// exported returns what the Prometheus exporter makes of what is recorded.
func exported(t *testing.T, record func(metric.Meter) error) []*dto.MetricFamily {
	t.Helper()
	registry, mp := provider(t)
	if err := record(mp.Meter("test")); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	return families
}

func provider(t *testing.T) (*prometheus.Registry, *sdkmetric.MeterProvider) {
	t.Helper()
	registry := prometheus.NewRegistry()
	e, err := exporter.New(exporter.WithRegisterer(registry))
	if err != nil {
		t.Fatal(err)
	}
	return registry, sdkmetric.NewMeterProvider(sdkmetric.WithReader(e))
}

// closed returns the labels whose values are a closed list, by the label, or by the
// instrument and the label where instruments differ.
func closed(t *testing.T) map[string][]string {
	t.Helper()
	v := map[string][]string{
		"bobtail_shadow": {"true", "false"},
		"bobtail_hedged": {"true", "false"},

		"bobtail.client.hedges.suppressed bobtail_reason":  reasons(t, "hedge suppressed"),
		"bobtail.client.retries.suppressed bobtail_reason": reasons(t, "retry suppressed"),
		"bobtail.client.refusals bobtail_reason":           reasons(t, "refused"),

		"bobtail.client.breaker.transitions bobtail_state": {breaker.Closed.String(), breaker.HalfOpen.String(), breaker.Open.String()},
		"bobtail.client.breaker.transitions bobtail_reason": texts(breaker.TooManyFailures, breaker.TooManySlow,
			breaker.ProbeDue, breaker.ProbeFailed, breaker.ProbeSlow, breaker.ProbesSucceeded),
		"bobtail.client.balancer.transitions bobtail_event": texts(loadbalance.Ejected, loadbalance.Readmitted,
			loadbalance.PanicBegan, loadbalance.PanicEnded),
		"bobtail.client.balancer.transitions bobtail_reason": texts(loadbalance.ReasonLatency, loadbalance.ReasonFailures,
			loadbalance.ReasonProbes, loadbalance.ReasonTime, loadbalance.ReasonReconnected, loadbalance.ReasonLimit, loadbalance.ReasonDisabled),

		"bobtail.server.overload.transitions bobtail_state": meant(t, "bobtail.server.overload.transitions"),
	}
	for r := shedding.AtLimit; r <= shedding.ClientGone; r++ {
		if key := "bobtail.server.refusals bobtail_reason"; !slices.Contains(v[key], r.String()) {
			v[key] = append(v[key], r.String())
		}
	}
	for c := shedding.Sheddable; c <= shedding.CriticalPlus; c++ {
		v["bobtail_criticality"] = append(v["bobtail_criticality"], c.String())
	}
	// What a client really writes of every kind, outcome and status.
	registry, mp := provider(t)
	client, err := telemetry.New(nil, mp, false)
	if err != nil {
		t.Fatal(err)
	}
	method := client.Method("t", "/s/m", true)
	for _, kind := range []telemetry.Kind{telemetry.First, telemetry.Hedge, telemetry.Retry, telemetry.Tied} {
		for _, outcome := range []telemetry.Outcome{telemetry.Won, telemetry.Superseded, telemetry.Failed, telemetry.Refused} {
			for code := codes.OK; code <= codes.Unauthenticated; code++ {
				var c telemetry.Call
				c.Begin(context.Background(), method, "/s/m")
				_, a := c.Attempt(c.Context, 1, kind)
				a.End(outcome, code, "", "")
				c.End(code, "")
			}
		}
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, p := range m.GetLabel() {
				switch name, value := p.GetName(), p.GetValue(); name {
				case "bobtail_attempt_kind", "bobtail_attempt_outcome", "grpc_status":
					if !slices.Contains(v[name], value) {
						v[name] = append(v[name], value)
					}
				}
			}
		}
	}
	return v
}

func texts[S ~string](all ...S) []string {
	var s []string
	for _, v := range all {
		s = append(s, string(v))
	}
	return s
}

func reasons(t *testing.T, event string) []string {
	t.Helper()
	for _, e := range telemetry.Events() {
		if e.Name == event {
			return e.Reasons
		}
	}
	t.Fatalf("there is no event %q", event)
	return nil
}

// meant returns the values that the meaning of an instrument names.
func meant(t *testing.T, name string) []string {
	t.Helper()
	var found []string
	for _, i := range instruments() {
		if i.Name == name {
			for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(i.Meaning, -1) {
				found = append(found, m[1])
			}
		}
	}
	if len(found) == 0 {
		t.Fatalf("%s names no values", name)
	}
	return found
}

// The names are those that the dashboard's author looked up, not those that one would guess.
func TestExportedNames(t *testing.T) {
	all := known(t)
	for name, kind := range map[string]string{
		"bobtail_client_call_duration_seconds_bucket": "bucket",
		"bobtail_client_attempts_total":               "counter",
		"bobtail_client_breaker_state_ratio":          "gauge", // of unit "1"
		"bobtail_client_hedging_p99_seconds":          "gauge",
		"grpc_client_call_hedges_sum":                 "total",
		"bobtail_server_queue_wait_seconds_count":     "total",
		"bobtail_server_tenants":                      "gauge",
	} {
		if all[name].kind != kind {
			t.Errorf("%s is %q, want %q", name, all[name].kind, kind)
		}
	}
	values := all["bobtail_client_attempts_total"].values
	if len(values["bobtail_attempt_kind"]) != 4 || len(values["bobtail_attempt_outcome"]) != 4 {
		t.Errorf("kinds and outcomes %v, want four each", values)
	}
	if got := all["bobtail_client_call_duration_seconds_count"].values["grpc_status"]; len(got) != 17 {
		t.Errorf("statuses %v, want 17", got)
	}
}

// An instrument's labels are bounded or known to be free, so that a new one is not checked
// against nothing.
func TestLabelsHaveValues(t *testing.T) {
	for name, s := range known(t) {
		for _, l := range s.labels {
			free := slices.Contains([]string{"grpc_method", "grpc_target", "bobtail_endpoint", "job", "instance", "le"}, l)
			if listed := len(s.values[l]) > 0; listed == free {
				t.Errorf("%s, label %s: free %v, a list %v", name, l, free, s.values[l])
			}
		}
	}
}
