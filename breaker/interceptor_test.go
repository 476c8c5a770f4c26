package breaker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/permethod"
)

// stage is three backends that answer as key says: "" at once, "hang" never, "code ..." with that
// code; a stream sends one message before.
type stage struct {
	*grpctest.Fleet
	kv kvpb.KVClient

	mu      sync.Mutex
	changes []string
}

func newStage(t *testing.T, dial func(*stage) []grpc.DialOption) *stage {
	serve := func(ctx context.Context, key string) error {
		code, isCode := strings.CutPrefix(key, "code ")
		switch {
		case key == "hang":
			<-ctx.Done()
			return status.FromContextError(ctx.Err()).Err()
		case isCode:
			var c codes.Code
			if err := c.UnmarshalJSON([]byte(`"` + code + `"`)); err != nil {
				return err
			}
			return status.Error(c, "as wanted")
		}
		return nil
	}
	s := &stage{}
	s.Fleet = grpctest.NewFleet(t, 3, grpctest.Handlers{
		Unary: func(ctx context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
			return &kvpb.Response{Id: req.Id}, serve(ctx, req.Key)
		},
		Scan: func(b *grpctest.Backend, req *kvpb.Request, ss grpc.ServerStreamingServer[kvpb.Response]) error {
			if req.Key != "code UNAVAILABLE" {
				if err := ss.Send(&kvpb.Response{Id: req.Id}); err != nil {
					return err
				}
			}
			return serve(ss.Context(), req.Key)
		},
	})
	s.kv = kvpb.NewKVClient(s.Dial(dial(s)...))
	return s
}

// breaking dials through breakers of cfg, with grpc's options before and after.
func breaking(cfg Config, below ...grpc.DialOption) func(*stage) []grpc.DialOption {
	return func(s *stage) []grpc.DialOption {
		cfg.OnStateChange = func(c Change) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.changes = append(s.changes, fmt.Sprintf("%s %s %v", c.Method, c.Reason, c.To))
		}
		return append([]grpc.DialOption{
			grpc.WithChainUnaryInterceptor(UnaryClientInterceptor(cfg)),
			grpc.WithChainStreamInterceptor(StreamClientInterceptor(cfg)),
		}, below...)
	}
}

func (s *stage) told() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.changes, ", ")
}

func (s *stage) arrived() int64 {
	return s.Total(func(b *grpctest.Backend) int64 { return b.Started.Load() })
}

// get makes a unary call.
func (s *stage) get(ctx context.Context, key string, opts ...grpc.CallOption) error {
	_, err := s.kv.Get(ctx, &kvpb.Request{Key: key}, opts...)
	return err
}

// scan makes a streaming call and receives to its end.
func (s *stage) scan(ctx context.Context, key string, opts ...grpc.CallOption) error {
	ss, err := s.kv.Scan(ctx, &kvpb.Request{Key: key}, opts...)
	for err == nil {
		_, err = ss.Recv()
	}
	if err == io.EOF {
		return nil
	}
	return err
}

// The life of a breaker over real calls, unary and streaming: it opens, nothing is sent,
// it probes, it closes.
func TestInterceptorStory(t *testing.T) {
	for kind, call := range map[string]func(*stage, context.Context, string, ...grpc.CallOption) error{"Get": (*stage).get, "Scan": (*stage).scan} {
		t.Run(kind, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := newStage(t, breaking(Config{MinimumCalls: 4}))
				for range 4 {
					if err := call(s, t.Context(), "code UNAVAILABLE"); status.Code(err) != codes.Unavailable || errors.Is(err, ErrOpen) {
						t.Fatal(err)
					}
				}
				synctest.Wait()
				sent := s.arrived()
				var finished error
				err := call(s, t.Context(), "", grpc.OnFinish(func(err error) { finished = err }))
				if !errors.Is(err, ErrOpen) || !errors.Is(finished, ErrOpen) {
					t.Errorf("refused with %v, OnFinish was told %v", err, finished)
				}
				if other := map[string]error{"Get": s.scan(t.Context(), ""), "Scan": s.get(t.Context(), "")}[kind]; other != nil {
					t.Errorf("another method: %v", other)
				}
				if n := s.arrived() - sent; n != 1 {
					t.Errorf("%d calls arrived, want that of the other method", n)
				}
				time.Sleep(7 * sec)
				for range 5 {
					if err := call(s, t.Context(), ""); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
				}
				m := "/kv.KV/" + kind
				if got, want := s.told(), m+" failures open, "+m+" probe due half-open, "+m+" probes succeeded closed"; got != want {
					t.Errorf("told %q, want %q", got, want)
				}
			})
		})
	}
}

// Each target has breakers of its own.
func TestInterceptorPerTarget(t *testing.T) {
	bubble(t, func(t *testing.T) {
		i := UnaryClientInterceptor(Config{MinimumCalls: 1})
		a := newStage(t, func(*stage) []grpc.DialOption { return []grpc.DialOption{grpc.WithChainUnaryInterceptor(i)} })
		a.get(t.Context(), "code UNAVAILABLE")
		if err := a.get(t.Context(), ""); !errors.Is(err, ErrOpen) {
			t.Fatal(err)
		}
		called := false
		if err := i(t.Context(), "/kv.KV/Get", nil, nil, nil, func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
			called = true
			return nil
		}); err != nil || !called {
			t.Errorf("another target: %v, called %v", err, called)
		}
	})
}

// Names come from outside: those beyond the bound share one breaker, which has no name.
func TestInterceptorIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var told []string
		i := UnaryClientInterceptor(Config{MinimumCalls: 2, OnStateChange: func(c Change) { told = append(told, c.Method) }})
		call := func(method string, end error) error {
			return i(t.Context(), method, nil, nil, nil, func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return end })
		}
		for n := range permethod.Max {
			if err := call(fmt.Sprint(n), ends['f']); errors.Is(err, ErrOpen) {
				t.Fatalf("method %d shares a breaker", n)
			}
		}
		call("x", ends['f'])
		call("y", ends['f'])
		if err := call("z", nil); !errors.Is(err, ErrOpen) || fmt.Sprint(told) != "[]" {
			t.Errorf("methods beyond the bound: %v, told of %q", err, told)
		}
	})
}

// A faulty configuration fails every call, and says how.
func TestInterceptorFaults(t *testing.T) {
	bad, badThrottle := Config{FailureRatio: 2}, ThrottleConfig{K: 1}
	bubble(t, func(t *testing.T) {
		for _, opts := range [][]grpc.DialOption{{
			grpc.WithChainUnaryInterceptor(UnaryClientInterceptor(bad)), grpc.WithChainStreamInterceptor(StreamClientInterceptor(bad)),
		}, {
			grpc.WithChainUnaryInterceptor(ThrottleUnaryClientInterceptor(badThrottle)),
			grpc.WithChainStreamInterceptor(ThrottleStreamClientInterceptor(badThrottle)),
		}} {
			s := newStage(t, func(*stage) []grpc.DialOption { return opts })
			for range 2 {
				for _, err := range []error{s.get(t.Context(), ""), s.scan(t.Context(), "")} {
					if m := status.Convert(err).Message(); status.Code(err) != codes.Internal || m != "breaker: failure ratio 2, want (0, 1]" && m != "breaker: throttle k 1, want [1.1, 100]" {
						t.Error(err)
					}
				}
			}
			if s.arrived() != 0 {
				t.Error("a call was sent")
			}
		}
	})
}

// A stream that is never received from ends with its context, by which it may have failed
// or been left.
func TestStreamNeverReceived(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStage(t, breaking(Config{MinimumCalls: 3}))
		open := func(end func(context.Context) (context.Context, context.CancelFunc)) context.CancelFunc {
			ctx, cancel := end(t.Context())
			if _, err := s.kv.Scan(ctx, &kvpb.Request{Key: "hang"}); err != nil {
				t.Fatal(err)
			}
			return cancel
		}
		for range 10 {
			open(context.WithCancel)()
			synctest.Wait()
		}
		if got := s.told(); got != "" {
			t.Fatalf("streams that were left count: %s", got)
		}
		for range 3 {
			defer open(func(ctx context.Context) (context.Context, context.CancelFunc) { return context.WithTimeout(ctx, sec) })()
		}
		time.Sleep(sec - 1)
		if got := s.told(); got != "" {
			t.Fatalf("streams that live count: %s", got)
		}
		time.Sleep(ms)
		if got := s.told(); got != "/kv.KV/Scan failures open" {
			t.Errorf("told %q", got)
		}
	})
}

// A stream that lives for long is a success as a probe with its first message: else a
// breaker whose calls are all such streams would never close.
func TestStreamThatLivesOn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStage(t, breaking(Config{MinimumCalls: 4}))
		for range 4 {
			s.scan(t.Context(), "code UNAVAILABLE")
			synctest.Wait()
		}
		time.Sleep(7 * sec)
		ctx, cancel := context.WithCancel(t.Context())
		var streams []grpc.ServerStreamingClient[kvpb.Response]
		for range 5 {
			ss, err := s.kv.Scan(ctx, &kvpb.Request{Key: "hang"})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.kv.Scan(ctx, &kvpb.Request{Key: "hang"}); !errors.Is(err, ErrOpen) && len(streams) == 0 {
				t.Errorf("the first probe has not answered, and another stream is let in: %v", err)
			}
			if _, err := ss.Recv(); err != nil {
				t.Fatal(err)
			}
			streams = append(streams, ss)
		}
		if got := s.told(); !strings.HasSuffix(got, "probes succeeded closed") {
			t.Errorf("told %q", got)
		}
		cancel()
		for _, ss := range streams {
			if _, err := ss.Recv(); status.Code(err) != codes.Canceled {
				t.Error(err)
			}
		}
		if got := strings.Count(s.told(), ","); got != 2 {
			t.Errorf("told %q", s.told())
		}
	})
}

// A stream is not slow for living long.
func TestStreamIsNeverSlow(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStage(t, breaking(Config{MinimumCalls: 1, SlowCallDuration: sec}))
		ss, err := s.kv.Scan(t.Context(), &kvpb.Request{})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		for err == nil {
			_, err = ss.Recv()
		}
		synctest.Wait()
		if got := s.told(); err != io.EOF || got != "" {
			t.Errorf("%v, told %q", err, got)
		}
	})
}

// A probe that panics gives its place to another at once.
func TestProbePanics(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := breakers(Config{MinimumCalls: 1})
		unary := func(f func() error) error {
			return g.unary(t.Context(), "m", nil, nil, nil, func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return f() })
		}
		stream := func(f func() error) error {
			_, err := g.stream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, nil, "m",
				func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
					return nil, f()
				})
			return err
		}
		unary(func() error { return ends['f'] })
		time.Sleep(7 * sec)
		for i, call := range []func(func() error) error{unary, stream, unary} {
			called := false
			func() {
				defer func() { recover() }()
				call(func() error { called = true; panic("below") })
			}()
			if !called {
				t.Errorf("probe %d was refused: the one before has kept its place", i+1)
			}
		}
	})
}

// A stream goes with the caller's options, whose list is left as it was.
func TestStreamOptions(t *testing.T) {
	i := StreamClientInterceptor(Config{})
	list := make([]grpc.CallOption, 1, 4)
	list[0] = grpc.WaitForReady(true)
	_, err := i(t.Context(), &grpc.StreamDesc{}, nil, "m",
		func(_ context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			if len(opts) != 2 || opts[0] != list[0] {
				t.Errorf("options %v, want the caller's and one more", opts)
			}
			return &fake{}, nil
		}, list...)
	if err != nil || list[:2][1] != nil {
		t.Errorf("%v, and behind the caller's options stands %v", err, list[:2][1])
	}
}

// A stream that does not open counts as what kept it from opening.
func TestStreamFailsToOpen(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStage(t, breaking(Config{MinimumCalls: 3}))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for range 5 {
			if err := s.scan(ctx, ""); status.Code(err) != codes.Canceled {
				t.Fatal(err)
			}
		}
		if got := s.told(); got != "" {
			t.Errorf("cancelled before it opened: told %q", got)
		}
		for i := range s.Backends {
			s.Stop(i)
		}
		for range 3 {
			if err := s.scan(t.Context(), ""); status.Code(err) != codes.Unavailable {
				t.Fatal(err)
			}
		}
		if got := s.told(); got != "/kv.KV/Scan failures open" {
			t.Errorf("told %q", got)
		}
	})
}

// What an interceptor below does: it panics, it answers by itself, it answers with a stream of
// its own and forgets the options. Each call counts once, or not at all.
func TestInterceptorsBelow(t *testing.T) {
	type open = func() (grpc.ClientStream, error)
	unary := func(f func() error) func(*gates) error {
		return func(g *gates) error {
			return g.unary(context.Background(), "/kv.KV/Get", nil, nil, nil, func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return f() })
		}
	}
	stream := func(serverStreams bool, f open, receive int) func(*gates) error {
		return func(g *gates) error {
			s, err := g.stream(context.Background(), &grpc.StreamDesc{ServerStreams: serverStreams}, nil, "/kv.KV/Get",
				func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
					return f()
				})
			// A throttle may refuse the later ones; that counts as a failure, too.
			for range receive {
				if s != nil {
					err = s.RecvMsg(nil)
				}
			}
			return err
		}
	}
	for _, tc := range []struct {
		name     string
		call     func(*gates) error
		bad, all uint32 // counted, of 4 calls
	}{
		{"unary answers", unary(func() error { return nil }), 0, 4},
		{"unary fails", unary(func() error { return ends['f'] }), 4, 4},
		{"unary panics", unary(func() error { panic("below") }), 0, 0},
		{"stream panics", stream(true, func() (grpc.ClientStream, error) { panic("below") }, 0), 0, 0},
		{"stream does not open", stream(true, func() (grpc.ClientStream, error) { return nil, ends['f'] }, 0), 4, 4},
		{"stream that nobody receives from", stream(true, func() (grpc.ClientStream, error) { return &fake{n: 1}, nil }, 0), 0, 0},
		{"stream with a message", stream(true, func() (grpc.ClientStream, error) { return &fake{n: 1, end: io.EOF}, nil }, 1), 0, 0},
		{"stream to its end, and beyond", stream(true, func() (grpc.ClientStream, error) { return &fake{n: 1, end: io.EOF}, nil }, 4), 0, 4},
		{"stream that fails", stream(true, func() (grpc.ClientStream, error) { return &fake{n: 1, end: ends['f']}, nil }, 4), 4, 4},
		{"a single answer is the end", stream(false, func() (grpc.ClientStream, error) { return &fake{n: 1, end: io.EOF}, nil }, 1), 0, 4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for kind, g := range map[string]*gates{"breaker": breakers(Config{}), "throttle": throttles(ThrottleConfig{})} {
				for range 4 {
					func() {
						defer func() {
							if p := recover(); (p != nil) != strings.Contains(tc.name, "panics") {
								t.Errorf("%s: panic %v", kind, p)
							}
						}()
						tc.call(g)
					}()
				}
				var all, bad uint32
				switch v := g.Of(nil, "/kv.KV/Get").(type) {
				case *Breaker:
					c := v.phase.Load().calls.cb.Counts()
					all, bad = c.Requests, c.TotalFailures
				case *Throttle:
					all, bad = uint32(v.sum.requests), uint32(v.sum.requests-v.sum.accepts)
				}
				if all != tc.all || bad != tc.bad {
					t.Errorf("%s: %d of %d counted as failures, want %d of %d", kind, bad, all, tc.bad, tc.all)
				}
			}
		})
	}
}

// fake is a stream with n messages before its end, which does nothing else.
type fake struct {
	grpc.ClientStream
	n   int
	end error
}

func (s *fake) RecvMsg(any) error {
	if s.n--; s.n >= 0 {
		return nil
	}
	return s.end
}

// A throttle over real calls: it learns from calls that end, refuses here, and lets one call
// a second through, by which it learns that the server is back.
func TestThrottleInterceptorStory(t *testing.T) {
	for kind, call := range map[string]func(*stage, context.Context, string, ...grpc.CallOption) error{"unary": (*stage).get, "stream": (*stage).scan} {
		t.Run(kind, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				cfg := ThrottleConfig{Window: 6 * sec}
				s := newStage(t, func(*stage) []grpc.DialOption {
					return []grpc.DialOption{
						grpc.WithChainUnaryInterceptor(ThrottleUnaryClientInterceptor(cfg)),
						grpc.WithChainStreamInterceptor(ThrottleStreamClientInterceptor(cfg)),
					}
				})
				refused := func(key string, calls int, gap time.Duration) (n int) {
					for range calls {
						if err := call(s, t.Context(), key); errors.Is(err, ErrThrottled) {
							n++
						}
						time.Sleep(gap)
					}
					return n
				}
				if n := refused("", 100, ms); n != 0 {
					t.Errorf("%d of 100 calls refused by a server that is well", n)
				}
				if n := refused("code UNAVAILABLE", 400, ms); n < 50 {
					t.Errorf("%d of 400 calls refused while all fail", n)
				}
				time.Sleep(sec)
				if n := refused("code UNAVAILABLE", 20, sec); n != 0 {
					t.Errorf("%d of 20 calls refused, one in a second", n)
				}
				if n := refused("", 20, sec); n != 0 {
					t.Errorf("%d of 20 calls refused after the server was back, one in a second", n)
				}
				if n := refused("", 200, ms); n != 0 {
					t.Errorf("%d of 200 calls refused by a server that is well again", n)
				}
			})
		})
	}
}
