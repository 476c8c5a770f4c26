// Command bench measures what a policy does to the latency tail of gRPC calls,
// and what that costs:
//
//	go run ./bench
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit codes, beside 0 and 1.
const (
	exitUsage       = 2   // a flag or file that makes no sense
	exitSaturated   = 98  // the figures are the generator's
	exitInterrupted = 130 // Ctrl-C: 128 + SIGINT
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends the process the hard way
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is main without the process: it returns the exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newCommand()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	var exit exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if exit.err != nil {
			fmt.Fprintln(stderr, "bench:", exit.err)
		}
		return exit.code
	}
	fmt.Fprintln(stderr, "bench:", err)
	return 1
}

// exitError carries an exit code; a nil err says nothing more.
type exitError struct {
	code int
	err  error
}

func (e exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e exitError) Unwrap() error { return e.err }

func usage(err error) error { return exitError{exitUsage, err} }

func usagef(format string, args ...any) error { return usage(fmt.Errorf(format, args...)) }

const help = `bench runs real gRPC servers on this machine's loopback, sends them requests under
one policy after another, and prints what each did to the latency tail and what
that cost. With nothing else it compares the built-in policies in the scenario
"stragglers" and takes about 45 seconds. "bench scenarios" lists the others. "bench
sweep" offers a server more and more load.

How to read the table:

  p50 ... p99.9   The time within which 50% ... 99.9% of requests were answered, in
                  milliseconds. It counts from when a request was meant to start, so
                  a request that had to wait to be sent is not made to look fast. A
                  failed request ranks as slower than all others. "n/a (needs N)":
                  fewer than N requests do not say.
  below them      Where the true value is, 19 times out of 20. If those of two
                  policies overlap, the run does not tell which is better.
  mean            The average of the requests that succeeded.
  errors          Requests that failed, timed out or could not be sent.
  goodput         Requests that succeeded, per second.
  attempts        Attempts sent per call: 1.05 is 5% more load on the backends.
  wasted          Attempts per call whose answer nobody used.
  p50 x, p99 x    Relative to the first policy: 0.25 is four times as fast.

The last line is the generator's own: how late it sent a request (99 of 100 were
less late than this) and its share of the processors. If it could not keep its
schedule, the report says SATURATED and the exit code is 98: the figures then
are about this machine, not about the policies.

The policies run in turns, in short blocks over the same arrivals and the same
service times. The same seed gives the same ones again.

Scenarios with faults that leave something behind (a queue, an open breaker) run
all policies at the same time instead, each against backends of its own. Below the
table then stand, before, in and after the faults, how many attempts a call took
and what share of requests succeeded; how long after the last fault it took until
95% did and went on doing so ("never": not within the run); and goodput over time.
Requests and their attempts count where the request was meant to start. The
scenario's time begins after the warm-up.

With --otlp a part of the requests is traced, the same ones under each policy, and
below the table stand the trace ids of the slowest. --prometheus has the metrics
scraped. Neither changes what is printed above; what they cost is part of what is
measured: see docs/benchmarks.md.

Exit codes: 0 done, 1 failed, 2 wrong usage, 98 saturated, 130 interrupted (what
there is by then is printed). "go run" shows them and itself exits with 1.`

func newCommand() *cobra.Command {
	compare := newCompare()
	root := &cobra.Command{
		Use:           "bench",
		Short:         "Measure what a policy does to the gRPC latency tail",
		Long:          help,
		Args:          noArgs,
		RunE:          compare.RunE,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.Flags().AddFlagSet(compare.Flags())
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	root.AddCommand(compare, newSweep(), newScenarios(), newServe())
	return root
}

// noArgs is cobra.NoArgs as a usage error.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("unknown command %q: %q lists them", args[0], cmd.Root().Name()+" --help")
	}
	return nil
}
