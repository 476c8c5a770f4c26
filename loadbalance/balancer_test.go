package loadbalance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const byP2C = `{"loadBalancingConfig":[{"bobtail_p2c":{}}]}`

func dialP2C(f *grpctest.Fleet, opts ...grpc.DialOption) (*grpc.ClientConn, kvpb.KVClient) {
	cc := f.Dial(append(opts, grpc.WithDefaultServiceConfig(byP2C))...)
	return cc, kvpb.NewKVClient(cc)
}

// ready connects to every backend: calls until each is ready.
func ready(t *testing.T, c kvpb.KVClient) {
	t.Helper()
	if _, err := c.Get(t.Context(), &kvpb.Request{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	synctest.Wait()
}

// serve answers after a time of the backend's own.
func serve(d func(b *grpctest.Backend) time.Duration) grpctest.Handlers {
	return grpctest.Handlers{Unary: func(ctx context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
		select {
		case <-time.After(d(b)):
			return &kvpb.Response{Id: req.Id, Backend: b.Name}, nil
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}}
}

// load calls every 10 ms for d, and returns how often each backend was called.
func load(t *testing.T, f *grpctest.Fleet, c kvpb.KVClient, d time.Duration) []int64 {
	t.Helper()
	before := make([]int64, len(f.Backends))
	for i, b := range f.Backends {
		before[i] = b.Started.Load()
	}
	var wg sync.WaitGroup
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(10 * ms) {
		wg.Go(func() {
			if _, err := c.Get(t.Context(), &kvpb.Request{}); err != nil {
				t.Errorf("call: %v", err)
			}
		})
	}
	wg.Wait()
	counts := make([]int64, len(f.Backends))
	for i, b := range f.Backends {
		counts[i] = b.Started.Load() - before[i]
	}
	return counts
}

// A slow backend is avoided, and what was learned of it survives resolver
// updates, its own disappearance for a minute, and a reconnect.
func TestSlowBackendIsAvoidedForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 4, serve(func(b *grpctest.Backend) time.Duration {
			if b.Index == 0 {
				return 200 * ms
			}
			return 2 * ms
		}))
		_, c := dialP2C(f)
		ready(t, c)
		check := func(when string, most int64) {
			t.Helper()
			n := load(t, f, c, 5*time.Second)
			if n[0] > most {
				t.Errorf("%s: slow backend got %d of 500 calls, want at most %d: %v", when, n[0], most, n)
			}
			for i, n := range n[1:] {
				if n < 100 {
					t.Errorf("%s: backend %d got %d of 500 calls, want at least 100", when, i+1, n)
				}
			}
		}
		check("at first", 2)
		f.Resolve(3, 2, 1, 0)
		check("after a resolver update", 0)
		f.Resolve(1, 2, 3)
		time.Sleep(time.Second)
		f.Resolve(0, 1, 2, 3)
		time.Sleep(time.Second)
		check("after a blink", 0)
		f.Stop(0)
		f.Start(0)
		time.Sleep(2 * time.Second)
		check("after a reconnect", 1) // a probe is due by now
	})
}

// What is in flight is still counted when an endpoint has gone and come back.
func TestInFlightSurvivesABlink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 2, serve(func(*grpctest.Backend) time.Duration { return 10 * time.Second }))
		var b atomic.Pointer[p2cBalancer]
		cc := f.Dial(grpc.WithDefaultServiceConfig(register(t, func(built *p2cBalancer) balancer.Balancer {
			b.Store(built)
			return built
		})))
		c := kvpb.NewKVClient(cc)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 40 {
			wg.Go(func() { _, _ = c.Get(ctx, &kvpb.Request{}) })
		}
		count := func() (sum int64) {
			s := b.Load()
			s.mu.Lock()
			defer s.mu.Unlock()
			for _, e := range s.endpoints {
				unary, streams := e.inFlight()
				sum += unary + streams
			}
			return sum
		}
		for i, want := range []int64{40, 40, 40} {
			time.Sleep(time.Second)
			synctest.Wait()
			if got := count(); got != want {
				t.Errorf("step %d: %d in flight, want %d", i, got, want)
			}
			f.Resolve([][]int{{1}, {0, 1}, {0, 1}}[i]...)
		}
		cancel()
		wg.Wait()
		synctest.Wait()
		if got := count(); got != 0 {
			t.Errorf("%d in flight at the end, want 0", got)
		}
	})
}

// register registers a bobtail_p2c that wrap has seen, and returns the service
// config that names it.
func register(t *testing.T, wrap func(*p2cBalancer) balancer.Balancer) string {
	b := wrapped{"bobtail_p2c_" + t.Name(), wrap}
	balancer.Register(b)
	return fmt.Sprintf(`{"loadBalancingConfig":[{%q:{}}]}`, b.name)
}

type wrapped struct {
	name string
	wrap func(*p2cBalancer) balancer.Balancer
}

func (w wrapped) Name() string { return w.name }
func (w wrapped) Build(cc balancer.ClientConn, o balancer.BuildOptions) balancer.Balancer {
	return w.wrap(p2cBuilder{}.Build(cc, o).(*p2cBalancer))
}

// paired makes one endpoint of each two addresses.
type paired struct{ *p2cBalancer }

func (p paired) UpdateClientConnState(s balancer.ClientConnState) error {
	var es []resolver.Endpoint
	for pair := range slices.Chunk(s.ResolverState.Endpoints, 2) {
		es = append(es, resolver.Endpoint{Addresses: append(slices.Clone(pair[0].Addresses), pair[1].Addresses...)})
	}
	s.ResolverState.Endpoints = es
	return p.p2cBalancer.UpdateClientConnState(s)
}

// A second attempt with a single backend is not sent, and the first not disturbed.
func TestUnsentEndsAtOnce(t *testing.T) {
	for _, wait := range []bool{false, true} {
		t.Run(fmt.Sprintf("waitForReady=%v", wait), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := grpctest.NewFleet(t, 1, serve(func(*grpctest.Backend) time.Duration { return time.Second }))
				_, c := dialP2C(f)
				ready(t, c)
				var call attempt.Call
				var first, second, third attempt.Attempt
				first.Init(&call, 1, attempt.First)
				second.Init(&call, 2, attempt.Hedge)
				third.Init(&call, 3, attempt.Retry)
				var wg sync.WaitGroup
				wg.Go(func() {
					if _, err := c.Get(attempt.NewContext(t.Context(), &first), &kvpb.Request{}); err != nil {
						t.Errorf("first attempt: %v", err)
					}
					first.End()
				})
				time.Sleep(ms)
				start := time.Now()
				_, err := c.Get(attempt.NewContext(t.Context(), &second), &kvpb.Request{}, grpc.WaitForReady(wait))
				if d := time.Since(start); d != 0 {
					t.Errorf("ended after %v, want at once", d)
				}
				st := status.Convert(err)
				if st.Code() != codes.Unavailable || !second.Unsent() {
					t.Errorf("got %v, unsent %v, want UNAVAILABLE and unsent", err, second.Unsent())
				}
				var info *errdetails.ErrorInfo
				for _, d := range st.Details() {
					info, _ = d.(*errdetails.ErrorInfo)
				}
				if info.GetDomain() != "bobtail" || info.GetReason() != "NOT_SENT" {
					t.Errorf("details %v, want bobtail's NOT_SENT", st.Details())
				}
				wg.Wait()
				// Once the first has ended, its endpoint is allowed again.
				if _, err := c.Get(attempt.NewContext(t.Context(), &third), &kvpb.Request{}); err != nil || third.Endpoint() != "backend-0" {
					t.Errorf("third attempt at %q: %v", third.Endpoint(), err)
				}
			})
		})
	}
}

// Attempts of one call spread over real backends, each named by its endpoint.
func TestAttemptsGoElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 3, serve(func(*grpctest.Backend) time.Duration { return time.Second }))
		_, c := dialP2C(f)
		ready(t, c)
		for range 50 {
			var call attempt.Call
			var as [4]attempt.Attempt
			var wg sync.WaitGroup
			for i := range as {
				as[i].Init(&call, i+1, attempt.Hedge)
				wg.Go(func() {
					res, err := c.Get(attempt.NewContext(t.Context(), &as[i]), &kvpb.Request{})
					if as[i].Unsent() != (err != nil) || err == nil && res.Backend != as[i].Endpoint() {
						t.Errorf("attempt %d: unsent %v, at %q, answer of %q, %v", i+1, as[i].Unsent(), as[i].Endpoint(), res.GetBackend(), err)
					}
				})
			}
			wg.Wait()
			var got []string
			for i := range as {
				got = append(got, as[i].Endpoint())
			}
			slices.Sort(got)
			if want := []string{"", "backend-0", "backend-1", "backend-2"}; !slices.Equal(got, want) {
				t.Fatalf("attempts at %q, want %q", got, want)
			}
		}
	})
}

// Endpoints with two addresses are one endpoint each, in whatever order the
// resolver names the addresses.
func TestMultiAddressEndpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 4, serve(func(*grpctest.Backend) time.Duration { return time.Second }))
		cc := f.Dial(grpc.WithDefaultServiceConfig(register(t, func(b *p2cBalancer) balancer.Balancer { return paired{b} })))
		c := kvpb.NewKVClient(cc)
		ready(t, c)
		for range 2 {
			var call attempt.Call
			var as [3]attempt.Attempt
			var got []string
			var wg sync.WaitGroup
			for i := range as {
				as[i].Init(&call, i+1, attempt.Hedge)
				wg.Go(func() { _, _ = c.Get(attempt.NewContext(t.Context(), &as[i]), &kvpb.Request{}) })
			}
			wg.Wait()
			for i := range as {
				got = append(got, as[i].Endpoint())
			}
			slices.Sort(got)
			if want := []string{"", "backend-0,backend-1", "backend-2,backend-3"}; !slices.Equal(got, want) {
				t.Errorf("attempts at %q, want %q", got, want)
			}
			f.Resolve(3, 2, 1, 0)
			time.Sleep(time.Second)
		}
	})
}

// Endpoints come and go under load, and no call is lost.
func TestNoCallIsLostWhileEndpointsChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 5, serve(func(*grpctest.Backend) time.Duration { return 50 * ms }))
		_, c := dialP2C(f)
		ready(t, c)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for i := range 50 {
				f.Resolve(i%5, (i+1)%5, (i+2)%5)
				time.Sleep(100 * ms)
			}
		}()
		load(t, f, c, 5*time.Second) // fails the test on any error
		<-done
	})
}

// With a faulty configuration the dial fails.
func TestConfigErrorsFailTheDial(t *testing.T) {
	_, err := grpc.NewClient("passthrough:///x", grpc.WithDefaultServiceConfig(
		`{"loadBalancingConfig":[{"bobtail_p2c":{"decayTimes":"1s"}}]}`))
	if err == nil {
		t.Error("no error for an unknown key")
	}
	var b p2cBalancer
	other := struct {
		serviceconfig.LoadBalancingConfig
	}{}
	if err := b.UpdateClientConnState(balancer.ClientConnState{BalancerConfig: other}); !errors.Is(err, balancer.ErrBadResolverState) {
		t.Errorf("got %v, want ErrBadResolverState", err)
	}
}
