package shedding

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
)

var errHook = errors.New("a hook has panicked")

// hooked is a server whose hooks panic as often as they are told to, and the interceptor of
// one who recovers.
type hooked struct {
	*Server
	report, changed int // so many times yet
}

func newHooked(t *testing.T, cfg ServerConfig) *hooked {
	h := &hooked{}
	cfg.Report = func(context.Context, ServerEvent) { h.due(&h.report) }
	cfg.Changed = func(Event) { h.due(&h.changed) }
	h.Server = newServer(t, cfg)
	return h
}

func (h *hooked) due(n *int) {
	if *n > 0 {
		*n--
		panic(errHook)
	}
}

// stir has the next one who holds the lock tell Changed of something, and that panic.
func (h *hooked) stir() {
	h.mu.Lock()
	h.core.event(LimitMoved, time.Now(), 1, 1)
	h.changed = 1
	h.mu.Unlock()
}

func (h *hooked) call(ctx context.Context, handler func(context.Context)) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = p.(error)
		}
	}()
	_, err = h.UnaryServerInterceptor()(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/kv.KV/Get"}, func(ctx context.Context, _ any) (any, error) {
		handler(ctx)
		return nil, nil
	})
	return err
}

func (h *hooked) stream(ctx context.Context, handler func(context.Context)) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = p.(error)
		}
	}()
	return h.StreamServerInterceptor()(nil, fakeStream{ctx: ctx}, &grpc.StreamServerInfo{FullMethod: "/kv.KV/Scan"}, func(_ any, ss grpc.ServerStream) error {
		handler(ss.Context())
		return nil
	})
}

func atOnce(context.Context) {}

// A hook that panics, with somebody outside who recovers, costs its call, and no slot and no
// place in the queue: wherever on the way of a call it is.
func TestServerHooksPanic(t *testing.T) {
	for _, mode := range []string{"on", "shadow"} {
		for _, tc := range []struct {
			name  string
			call  func(h *hooked) error
			modes string // on, shadow or both
		}{
			{"Report of one admitted", func(h *hooked) error {
				h.report = 1
				return h.call(context.Background(), atOnce)
			}, "on shadow"},
			{"Report of a stream", func(h *hooked) error {
				h.report = 1
				return h.stream(context.Background(), atOnce)
			}, "on shadow"},
			{"Changed, on arrival", func(h *hooked) error {
				h.stir()
				return h.call(context.Background(), atOnce)
			}, "on shadow"},
			{"Changed, at the end", func(h *hooked) error {
				return h.call(context.Background(), func(context.Context) { h.stir() })
			}, "on shadow"},
			{"Changed, at the end of a stream open for long", func(h *hooked) error {
				return h.stream(context.Background(), func(context.Context) { time.Sleep(2 * lastingAfter); h.stir() })
			}, "on shadow"},
			{"both", func(h *hooked) error {
				h.report = 1
				return h.call(context.Background(), func(context.Context) { h.stir() })
			}, "on shadow"},
			{"Changed, on its way into the queue", func(h *hooked) error {
				go h.call(context.Background(), func(context.Context) { time.Sleep(50 * ms) }) //nolint:errcheck
				synctest.Wait()
				h.stir()
				return h.call(context.Background(), atOnce)
			}, "on shadow"},
			{"Report of one that had waited", func(h *hooked) error {
				go h.call(context.Background(), func(context.Context) { time.Sleep(50 * ms); h.report = 1 }) //nolint:errcheck
				synctest.Wait()
				return h.call(context.Background(), atOnce)
			}, "on"},
			{"Report at the end of one that would have waited", func(h *hooked) error {
				go h.call(context.Background(), func(context.Context) { time.Sleep(50 * ms) }) //nolint:errcheck
				synctest.Wait()
				return h.call(context.Background(), func(context.Context) { time.Sleep(80 * ms); h.report = 1 })
			}, "shadow"},
			{"Report of one refused", func(h *hooked) error {
				h.Drain()
				h.report = 1
				return h.call(context.Background(), atOnce)
			}, "on shadow"},
			{"Changed, when the client of one that waits goes", func(h *hooked) error {
				go h.call(context.Background(), func(context.Context) { time.Sleep(50 * ms) }) //nolint:errcheck
				synctest.Wait()
				ctx, cancel := context.WithCancel(context.Background())
				time.AfterFunc(10*ms, func() { h.stir(); cancel() })
				return h.call(ctx, atOnce)
			}, "on"},
			{"Report, when the client of one that waits goes", func(h *hooked) error {
				go h.call(context.Background(), func(context.Context) { time.Sleep(50 * ms) }) //nolint:errcheck
				synctest.Wait()
				ctx, cancel := context.WithCancel(context.Background())
				time.AfterFunc(10*ms, func() { h.report = 1; cancel() })
				return h.call(ctx, atOnce)
			}, "on"},
		} {
			if !strings.Contains(tc.modes, mode) {
				continue
			}
			t.Run(mode+"/"+tc.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					cfg := staticServer(1, 1)
					cfg.Shadow = mode == "shadow"
					h := newHooked(t, cfg)
					h.unlock(h.lock()) // whatever there is to tell of a new server
					if err := tc.call(h); !errors.Is(err, errHook) {
						t.Errorf("%v, want the hook's panic", err)
					}
					time.Sleep(time.Second)
					if h.report != 0 || h.changed != 0 {
						t.Errorf("a hook has yet to panic")
					}
					if st := h.Stats(); st.InFlight != 0 || st.Queued != 0 || h.core.lasting != 0 {
						t.Errorf("%+v, %d open for long, want nobody", st.Stats, h.core.lasting)
					}
				})
			})
		}
	}
}

// Hooks that panic now and then, streams that come to last, clients that go, and a server that
// is put into shadow and back under them all: nothing is left of anybody.
func TestServerAtRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := staticServer(8, 40)
		cfg.Report = func(context.Context, ServerEvent) {
			if rand.IntN(20) == 0 {
				panic(errHook)
			}
		}
		s := newServer(t, cfg)
		h := hooked{Server: s}
		var panics, lasted, waited atomic.Int64
		var wg sync.WaitGroup
		for c := range 100 {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(c), 1))
				for range 200 {
					time.Sleep(time.Duration(rng.IntN(40_000)) * time.Microsecond)
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+rng.IntN(100_000))*time.Microsecond)
					takes, call := time.Duration(rng.IntN(10_000))*time.Microsecond, h.call
					if rng.IntN(2) == 0 {
						if call = h.stream; rng.IntN(10) == 0 {
							takes += lastingAfter
						}
					}
					begin := time.Now()
					err := call(ctx, func(context.Context) {
						if time.Since(begin) > 0 {
							waited.Add(1)
						}
						time.Sleep(takes)
						s.mu.Lock()
						lasted.Add(int64(s.core.lasting))
						s.mu.Unlock()
					})
					cancel()
					if errors.Is(err, errHook) {
						panics.Add(1)
					}
				}
			})
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for i := range 100 {
				time.Sleep(10*ms + time.Microsecond)
				c := cfg
				c.Shadow = i%2 == 0
				if err := s.Reconfigure(c); err != nil {
					t.Error(err)
				}
			}
		}()
		wg.Wait()
		<-done
		time.Sleep(2 * lastingAfter)
		if st := s.Stats(); st.InFlight != 0 || st.Queued != 0 || s.core.lasting != 0 {
			t.Errorf("%+v, %d open for long", st.Stats, s.core.lasting)
		}
		// About 950, 120 and 1,100.
		if panics.Load() < 10 || lasted.Load() < 10 || waited.Load() < 10 {
			t.Errorf("%d panics, %d lasted, %d waited: too few to show anything", panics.Load(), lasted.Load(), waited.Load())
		}
	})
}
