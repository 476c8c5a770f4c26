package main

import (
	"context"
	"fmt"
	"net"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail/bench/experiment"
	"github.com/bobtail-rpc/bobtail/bench/observe"
	"github.com/bobtail-rpc/bobtail/bench/report"
)

// defaultTraceRatio is the share of the requests that are traced: of 10,000 calls, the tenth
// slowest is most likely among them. docs/benchmarks.md has what tracing costs.
const defaultTraceRatio = 0.1

// observation are the flags about OpenTelemetry.
type observation struct {
	otlp       string
	ratio      float64
	prometheus string
}

func (o *observation) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.otlp, "otlp", "", "`host:port` or URL of an OTLP/gRPC receiver of traces and metrics")
	f.Float64Var(&o.ratio, "otlp-ratio", defaultTraceRatio, "the `share` of the requests that are traced, with --otlp")
	f.StringVar(&o.prometheus, "prometheus", "", "`host:port` where /metrics can be scraped while it runs; port 0 is any")
}

// check finds what makes no sense.
func (o *observation) check(set func(string) bool) error {
	if set("otlp") {
		url, err := observe.ParseEndpoint(o.otlp)
		if err != nil {
			return usagef("--otlp %q: %w", o.otlp, err)
		}
		o.otlp = url
	}
	switch {
	case set("otlp-ratio") && !set("otlp"):
		return usagef("--otlp-ratio %v, want --otlp too: without it nothing is traced", o.ratio)
	case set("otlp-ratio") && !(o.ratio > 0 && o.ratio <= 1):
		return usagef("--otlp-ratio %v, want more than 0, at most 1", o.ratio)
	case set("prometheus") && o.prometheus == "":
		return usagef("--prometheus %q, want host:port", o.prometheus)
	}
	return nil
}

// observed is what observes the policies of a run; nil if nobody asked for it.
type observed struct {
	*observe.Observer
	policies []*observe.Policy
	ratio    float64
}

// observe begins to observe the policies. What is to be told goes to the progress.
func (o *observation) observe(policies []policy, bar *progress) (*observed, error) {
	if o.otlp == "" && o.prometheus == "" {
		return nil, nil
	}
	c := observe.Config{OTLP: o.otlp, Ratio: o.ratio, Tell: func(what string) { bar.tell("--otlp: " + what) }}
	if o.prometheus != "" {
		lis, err := net.Listen("tcp", o.prometheus)
		if err != nil {
			return nil, usagef("--prometheus %q: %w", o.prometheus, err)
		}
		bar.tell(fmt.Sprintf("metrics at http://%s/metrics", lis.Addr()))
		c.Scrape = lis
	}
	watching := &observed{Observer: observe.Start(c)}
	if o.otlp != "" {
		watching.ratio = o.ratio
	}
	for _, p := range policies {
		one, err := watching.Policy(p.name)
		if err != nil {
			watching.close()
			return nil, fmt.Errorf("policy %s: OpenTelemetry: %w", p.name, err)
		}
		watching.policies = append(watching.policies, one)
	}
	return watching, nil
}

// options are the dial options of policy i.
func (o *observed) options(i int, p policy) ([]grpc.DialOption, error) {
	if o == nil {
		return p.opts, nil
	}
	opts, err := p.remake(o.policies[i].Options()...)
	return append(opts, o.policies[i].DialOptions()...), err
}

// begin is told of each request; nil if nobody is.
func (o *observed) begin() func(context.Context, int, experiment.Request) (context.Context, func(error)) {
	if o == nil {
		return nil
	}
	return func(ctx context.Context, arm int, r experiment.Request) (context.Context, func(error)) {
		return o.policies[arm].Begin(ctx, r)
	}
}

// finish sends what is left, and names the slowest requests in the report.
func (o *observed) finish(r *report.Report) {
	if o == nil {
		return
	}
	o.close()
	r.TraceRatio = o.ratio
	for i := range r.Policies {
		r.Policies[i].Slowest = o.policies[i].Slowest()
	}
}

// close ends it; it may be called twice.
func (o *observed) close() {
	if o != nil {
		o.Observer.Close()
	}
}
