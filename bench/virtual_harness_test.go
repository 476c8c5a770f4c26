package main

import (
	"context"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/test/bufconn"

	"github.com/bobtail-rpc/bobtail/bench/experiment"
	"github.com/bobtail-rpc/bobtail/bench/fleet"
	"github.com/bobtail-rpc/bobtail/bench/load"
	"github.com/bobtail-rpc/bobtail/bench/report"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// The tests of this folder run the whole gRPC stack over bufconn in virtual time:
// only the policy's choices, the service times and the faults count, so the
// figures are those of the policy and of no machine.

func named(t *testing.T, name string) *scenario.Scenario {
	t.Helper()
	sc, err := scenario.Named(name)
	if err != nil {
		t.Fatal(err)
	}
	return sc
}

func virtualSleep(ctx context.Context, d time.Duration) error {
	if d <= 0 { // see grpctest.Dial
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// arrived is an attempt as a backend saw it.
type arrived struct {
	id      uint64
	key     string
	backend int
	at      time.Time
	err     error
}

// observer collects attempts; nil collects none.
type observer struct {
	mu       sync.Mutex
	attempts []arrived
}

func (o *observer) saw(a arrived) {
	if o != nil {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.attempts = append(o.attempts, a)
	}
}

// backends are those of a scenario, over bufconn.
type backends struct {
	t *testing.T
	// Atomic because one that was down listens anew, under dialing clients.
	listeners []atomic.Pointer[bufconn.Listener]
	servers   []*fleet.Backend
}

// work is what all handlers did.
func (f *backends) work() (sum fleet.Work) {
	for _, b := range f.servers {
		w := b.Work()
		sum.Runs += w.Runs
		sum.Worked += w.Worked
		sum.Unused += w.Unused
	}
	return sum
}

// virtualFleet plays a scenario's backends. Call it, and look policies up, inside
// a bubble.
func virtualFleet(t *testing.T, sc *scenario.Scenario, seed uint64, install fleet.Server, o *observer) *backends {
	f := &backends{t: t, listeners: make([]atomic.Pointer[bufconn.Listener], sc.Backends)}
	ctx, stop := context.WithCancel(t.Context())
	var servers sync.WaitGroup
	t.Cleanup(func() {
		stop()
		servers.Wait()
	})
	for i := range sc.Backends {
		listen := func() (net.Listener, error) {
			lis := bufconn.Listen(256 << 10)
			f.listeners[i].Store(lis)
			return lis, nil
		}
		observe := func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			at := time.Now()
			res, err := handler(ctx, req)
			if get, ok := req.(*kvpb.Request); ok { // and no probe of the balancer's
				o.saw(arrived{get.Id, get.Key, i, at, err})
			}
			return res, err
		}
		b := fleet.NewBackend(sc, seed, i, virtualSleep)
		f.servers = append(f.servers, b)
		lis, _ := listen()
		servers.Go(func() {
			// A bubble must not end before its handlers have: Stop waits for them.
			err := fleet.Play(ctx, b, install, lis, listen, grpc.WaitForHandlers(true), grpc.ChainUnaryInterceptor(observe))
			if err != nil {
				t.Error(err)
			}
		})
	}
	return f
}

// Dial connects to all backends, until the test ends.
func (f *backends) Dial(opts ...grpc.DialOption) *grpc.ClientConn {
	f.t.Helper()
	r := manual.NewBuilderWithScheme("virtual")
	var st resolver.State
	for i := range f.listeners {
		st.Endpoints = append(st.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: strconv.Itoa(i)}}})
	}
	r.InitialState(st)
	dial := func(ctx context.Context, addr string) (net.Conn, error) {
		i, err := strconv.Atoi(addr)
		if err != nil {
			return nil, err
		}
		return grpctest.Dial(ctx, f.listeners[i].Load())
	}
	cc, err := grpc.NewClient("virtual:///kv", append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithResolvers(r),
		grpc.WithContextDialer(dial),
	}, opts...)...)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { cc.Close() })
	return cc
}

// ended is what became of a request: when it was meant to begin and when it ended,
// from the start.
type ended struct {
	at, end time.Duration
	err     error
}

// drive sends n requests as the scenario's arrivals have them, id by id, and waits
// for all of them.
func drive(t *testing.T, sc *scenario.Scenario, seed uint64, start time.Time, n int, send func(ctx context.Context, id uint64) error) []ended {
	t.Helper()
	at := load.NewArrivals(seed, sc.Rate, sc.Arrivals).Next(time.Duration(2 * float64(n) / sc.Rate * float64(time.Second)))[:n]
	out := make([]ended, n)
	g := &load.Generator{Sleep: virtualSleep, Timeout: time.Duration(sc.Timeout), MaxInFlight: n}
	g.Run(t.Context(), t.Context(), load.Block{
		Start: start, At: at,
		Send: func(ctx context.Context, id uint64) error {
			err := send(ctx, id)
			out[id] = ended{at[id], time.Since(start), err}
			return err
		},
		Record: func(time.Duration, error) {},
	})
	g.Drain(t.Context())
	if lag := g.Health().LagP99; lag != 0 {
		t.Errorf("the generator lags by %v in virtual time", lag)
	}
	return out
}

// sideBySide runs a scenario's whole comparison in virtual time.
func sideBySide(t *testing.T, sc *scenario.Scenario, seed uint64, policies ...string) map[string]report.Run {
	t.Helper()
	var all []policy
	for _, name := range policies {
		p, err := findPolicy(name)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	return sideBySideOf(t, sc, seed, all...)
}

func sideBySideOf(t *testing.T, sc *scenario.Scenario, seed uint64, policies ...policy) map[string]report.Run {
	t.Helper()
	runs := map[string]report.Run{}
	synctest.Test(t, func(t *testing.T) {
		c := experiment.Config{Scenario: sc, Seed: seed, Block: 500 * time.Millisecond, Warmup: time.Second, Sleep: virtualSleep}
		for _, p := range policies {
			cc := virtualFleet(t, sc, seed, p.server, nil).Dial(append(p.opts, load.CountAttempts())...)
			c.Arms = append(c.Arms, experiment.Arm{Name: p.name, Conn: cc})
		}
		r, err := experiment.Run(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if lag := r.Generator.LagP99; lag != 0 {
			t.Errorf("the generator lags by %v in virtual time", lag)
		}
		for _, run := range r.Runs() {
			runs[run.Policy] = run
			t.Log(line(run))
		}
	})
	return runs
}
