package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/bobtail-rpc/bobtail/bench/clock"
	"github.com/bobtail-rpc/bobtail/bench/experiment"
	"github.com/bobtail-rpc/bobtail/bench/fleet"
	"github.com/bobtail-rpc/bobtail/bench/load"
	"github.com/bobtail-rpc/bobtail/bench/report"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

// measure starts the backends, runs the experiment and ends them again.
func (s *settings) measure(cmd *cobra.Command, sc *scenario.Scenario, policies []policy) (*report.Report, error) {
	fleet.RelaxGC()
	bar := newProgress(cmd.ErrOrStderr(), sc.Name)
	defer bar.close()
	watching, err := s.observe(policies, bar)
	if err != nil {
		return nil, err
	}
	defer watching.close()
	fleets, closeFleets, err := s.fleets(cmd.Context(), sc, policies)
	defer closeFleets()
	if err != nil {
		return nil, interrupted(cmd.Context(), err)
	}
	clk, err := clock.New()
	if err != nil {
		return nil, err
	}
	defer clk.Close()

	c := experiment.Config{
		Scenario: sc, Seed: s.seed, Block: s.block, Warmup: s.warmup, Duration: s.duration, Sleep: clk.Sleep,
	}
	for i, p := range policies {
		opts, err := watching.options(i, p)
		if err != nil {
			return nil, fmt.Errorf("policy %s: %w", p.name, err)
		}
		conn, err := fleets[i%len(fleets)].Dial(append(opts, load.CountAttempts())...)
		if err != nil {
			return nil, fmt.Errorf("policy %s: %w", p.name, err)
		}
		defer conn.Close()
		c.Arms = append(c.Arms, experiment.Arm{Name: p.name, Conn: conn})
	}

	c.Begin = watching.begin()
	c.Progress = bar.update

	ctx, cancel := context.WithCancelCause(cmd.Context())
	defer cancel(nil)
	for _, f := range fleets {
		go func() {
			select {
			case err := <-f.Died():
				cancel(err)
			case <-ctx.Done():
			}
		}()
	}
	r, err := experiment.Run(ctx, c)
	if err != nil {
		return nil, interrupted(cmd.Context(), err)
	}
	if cmd.Context().Err() == nil && ctx.Err() != nil {
		return nil, context.Cause(ctx) // a backend died: its figures mean nothing
	}
	watching.finish(r)
	return r, nil
}

// fleets starts the backends: one fleet for all policies, or, side by side, one
// for each. The second result ends what has been started, also after an error.
func (s *settings) fleets(ctx context.Context, sc *scenario.Scenario, policies []policy) ([]*fleet.Fleet, func(), error) {
	var all []*fleet.Fleet
	end := func() {
		for _, f := range all {
			f.Close()
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, end, fmt.Errorf("find this program, to start the backends: %w", err)
	}
	for _, install := range serversOf(policies, sc.SideBySide) {
		f, err := fleet.Start(ctx, fleet.Config{
			Scenario: sc, Seed: s.seed, Command: []string{self, "serve"}, Processes: s.children, Server: install,
		})
		if err != nil {
			return nil, end, err
		}
		all = append(all, f)
	}
	return all, end, nil
}

// serversOf returns what is installed in the servers of each fleet.
func serversOf(policies []policy, sideBySide bool) []fleet.Server {
	var servers []fleet.Server
	for _, p := range policies {
		if len(servers) == 0 || sideBySide {
			servers = append(servers, fleet.Server{})
		}
		last := &servers[len(servers)-1]
		*last = last.With(p.server)
	}
	return servers
}

// interrupted gives the exit code of Ctrl-C to an error that it caused.
func interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return exitError{code: exitInterrupted, err: err}
	}
	return err
}
