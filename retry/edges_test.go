package retry

import (
	"context"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// invoke makes a unary call whose attempts are made by f, told their number.
func invoke(ctx context.Context, cfg Config, f func(ctx context.Context, k int) error) error {
	k := 0
	return UnaryClientInterceptor(cfg)(ctx, "/kv.KV/Get", &kvpb.Request{}, &kvpb.Response{}, nil,
		func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
			k++
			return f(ctx, k)
		})
}

// Only UNAVAILABLE can mean that nobody was there: credentials that are not to be had, or an
// interceptor below that says no, reach no server either, and will say so again.
func TestUnsentMeansUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, code := range []codes.Code{codes.Unauthenticated, codes.Internal, codes.Canceled} {
			calls := 0
			err := invoke(t.Context(), Config{MaxAttempts: 3, Backoff: doubling, UnsentOnly: true}, func(context.Context, int) error {
				calls++
				return status.Error(code, "not sent")
			})
			if status.Code(err) != code || calls != 1 {
				t.Errorf("%v: %v after %d attempts, want 1", code, err, calls)
			}
		}
	})
}

// An interceptor below that drops the options hides the peer. Over our balancer, which has
// named a backend, the attempt counts as sent all the same.
func TestUnsentBehindDroppedOptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := Config{MaxAttempts: 3, Backoff: doubling, UnsentOnly: true}
		drop := grpc.WithChainUnaryInterceptor(func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, inv grpc.UnaryInvoker, _ ...grpc.CallOption) error {
			return inv(ctx, m, req, reply, cc)
		})
		s, kv, _ := over(t, cfg, 0.5, []part{{Code: codes.Unavailable}}, drop)
		if _, err := kv.Get(t.Context(), &kvpb.Request{}); status.Code(err) != codes.Unavailable || len(s.Arrived) != 1 {
			t.Errorf("%v after %d attempts, want 1", err, len(s.Arrived))
		}
	})
}

// An attempt that ends late by itself, with another code than the timeout's, is judged by
// that code.
func TestLateByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		err := invoke(t.Context(), Config{MaxAttempts: 3, Backoff: doubling, AttemptTimeout: 10 * ms}, func(context.Context, int) error {
			calls++
			time.Sleep(20 * ms) // deaf to its context
			return status.Error(codes.NotFound, "after all")
		})
		if status.Code(err) != codes.NotFound || calls != 1 {
			t.Errorf("%v after %d attempts, want NOT_FOUND after 1", err, calls)
		}
	})
}

// In shadow nothing ends an attempt that no other would follow.
func TestShadowEndsNoAttempt(t *testing.T) {
	cfg := Config{MaxAttempts: 3, Backoff: doubling, AttemptTimeout: 10 * ms, Shadow: true}
	slow := func(ctx context.Context) error {
		select {
		case <-time.After(50 * ms):
			return nil
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
	synctest.Test(t, func(t *testing.T) {
		if err := invoke(t.Context(), cfg, func(ctx context.Context, _ int) error { return slow(ctx) }); err != nil {
			t.Errorf("unary: %v", err)
		}
		r, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Do(t.Context(), r, func(ctx context.Context) (int, error) { return 0, slow(ctx) }); err != nil {
			t.Errorf("Do: %v", err)
		}
		f := scans(t, func(_ int, _ *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
			if err := slow(s.Context()); err != nil {
				return err
			}
			return s.Send(&kvpb.Response{})
		})
		if _, err := makeCall(t.Context(), dial(f, cfg), "server streaming"); err != nil {
			t.Errorf("stream: %v", err)
		}
	})
}

// Quick failures say nothing about how long an answer takes.
func TestFailuresAreCensored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, err := New(Config{MaxAttempts: 2, Backoff: doubling, RetryableCodes: unavailable})
		if err != nil {
			t.Fatal(err)
		}
		serve := func(d time.Duration, err error) {
			r.InvokeUnary(t.Context(), "/kv.KV/Get", &kvpb.Request{}, &kvpb.Response{}, nil,
				func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
					time.Sleep(d)
					return err
				})
		}
		for range 100 {
			serve(20*ms, nil)
		}
		for range 150 {
			serve(0, status.Error(codes.DataLoss, ""))
		}
		if d, ok := r.latency.Quantile(time.Now(), 0.5); !ok || d < 19*ms {
			t.Errorf("the median is %v, %v after quick failures, want 20ms", d, ok)
		}
	})
}

// A caller who waits before it receives makes no answer slow.
func TestUnreceivedIsUnmeasured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, err := New(Config{MaxAttempts: 2, Backoff: doubling, RetryableCodes: unavailable})
		if err != nil {
			t.Fatal(err)
		}
		f := scans(t, func(_ int, _ *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
			return s.Send(&kvpb.Response{})
		})
		cc := f.Dial(grpc.WithChainStreamInterceptor(r.OpenStream))
		for range 20 {
			s, err := kvpb.NewKVClient(cc).Scan(t.Context(), &kvpb.Request{})
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			for err == nil {
				_, err = s.Recv()
			}
		}
		if d, ok := r.latency.Quantile(time.Now(), 0.5); ok {
			t.Errorf("the median is %v, want none known", d)
		}
	})
}

// The budget is paid for by first attempts, charged for retries, and owed nothing in the
// end.
func TestBudgetIsPaid(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := budget(t, 0.5)
				_, kv, _ := over(t, Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable, Budget: b}, 0.5, []part{{Code: codes.Unavailable}, {}})
				for range 10 {
					if _, err := makeCall(t.Context(), kv, kind); err != nil {
						// The budget pays for every second retry, and for the first.
						continue
					}
				}
				if b.reserved != 0 || b.extraTotal != 6 {
					t.Errorf("%d attempts reserved, %d charged, want none and 1 + 0.5 x 10", b.reserved, b.extraTotal)
				}
				if got := b.Balance(time.Now()); got != 0 {
					t.Errorf("balance %v, want 0", got)
				}
				// What was sent leaves the window in time; what is reserved never would.
				if got := b.Balance(time.Now().Add(time.Hour)); got != 0 {
					t.Errorf("balance %v after an hour of silence, want 0: the total is spent", got)
				}
			})
		})
	}
}

// The balancer is told of each attempt what kind of call it belongs to.
func TestAttemptsInContext(t *testing.T) {
	for _, kind := range kinds {
		synctest.Test(t, func(t *testing.T) {
			var seen []attempt.Attempt
			note := func(ctx context.Context) {
				a := attempt.FromContext(ctx)
				seen = append(seen, attempt.Attempt{Number: a.Number, Kind: a.Kind, Streaming: a.Streaming})
				if !a.Of("/kv.KV/Get") == (kind == "unary") {
					t.Errorf("%s: attempt %d is of another method", kind, a.Number)
				}
			}
			_, kv, _ := over(t, Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable}, 0.5, []part{{Code: codes.Unavailable}, {}},
				grpc.WithChainUnaryInterceptor(func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, inv grpc.UnaryInvoker, o ...grpc.CallOption) error {
					note(ctx)
					return inv(ctx, m, req, reply, cc, o...)
				}),
				grpc.WithChainStreamInterceptor(func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, m string, st grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
					note(ctx)
					return st(ctx, d, cc, m, o...)
				}))
			if _, err := makeCall(t.Context(), kv, kind); err != nil {
				t.Fatal(err)
			}
			streaming := kind != "unary"
			if len(seen) != 2 || seen[0].Number != 1 || seen[0].Kind != attempt.First || seen[0].Streaming != streaming ||
				seen[1].Number != 2 || seen[1].Kind != attempt.Retry || seen[1].Streaming != streaming {
				t.Errorf("%s: %d attempts, not as they were made", kind, len(seen))
			}
		})
	}
}

// played is a stream that does as it is told.
type played struct {
	failing
	send error
	recv func() error
}

func (p played) SendMsg(any) error { return p.send }
func (p played) RecvMsg(any) error { return p.recv() }

// streamOf opens a server stream whose attempts are played.
func streamOf(t *testing.T, cfg Config, play func(k int) played) grpc.ClientStream {
	t.Helper()
	k := 0
	s, err := StreamClientInterceptor(cfg)(t.Context(), &grpc.StreamDesc{ServerStreams: true}, nil, "/kv.KV/Scan",
		func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
			k++
			p := play(k)
			p.ctx = ctx
			return p, nil
		})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SendMsg(&kvpb.Request{}); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	return s
}

// A message that comes together with the attempt's timeout comes too late: the stream is
// cut off already, and would end in a CANCELLED that is nobody's.
func TestMessageTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := streamOf(t, Config{MaxAttempts: 2, Backoff: doubling, AttemptTimeout: 10 * ms}, func(k int) played {
			return played{recv: func() error {
				if k == 1 {
					time.Sleep(20 * ms)
				}
				return nil
			}}
		})
		if err := s.RecvMsg(&kvpb.Response{}); err != nil {
			t.Errorf("%v", err)
		}
		if n := s.(*stream).number; n != 2 {
			t.Errorf("%d attempts, want 2", n)
		}
	})
}

// A send that finds the stream failed is no failure of the call.
func TestSendFindsTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := streamOf(t, Config{MaxAttempts: 2, Backoff: doubling, RetryableCodes: unavailable}, func(k int) played {
			if k == 1 {
				return played{send: io.EOF, recv: func() error { return down }}
			}
			return played{recv: func() error { return nil }}
		})
		if err := s.RecvMsg(&kvpb.Response{}); err != nil {
			t.Errorf("%v, want the second attempt's message", err)
		}
	})
}

// Inside a server the caller's context has a peer: that of the server's own caller. It is
// not that of a call that reached nobody.
func TestNobodyIsNoPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := scans(t, func(int, *kvpb.Request, grpc.ServerStreamingServer[kvpb.Response]) error { return down })
		kv := dial(f, Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable})
		ctx := peer.NewContext(t.Context(), &peer.Peer{Addr: &net.UnixAddr{Name: "the caller's own"}})
		var p peer.Peer
		var header metadata.MD
		s, err := kv.Scan(ctx, &kvpb.Request{}, grpc.Peer(&p), grpc.Header(&header))
		if err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			f.Stop(i)
		}
		if _, err := s.Recv(); status.Code(err) != codes.Unavailable || p.Addr != nil {
			t.Errorf("%v, peer %v", err, p)
		}
	})
}

// Two calls at once share nothing but what they learn. The race detector looks on.
func TestConcurrentCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 3, grpctest.Handlers{Unary: func(ctx context.Context, _ *grpctest.Backend, r *kvpb.Request) (*kvpb.Response, error) {
			if v := metadata.ValueFromIncomingContext(ctx, "grpc-previous-rpc-attempts"); len(v) == 0 && r.Id%3 == 0 {
				return nil, down
			}
			time.Sleep(ms)
			return &kvpb.Response{Id: r.Id, Value: r.Value}, nil
		}})
		kv := dial(f, Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable, Budget: budget(t, 1), AttemptTimeout: time.Second})
		done := make(chan error, 100)
		for i := range 100 {
			go func() {
				res, err := kv.Get(t.Context(), &kvpb.Request{Id: uint64(i), Value: []byte{byte(i)}})
				if err == nil && (res.Id != uint64(i) || res.Value[0] != byte(i)) {
					t.Errorf("call %d got the answer to %d", i, res.Id)
				}
				done <- err
			}()
		}
		for range 100 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}
