package shedding

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
)

// Streams that are open for long starve nobody: a server whose limit is 20 comes to have any
// number of them, and serves the calls beside them as if they were not there. They end in all
// ways, and at the end nothing is left of them.
func TestServerLastingStreams(t *testing.T) {
	for _, streams := range []int{12, 100} {
		t.Run(fmt.Sprint(streams), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newServer(t, ServerConfig{Queue: &QueueConfig{}})
				unary, stream := s.UnaryServerInterceptor(), s.StreamServerInterceptor()
				var open, calls, served atomic.Int64
				ctx, end := context.WithCancel(context.Background())
				defer end()
				for i := range streams {
					info := &grpc.StreamServerInfo{FullMethod: "/kv.KV/Watch", IsClientStream: i%2 == 0}
					go func() {
						defer func() { _ = recover() }()
						time.Sleep(time.Duration(i) * 100 * ms)                             // half of what can come in at first, at a limit of 20
						for in := false; !in && ctx.Err() == nil; time.Sleep(time.Second) { // those that are refused come again
							_ = stream(nil, fakeStream{ctx: ctx}, info, func(_ any, ss grpc.ServerStream) error {
								in = true
								open.Add(1)
								defer open.Add(-1)
								<-ss.Context().Done()
								if i%3 == 0 {
									panic(errors.New("handler"))
								}
								return ss.Context().Err()
							})
						}
					}()
				}
				call := func() {
					calls.Add(1)
					_, err := unary(context.Background(), nil, &grpc.UnaryServerInfo{FullMethod: "/kv.KV/Get"}, func(context.Context, any) (any, error) {
						time.Sleep(5 * ms)
						return nil, nil
					})
					if err == nil {
						served.Add(1)
					}
				}
				tick := func(span time.Duration) {
					for begin := time.Now(); time.Since(begin) < span; time.Sleep(10 * ms) {
						go call()
					}
				}
				tick(time.Duration(streams) * 100 * ms)
				if n := open.Load(); n != int64(streams) {
					t.Errorf("%d streams are open, want %d", n, streams)
				}
				tick(2 * time.Second)
				calls.Store(0)
				served.Store(0)
				tick(3 * time.Minute)
				synctest.Wait()
				if n, of := served.Load(), calls.Load(); n < of*99/100 || of < 17_000 {
					t.Errorf("%d of %d calls served", n, of)
				}
				if st := s.Stats(); st.InFlight < streams {
					t.Errorf("%+v: the streams are not in flight", st.Stats)
				}
				end()
				time.Sleep(time.Second)
				if st := s.Stats(); st.InFlight != 0 || st.Queued != 0 || s.core.lasting != 0 || open.Load() != 0 {
					t.Errorf("%+v, %d open for long: they have ended", st.Stats, s.core.lasting)
				}
			})
		})
	}
}

// A stream that ends just when it is about to be one that lasts is counted off as often as
// on, and one that has ended never is. Not after a panic either.
func TestServerLastingEnds(t *testing.T) {
	for _, off := range []time.Duration{-time.Nanosecond, time.Nanosecond, time.Hour} {
		for _, panics := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				s := newServer(t, staticServer(1, 10))
				lasts := func() int {
					s.mu.Lock()
					defer s.mu.Unlock()
					return s.core.lasting
				}
				h := hooked{Server: s}
				_ = h.stream(context.Background(), func(context.Context) {
					if n := lasts(); n != 0 {
						t.Errorf("%d at its beginning", n)
					}
					time.Sleep(lastingAfter + off)
					if n := lasts(); n != 0 && off < 0 || n != 1 && off > 0 {
						t.Errorf("%d after %v", n, lastingAfter+off)
					}
					if panics {
						panic(errHook)
					}
				})
				if n := lasts(); n != 0 {
					t.Errorf("%d at its end", n)
				}
				time.Sleep(2 * lastingAfter)
				if n := lasts(); n != 0 || s.Stats().InFlight != 0 {
					t.Errorf("%d long after its end, %+v", n, s.Stats().Stats)
				}
			})
		}
	}
	// The timer that has fired, and comes to the lock when the stream has ended.
	s := newServer(t, staticServer(1, 10))
	p := &permit{server: s, cfg: s.config.Load(), stream: true}
	if _, err := p.admit(context.Background(), "/kv.KV/Watch"); err != nil {
		t.Fatal(err)
	}
	p.end(context.Background(), nil)
	p.last()
	if s.core.lasting != 0 {
		t.Errorf("one that has ended lasts")
	}
}

// A slot that a lasting stream gives back lets in one, and not two.
func TestServerLastingEndLetsInOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, ServerConfig{Limiter: LimiterConfig{Algorithm: Static, Limit: 1}, Queue: &QueueConfig{MaxWait: time.Minute, Target: time.Minute}})
		h := hooked{Server: s}
		var running, most atomic.Int64
		go h.stream(context.Background(), func(context.Context) { time.Sleep(3 * lastingAfter) }) //nolint:errcheck
		synctest.Wait()
		for range 5 {
			go h.call(context.Background(), func(context.Context) { //nolint:errcheck
				most.Store(max(most.Load(), running.Add(1)))
				defer running.Add(-1)
				time.Sleep(5 * lastingAfter)
			})
		}
		time.Sleep(time.Minute)
		if most.Load() != 1 {
			t.Errorf("%d beside it at once, want one", most.Load())
		}
		if st := s.Stats(); st.InFlight != 0 || st.Queued != 0 {
			t.Errorf("%+v", st.Stats)
		}
	})
}
