// Package experiment compares policies fairly: they run in turns, in short
// blocks, over the same arrivals and the same service times, so that what the
// machine does in a given second happens to all of them.
package experiment

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	"github.com/bobtail-rpc/bobtail/bench/load"
	"github.com/bobtail-rpc/bobtail/bench/report"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// Config says what to compare, and how long.
type Config struct {
	Scenario *scenario.Scenario
	Seed     uint64
	// Arms are the policies, each with its connection; at least one.
	Arms []Arm
	// Block is the length of a turn.
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
}

// Arm is a policy and the one connection that it keeps over the whole run. The
// connection was dialled with [load.CountAttempts].
type Arm struct {
	Name string
	Conn *grpc.ClientConn
}

// Progress is how far the run is, all policies together.
type Progress struct {
	// Policy is the one that has just had its turn, Block which, from 1.
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
			if b := t.block(c.Scenario.Fanout); len(b.Latencies)+b.Errors > 0 {
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

// run sends every block of every policy. Each policy begins every so many
// rounds: who goes first finds the machine as the last round left it.
func run(ctx, base context.Context, c Config, g *load.Generator) [][]*tally {
	tallies := make([][]*tally, len(c.Arms))
	clients := make([]kvpb.KVClient, len(c.Arms))
	for i, arm := range c.Arms {
		clients[i] = kvpb.NewKVClient(arm.Conn)
	}
	p := newPlan(c)
	progress := Progress{Total: c.expected() * len(c.Arms)}
	start := time.Now()
	for round := 0; ; round++ {
		b, ok := p.next()
		if !ok {
			return tallies
		}
		for turn := range c.Arms {
			i := (round + turn) % len(c.Arms)
			t := &tally{length: b.length}
			caller := &load.Caller{
				Client: clients[i], Fanout: c.Scenario.Fanout, Attempts: &t.attempts,
				// Each policy's block plays at the same place of the timeline.
				Epoch: start.Add(-b.offset),
			}
			sent := g.Run(ctx, base, load.Block{Start: start, At: b.at, FirstID: b.firstID, Send: caller.Send, Record: t.record})
			if !b.warmup {
				tallies[i] = append(tallies[i], t)
			}
			start = start.Add(b.length)
			if ctx.Err() != nil {
				t.length = min(t.length, max(time.Since(start.Add(-b.length)), 0))
				return tallies
			}
			progress.Policy, progress.Block = c.Arms[i].Name, round+1
			progress.Sent += sent
			if c.Progress != nil {
				c.Progress(progress)
			}
		}
	}
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

// tally is what one block of one policy did.
type tally struct {
	length   time.Duration
	attempts load.Attempts

	mu        sync.Mutex // guards what follows
	latencies []time.Duration
	errors    int
}

func (t *tally) record(latency time.Duration, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		t.errors++
		return
	}
	t.latencies = append(t.latencies, latency)
}

func (t *tally) block(fanout int) report.Block {
	t.mu.Lock()
	defer t.mu.Unlock()
	return report.Block{
		Length: t.length, Latencies: t.latencies, Errors: t.errors,
		Calls:   int64(len(t.latencies)+t.errors) * int64(fanout),
		CallsOK: t.attempts.OK(), Attempts: t.attempts.Sent(),
	}
}
