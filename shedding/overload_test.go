package shedding

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// story is of a real gRPC server in virtual time: 8 workers of 10 ms each and a FIFO before
// them that no policy sees, as a pool of connections or a lock would be. Calls have 100 ms,
// and come open-loop by a Poisson process, which does not slow down because the server
// does.
type story struct {
	server    *Server // nil: none
	load      float64 // of 800/s
	warm, run time.Duration
	// call gives each call its context and the number of the group that it is counted in.
	call func(ctx context.Context, rng *rand.Rand) (context.Context, int)
}

const overloadGroups = 16

// simulate must run in a bubble.
func (o story) simulate(t *testing.T) (total tally, groups [overloadGroups]tally) {
	t.Helper()
	workers := make(chan struct{}, 8)
	handlers := grpctest.Handlers{Unary: func(context.Context, *grpctest.Backend, *kvpb.Request) (*kvpb.Response, error) {
		workers <- struct{}{}
		time.Sleep(10 * time.Millisecond)
		<-workers
		return &kvpb.Response{}, nil
	}}
	var opts []grpc.ServerOption
	if s := o.server; s != nil {
		opts = append(opts, grpc.ChainUnaryInterceptor(s.UnaryServerInterceptor()), grpc.InTapHandle(s.TapHandle))
	}
	client := kvpb.NewKVClient(grpctest.NewFleet(t, 1, handlers, opts...).Dial())
	if _, err := client.Get(t.Context(), &kvpb.Request{}); err != nil {
		t.Fatal(err)
	}
	var (
		rng   = rand.New(rand.NewPCG(1, 2))
		wg    sync.WaitGroup
		mu    sync.Mutex // guards the tallies
		begin = time.Now()
	)
	for at := time.Duration(0); at < o.run; at += time.Duration(rng.ExpFloat64() / (o.load * 800) * 1e9) {
		time.Sleep(time.Until(begin.Add(at)))
		ctx, group := context.Background(), 0
		if o.call != nil {
			ctx, group = o.call(ctx, rng)
		}
		counted := at >= o.warm
		wg.Go(func() {
			sent := time.Now()
			ctx, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
			defer cancel()
			_, err := client.Get(ctx, &kvpb.Request{})
			took := time.Since(sent)
			if !counted {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for _, c := range []*tally{&total, &groups[group]} {
				c.offered++
				switch status.Code(err) {
				case codes.OK:
					c.admitted++
					c.good++
					c.latencies = append(c.latencies, took)
				case codes.DeadlineExceeded: // let in, and not served; or hopeless
					c.reasons[Hopeless]++
				case codes.Unavailable:
					c.reasons[AtLimit]++
				default:
					t.Errorf("%v", err)
				}
			}
		})
	}
	wg.Wait()
	return total, groups
}

// best is how many calls the server could have served.
func (o story) best() float64 { return min(o.load, 1) * 800 * (o.run - o.warm).Seconds() }

// shedServer is a server that nobody has tuned.
func shedServer(t *testing.T, cfg ServerConfig) *Server {
	t.Helper()
	if cfg.Limiter.Algorithm != Static {
		cfg.Queue = &QueueConfig{}
	}
	s, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// withMixed gives each call a class, by the parts of mixed.
func withMixed(ctx context.Context, rng *rand.Rand) (context.Context, int) {
	c := (&sim{mix: mixed}).class(rng)
	return WithCriticality(ctx, c), c.rank()
}

// The table of the overload: goodput, as part of the best possible; what is refused; and the
// 99th percentile of those served. See TestSimOverload for what the cores do by
// themselves, and for why a mixed load waits for longer at 1x and at 8x.
func TestOverload(t *testing.T) {
	if testing.Short() || testenv.Race {
		t.Skip("600,000 calls")
	}
	for _, policy := range []string{"none", "static", "shed", "shed, classes"} {
		for _, load := range []float64{0.5, 1, 2, 4, 8} {
			synctest.Test(t, func(t *testing.T) {
				o := story{load: load, warm: 5 * time.Second, run: 15 * time.Second}
				if load == 8 {
					o.run = 12 * time.Second
				}
				bound, at1x, refused1x := 25*ms, 40*ms, 0.03
				switch policy {
				case "none":
					o.warm, o.run = 2*time.Second, 6*time.Second
				case "static":
					o.server = shedServer(t, ServerConfig{Limiter: LimiterConfig{Algorithm: Static, Limit: 4 * 8}})
				case "shed, classes":
					// All waiting is the sheddable classes', three quarters of the load.
					o.call, at1x, refused1x = withMixed, 44*ms, 0.033
					if load == 8 {
						bound = 28 * ms
					}
					fallthrough
				case "shed":
					o.server = shedServer(t, ServerConfig{})
					if load == 1 {
						o.run = 65 * time.Second
					}
				}
				r, _ := o.simulate(t)
				goodput, slow := float64(r.good)/o.best(), p99(r.latencies)
				t.Logf("%-13s %3.1fx: goodput %.3f refused %.4f p99 %5.1f ms, %v", policy, load, goodput, r.refused(), float64(slow)/1e6, r.reasons)
				switch {
				case policy == "none":
					if load >= 2 && goodput > 0.1 {
						t.Errorf("goodput %v: this is no overload", goodput)
					}
				case policy == "static":
				case load == 0.5:
					if r.refused() > 0 {
						t.Errorf("%v of the load refused", r.refused())
					}
				case load == 1:
					if r.refused() > refused1x {
						t.Errorf("%v of the load refused, want %v", r.refused(), refused1x)
					}
					if slow > at1x {
						t.Errorf("p99 %v, want %v", slow, at1x)
					}
				default:
					if goodput < 0.98 {
						t.Errorf("goodput %v, want 0.98", goodput)
					}
					if slow >= bound {
						t.Errorf("p99 %v, want less than %v", slow, bound)
					}
				}
				if s := o.server; s != nil {
					if st := s.Stats(); st.InFlight != 0 || st.Queued != 0 {
						t.Errorf("at rest: %+v", st)
					}
				}
			})
		}
	}
}

// At 3x the two upper classes fit, and are served; what is refused is refused from below.
func TestOverloadCriticality(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := story{load: 3, warm: 5 * time.Second, run: 20 * time.Second, call: withMixed}
		if testenv.Race {
			o.run = 7 * time.Second
		}
		var early, refused atomic.Int64
		o.server = shedServer(t, ServerConfig{Report: func(_ context.Context, e ServerEvent) {
			if !e.Admitted {
				refused.Add(1)
			}
			if e.Tap {
				early.Add(1)
			}
		}})
		_, c := o.simulate(t)
		if early.Load() < refused.Load()/2 {
			t.Errorf("the tap has refused %d of %d", early.Load(), refused.Load())
		}
		t.Logf("success from below %.4f %.4f %.4f %.4f", c[0].success(), c[1].success(), c[2].success(), c[3].success())
		for rank := 2; rank < classes; rank++ {
			if s := c[rank].success(); s < 0.995 {
				t.Errorf("%v: success %v, want 0.995", Sheddable+Criticality(rank), s)
			}
		}
		if c[0].success() > 0.01 || c[1].success() > 0.5 {
			t.Errorf("success %v and %v of the lower classes, while all above do not fit", c[0].success(), c[1].success())
		}
	})
}

// Ten tenants have 80 calls/s each as their share. Nine ask for 64, one for 800: it costs the
// others next to nothing. Without shares it costs them a third.
func TestOverloadTenants(t *testing.T) {
	for _, shared := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			o := story{load: (9*64 + 800) / 800., warm: 5 * time.Second, run: 20 * time.Second}
			if testenv.Race {
				o.run = 10 * time.Second
			}
			o.call = func(ctx context.Context, rng *rand.Rand) (context.Context, int) {
				tenant := 9
				if u := rng.Float64() * (9*64 + 800); u < 9*64 {
					tenant = int(u / 64)
				}
				return metadata.AppendToOutgoingContext(ctx, "x-tenant-id", fmt.Sprint("tenant-", tenant)), tenant
			}
			cfg := ServerConfig{}
			if shared {
				cfg.Tenants = &TenantsConfig{MetadataKey: "x-tenant-id"}
			}
			o.server = shedServer(t, cfg)
			r, tenants := o.simulate(t)
			worst := 1.0
			for i := range 9 {
				worst = min(worst, tenants[i].success())
			}
			t.Logf("shares %v: goodput %.3f, worst of the nine %.4f, the one %.4f, %+v", shared, float64(r.good)/o.best(), worst, tenants[9].success(), o.server.Stats())
			switch {
			case shared && worst < 0.99:
				t.Errorf("success %v of a tenant inside its share, want 0.99", worst)
			case shared && float64(r.good)/o.best() < 0.98:
				t.Errorf("goodput %v, want 0.98", float64(r.good)/o.best())
			case !shared && worst > 0.8:
				t.Errorf("success %v without shares: this is no test of them", worst)
			}
		})
	}
}
