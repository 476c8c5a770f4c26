package loadbalance

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/loadbalance/loadpb"
)

// A reporting is a server with a ServerLoad of its own.
type reporting struct {
	kvpb.UnimplementedKVServer
	name   string
	load   *ServerLoad
	srv    *grpc.Server
	lis    atomic.Pointer[bufconn.Listener]
	serve  func(ctx context.Context) error
	calls  atomic.Int64
	probes atomic.Int64
	stall  atomic.Bool // it leaves probes unanswered
}

func (b *reporting) Get(ctx context.Context, req *kvpb.Request) (*kvpb.Response, error) {
	b.calls.Add(1)
	if err := b.serve(ctx); err != nil {
		return nil, err
	}
	return &kvpb.Response{Id: req.Id, Backend: b.name}, nil
}

func (b *reporting) listen(t *testing.T) {
	lis := bufconn.Listen(256 << 10)
	b.lis.Store(lis)
	go b.srv.Serve(lis) //nolint:errcheck // it returns when the test stops the server
	t.Cleanup(b.srv.Stop)
}

// fleetOf starts servers that answer probes, if reports says so, and dials them.
type fleetOf struct {
	backends []*reporting
	manual   *manual.Resolver
	cc       *grpc.ClientConn
	kvpb.KVClient
}

func (f *fleetOf) resolve(indexes ...int) resolver.State {
	var st resolver.State
	for _, i := range indexes {
		st.Endpoints = append(st.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: f.backends[i].name}}})
	}
	return st
}

func startReporting(t *testing.T, n int, config string, reports func(i int) bool, serve func(ctx context.Context, i int) error) *fleetOf {
	t.Helper()
	f := &fleetOf{manual: manual.NewBuilderWithScheme("fleet")}
	var all []int
	for i := range n {
		b := &reporting{
			name:  fmt.Sprintf("backend-%d", i),
			load:  NewServerLoad(),
			serve: func(ctx context.Context) error { return serve(ctx, i) },
		}
		count := func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			if info.FullMethod == loadpb.LoadReport_Get_FullMethodName {
				b.probes.Add(1)
				if b.stall.Load() {
					<-ctx.Done()
				}
			}
			return handler(ctx, req)
		}
		b.srv = grpc.NewServer(grpc.WaitForHandlers(true), grpc.ChainUnaryInterceptor(count, b.load.UnaryServerInterceptor()))
		kvpb.RegisterKVServer(b.srv, b)
		if reports(i) {
			b.load.Register(b.srv)
		}
		b.listen(t)
		f.backends = append(f.backends, b)
		all = append(all, i)
	}
	f.manual.InitialState(f.resolve(all...))
	cc, err := grpc.NewClient("fleet:///kv", grpc.WithResolvers(f.manual),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"bobtail_prequal":`+config+`}]}`),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			for _, b := range f.backends {
				if b.name == addr {
					return grpctest.Dial(ctx, b.lis.Load())
				}
			}
			return nil, fmt.Errorf("no backend %q", addr)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	f.cc, f.KVClient = cc, kvpb.NewKVClient(cc)
	ready(t, f)
	return f
}

func everyone(int) bool { return true }

// after ends with the context, or after d.
func after(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// run calls every 10 ms for d; it returns how many calls each backend got, and how many
// failed.
func (f *fleetOf) run(t *testing.T, d time.Duration) (calls []int64, failures int64) {
	t.Helper()
	for _, b := range f.backends {
		calls = append(calls, -b.calls.Load())
	}
	var failed atomic.Int64
	var wg sync.WaitGroup
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(10 * ms) {
		wg.Go(func() {
			if _, err := f.Get(t.Context(), &kvpb.Request{}); err != nil {
				failed.Add(1)
			}
		})
	}
	wg.Wait()
	for i, b := range f.backends {
		calls[i] += b.calls.Load()
	}
	return calls, failed.Load()
}

func (f *fleetOf) probes() (sum int64) {
	for _, b := range f.backends {
		sum += b.probes.Load()
	}
	return sum
}

// One slow backend of five, and one that others load, get next to nothing.
func TestPrequalStarvesTheSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startReporting(t, 5, `{}`, everyone, func(ctx context.Context, i int) error {
			if i == 0 {
				return after(ctx, 100*ms)
			}
			return after(ctx, 5*ms)
		})
		f.run(t, time.Second)
		calls, failures := f.run(t, 5*time.Second)
		if calls[0] > 10 || failures > 0 {
			t.Errorf("the slow backend got %d of 500 calls, want at most 10: %v, %d failed", calls[0], calls, failures)
		}
		for i, n := range calls[1:] {
			if n < 50 {
				t.Errorf("backend %d got %d of 500 calls, want at least 50: %v", i+1, n, calls)
			}
		}
		// Another client's load: this one sees it by probes only.
		f.backends[1].load.gauge.rif.Add(100)
		f.run(t, 100*ms)
		calls, _ = f.run(t, time.Second)
		if calls[1] > 1 {
			t.Errorf("the backend that others load got %d of 100 calls, want at most 1: %v", calls[1], calls)
		}
		f.backends[1].load.gauge.rif.Add(-100)
	})
}

// A backend that fails at once has nothing in flight, and is no sinkhole.
func TestPrequalFailsAreNotFast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var broken atomic.Bool
		// Without ejection, which would hide it.
		f := startReporting(t, 5, `{"ejection": {"maxEjectionPercent": 0}}`, everyone, func(ctx context.Context, i int) error {
			if i == 0 && broken.Load() {
				return status.Error(codes.Unavailable, "broken")
			}
			return after(ctx, 20*ms)
		})
		broken.Store(true)
		f.run(t, 2*time.Second)
		calls, failures := f.run(t, 20*time.Second)
		if calls[0] > 10 || failures != calls[0] {
			t.Errorf("the broken backend got %d of 2000 calls, want at most 10: %v, %d failed", calls[0], calls, failures)
		}
	})
}

// A fleet without the service, or with one server without, balances as bobtail_p2c: all
// get calls, the slow one hardly any; and the probes of such servers cease.
func TestPrequalFallsBack(t *testing.T) {
	for name, reports := range map[string]func(int) bool{
		"none reports": func(int) bool { return false },
		"one does not": func(i int) bool { return i != 4 },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := startReporting(t, 5, `{}`, reports, func(ctx context.Context, i int) error {
					if i == 0 {
						return after(ctx, 100*ms)
					}
					return after(ctx, 5*ms)
				})
				f.run(t, time.Second)
				before := f.backends[4].probes.Load()
				calls, failures := f.run(t, 5*time.Second)
				if calls[0] > 10 || failures > 0 {
					t.Errorf("the slow backend got %d of 500 calls, want at most 10: %v, %d failed", calls[0], calls, failures)
				}
				for i, n := range calls[1:] {
					if n < 50 {
						t.Errorf("backend %d got %d of 500 calls, want at least 50: %v", i+1, n, calls)
					}
				}
				if n := f.backends[4].probes.Load() - before; n > 0 {
					t.Errorf("%d probes of a backend that has no such service, want none within %v", n, quietFor)
				}
			})
		})
	}
}

// Three probes for a call while there are few calls, no more than allowed while there are many, and
// none without.
func TestPrequalProbesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startReporting(t, 5, `{"maxProbesPerSecond": 60}`, everyone, func(ctx context.Context, _ int) error { return after(ctx, ms) })
		time.Sleep(time.Second)
		before := f.probes()
		for range 10 {
			if _, err := f.Get(t.Context(), &kvpb.Request{}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(200 * ms)
		}
		if n := f.probes() - before; n != 30 {
			t.Errorf("%d probes for 10 calls in 2 s, want 30", n)
		}
		before = f.probes()
		f.run(t, 10*time.Second)
		time.Sleep(100 * ms)
		if n := f.probes() - before; n < 590 || n > 10*60+3+3 {
			t.Errorf("%d probes in 10 s of 100 calls/s, want 60/s and 3 at once", n)
		}
		before = f.probes()
		time.Sleep(time.Hour / 4)
		if n := f.probes() - before; n > 0 {
			t.Errorf("%d probes in a quarter of an hour without a call, want none", n)
		}
	})
}

// Endpoints that come, go and blink while others are probed.
func TestPrequalBlinkingEndpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startReporting(t, 4, `{}`, everyone, func(ctx context.Context, i int) error { return after(ctx, time.Duration(2+i)*ms) })
		var failures int64
		for _, set := range [][]int{{0, 1, 2, 3}, {1, 2}, {2, 1, 0}, {3}, {3, 0}, {0, 1, 2, 3}} {
			f.manual.UpdateState(f.resolve(set...))
			_, n := f.run(t, 500*ms)
			failures += n
			calls, n := f.run(t, 500*ms)
			failures += n
			for i, n := range calls {
				named := false
				for _, k := range set {
					named = named || k == i
				}
				if !named && n > 0 {
					t.Errorf("endpoints %v: backend %d got %d calls", set, i, n)
				}
			}
		}
		if failures > 0 {
			t.Errorf("%d calls failed", failures)
		}
		// A server that stops and is back.
		old := f.backends[0]
		old.srv.Stop()
		f.run(t, time.Second)
		old.srv = grpc.NewServer(grpc.WaitForHandlers(true), grpc.ChainUnaryInterceptor(old.load.UnaryServerInterceptor()))
		kvpb.RegisterKVServer(old.srv, old)
		old.load.Register(old.srv)
		old.listen(t)
		time.Sleep(5 * time.Second)
		f.run(t, 15*time.Second) // its slow start
		if calls, n := f.run(t, 2*time.Second); calls[0] < 20 || n > 0 {
			t.Errorf("the fastest, back again, got %d of 200 calls: %v, %d failed", calls[0], calls, n)
		}
	})
}

// Servers that sit on probes do not hold up calls, and are asked less and less: after three
// probes each waits for twice as long, from 100 ms on.
func TestPrequalProbesTimeOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startReporting(t, 3, `{"probeTimeout": "0.020s"}`, everyone, func(ctx context.Context, _ int) error { return after(ctx, ms) })
		f.run(t, 200*ms)
		for _, b := range f.backends {
			b.stall.Store(true)
		}
		before := f.probes()
		calls, failures := f.run(t, 10*time.Second)
		// 3, and those after 0.1, 0.2, 0.4, 0.8, 1.6, 3.2 and 6.4 s.
		if n := f.probes() - before; n > 3*15 || n < 3*8 {
			t.Errorf("%d probes of 3 servers in 10 s, want about 10 of each", n)
		}
		for i, n := range calls {
			if n < 200 || failures > 0 {
				t.Errorf("backend %d got %d of 1000 calls, want at least 200: %v, %d failed", i, n, calls, failures)
			}
		}
	})
}

// Attempts of one call never meet at an endpoint, by reports as without.
func TestPrequalAttemptsGoElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startReporting(t, 3, `{}`, everyone, func(ctx context.Context, _ int) error { return after(ctx, 50*ms) })
		f.run(t, 200*ms)
		for range 20 {
			var call attempt.Call
			var as [4]attempt.Attempt
			seen := make(map[string]int)
			var mu sync.Mutex
			var wg sync.WaitGroup
			for i := range as {
				as[i].Init(&call, i+1, attempt.Hedge)
				wg.Go(func() {
					res, err := f.Get(attempt.NewContext(t.Context(), &as[i]), &kvpb.Request{})
					mu.Lock()
					defer mu.Unlock()
					if as[i].Unsent() != (err != nil) {
						t.Errorf("attempt %d: unsent %v, %v", i+1, as[i].Unsent(), err)
					}
					seen[res.GetBackend()]++
				})
			}
			wg.Wait()
			if len(seen) != 4 || seen[""] != 1 {
				t.Fatalf("attempts at %v, want one at each backend and one nowhere", seen)
			}
		}
	})
}

// A server that serves well and answers no probes any more, or never has, is not left
// without calls.
func TestPrequalTheDeaf(t *testing.T) {
	t.Run("no more", func(t *testing.T) { testDeaf(t, everyone, true, 30*time.Second) })
	t.Run("never", func(t *testing.T) { testDeaf(t, func(i int) bool { return i != 4 }, false, 15*time.Second) })
}

func testDeaf(t *testing.T, reports func(int) bool, stall bool, d time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		var slow atomic.Bool
		f := startReporting(t, 5, `{"ejection": {"maxEjectionPercent": 0}}`, reports, func(ctx context.Context, i int) error {
			if i == 4 && slow.Load() {
				return after(ctx, 1500*ms)
			}
			return after(ctx, 5*ms)
		})
		for _, b := range f.backends {
			b.load.gauge.rif.Add(5) // of other clients
		}
		f.run(t, 2*time.Second)
		f.run(t, 5*time.Second)
		if stall {
			f.backends[4].stall.Store(true)
		}
		f.backends[4].load.gauge.rif.Add(100) // a burst of others
		f.run(t, 2*time.Second)
		f.backends[4].load.gauge.rif.Add(-100)
		calls, _ := f.run(t, d)
		if calls[4] == 0 {
			t.Errorf("backend 4 got none of the calls of %v", d)
		}
	})
}
