package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

// settings are the flags of compare.
type settings struct {
	scenario string
	policies []string
	rate     float64
	arrivals string
	duration time.Duration
	calls    int
	block    time.Duration
	warmup   time.Duration
	timeout  time.Duration
	seed     uint64
	output   string
	children int
	observation
}

func newCompare() *cobra.Command {
	var s settings
	cmd := &cobra.Command{
		Use:   "compare",
		Short: "Compare policies in one scenario (the default command)",
		Long:  help,
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.compare(cmd)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&s.scenario, "scenario", scenario.Default, "a `name` that \"bench scenarios\" lists, or a file *.json")
	f.StringSliceVar(&s.policies, "policies", nil, "`names` or policy documents *.json, comma-separated; the first is the yardstick (default: the scenario's)")
	f.Float64Var(&s.rate, "rate", 0, "`requests` per second (default: the scenario's)")
	f.StringVar(&s.arrivals, "arrivals", "", "`poisson` or uniform (default: the scenario's)")
	f.DurationVar(&s.duration, "duration", 0, "how long each policy is measured, instead of --calls")
	f.IntVar(&s.calls, "calls", 0, "how many `requests` each policy is measured with (default: the scenario's)")
	f.DurationVar(&s.block, "block", 500*time.Millisecond, "the length of a policy's turn, or of a step of the timeline")
	f.DurationVar(&s.warmup, "warmup", time.Second, "how much of each policy's time is dropped before measuring, in whole blocks")
	f.DurationVar(&s.timeout, "timeout", 0, "what ends a request (default: the scenario's)")
	f.Uint64Var(&s.seed, "seed", 1, "fixes arrivals and service times")
	f.StringVarP(&s.output, "output", "o", "table", "`table` or json; -O is the same")
	f.StringVarP(&s.output, "output-format", "O", "table", "as --output")
	f.Lookup("output-format").Hidden = true
	s.observation.flags(cmd)
	f.IntVar(&s.children, "processes", 1, "how many processes share the backends")
	f.Lookup("processes").Hidden = true
	return cmd
}

// check finds what makes no sense and returns the scenario with its overrides.
func (s *settings) check(cmd *cobra.Command) (*scenario.Scenario, error) {
	set := cmd.Flags().Changed
	for _, d := range []struct {
		flag   string
		value  time.Duration
		lo, hi time.Duration
	}{
		{"duration", s.duration, time.Millisecond, 24 * time.Hour},
		{"block", s.block, 10 * time.Millisecond, time.Hour},
		{"warmup", s.warmup, 0, time.Hour},
		{"timeout", s.timeout, time.Millisecond, time.Hour},
	} {
		if set(d.flag) && (d.value < d.lo || d.value > d.hi) {
			return nil, usagef("--%s %v, want %v to %v", d.flag, d.value, d.lo, d.hi)
		}
	}
	switch {
	case set("rate") && !(s.rate > 0 && s.rate <= 1e6):
		return nil, usagef("--rate %v, want more than 0, at most 1000000", s.rate)
	case set("calls") && (s.calls < 1 || s.calls > 1e7):
		return nil, usagef("--calls %d, want 1 to 10000000", s.calls)
	case set("calls") && set("duration"):
		return nil, usagef("--calls %d and --duration %v, want one of them", s.calls, s.duration)
	case set("arrivals") && s.arrivals != "poisson" && s.arrivals != "uniform":
		return nil, usagef("--arrivals %q, want poisson or uniform", s.arrivals)
	case s.output != "table" && s.output != "json":
		return nil, usagef("--output %q, want table or json", s.output)
	case s.children < 1 || s.children > 1000:
		return nil, usagef("--processes %d, want 1 to 1000", s.children)
	}

	if err := s.observation.check(set); err != nil {
		return nil, err
	}
	sc, err := findScenario(s.scenario)
	if err != nil {
		return nil, usagef("--scenario %s: %w", s.scenario, err)
	}
	if s.rate > 0 {
		sc.Rate = s.rate
	}
	if s.arrivals != "" {
		sc.Arrivals = s.arrivals
	}
	if s.calls > 0 {
		sc.Requests = s.calls
	}
	if s.timeout > 0 {
		sc.Timeout = scenario.Duration(s.timeout)
	}
	if s.duration > 0 {
		if n := sc.Rate * s.duration.Seconds(); n > 1e7 {
			return nil, usagef("--duration %v at %v requests/s is %.0f requests, want at most 10000000", s.duration, sc.Rate, n)
		}
	}
	if set("policies") {
		if len(s.policies) == 0 {
			return nil, usagef("--policies: empty, want names, comma-separated")
		}
		sc.Policies = s.policies
	}
	if len(sc.Policies) == 0 {
		sc.Policies = policyNames()
	}
	return sc, nil
}

func findScenario(name string) (*scenario.Scenario, error) {
	if !strings.HasSuffix(name, ".json") {
		return scenario.Named(name)
	}
	doc, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	return scenario.Decode(doc)
}

// findPolicies looks all of them up before anything is started.
func findPolicies(names []string) ([]policy, error) {
	var all []policy
	for _, name := range names {
		p, err := findPolicy(strings.TrimSpace(name))
		if err != nil {
			return nil, usagef("--policies: %w", err)
		}
		if slices.ContainsFunc(all, func(q policy) bool { return q.name == p.name }) {
			return nil, usagef("--policies: %s is named twice", p.name)
		}
		all = append(all, p)
	}
	return all, nil
}

// canShare finds policies that would need servers of their own where all take turns against
// the same.
func canShare(sc *scenario.Scenario, policies []policy) error {
	for _, p := range policies {
		if !sc.SideBySide && p.server.Policy != policies[0].server.Policy {
			return usagef("--policies: %s and %s differ in their server policy, want a scenario with \"sideBySide\": true: in turns all have the same servers", policies[0].name, p.name)
		}
	}
	return nil
}

func (s *settings) compare(cmd *cobra.Command) error {
	sc, err := s.check(cmd)
	if err != nil {
		return err
	}
	policies, err := findPolicies(sc.Policies)
	if err != nil {
		return err
	}
	if err := canShare(sc, policies); err != nil {
		return err
	}
	r, err := s.measure(cmd, sc, policies)
	if err != nil {
		return err
	}
	write := r.Table
	if s.output == "json" {
		write = r.JSON
	}
	if err := write(cmd.OutOrStdout()); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	if r.Interrupted {
		return exitError{code: exitInterrupted}
	}
	if why := r.Saturated(); len(why) > 0 {
		return exitError{exitSaturated, fmt.Errorf("saturated: %s", strings.Join(why, "; "))}
	}
	return nil
}
