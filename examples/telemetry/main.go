// Telemetry shows what bobtail tells of itself: servers and clients in trouble, a Prometheus
// that scrapes them and an OpenTelemetry Collector that takes their traces, both real, and the
// answer of that Prometheus to every query of the dashboard in docs/grafana.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"
)

type settings struct {
	dashboard, rules  string
	withoutPrometheus bool
	traffic           time.Duration // at most
}

func main() {
	var s settings
	flag.StringVar(&s.dashboard, "dashboard", "../../docs/grafana/bobtail.json", "the dashboard whose queries are asked")
	flag.StringVar(&s.rules, "rules", "../../docs/prometheus/bobtail.rules.yml", "the rules that Prometheus loads")
	flag.BoolVar(&s.withoutPrometheus, "without-prometheus", false, "start no Prometheus: only look whether the metrics of the dashboard are there")
	flag.DurationVar(&s.traffic, "traffic", 35*time.Second, "how long calls are made at most, 10s to 10m; they end when every query has data")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout, s); err != nil {
		stop()
		fmt.Fprintln(os.Stderr, "telemetry:", err)
		os.Exit(1)
	}
}

// askEvery is how often it is looked whether every query has data yet.
const askEvery = 2 * time.Second

// run is the program. It leaves nothing behind, however it ends.
func run(ctx context.Context, out io.Writer, s settings) (err error) {
	if s.traffic < 10*time.Second || s.traffic > 10*time.Minute {
		return fmt.Errorf("traffic %v, want [10s, 10m]", s.traffic)
	}
	// Should anything hang, it hangs no longer than this.
	ctx, cancel := context.WithTimeout(ctx, s.traffic+20*time.Second)
	defer cancel()
	panels, err := readDashboard(s.dashboard)
	if err != nil {
		return err
	}
	binary := ""
	if !s.withoutPrometheus {
		if binary, err = findPrometheus(); err != nil {
			return err
		}
	}

	otlp, err := freeAddress()
	if err != nil {
		return err
	}
	ledger, stopCollector, err := startCollector(ctx, otlp)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopCollector()) }()

	world, err := newWorld(ctx, otlp)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, world.close()) }()

	var prom *prometheus
	if binary != "" {
		if prom, err = startPrometheus(ctx, binary, s.rules, world.metrics, world.instances()); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, prom.stop()) }()
		fmt.Fprintf(out, "%s at %s scrapes %d instances; an OpenTelemetry Collector takes their traces at %s\n", prom.version, prom.url, len(world.instances()), otlp)
	}
	fmt.Fprintf(out, "calls are made: some are slow, some fail, some are too many\n\n")
	began := time.Now()
	// The questions are asked while calls are made, as one would look at a dashboard. On a busy
	// machine it takes longer until all that can go wrong has gone wrong.
	calls, stopCalls := context.WithCancel(ctx)
	done := world.traffic(calls)
	defer func() {
		stopCalls()
		<-done
	}()
	look := func(out io.Writer) error {
		if prom != nil {
			return ask(ctx, out, prom, panels)
		}
		return lookForNames(ctx, out, world, panels)
	}
	for {
		select {
		case <-time.After(askEvery):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		var table bytes.Buffer
		err = look(&table)
		if (err != nil || ledger.hedged() == "") && ctx.Err() == nil && time.Since(began) < s.traffic {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		fmt.Fprintf(out, "after %v\n%s", time.Since(began).Round(time.Second), &table)
		break
	}
	world.flush(ctx)
	tellTraces(ctx, out, prom, ledger)
	return err
}

// ask asks every query of the dashboard, and returns an error that names those that
// have no answer.
func ask(ctx context.Context, out io.Writer, prom *prometheus, panels []panel) error {
	var empty []error
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "panel\tquery\tseries\ta sample")
	queries := 0
	for _, p := range panels {
		for _, q := range p.queries {
			queries++
			answer, err := prom.query(ctx, q.expr)
			if err != nil {
				return fmt.Errorf("%s: %s: %w", p.title, q.expr, err)
			}
			if len(answer) == 0 {
				empty = append(empty, fmt.Errorf("%q has no data: %s", p.title, q.expr))
			}
			fmt.Fprintf(table, "%s\t%s\t%d\t%s\n", p.title, shortened(q.expr), len(answer), greatest(answer))
		}
	}
	table.Flush()
	fmt.Fprintf(out, "\n%d queries of %d panels, %d without data\n", queries, len(panels), len(empty))
	n, broken, err := prom.rules(ctx)
	if err != nil {
		return err
	}
	pending, err := prom.query(ctx, `count by (alertname, alertstate) (ALERTS)`)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%d rules are loaded, %d of them with an error; alerts that are pending or firing:", n, len(broken))
	for _, a := range pending {
		fmt.Fprintf(out, " %s (%s)", a.labels["alertname"], a.labels["alertstate"])
	}
	fmt.Fprintln(out)
	return errors.Join(append(empty, broken...)...)
}

// tellTraces tells what the collector has received, and shows one hedged call; and a
// point of a histogram that leads to a trace.
func tellTraces(ctx context.Context, out io.Writer, prom *prometheus, ledger *spans) {
	n, traces := ledger.received()
	fmt.Fprintf(out, "\nthe collector received %d spans of %d traces\n", n, traces)
	if trace := ledger.hedged(); trace != "" {
		fmt.Fprintf(out, "a hedged call, trace %s:\n", trace)
		ledger.tree(out, trace)
	} else {
		fmt.Fprintln(out, "no hedged call among them")
	}
	if prom == nil {
		return
	}
	exemplars, err := prom.exemplars(ctx, "bobtail_client_call_duration_seconds_bucket")
	if err != nil {
		fmt.Fprintln(out, "no exemplars:", err)
		return
	}
	slices.SortFunc(exemplars, func(a, b exemplar) int { return cmp.Compare(b.value, a.value) }) // the slowest is asked about
	for _, e := range exemplars {
		if ledger.has(e.trace) {
			fmt.Fprintf(out, "%d exemplars; for example the call of %s that took %.1f ms (bucket up to %s s) is trace %s, which the collector has\n",
				len(exemplars), e.method, e.value*1000, e.le, e.trace)
			return
		}
	}
	fmt.Fprintf(out, "%d exemplars, none of which leads to a trace that the collector has\n", len(exemplars))
}

// freeAddress returns an address of the loopback that nobody listens at. Somebody may take it
// before it is used; who uses it then gets an error.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}
