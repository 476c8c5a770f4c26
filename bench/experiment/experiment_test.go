package experiment

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"github.com/bobtail-rpc/bobtail/bench/load"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A plan gives every request once, in order, in blocks that weigh about alike.
func TestPlan(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := Config{
			Scenario: &scenario.Scenario{
				Rate:     rapid.Float64Range(10, 2000).Draw(t, "rate"),
				Arrivals: rapid.SampledFrom([]string{"poisson", "uniform"}).Draw(t, "arrivals"),
				Requests: rapid.IntRange(1, 5000).Draw(t, "requests"),
			},
			Seed:   rapid.Uint64().Draw(t, "seed"),
			Block:  time.Duration(rapid.IntRange(10, 2000).Draw(t, "block")) * time.Millisecond,
			Warmup: time.Duration(rapid.IntRange(0, 2000).Draw(t, "warmup")) * time.Millisecond,
		}
		p := newPlan(c)
		var measured, total int
		var warm, offset time.Duration
		for {
			b, ok := p.next()
			if !ok {
				break
			}
			if b.firstID != uint64(total) || b.offset != offset {
				t.Fatalf("block begins with id %d at %v, want %d at %v", b.firstID, b.offset, total, offset)
			}
			if !slices.IsSorted(b.at) || len(b.at) > 0 && (b.at[0] < 0 || b.at[len(b.at)-1] >= b.length) {
				t.Fatalf("arrivals %v in a block of %v", b.at, b.length)
			}
			if b.warmup {
				warm += b.length
				if measured > 0 {
					t.Fatal("warm-up after a measured block")
				}
			} else {
				measured += len(b.at)
				// The mean is for long schedules; a short one may come late as a whole.
				if b.length > 2*c.Block && float64(c.Scenario.Requests) > 100 && c.Scenario.Rate*c.Block.Seconds() > 100 {
					t.Errorf("a block of %v, want at most twice %v", b.length, c.Block)
				}
			}
			total += len(b.at)
			offset += b.length
		}
		if measured != c.Scenario.Requests {
			t.Errorf("%d requests, want %d", measured, c.Scenario.Requests)
		}
		if warm < c.Warmup || warm >= c.Warmup+c.Block {
			t.Errorf("%v of warm-up, want %v in whole blocks of %v", warm, c.Warmup, c.Block)
		}
	})
}

func TestPlanDuration(t *testing.T) {
	c := Config{Scenario: &scenario.Scenario{Rate: 100, Arrivals: "uniform", Requests: 7}, Block: 400 * time.Millisecond, Duration: time.Second}
	p := newPlan(c)
	n := 0
	for b, ok := p.next(); ok; b, ok = p.next() {
		if b.length != c.Block {
			t.Errorf("a block of %v, want %v", b.length, c.Block)
		}
		n++
	}
	if n != 3 {
		t.Errorf("%d blocks of 400ms, want 3 for 1s", n)
	}
	if got := c.expected(); got != 120 {
		t.Errorf("%d requests expected, want 120", got)
	}
}

// seen is what the backends saw of a policy.
type seen struct {
	ids   []uint64
	at    []time.Duration // on the scenario's timeline
	begun []time.Time
}

// fixture is a fleet that takes 5 ms, or as long as serve says, and notes what it
// sees of each policy.
func fixture(t *testing.T, serve func(id uint64) time.Duration, names ...string) (Config, map[string]*seen) {
	var mu sync.Mutex
	all := map[string]*seen{}
	f := grpctest.NewFleet(t, 2, grpctest.Handlers{
		Unary: func(ctx context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
			name := metadata.ValueFromIncomingContext(ctx, "policy")[0]
			mu.Lock()
			s := all[name]
			s.ids = append(s.ids, req.Id)
			s.at = append(s.at, time.Since(time.Unix(0, req.EpochUnixNs)))
			s.begun = append(s.begun, time.Now())
			mu.Unlock()
			if err := sleep(ctx, serve(req.Id)); err != nil {
				return nil, status.FromContextError(err).Err()
			}
			if req.Id == 3 {
				return nil, status.Error(codes.Internal, "id 3 always fails")
			}
			return &kvpb.Response{Id: req.Id}, nil
		},
	})
	c := Config{
		Scenario: &scenario.Scenario{Name: "test", Rate: 100, Arrivals: "poisson", Requests: 300, Fanout: 1, Timeout: scenario.Duration(10 * time.Second)},
		Seed:     1, Block: time.Second, Sleep: sleep,
	}
	for _, name := range names {
		all[name] = &seen{}
		c.Arms = append(c.Arms, Arm{name, f.Dial(load.CountAttempts(), grpc.WithUnaryInterceptor(
			func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				return invoker(metadata.AppendToOutgoingContext(ctx, "policy", name), method, req, reply, cc, opts...)
			}))})
	}
	return c, all
}

func quick(uint64) time.Duration { return 5 * time.Millisecond }

// Every policy faces the same calls at the same moments of the timeline; they
// take turns, and who begins a round changes.
func TestInterleaving(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, all := fixture(t, quick, "a", "b", "c")
		var turns []string
		sent := 0
		c.Progress = func(p Progress) { turns = append(turns, p.Policy); sent = p.Sent }
		r, err := Run(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(turns, ""); got != "abcbcacab" {
			t.Errorf("turns %s, want abc bca cab", got)
		}
		if sent != 900 || r.Interrupted {
			t.Errorf("%d sent, interrupted %v, want 900, false", sent, r.Interrupted)
		}
		for _, name := range []string{"b", "c"} {
			if !slices.Equal(all["a"].ids, all[name].ids) {
				t.Errorf("%s saw other calls than a, or in another order", name)
			}
			for i := range all["a"].at {
				if all["a"].at[i] != all[name].at[i] {
					t.Fatalf("call %d at %v for a, %v for %s", i, all["a"].at[i], all[name].at[i], name)
				}
			}
		}
		// The timeline goes on from block to block: 300 requests at 100/s.
		if last := slices.Max(all["a"].at); last < 2500*time.Millisecond || last > 3500*time.Millisecond {
			t.Errorf("the last call is at %v of the timeline, want about 3s", last)
		}
		for _, p := range r.Policies {
			runs := 0
			for _, b := range p.Blocks {
				runs += len(b.Latencies) + b.Errors
				for _, d := range b.Latencies {
					if d != 5*time.Millisecond {
						t.Fatalf("%s: latency %v, want 5ms", p.Name, d)
					}
				}
				if n := int64(len(b.Latencies) + b.Errors); b.Calls != n || b.Attempts != n || b.CallsOK != n-int64(b.Errors) {
					t.Errorf("%s: %d calls, %d OK, %d attempts of %d requests", p.Name, b.Calls, b.CallsOK, b.Attempts, n)
				}
			}
			if runs != 300 || len(p.Blocks) != 3 || p.Blocks[0].Errors != 1 {
				t.Errorf("%s: %d calls in %d blocks, %d errors in the first, want 300 in 3, 1", p.Name, runs, len(p.Blocks), p.Blocks[0].Errors)
			}
		}
	})
}

// Warm-up is run and dropped.
func TestWarmup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, all := fixture(t, quick, "a")
		c.Warmup = 1500 * time.Millisecond
		r, err := Run(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, b := range r.Policies[0].Blocks {
			n += len(b.Latencies)
			if b.Errors > 0 {
				t.Error("the call that fails is one of the warm-up's")
			}
		}
		if n != 300 || len(all["a"].ids) < 450 || r.Warmup != 2*time.Second {
			t.Errorf("%d measured, %d sent, warm-up %v, want 300, about 500, 2s", n, len(all["a"].ids), r.Warmup)
		}
	})
}

// A request that takes seconds holds nobody up, and counts in its own block.
func TestSlowRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, all := fixture(t, func(id uint64) time.Duration {
			if id == 5 {
				return 8 * time.Second
			}
			return 5 * time.Millisecond
		}, "a", "b")
		start := time.Now()
		r, err := Run(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("took %v, want little more than the 9 s of b's slow request", took)
		}
		last := slices.MaxFunc(all["b"].begun, time.Time.Compare)
		if d := last.Sub(start); d > 7*time.Second {
			t.Errorf("the last request begins after %v, want 6 s: nobody waits for the slow one", d)
		}
		for _, p := range r.Policies {
			if d := slices.Max(p.Blocks[0].Latencies); d != 8*time.Second {
				t.Errorf("%s: slowest of the first block %v, want 8s", p.Name, d)
			}
		}
	})
}

// An interrupt ends the sending; what is under way gets the grace, then is left out.
func TestInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := fixture(t, func(id uint64) time.Duration {
			if id%10 == 0 {
				return 9 * time.Second
			}
			return 5 * time.Millisecond
		}, "a", "b")
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(2500*time.Millisecond, cancel)
		start := time.Now()
		r, err := Run(ctx, c)
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 2750*time.Millisecond {
			t.Errorf("took %v, want 2.5 s and the grace", took)
		}
		if !r.Interrupted || r.Generator.Abandoned == 0 {
			t.Errorf("interrupted %v, %d abandoned", r.Interrupted, r.Generator.Abandoned)
		}
		// The third turn is b's second block: half of it.
		a, b := r.Policies[0].Blocks, r.Policies[1].Blocks
		if len(a) != 1 || len(b) != 2 || b[1].Length != 500*time.Millisecond {
			t.Errorf("%d blocks of a, %d of b, want 1 and 2", len(a), len(b))
		}
		for _, bl := range append(a, b...) {
			if bl.Errors > 1 { // id 3
				t.Errorf("%d errors: an interrupt is none", bl.Errors)
			}
		}
	})
}

// Interrupted before it began.
func TestInterruptedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := fixture(t, quick, "a")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := Run(ctx, c); err == nil {
			t.Error("no error, and nothing to report")
		}
	})
}

// No backend: an error that names the policy, not ten thousand failed calls.
func TestUnreachable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 1, grpctest.Handlers{})
		f.Stop(0)
		c := Config{Scenario: &scenario.Scenario{Rate: 1, Requests: 1, Fanout: 1}, Block: time.Second, Sleep: sleep, Arms: []Arm{{"lonely", f.Dial()}}}
		if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "lonely") {
			t.Errorf("%v, want an error that names the policy", err)
		}
	})
}
