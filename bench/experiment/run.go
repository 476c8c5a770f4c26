package experiment

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/bench/load"
	"github.com/bobtail-rpc/bobtail/bench/report"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// maxPhase bounds how much later than the first the last policy sends, side by side: less
// than what a timeline shows.
const maxPhase = 10 * time.Millisecond

// runner sends the blocks of one comparison.
type runner struct {
	Config
	ctx, base context.Context
	generator *load.Generator
	clients   []kvpb.KVClient
	tallies   [][]*tally // of each arm
}

// run sends every block of every policy and returns what became of them, which is
// complete when the generator has drained.
func run(ctx, base context.Context, c Config, g *load.Generator) [][]*tally {
	r := &runner{Config: c, ctx: ctx, base: base, generator: g, tallies: make([][]*tally, len(c.Arms))}
	for _, arm := range c.Arms {
		r.clients = append(r.clients, kvpb.NewKVClient(arm.Conn))
	}
	if c.Scenario.SideBySide {
		r.sideBySide()
	} else {
		r.inTurns()
	}
	return r.tallies
}

// inTurns: each policy begins every so many rounds, for who goes first finds the
// machine as the last round left it.
func (r *runner) inTurns() {
	p := newPlan(r.Config)
	progress := Progress{Total: r.expected() * len(r.Arms)}
	start := time.Now()
	for round := 0; ; round++ {
		b, ok := p.next()
		if !ok {
			return
		}
		for turn := range r.Arms {
			i := (round + turn) % len(r.Arms)
			sent := r.send(i, b, start, 0)
			start = start.Add(b.length)
			if r.ctx.Err() != nil {
				return
			}
			progress.Policy, progress.Block = r.Arms[i].Name, round+1
			progress.Sent += sent
			r.tell(progress)
		}
	}
}

// sideBySide: all policies send block after block at the same time, each a little later
// than the one before it: at the very same instants their requests would queue for the
// processors behind each other, the more of them the longer.
func (r *runner) sideBySide() {
	gap := min(time.Duration(float64(time.Second)/r.Scenario.Rate), maxPhase)
	p := newPlan(r.Config)
	progress := Progress{Total: r.expected() * len(r.Arms)}
	start := time.Now()
	sent := make([]int, len(r.Arms))
	for round := 0; ; round++ {
		b, ok := p.next()
		if !ok {
			return
		}
		var arms sync.WaitGroup
		for i := range r.Arms {
			phase := gap * time.Duration(i) / time.Duration(len(r.Arms))
			arms.Go(func() { sent[i] = r.send(i, b, start, phase) })
		}
		arms.Wait()
		start = start.Add(b.length)
		if r.ctx.Err() != nil {
			return
		}
		progress.Block = round + 1
		for _, n := range sent {
			progress.Sent += n
		}
		r.tell(progress)
	}
}

// send sends a block of one policy, all of it later by phase, and returns the number of
// its requests. It is called for one policy at a time, for different ones at once.
func (r *runner) send(arm int, b block, start time.Time, phase time.Duration) int {
	t := &tally{at: b.offset, length: b.length}
	caller := &load.Caller{
		Client: r.clients[arm], Fanout: r.Scenario.Fanout, Attempts: &t.attempts,
		// Each policy's block plays at the same place of the timeline.
		Epoch: start.Add(phase - b.offset),
	}
	send := caller.Send
	if r.Scenario.Criticality != nil {
		caller.Class = func(id uint64) string { return r.Scenario.Class(r.Seed, id) }
		send = func(ctx context.Context, id uint64) error {
			err := caller.Send(ctx, id)
			if r.base.Err() == nil {
				t.class(caller.Class(id), err == nil)
			}
			return err
		}
	}
	if r.Scenario.Keys != nil {
		caller.Key = func(id uint64) string { return r.Scenario.Key(r.Seed, id) }
	}
	if r.Begin != nil {
		send = r.begun(arm, b, start.Add(phase), send)
	}
	sent := r.generator.Run(r.ctx, r.base, load.Block{Start: start.Add(phase), At: b.at, FirstID: b.firstID, Send: send, Record: t.record})
	if r.ctx.Err() != nil {
		t.length = min(t.length, max(time.Since(start), 0))
	}
	if !b.warmup {
		r.tallies[arm] = append(r.tallies[arm], t)
	}
	return sent
}

// begun is send, told to Begin.
func (r *runner) begun(arm int, b block, start time.Time, send func(context.Context, uint64) error) func(context.Context, uint64) error {
	return func(ctx context.Context, id uint64) error {
		at := b.at[id-b.firstID]
		ctx, end := r.Begin(ctx, arm, Request{ID: id, Intended: start.Add(at), At: b.offset + at, Warmup: b.warmup})
		err := send(ctx, id)
		if err != nil && r.base.Err() != nil {
			end(fmt.Errorf("%w: %w", ErrAbandoned, err))
		} else {
			end(err)
		}
		return err
	}
}

func (r *runner) tell(p Progress) {
	if r.Progress != nil {
		r.Progress(p)
	}
}

// tally is what one block of one policy did.
type tally struct {
	at, length time.Duration
	attempts   load.Attempts

	mu        sync.Mutex // guards what follows
	latencies []time.Duration
	errors    int
	late      int            // of errors: the deadline passed
	refused   map[string]int // of errors, by reason
	classes   map[string]report.Class
}

// record counts a request for the block in which it was meant to start, whenever it ends.
func (t *tally) record(latency time.Duration, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		t.errors++
		if reason := refusal(err); reason != "" {
			if t.refused == nil {
				t.refused = map[string]int{}
			}
			t.refused[reason]++
		} else if status.Code(err) == codes.DeadlineExceeded {
			t.late++
		}
		return
	}
	t.latencies = append(t.latencies, latency)
}

// class counts a request of a class.
func (t *tally) class(name string, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.classes == nil {
		t.classes = map[string]report.Class{}
	}
	c := t.classes[name]
	c.Calls++
	if ok {
		c.OK++
	}
	t.classes[name] = c
}

// refusal is the reason why bobtail, at either end, refused a call; "" if it did not.
func refusal(err error) string {
	st, ok := status.FromError(err)
	if !ok {
		return ""
	}
	for _, detail := range st.Details() {
		if info, is := detail.(*errdetails.ErrorInfo); is && info.Domain == outcome.Domain {
			return info.Reason
		}
	}
	return ""
}

func (t *tally) block(fanout int) report.Block {
	t.mu.Lock()
	defer t.mu.Unlock()
	return report.Block{
		At: t.at, Length: t.length, Latencies: t.latencies, Errors: t.errors,
		Late: t.late, Refused: t.refused, Classes: t.classes,
		Calls:   int64(len(t.latencies)+t.errors) * int64(fanout),
		CallsOK: t.attempts.OK(), Attempts: t.attempts.Sent(),
	}
}
