// Package experiment compares policies fairly: they run in turns, in short
// blocks, over the same arrivals and the same service times, so that what the
// machine does in a given second happens to all of them.
//
// Where a scenario says sideBySide they run at the same time instead, each with
// backends of its own, over the same arrivals, service times and faults: what one
// policy leaves behind, a full queue or an open breaker, must not be another's.
// The blocks are then the steps of one timeline. It begins with the first measured
// block: the warm-up comes before its zero, so it shifts no fault.
package experiment

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	"github.com/bobtail-rpc/bobtail/bench/load"
	"github.com/bobtail-rpc/bobtail/bench/report"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

// Config says what to compare, and how long.
type Config struct {
	Scenario *scenario.Scenario
	Seed     uint64
	// Arms are the policies, each with its connection; at least one. Side by side,
	// each connection leads to other backends.
	Arms []Arm
	// Block is the length of a turn, or of a step of the timeline.
	Block time.Duration
	// Warmup is how much of each policy's time is dropped, in whole blocks.
	Warmup time.Duration
	// Duration is how long each policy is measured, in whole blocks. 0: until it
	// has made the scenario's requests.
	Duration time.Duration
	// Sleep is how the generator waits.
	Sleep load.Sleep
	// Progress is told what has been sent, once per block. It may be nil.
	Progress func(Progress)
	// Begin, if it is not nil, is told of each request of Arms[arm] as it is sent. The
	// request is made under the context that it returns; end is told of its end. Both are
	// part of the request's latency, and are called from many goroutines at once.
	Begin func(ctx context.Context, arm int, r Request) (_ context.Context, end func(error))
}

// Request is one request, all its leaf calls together.
type Request struct {
	ID uint64
	// Intended is when it was meant to start, At where that is on the scenario's timeline.
	Intended time.Time
	At       time.Duration
	// Warmup says that the report does not have it.
	Warmup bool
}

// ErrAbandoned wraps the error of a request that an interrupt has cut off: the report does
// not have it.
var ErrAbandoned = errors.New("experiment: cut off by an interrupt")

// Arm is a policy and the one connection that it keeps over the whole run. The
// connection was dialled with [load.CountAttempts].
type Arm struct {
	Name string
	Conn *grpc.ClientConn
}

// Progress is how far the run is, all policies together.
type Progress struct {
	// Policy is the one that has just had its turn, "" if all have; Block which,
	// from 1.
	Policy string
	Block  int
	// Sent is the requests so far, of about Total.
	Sent, Total int
}

// maxInFlight bounds the leaf calls under way, at a few KB each. An open loop
// against backends that stopped would otherwise take all memory.
const maxInFlight = 50_000

// grace is what requests under way get to end after an interrupt: more than a
// straggler takes, less than a reader's patience.
const grace = 250 * time.Millisecond

// Run compares. When ctx ends early it returns what there is, marked as
// interrupted. An error is a policy that cannot connect.
func Run(ctx context.Context, c Config) (*report.Report, error) {
	if err := connect(ctx, c); err != nil {
		return nil, err
	}
	g := &load.Generator{
		Sleep:       c.Sleep,
		Timeout:     time.Duration(c.Scenario.Timeout),
		MaxInFlight: max(maxInFlight/c.Scenario.Fanout, 1),
	}
	// Requests outlive an interrupt by the grace.
	base, cutOff := context.WithCancel(context.WithoutCancel(ctx))
	defer cutOff()

	began, cpu := time.Now(), load.CPUTime()
	tallies := run(ctx, base, c, g)
	busy, used := time.Since(began), load.CPUTime()-cpu

	patience := time.Duration(c.Scenario.Timeout) + time.Second
	settle(ctx, g, patience, cutOff)

	r := &report.Report{
		Scenario: c.Scenario, Seed: c.Seed, Block: c.Block,
		Warmup:      time.Duration(ceil(c.Warmup, c.Block)) * c.Block,
		Interrupted: ctx.Err() != nil,
	}
	for i, arm := range c.Arms {
		p := report.Policy{Name: arm.Name}
		for _, t := range tallies[i] {
			// One without requests counts too: it is time in which nothing succeeded.
			if b := t.block(c.Scenario.Fanout); b.Length > 0 {
				p.Blocks = append(p.Blocks, b)
			}
		}
		r.Policies = append(r.Policies, p)
	}
	h := g.Health()
	r.Generator = report.Generator{
		LagP99: h.LagP99, Overflow: h.Overflow, Abandoned: h.Abandoned,
		CPU: used.Seconds() / max(busy.Seconds(), 1e-9) / float64(runtime.NumCPU()),
	}
	return r, nil
}

// settle waits for the requests under way: to their timeout, or, once ctx has
// ended, for the grace.
func settle(ctx context.Context, g *load.Generator, patience time.Duration, cutOff func()) {
	all, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if g.Drain(all) {
		return
	}
	brief, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	if g.Drain(brief) {
		return
	}
	cutOff()
	g.Drain(context.WithoutCancel(ctx)) // a cancelled call returns at once
}

// connect waits until every policy has a backend: dialling is no part of a latency.
func connect(ctx context.Context, c Config) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, arm := range c.Arms {
		arm.Conn.Connect()
		for s := arm.Conn.GetState(); s != connectivity.Ready; s = arm.Conn.GetState() {
			if !arm.Conn.WaitForStateChange(ctx, s) {
				return fmt.Errorf("experiment: policy %s: no backend is ready (%v): %w", arm.Name, s, ctx.Err())
			}
		}
	}
	return nil
}
