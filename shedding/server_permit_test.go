package shedding

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// fakeStream is a server's stream without a transport.
type fakeStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s fakeStream) Context() context.Context { return s.ctx }

// ending is how a call ends.
type ending int

const (
	endsOK ending = iota
	endsInError
	endsInPanic
	cancelledBefore
	cancelledDuring
	cancelledAfter
	endsLate
	endsInGoexit
	endings
)

// Whatever ends a call, its slot is given back, once: no more handlers ever run than the limit
// lets, and at the end none is missing. A million calls of every ending, unary and streams,
// most of which wait, and many of which leave the queue; the configuration changes under them.
func TestPermits(t *testing.T) {
	calls := 1_000_000
	if testing.Short() {
		calls = 100_000
	}
	const limit, callers = 16, 200
	synctest.Test(t, func(t *testing.T) {
		cfg := ServerConfig{
			Limiter: LimiterConfig{Algorithm: Static, Limit: limit}, Queue: &QueueConfig{MaxLength: 120, MaxWait: 4 * ms},
			Tenants: &TenantsConfig{MetadataKey: "x-tenant", PerSecond: 14_000, Burst: 500},
		}
		s := newServer(t, cfg)
		var running, ran, most atomic.Int64
		var ended [endings]atomic.Int64 // of those whose handler ran
		handle := func(ctx context.Context, e ending, takes time.Duration) error {
			n := running.Add(1)
			defer running.Add(-1)
			ran.Add(1)
			ended[e].Add(1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			switch e {
			case endsInError:
				return errors.New("failed")
			case endsInPanic:
				panic(e)
			case cancelledDuring:
				<-ctx.Done()
				return ctx.Err()
			case endsInGoexit, endsLate:
				time.Sleep(5 * takes)
			default:
				time.Sleep(takes)
			}
			return nil
		}
		unary, stream := s.UnaryServerInterceptor(), s.StreamServerInterceptor()
		call := func(rng *rand.Rand, e ending) {
			defer func() {
				if p := recover(); p != nil && p != e {
					panic(p)
				}
			}()
			ctx := context.Background()
			takes := time.Duration(rng.IntN(1000)) * time.Microsecond
			switch e {
			case endsLate:
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 2*takes)
				defer cancel()
			case cancelledBefore, cancelledDuring, cancelledAfter:
				var cancel context.CancelFunc
				ctx, cancel = context.WithCancel(ctx)
				defer cancel()
				if e == cancelledBefore {
					cancel()
				} else if e == cancelledDuring {
					defer time.AfterFunc(takes, cancel).Stop()
				}
			}
			if rng.IntN(2) == 0 {
				info := &grpc.UnaryServerInfo{FullMethod: "/kv.KV/Get"}
				_, _ = unary(ctx, nil, info, func(ctx context.Context, _ any) (any, error) { return nil, handle(ctx, e, takes) })
				return
			}
			info := &grpc.StreamServerInfo{FullMethod: "/kv.KV/Scan", IsClientStream: rng.IntN(2) == 0}
			_ = stream(nil, fakeStream{ctx: ctx}, info, func(_ any, ss grpc.ServerStream) error { return handle(ss.Context(), e, takes) })
		}
		var wg sync.WaitGroup
		for c := range callers {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(c), 1))
				for range calls / callers {
					time.Sleep(time.Duration(rng.IntN(20_000)) * time.Microsecond)
					e := ending(rng.IntN(int(endings)))
					if e != endsInGoexit {
						call(rng, e)
						continue
					}
					done := make(chan struct{})
					go func() {
						defer close(done)
						call(rng, e)
					}()
					<-done
				}
			})
		}
		stop := make(chan struct{})
		go func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(10 * ms):
				}
				c := cfg
				if i%2 == 0 {
					c.Queue = &QueueConfig{MaxLength: 60, MaxWait: 2 * ms}
				}
				if i%7 == 0 {
					c.Queue = nil
				}
				if err := s.Reconfigure(c); err != nil {
					t.Error(err)
				}
			}
		}()
		wg.Wait()
		close(stop)
		synctest.Wait()
		st := s.Stats()
		if st.InFlight != 0 || st.Queued != 0 || running.Load() != 0 {
			t.Errorf("at rest: %+v, %d run", st, running.Load())
		}
		if most.Load() != limit {
			t.Errorf("%d ran at once, want %d", most.Load(), limit)
		}
		if st.Admitted != ran.Load() || st.Admitted+st.Refused != int64(calls) {
			t.Errorf("%d admitted, %d ran; %d refused of %d", st.Admitted, ran.Load(), st.Refused, calls)
		}
		for e := range ended {
			if n := ended[e].Load(); ending(e) != cancelledBefore && n < int64(calls/100) {
				t.Errorf("ending %d: %d handlers, which is too few to show anything", e, n)
			}
		}
		if gone := s.refused[ClientGone].Load(); gone < int64(calls/100) {
			t.Errorf("%d left the queue, which is too few to show anything", gone)
		}
		t.Logf("%d ran, reasons %v", ran.Load(), &s.refused)
	})
}

// The same over connections: clients that cancel, run out of time, reset their streams and
// go away, a server that is stopped under them, and in every other round connections that the
// server ends with a GOAWAY and soon after cuts.
func TestPermitsOverConnections(t *testing.T) {
	rounds := 6
	if testing.Short() {
		rounds = 2
	}
	for round := range rounds {
		synctest.Test(t, func(t *testing.T) {
			const limit = 8
			s := newServer(t, ServerConfig{Limiter: LimiterConfig{Algorithm: Static, Limit: limit}, Queue: &QueueConfig{MaxLength: 60, MaxWait: 20 * ms}})
			var age keepalive.ServerParameters
			if round%2 == 1 {
				age.MaxConnectionAge, age.MaxConnectionAgeGrace = 20*ms, 5*ms
			}
			var running, most atomic.Int64
			work := func(ctx context.Context, req *kvpb.Request) error {
				n := running.Add(1)
				defer running.Add(-1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				switch req.Key {
				case "panic":
					panic("handler")
				case "error":
					return status.Error(codes.Internal, "")
				case "deaf":
					time.Sleep(time.Duration(req.Id) * ms)
					return nil
				}
				return sleep(ctx, req)
			}
			recovers := func(err *error) {
				if p := recover(); p != nil {
					*err = status.Errorf(codes.Internal, "%v", p)
				}
			}
			f := grpctest.NewFleet(t, 1, grpctest.Handlers{
				Unary: func(ctx context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
					return &kvpb.Response{}, work(ctx, req)
				},
				Scan: func(_ *grpctest.Backend, req *kvpb.Request, ss grpc.ServerStreamingServer[kvpb.Response]) error {
					for range 3 {
						if err := ss.Send(&kvpb.Response{}); err != nil {
							return err
						}
					}
					return work(ss.Context(), req)
				},
			}, grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (_ any, err error) {
				defer recovers(&err)
				return h(ctx, req)
			}, s.UnaryServerInterceptor()), grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
				defer recovers(&err)
				return h(srv, ss)
			}, s.StreamServerInterceptor()), grpc.InTapHandle(s.TapHandle), grpc.KeepaliveParams(age))
			conns := []*grpc.ClientConn{f.Dial(), f.Dial(), f.Dial()}
			keys := []string{"", "panic", "error", "deaf"}
			var wg sync.WaitGroup
			for c := range 50 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(round), uint64(c)))
					client := kvpb.NewKVClient(conns[rng.IntN(len(conns))])
					for i := range 60 {
						if c == 0 && i == 30 {
							f.Stop(0) // all streams are reset
							f.Start(0)
						}
						ctx, cancel := context.WithCancel(context.Background())
						switch rng.IntN(4) {
						case 0:
							ctx, cancel = context.WithTimeout(ctx, time.Duration(rng.IntN(20))*ms)
						case 1:
							time.AfterFunc(time.Duration(rng.IntN(20))*ms, cancel)
						}
						req := &kvpb.Request{Id: uint64(rng.IntN(8)), Key: keys[rng.IntN(len(keys))]}
						switch rng.IntN(3) {
						case 0:
							_, _ = client.Get(ctx, req)
						case 1:
							if ss, err := client.Scan(ctx, req); err == nil {
								for range rng.IntN(5) {
									if _, err := ss.Recv(); err != nil {
										break
									}
								}
							}
						case 2:
							if ss, err := client.Sync(ctx); err == nil {
								_ = ss.Send(req)
								_, _ = ss.Recv() // and go away: the context ends it
							}
						}
						cancel()
					}
				})
			}
			wg.Wait()
			time.Sleep(time.Second) // deaf handlers
			st := s.Stats()
			if st.InFlight != 0 || st.Queued != 0 || running.Load() != 0 {
				t.Errorf("at rest: %+v, %d run", st, running.Load())
			}
			if n := most.Load(); n > limit || n < limit/2 {
				t.Errorf("%d ran at once, want up to %d", n, limit)
			}
			if st.Admitted < 500 {
				t.Errorf("%+v: too few to show anything", st)
			}
			t.Logf("%+v", st)
		})
	}
}
