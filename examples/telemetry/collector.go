package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/collector/confmap/provider/yamlprovider"
	"go.opentelemetry.io/collector/consumer"
	"go.opentelemetry.io/collector/exporter"
	"go.opentelemetry.io/collector/otelcol"
	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/ptrace"
	"go.opentelemetry.io/collector/receiver"
	"go.opentelemetry.io/collector/receiver/otlpreceiver"
	"go.opentelemetry.io/collector/service/telemetry/otelconftelemetry"
)

// collectorConfig is the configuration of the collector. Its exporter is our own: see [spans].
// It tells nothing of itself.
const collectorConfig = `yaml:
receivers:
  otlp:
    protocols:
      grpc:
        endpoint: %s
exporters:
  ledger:
service:
  telemetry:
    logs:
      level: error
    metrics:
      level: none
  pipelines:
    traces:
      receivers: [otlp]
      exporters: [ledger]
`

// span is what the ledger keeps of one.
type span struct {
	id, parent, name, service string
	start, end                time.Time
	attributes                map[string]string
}

// spans is the collector's exporter: it keeps what it is sent, by trace.
type spans struct {
	mu     sync.Mutex // guards all of it
	count  int
	traces map[string][]span
}

// startCollector runs an OpenTelemetry Collector with an OTLP receiver at addr. stop ends it
// after it has handed on what it has.
func startCollector(ctx context.Context, addr string) (ledger *spans, stop func() error, err error) {
	ledger = &spans{traces: map[string][]span{}}
	kind := component.MustNewType("ledger")
	own := exporter.NewFactory(kind, func() component.Config { return &struct{}{} },
		exporter.WithTraces(func(context.Context, exporter.Settings, component.Config) (exporter.Traces, error) {
			return tracesExporter{ledger: ledger}, nil
		}, component.StabilityLevelDevelopment))
	otlp := otlpreceiver.NewFactory()
	collector, err := otelcol.NewCollector(otelcol.CollectorSettings{
		BuildInfo: component.BuildInfo{Command: "telemetry-example", Version: "1"},
		Factories: func() (otelcol.Factories, error) {
			return otelcol.Factories{
				Receivers: map[component.Type]receiver.Factory{otlp.Type(): otlp},
				Exporters: map[component.Type]exporter.Factory{kind: own},
				Telemetry: otelconftelemetry.NewFactory(),
			}, nil
		},
		ConfigProviderSettings: otelcol.ConfigProviderSettings{ResolverSettings: confmap.ResolverSettings{
			URIs:              []string{fmt.Sprintf(collectorConfig, addr)},
			ProviderFactories: []confmap.ProviderFactory{yamlprovider.NewFactory()},
		}},
		DisableGracefulShutdown: true, // the program takes the signals
		SkipSettingGRPCLogger:   true,
	})
	if err != nil {
		return nil, nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- collector.Run(context.WithoutCancel(ctx)) }()
	for collector.GetState() != otelcol.StateRunning {
		select {
		case err := <-ended:
			return nil, nil, fmt.Errorf("collector: %w", err)
		case <-ctx.Done():
			collector.Shutdown()
			return nil, nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return ledger, func() error {
		collector.Shutdown()
		return <-ended
	}, nil
}

// tracesExporter hands what it is sent to the ledger. It starts nothing.
type tracesExporter struct {
	component.StartFunc
	component.ShutdownFunc
	ledger *spans
}

// Capabilities says that it changes nothing of what it is sent.
func (tracesExporter) Capabilities() consumer.Capabilities { return consumer.Capabilities{} }

func (e tracesExporter) ConsumeTraces(_ context.Context, td ptrace.Traces) error {
	e.ledger.mu.Lock()
	defer e.ledger.mu.Unlock()
	for _, resource := range td.ResourceSpans().All() {
		service, _ := resource.Resource().Attributes().Get("service.name")
		for _, scope := range resource.ScopeSpans().All() {
			for _, s := range scope.Spans().All() {
				e.ledger.count++
				trace, id, parent := s.TraceID(), s.SpanID(), s.ParentSpanID()
				kept := span{id: hex.EncodeToString(id[:]), name: s.Name(), service: service.AsString(),
					start: s.StartTimestamp().AsTime(), end: s.EndTimestamp().AsTime(), attributes: texts(s.Attributes())}
				if !parent.IsEmpty() {
					kept.parent = hex.EncodeToString(parent[:])
				}
				key := hex.EncodeToString(trace[:])
				e.ledger.traces[key] = append(e.ledger.traces[key], kept)
			}
		}
	}
	return nil
}

func texts(attributes pcommon.Map) map[string]string {
	m := map[string]string{}
	for k, v := range attributes.All() {
		m[k] = v.AsString()
	}
	return m
}

// received is how many spans have come, of how many traces.
func (l *spans) received() (spans, traces int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count, len(l.traces)
}

func (l *spans) has(trace string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.traces[trace]) > 0
}

// hedged returns the trace of a call whose hedge won, complete: both attempts and the
// server's span of the hedge are there. It is "" if there is none.
func (l *spans) hedged() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	best := ""
	for trace, all := range l.traces {
		won, lost, served := "", false, false
		for _, s := range all {
			switch s.attributes["bobtail.attempt.outcome"] {
			case "won":
				if s.attributes["bobtail.attempt.kind"] == "hedge" {
					won = s.id
				}
			case "superseded":
				lost = true
			}
		}
		byID := map[string]span{}
		for _, s := range all {
			byID[s.id] = s
		}
		for _, s := range all {
			if s.attributes["bobtail.admission"] != "" && byID[s.parent].parent == won && won != "" {
				served = true
			}
		}
		if won != "" && lost && served && (best == "" || trace < best) {
			best = trace
		}
	}
	return best
}

// treeAttributes are those that the tree shows.
var treeAttributes = []string{"bobtail.attempt.number", "bobtail.attempt.kind", "bobtail.attempt.outcome", "bobtail.attempt.backend",
	"bobtail.hedging.delay", "bobtail.call.attempts", "bobtail.criticality", "bobtail.admission", "bobtail.queue.wait"}

// tree writes a trace, one span per line below its parent.
func (l *spans) tree(w io.Writer, trace string) {
	l.mu.Lock()
	all := slices.Clone(l.traces[trace])
	l.mu.Unlock()
	slices.SortFunc(all, func(a, b span) int { return cmp.Or(a.start.Compare(b.start), strings.Compare(a.id, b.id)) })
	if len(all) == 0 {
		return
	}
	known, begin := map[string]bool{}, all[0].start
	for _, s := range all {
		known[s.id] = true
	}
	var write func(parent string, depth int)
	write = func(parent string, depth int) {
		for _, s := range all {
			above := s.parent
			if !known[above] {
				above = ""
			}
			if above != parent {
				continue
			}
			var shown []string
			for _, k := range treeAttributes {
				if v, ok := s.attributes[k]; ok {
					shown = append(shown, strings.TrimPrefix(k, "bobtail.")+"="+v)
				}
			}
			name := strings.Repeat("  ", depth) + s.name
			fmt.Fprintf(w, "  %-30s %-9s %6.1f to %6.1f ms  %s\n", name, s.service, ms(s.start.Sub(begin)), ms(s.end.Sub(begin)), strings.Join(shown, " "))
			write(s.id, depth+1)
		}
	}
	write("", 0)
}

func ms(d time.Duration) float64 { return d.Seconds() * 1000 }
