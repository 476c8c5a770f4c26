package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/bobtail-rpc/bobtail/bench/clock"
	"github.com/bobtail-rpc/bobtail/bench/experiment"
	"github.com/bobtail-rpc/bobtail/bench/fleet"
	"github.com/bobtail-rpc/bobtail/bench/load"
	"github.com/bobtail-rpc/bobtail/bench/report"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

const sweepHelp = `sweep offers a scenario's servers more and more load, and prints what each policy makes
of it: goodput, the latency of what was accepted, and refusals. 1x is what the servers
can do. Each policy has each load to itself, with servers and clients that are new. With
nothing else it sweeps the scenario "overload", which takes about three and a half
minutes.

A policy may be one of clients, or one of clients and one of servers: "retry+shed".
"bench scenarios" lists both.

How to read the table:

  of best         Successes per second, as a share of the best possible: of what is
                  offered or, if that is less, of what the servers can do.
  p50, p99        The time within which 50% and 99% of requests were answered that were
                  not refused, from when they were meant to start. "failed": of those
                  accepted, too many were not answered in time.
  its interval    Where the true p99 is, 19 times out of 20.
  refused         Requests that a server, or the client itself, refused; below the
                  table stands why.
  late            Requests that were accepted, and not answered before their deadline.
  attempts        Attempts sent per call: less than 1 where the client refuses.
  lag, CPU        The generator's own. Where it could not keep its schedule, lag has
                  a "!", the report says SATURATED, and the exit code is 98.

-O json prints all of it, -O csv a line per load and policy, for a plot.`

// sweepSettings are the flags of sweep.
type sweepSettings struct {
	scenario string
	policies []string
	loads    []string
	duration time.Duration
	warmup   time.Duration
	seed     uint64
	output   string
	children int
}

// sweepBlock is what the intervals of percentiles are drawn from: in a sweep of the
// shortest duration there are five.
const sweepBlock = 200 * time.Millisecond

// defaultLoads are those of a scenario that names none.
var defaultLoads = []float64{0.5, 1, 2, 4, 6, 8, 10}

func newSweep() *cobra.Command {
	var s sweepSettings
	cmd := &cobra.Command{
		Use:   "sweep",
		Short: "Offer more and more load, and see what policies make of it",
		Long:  sweepHelp,
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return s.sweep(cmd) },
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&s.scenario, "scenario", "overload", "a `name` that \"bench scenarios\" lists, or a file *.json; it has workers")
	f.StringSliceVar(&s.policies, "policies", nil, "`names` or policy documents *.json, comma-separated (default: the scenario's)")
	f.StringSliceVar(&s.loads, "loads", nil, "`multiples` of what the servers can do, comma-separated (default: the scenario's)")
	f.DurationVar(&s.duration, "duration", 5*time.Second, "how long each policy is measured under each load")
	f.DurationVar(&s.warmup, "warmup", 2*time.Second, "how much is dropped before")
	f.Uint64Var(&s.seed, "seed", 1, "fixes arrivals and service times")
	f.StringVarP(&s.output, "output", "o", "table", "`table`, json or csv; -O is the same")
	f.StringVarP(&s.output, "output-format", "O", "table", "as --output")
	f.Lookup("output-format").Hidden = true
	f.IntVar(&s.children, "processes", 1, "how many processes share the backends")
	f.Lookup("processes").Hidden = true
	return cmd
}

// maxSweepLoad bounds --loads, as a scenario's are.
const maxSweepLoad = 100

// check finds what makes no sense and returns the scenario and its loads.
func (s *sweepSettings) check(cmd *cobra.Command) (*scenario.Scenario, []float64, error) {
	switch {
	case s.duration < time.Second || s.duration > time.Hour:
		return nil, nil, usagef("--duration %v, want 1s to 1h", s.duration)
	case s.warmup < 0 || s.warmup > time.Hour:
		return nil, nil, usagef("--warmup %v, want 0s to 1h", s.warmup)
	case !slices.Contains([]string{"table", "json", "csv"}, s.output):
		return nil, nil, usagef("--output %q, want table, json or csv", s.output)
	case s.children < 1 || s.children > 1000:
		return nil, nil, usagef("--processes %d, want 1 to 1000", s.children)
	}
	sc, err := findScenario(s.scenario)
	if err != nil {
		return nil, nil, usagef("--scenario %s: %w", s.scenario, err)
	}
	if sc.Capacity() == 0 {
		return nil, nil, usagef("--scenario %s: no workers whose work takes time, want a scenario with a capacity", s.scenario)
	}
	if sc.TimedFaults() {
		return nil, nil, usagef("--scenario %s: faults that begin or end, want none in a sweep", s.scenario)
	}
	loads := sc.Loads
	if len(loads) == 0 {
		loads = defaultLoads
	}
	if cmd.Flags().Changed("loads") {
		loads = nil
		for _, text := range s.loads {
			load, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(text), "x"), 64)
			if err != nil || !(load >= 0.01 && load <= maxSweepLoad) {
				return nil, nil, usagef("--loads %s, want 0.01 to %d, such as 0.5,1,2", text, maxSweepLoad)
			}
			loads = append(loads, load)
		}
	}
	if cmd.Flags().Changed("policies") {
		if len(s.policies) == 0 {
			return nil, nil, usagef("--policies: empty, want names, comma-separated")
		}
		sc.Policies = s.policies
	}
	if len(sc.Policies) == 0 {
		sc.Policies = []string{"none", "shed", "shed+client"}
	}
	_, err = findPolicies(sc.Policies)
	return sc, loads, err
}

func (s *sweepSettings) sweep(cmd *cobra.Command) error {
	sc, loads, err := s.check(cmd)
	if err != nil {
		return err
	}
	fleet.RelaxGC()
	bar := newProgress(cmd.ErrOrStderr(), sc.Name)
	result, err := s.run(cmd.Context(), sc, loads, bar)
	bar.close()
	if err != nil {
		return interrupted(cmd.Context(), err)
	}
	write := map[string]func(*report.Sweep) error{
		"table": func(r *report.Sweep) error { return r.Table(cmd.OutOrStdout()) },
		"json":  func(r *report.Sweep) error { return r.JSON(cmd.OutOrStdout()) },
		"csv":   func(r *report.Sweep) error { return r.CSV(cmd.OutOrStdout()) },
	}[s.output]
	if err := write(result); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	if result.Interrupted {
		if s.output == "csv" { // which has no room to say so
			return exitError{exitInterrupted, errors.New("interrupted: the last point is a part of one, and others are missing")}
		}
		return exitError{code: exitInterrupted}
	}
	if why := result.Saturated(); len(why) > 0 {
		return exitError{exitSaturated, fmt.Errorf("saturated: %d of %d points", len(why), len(result.Points))}
	}
	return nil
}

// run measures every policy under every load. When ctx ends early it returns what there
// is.
func (s *sweepSettings) run(ctx context.Context, sc *scenario.Scenario, loads []float64, bar *progress) (*report.Sweep, error) {
	result := &report.Sweep{Scenario: sc, Seed: s.seed, Duration: s.duration, Warmup: s.warmup}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program, to start the backends: %w", err)
	}
	clk, err := clock.New()
	if err != nil {
		return nil, err
	}
	defer clk.Close()

	var total, done float64
	for _, load := range loads {
		total += load * sc.Capacity() * (s.warmup + s.duration).Seconds() * float64(len(sc.Policies))
	}
	for _, load := range loads {
		at := offering(sc, load)
		for _, name := range sc.Policies {
			name = strings.TrimSpace(name)
			bar.at(fmt.Sprintf("%gx %s", load, name))
			r, err := s.point(ctx, self, name, experiment.Config{
				Scenario: at, Seed: s.seed, Block: sweepBlock, Warmup: s.warmup, Duration: s.duration, Sleep: clk.Sleep,
				Progress: func(p experiment.Progress) {
					bar.update(experiment.Progress{Sent: int(done) + p.Sent, Total: int(total)})
				},
			})
			if err != nil && ctx.Err() == nil {
				return nil, err
			}
			if r != nil {
				if p, ok := report.NewPoint(r, load); ok {
					result.Points = append(result.Points, p)
				}
			}
			if ctx.Err() != nil {
				result.Interrupted = true
				return result, nil
			}
			done += load * sc.Capacity() * (s.warmup + s.duration).Seconds()
		}
	}
	return result, nil
}

// point measures one policy under one load, with servers and a client that are new.
func (s *sweepSettings) point(ctx context.Context, self, name string, c experiment.Config) (*report.Report, error) {
	p, err := findPolicy(name)
	if err != nil {
		return nil, err
	}
	f, err := fleet.Start(ctx, fleet.Config{
		Scenario: c.Scenario, Seed: s.seed, Command: []string{self, "serve"}, Processes: s.children, Server: p.server,
	})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	conn, err := f.Dial(append(p.opts, load.CountAttempts())...)
	if err != nil {
		return nil, fmt.Errorf("policy %s: %w", name, err)
	}
	defer conn.Close()
	c.Arms = []experiment.Arm{{Name: p.name, Conn: conn}}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case err := <-f.Died():
			cancel(err)
		case <-ctx.Done():
		}
	}()
	r, err := experiment.Run(ctx, c)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return nil, cause // a backend died: its figures mean nothing
	}
	return r, err
}

// offering is a scenario at so many times its capacity.
func offering(sc *scenario.Scenario, load float64) *scenario.Scenario {
	at := *sc
	at.Rate = load * sc.Capacity()
	return &at
}
