package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/bobtail-rpc/bobtail/bench/fleet"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

func newScenarios() *cobra.Command {
	return &cobra.Command{
		Use:   "scenarios",
		Short: "List the scenarios and policies, and what each shows",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := cmd.OutOrStdout()
			fmt.Fprintln(out, "Scenarios (--scenario):")
			for _, name := range scenario.Names() {
				s, err := scenario.Named(name)
				if err != nil {
					return err
				}
				fmt.Fprintf(out, "  %-21s %s\n", name, s.Description)
			}
			fmt.Fprintln(out, "\nPolicies (--policies):")
			for _, p := range builtin {
				fmt.Fprintf(out, "  %-21s %s\n", p.name, p.shows)
			}
			fmt.Fprintln(out, "\nServer policies, after a policy and a \"+\", as in \"retry+shed\":")
			for _, p := range servers {
				fmt.Fprintf(out, "  %-21s %s\n", p.name, p.shows)
			}
			fmt.Fprintln(out, "\nAll take files *.json, too: a scenario, a policy document, a server policy document.")
			return nil
		},
	}
}

// newServe is the child that plays the backends: see package fleet.
func newServe() *cobra.Command {
	return &cobra.Command{
		Use:    "serve",
		Short:  "Play backends as told on standard input",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return fleet.Serve(cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}
