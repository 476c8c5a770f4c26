package shedding

import (
	"context"
	"errors"
	"io"
	"math"
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
)

// over dials a backend whose handlers take 100 ms, through gates of cfg.
func over(t *testing.T, cfg ClientConfig, opts ...grpc.DialOption) (kvpb.KVClient, *grpc.ClientConn, *gates, *grpctest.Fleet) {
	t.Helper()
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	g := newGates(cfg)
	f := grpctest.NewFleet(t, 1, grpctest.Handlers{
		Unary: func(ctx context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
			select {
			case <-time.After(100 * ms):
				return &kvpb.Response{Id: req.Id}, nil
			case <-ctx.Done():
				return nil, status.FromContextError(ctx.Err()).Err()
			}
		},
		// Scan sends one message; what comes then the request's key says.
		Scan: func(_ *grpctest.Backend, req *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
			if err := s.Send(&kvpb.Response{}); err != nil {
				return err
			}
			switch req.Key {
			case "end":
				return nil
			case "fail":
				return status.Error(codes.Unavailable, "no")
			}
			<-s.Context().Done()
			return s.Context().Err()
		},
	})
	cc := f.Dial(append([]grpc.DialOption{grpc.WithChainUnaryInterceptor(g.unary), grpc.WithChainStreamInterceptor(g.stream)}, opts...)...)
	cc.Connect()
	time.Sleep(time.Second)
	return kvpb.NewKVClient(cc), cc, g, f
}

// As many calls as may be are in flight, of each method by itself; one more is refused at
// once and never reaches a server, and its OnFinish is run.
func TestUnaryMaxInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kv, cc, g, f := over(t, ClientConfig{MaxInFlight: 2})
		begin := time.Now()
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				if _, err := kv.Get(t.Context(), &kvpb.Request{}); err != nil || time.Since(begin) != 100*ms {
					t.Errorf("%v after %v", err, time.Since(begin))
				}
			})
		}
		synctest.Wait()
		var told []error
		_, err := kv.Get(t.Context(), &kvpb.Request{}, grpc.OnFinish(func(err error) { told = append(told, err) }))
		checkRefusal(t, err, "BULKHEAD_FULL", kvpb.KV_Get_FullMethodName, 0)
		if !errors.Is(err, ErrBulkheadFull) || time.Since(begin) != 0 {
			t.Errorf("%v after %v, want ErrBulkheadFull at once", err, time.Since(begin))
		}
		if len(told) != 1 || told[0] != err {
			t.Errorf("OnFinish was told %v", told)
		}
		if _, err := kv.Put(t.Context(), &kvpb.Request{}); err != nil {
			t.Errorf("another method: %v", err)
		}
		wg.Wait()
		if _, err := kv.Get(t.Context(), &kvpb.Request{}); err != nil {
			t.Errorf("when the others have ended: %v", err)
		}
		if n := f.Backends[0].Started.Load(); n != 4 {
			t.Errorf("%d calls reached the server, want 4", n)
		}
		if n := g.Of(cc, kvpb.KV_Get_FullMethodName).bulkhead.InFlight(); n != 0 {
			t.Errorf("%d in flight in the end", n)
		}
	})
}

// Calls go at the rate, each method's by itself, and those whose turn would come too late
// are refused at once.
func TestUnaryRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kv, _, _, f := over(t, ClientConfig{PerSecond: 10, Burst: 2})
		begin := time.Now()
		var wg sync.WaitGroup
		for _, want := range []time.Duration{0, 0, 100 * ms, 200 * ms} {
			wg.Go(func() {
				if _, err := kv.Get(t.Context(), &kvpb.Request{}); err != nil || time.Since(begin) != want+100*ms {
					t.Errorf("%v after %v, want a start at %v", err, time.Since(begin), want)
				}
			})
			synctest.Wait()
		}
		ctx, cancel := context.WithTimeout(t.Context(), 250*ms)
		defer cancel()
		_, err := kv.Get(ctx, &kvpb.Request{})
		checkRefusal(t, err, "RATE_LIMITED", kvpb.KV_Get_FullMethodName, 300*ms)
		if !errors.Is(err, ErrRateLimited) || time.Since(begin) != 0 {
			t.Errorf("%v after %v, want ErrRateLimited at once", err, time.Since(begin))
		}
		if _, err := kv.Put(ctx, &kvpb.Request{}); err != nil || time.Since(begin) != 100*ms {
			t.Errorf("another method: %v after %v", err, time.Since(begin))
		}
		wg.Wait()
		if n := f.Backends[0].Started.Load(); n != 5 {
			t.Errorf("%d calls reached the server, want 5", n)
		}
	})
}

// Who waits for a turn is in flight: MaxInFlight bounds the queue as well. Who gives up
// frees the place.
func TestBulkheadBoundsTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kv, cc, g, _ := over(t, ClientConfig{PerSecond: 1, Burst: 1, MaxInFlight: 3})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				_, err := kv.Get(ctx, &kvpb.Request{})
				if want := []codes.Code{codes.OK, codes.Canceled, codes.Canceled}[i]; status.Code(err) != want {
					t.Errorf("call %d: %v, want %v", i, err, want)
				}
			})
			synctest.Wait()
		}
		if _, err := kv.Get(t.Context(), &kvpb.Request{}); !errors.Is(err, ErrBulkheadFull) {
			t.Errorf("%v, want ErrBulkheadFull", err)
		}
		// The first ends; its place is that of another who waits.
		time.Sleep(200 * ms)
		b := g.Of(cc, kvpb.KV_Get_FullMethodName).bulkhead
		if n := b.InFlight(); n != 2 {
			t.Errorf("%d in flight, want the 2 who wait", n)
		}
		cancel()
		wg.Wait()
		if n := b.InFlight(); n != 0 {
			t.Errorf("%d in flight, want 0", n)
		}
		begin := time.Now()
		if _, err := kv.Get(t.Context(), &kvpb.Request{}); err != nil || time.Since(begin) != 900*ms {
			t.Errorf("%v after %v, want the turn that they gave back, at 800ms, and a call of 100ms", err, time.Since(begin))
		}
	})
}

// An interceptor below that panics costs no place.
func TestPanicBelow(t *testing.T) {
	g := newGates(ClientConfig{MaxInFlight: 1})
	for range 3 {
		func() {
			defer func() {
				if v := recover(); v != "below" {
					t.Errorf("recovered %v, want the panic to pass", v)
				}
			}()
			g.unary(t.Context(), "/kv.KV/Get", nil, nil, nil, func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
				panic("below")
			})
		}()
	}
	if n := g.Of(nil, "/kv.KV/Get").bulkhead.InFlight(); n != 0 {
		t.Errorf("%d in flight, want 0", n)
	}
}

// However a stream ends, it gives its place back at that time, and once. Another stream of
// the same method, open all the while, would be missing if it did so twice.
func TestStreamEnds(t *testing.T) {
	scan := &grpc.StreamDesc{StreamName: "Scan", ServerStreams: true}
	const method = kvpb.KV_Scan_FullMethodName
	receive := func(t *testing.T, s grpc.ServerStreamingClient[kvpb.Response], n int, want codes.Code) {
		t.Helper()
		for range n {
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.Recv(); err == nil || err != io.EOF && status.Code(err) != want || err == io.EOF && want != codes.OK {
			t.Errorf("%v, want %v", err, want)
		}
	}
	fabricated := func(recv error) grpc.Streamer {
		return func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
			return fake{recv: recv, send: recv}, nil
		}
	}
	for name, end := range map[string]func(*testing.T, kvpb.KVClient, *grpc.ClientConn, *gates){
		"received to its end": func(t *testing.T, kv kvpb.KVClient, _ *grpc.ClientConn, _ *gates) {
			s, err := kv.Scan(t.Context(), &kvpb.Request{Key: "end"})
			if err != nil {
				t.Fatal(err)
			}
			receive(t, s, 1, codes.OK)
			s.Recv() // and once more
		},
		"failed by the server": func(t *testing.T, kv kvpb.KVClient, _ *grpc.ClientConn, _ *gates) {
			s, err := kv.Scan(t.Context(), &kvpb.Request{Key: "fail"})
			if err != nil {
				t.Fatal(err)
			}
			receive(t, s, 1, codes.Unavailable)
		},
		"cancelled, and then received": func(t *testing.T, kv kvpb.KVClient, _ *grpc.ClientConn, _ *gates) {
			ctx, cancel := context.WithCancel(t.Context())
			s, err := kv.Scan(ctx, &kvpb.Request{})
			if err != nil {
				t.Fatal(err)
			}
			cancel()
			synctest.Wait()
			s.Recv()
			receive(t, s, 0, codes.Canceled)
		},
		"cancelled and never received": func(t *testing.T, kv kvpb.KVClient, _ *grpc.ClientConn, _ *gates) {
			ctx, cancel := context.WithCancel(t.Context())
			if _, err := kv.Scan(ctx, &kvpb.Request{}); err != nil {
				t.Fatal(err)
			}
			cancel()
		},
		"past its deadline and never received": func(t *testing.T, kv kvpb.KVClient, _ *grpc.ClientConn, _ *gates) {
			ctx, cancel := context.WithTimeout(t.Context(), 50*ms)
			defer cancel()
			if _, err := kv.Scan(ctx, &kvpb.Request{}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(60 * ms)
		},
		"refused by grpc when it opens": func(t *testing.T, kv kvpb.KVClient, _ *grpc.ClientConn, _ *gates) {
			if _, err := kv.Scan(t.Context(), &kvpb.Request{}, grpc.UseCompressor("none such")); status.Code(err) != codes.Internal {
				t.Errorf("%v, want INTERNAL", err)
			}
		},
		"opened under a context that has ended": func(t *testing.T, kv kvpb.KVClient, _ *grpc.ClientConn, _ *gates) {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := kv.Scan(ctx, &kvpb.Request{}); status.Code(err) != codes.Canceled {
				t.Errorf("%v, want CANCELLED", err)
			}
		},
		"an interceptor below fails without grpc": func(t *testing.T, _ kvpb.KVClient, cc *grpc.ClientConn, g *gates) {
			_, err := g.stream(t.Context(), scan, cc, method, func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
				return nil, status.Error(codes.Aborted, "below")
			})
			if status.Code(err) != codes.Aborted {
				t.Error(err)
			}
		},
		"an interceptor below panics": func(t *testing.T, _ kvpb.KVClient, cc *grpc.ClientConn, g *gates) {
			defer func() {
				if v := recover(); v != "below" {
					t.Errorf("recovered %v, want the panic to pass", v)
				}
			}()
			g.stream(t.Context(), scan, cc, method, func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
				panic("below")
			})
		},
		"an interceptor below answers by itself": func(t *testing.T, _ kvpb.KVClient, cc *grpc.ClientConn, g *gates) {
			s, err := g.stream(t.Context(), scan, cc, method, fabricated(io.EOF))
			if err != nil {
				t.Fatal(err)
			}
			if n := g.Of(cc, method).bulkhead.InFlight(); n != 2 {
				t.Errorf("%d in flight while it is open, want 2", n)
			}
			if err := s.SendMsg(nil); err != io.EOF {
				t.Error(err)
			}
			if n := g.Of(cc, method).bulkhead.InFlight(); n != 2 {
				t.Errorf("%d in flight before its end is received, want 2", n)
			}
			s.RecvMsg(nil)
			s.RecvMsg(nil)
		},
		"an interceptor below answers by itself, and cannot send": func(t *testing.T, _ kvpb.KVClient, cc *grpc.ClientConn, g *gates) {
			s, err := g.stream(t.Context(), scan, cc, method, fabricated(status.Error(codes.Internal, "no")))
			if err != nil {
				t.Fatal(err)
			}
			s.SendMsg(nil)
		},
		"an interceptor below answers by itself with one message": func(t *testing.T, _ kvpb.KVClient, cc *grpc.ClientConn, g *gates) {
			s, err := g.stream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, cc, method, fabricated(nil))
			if err != nil {
				t.Fatal(err)
			}
			s.RecvMsg(nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kv, cc, g, _ := over(t, ClientConfig{MaxInFlight: 2})
				other, err := kv.Scan(t.Context(), &kvpb.Request{})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := other.Recv(); err != nil {
					t.Fatal(err)
				}
				end(t, kv, cc, g)
				synctest.Wait()
				if n := g.Of(cc, method).bulkhead.InFlight(); n != 1 {
					t.Errorf("%d in flight, want the other stream alone", n)
				}
			})
		})
	}
}

// fake is a stream of an interceptor that knows nothing of options.
type fake struct {
	grpc.ClientStream
	send, recv error
}

func (f fake) SendMsg(any) error { return f.send }
func (f fake) RecvMsg(any) error { return f.recv }

// The caller's list of options, which may have room behind it, is not written into.
func TestStreamLeavesOptionsAlone(t *testing.T) {
	g := newGates(ClientConfig{MaxInFlight: 1})
	opts := append(make([]grpc.CallOption, 0, 2), grpc.WaitForReady(true))
	var given []grpc.CallOption
	_, err := g.stream(t.Context(), &grpc.StreamDesc{}, nil, "/a/b",
		func(_ context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			given = opts
			return fake{}, nil
		}, opts...)
	if err != nil || len(given) != 2 || opts[:2][1] != nil {
		t.Errorf("%v: given %v, and behind the caller's options %v", err, given, opts[:2][1])
	}
}

// A connection that is closed ends its streams, received or not.
func TestStreamOfClosedConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kv, cc, g, _ := over(t, ClientConfig{MaxInFlight: 2})
		for range 2 {
			if _, err := kv.Scan(t.Context(), &kvpb.Request{}); err != nil {
				t.Fatal(err)
			}
		}
		_, err := kv.Scan(t.Context(), &kvpb.Request{})
		checkRefusal(t, err, "BULKHEAD_FULL", kvpb.KV_Scan_FullMethodName, 0)
		cc.Close()
		synctest.Wait()
		if n := g.Of(cc, kvpb.KV_Scan_FullMethodName).bulkhead.InFlight(); n != 0 {
			t.Errorf("%d in flight, want 0", n)
		}
	})
}

// Streams whose client streams hold a place too, the last one until its one answer.
func TestClientStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kv, cc, g, _ := over(t, ClientConfig{MaxInFlight: 1})
		load, err := kv.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := kv.Load(t.Context()); !errors.Is(err, ErrBulkheadFull) {
			t.Errorf("%v, want ErrBulkheadFull", err)
		}
		load.Send(&kvpb.Request{})
		if _, err := load.CloseAndRecv(); err != nil {
			t.Error(err)
		}
		sync, err := kv.Sync(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		sync.CloseSend()
		if n := g.Of(cc, kvpb.KV_Sync_FullMethodName).bulkhead.InFlight(); n != 1 {
			t.Errorf("%d in flight, want 1", n)
		}
		if _, err := sync.Recv(); err != io.EOF {
			t.Error(err)
		}
		for _, m := range []string{kvpb.KV_Load_FullMethodName, kvpb.KV_Sync_FullMethodName} {
			if n := g.Of(cc, m).bulkhead.InFlight(); n != 0 {
				t.Errorf("%s: %d in flight, want 0", m, n)
			}
		}
	})
}

// A stream takes a turn when it is opened, and without a bound holds nothing.
func TestStreamRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kv, _, _, _ := over(t, ClientConfig{PerSecond: 10, Burst: 1})
		begin := time.Now()
		for i := range 3 {
			if _, err := kv.Scan(t.Context(), &kvpb.Request{}); err != nil || time.Since(begin) != time.Duration(i)*100*ms {
				t.Errorf("stream %d: %v after %v", i, err, time.Since(begin))
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*ms)
		defer cancel()
		told := 0
		_, err := kv.Scan(ctx, &kvpb.Request{}, grpc.OnFinish(func(error) { told++ }))
		checkRefusal(t, err, "RATE_LIMITED", kvpb.KV_Scan_FullMethodName, 100*ms)
		if told != 1 {
			t.Errorf("OnFinish was run %d times, want once", told)
		}

		own := &fake{}
		s, err := StreamClientInterceptor(ClientConfig{PerSecond: 10})(t.Context(), &grpc.StreamDesc{}, nil, "/a/b",
			func(_ context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
				if len(opts) > 0 {
					t.Errorf("options %v, want none", opts)
				}
				return own, nil
			})
		if s != own || err != nil {
			t.Errorf("%v, %v, want the very stream", s, err)
		}
	})
}

func TestClientConfig(t *testing.T) {
	for _, test := range []struct {
		cfg  ClientConfig
		want string // "" is none
	}{
		{ClientConfig{PerSecond: 1}, ""},
		{ClientConfig{PerSecond: 1, Burst: 1, MaxInFlight: 1_000_000}, ""},
		{ClientConfig{MaxInFlight: 1}, ""},
		{ClientConfig{}, "shedding: neither perSecond nor max in flight, want at least one"},
		{ClientConfig{Burst: 3}, "shedding: burst 3 without perSecond, want both"},
		{ClientConfig{PerSecond: math.NaN()}, "shedding: rate limit perSecond NaN, want (0, 1000000000]"},
		{ClientConfig{MaxInFlight: 1_000_001}, "shedding: max in flight 1000001, want [1, 1000000], or 0 for none"},
		{ClientConfig{PerSecond: -1, Burst: -2, MaxInFlight: -3}, "shedding: rate limit perSecond -1, want (0, 1000000000]\n" +
			"shedding: rate limit burst -2, want [1, 1000000000], or 0 for the default\n" +
			"shedding: max in flight -3, want [1, 1000000], or 0 for none"},
	} {
		err := test.cfg.Validate()
		if err == nil && test.want != "" || err != nil && err.Error() != test.want {
			t.Errorf("%+v: %v, want %q", test.cfg, err, test.want)
		}
		if test.want == "" {
			continue
		}
		err = UnaryClientInterceptor(test.cfg)(t.Context(), "/a/b", nil, nil, nil, nil)
		if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: a call: %v", test.cfg, err)
		}
		_, err = StreamClientInterceptor(test.cfg)(t.Context(), nil, nil, "/a/b", nil)
		if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: a stream: %v", test.cfg, err)
		}
	}
}

// Beside the bare transport: what the interceptors add to a call.
func BenchmarkUnaryClientInterceptor(b *testing.B) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	invoke := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return nil }
	bare := func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, inv grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		return inv(ctx, method, req, reply, cc, opts...)
	}
	for name, i := range map[string]grpc.UnaryClientInterceptor{
		"bare":          bare,
		"rate":          UnaryClientInterceptor(ClientConfig{PerSecond: 1e9, Burst: 1e9}),
		"max in flight": UnaryClientInterceptor(ClientConfig{MaxInFlight: 1000}),
		"both":          UnaryClientInterceptor(ClientConfig{PerSecond: 1e9, Burst: 1e9, MaxInFlight: 1000}),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := i(ctx, "/kv.KV/Get", nil, nil, nil, invoke); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
