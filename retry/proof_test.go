package retry

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// An attempt's timeout is for those who wait: streams that are opened together and received
// one after the other have their answers already.
func TestNobodyReceivesYet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		n := 0
		f := scans(t, func(_ int, _ *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
			mu.Lock()
			n++
			mu.Unlock()
			time.Sleep(ms)
			return s.Send(&kvpb.Response{})
		})
		kv := dial(f, Config{MaxAttempts: 3, Backoff: doubling, AttemptTimeout: 100 * ms})
		var open []grpc.ServerStreamingClient[kvpb.Response]
		for range 10 {
			s, err := kv.Scan(t.Context(), &kvpb.Request{})
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, s)
		}
		time.Sleep(200 * ms)
		for _, s := range open {
			if _, err := s.Recv(); err != nil {
				t.Error(err)
			}
		}
		if n != 10 {
			t.Errorf("%d executions of 10 healthy streams", n)
		}
	})
}

// An interceptor below that fails a stream which it has opened and sent on shows that it
// was sent: no retry of a code that is not listed.
func TestSentByAnInterceptor(t *testing.T) {
	for _, drop := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			var mu sync.Mutex
			n := 0
			f := scans(t, func(int, *kvpb.Request, grpc.ServerStreamingServer[kvpb.Response]) error {
				mu.Lock()
				n++
				mu.Unlock()
				return down
			})
			eager := grpc.WithChainStreamInterceptor(func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, m string, st grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
				if drop {
					o = nil
				}
				s, err := st(ctx, d, cc, m, o...)
				if err != nil {
					return nil, err
				}
				s.SendMsg(&kvpb.Request{})
				s.CloseSend()
				if md, _ := s.Header(); md == nil {
					return nil, s.RecvMsg(&kvpb.Response{})
				}
				return s, nil
			})
			kv := dial(f, Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: []codes.Code{codes.Aborted}}, eager,
				grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`))
			if _, err := makeCall(t.Context(), kv, "server streaming"); status.Code(err) != codes.Unavailable || n != 1 {
				t.Errorf("options dropped %v: %v after %d executions, want 1", drop, err, n)
			}
		})
	}
}

// The same for unary calls, over grpc's own balancer: options that were dropped are no
// proof that nothing was sent.
func TestDroppedOptionsAreNoProof(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, kv, _ := over(t, Config{MaxAttempts: 3, Backoff: doubling, UnsentOnly: true}, 0.5, []part{{Code: codes.Unavailable}},
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`),
			grpc.WithChainUnaryInterceptor(func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, inv grpc.UnaryInvoker, _ ...grpc.CallOption) error {
				return inv(ctx, m, req, reply, cc)
			}))
		if _, err := kv.Get(t.Context(), &kvpb.Request{}); status.Code(err) != codes.Unavailable || len(s.Arrived) != 1 {
			t.Errorf("%v after %d executions, want 1", err, len(s.Arrived))
		}
	})
}

// Closing the connection ends a stream, though nobody receives: before and after its first
// message.
func TestConnectionClosed(t *testing.T) {
	for _, received := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := scans(t, func(_ int, _ *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
				s.Send(&kvpb.Response{})
				<-s.Context().Done()
				return nil
			})
			cc := f.Dial(grpc.WithChainStreamInterceptor(StreamClientInterceptor(Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable})))
			var ends []error
			s, err := kvpb.NewKVClient(cc).Scan(t.Context(), &kvpb.Request{}, grpc.OnFinish(func(err error) { ends = append(ends, err) }))
			if err != nil {
				t.Fatal(err)
			}
			if received {
				if _, err := s.Recv(); err != nil {
					t.Fatal(err)
				}
			}
			cc.Close()
			synctest.Wait()
			if len(ends) != 1 || status.Code(ends[0]) != codes.Canceled {
				t.Errorf("received %v: OnFinish was told %v, want CANCELLED once", received, ends)
			}
		})
	}
}

// A message that comes when both the attempt's time and the caller's have run out is the
// caller's, and told once.
func TestBothTimesRunOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var reports []Report
		ctx, cancel := context.WithTimeout(t.Context(), 10*ms)
		defer cancel()
		cfg := Config{MaxAttempts: 2, Backoff: doubling, AttemptTimeout: 10 * ms, Report: func(_ context.Context, r Report) { reports = append(reports, r) }}
		s, err := StreamClientInterceptor(cfg)(ctx, &grpc.StreamDesc{ServerStreams: true}, nil, "/s/m",
			func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				return played{failing: failing{ctx: ctx}, recv: func() error { time.Sleep(11 * ms); return nil }}, nil
			})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(&kvpb.Response{}); err != nil || len(reports) != 1 || reports[0].Code != codes.OK {
			t.Errorf("%v, reports %+v, want the message and one report", err, reports)
		}
	})
}

// SendMsg and RecvMsg may meet the end of a stream at the same time. The race detector
// looks on.
func TestEndsMeet(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			f := scans(t, func(_ int, _ *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
				<-s.Context().Done()
				return nil
			})
			cc := f.Dial(grpc.WithChainStreamInterceptor(StreamClientInterceptor(Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable})))
			var trailer metadata.MD
			s, err := cc.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, "/kv.KV/Scan", grpc.Trailer(&trailer), grpc.MaxCallSendMsgSize(10))
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan error)
			go func() { done <- s.RecvMsg(&kvpb.Response{}) }()
			time.Sleep(ms)
			if err := s.SendMsg(&kvpb.Request{Value: make([]byte, 1000)}); status.Code(err) != codes.ResourceExhausted {
				t.Errorf("a message beyond the limit: %v", err)
			}
			if err := <-done; err == nil {
				t.Error("received, from a stream that has failed")
			}
		})
	}
}

// A wait longer than the window keeps no token: those who come meanwhile have theirs. When
// it is due it pays like anybody, or is given up.
func TestLongWaitsKeepNoToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := budget(t, 0.5)
		var report Report
		cfg := Config{MaxAttempts: 2, Backoff: doubling, RetryableCodes: unavailable, Budget: b, Report: func(_ context.Context, r Report) { report = r }}
		s, kv, _ := over(t, cfg, 0.5, []part{{Code: codes.Unavailable, Push: "3600000"}, {}})
		done := make(chan error)
		call := func() { go func() { _, err := kv.Get(t.Context(), &kvpb.Request{}); done <- err }() }

		call()
		time.Sleep(time.Minute)
		if n := b.Balance(time.Now()); n != 1 || b.reserved != 0 {
			t.Errorf("balance %v, %d reserved, want the token there", n, b.reserved)
		}
		if err := <-done; err != nil || s.Arrivals()[1] != time.Hour || b.extraTotal != 1 {
			t.Errorf("%v, attempts at %v, %d charged, want the second after an hour, and paid", err, s.Arrivals(), b.extraTotal)
		}

		b.Deposit(time.Now())
		b.Deposit(time.Now())
		call()
		for range 5 { // others take all that there is
			time.Sleep(time.Minute)
			for b.TryWithdraw(time.Now()) {
			}
		}
		if err := <-done; status.Code(err) != codes.Unavailable || report.Stopped != NoBudget || report.Attempts != 1 {
			t.Errorf("%v, %+v, want it given up for want of budget, as the server failed it", err, report)
		}
	})
}

// What a method without a tracker costs: nobody looks at the latency of calls that are
// retried only if they were never sent.
func TestUnsentOnlyLearnsNothing(t *testing.T) {
	r, err := New(Config{MaxAttempts: 2, Backoff: doubling, UnsentOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if r.latency != nil {
		t.Error("it has a tracker of 64 KiB")
	}
	other, err := r.With(Config{MaxAttempts: 2, Backoff: doubling, RetryableCodes: unavailable})
	if err != nil || other.latency == nil {
		t.Errorf("%v, with a tracker: %v", err, other.latency != nil)
	}
}

// A server's answer is that, even if it comes together with the attempt's timeout.
func TestAnswerAtTheLastMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := streamOf(t, Config{MaxAttempts: 3, Backoff: doubling, AttemptTimeout: 10 * ms}, func(int) played {
			return played{recv: func() error {
				time.Sleep(10 * ms)
				return status.Error(codes.InvalidArgument, "an answer")
			}}
		})
		if err := s.RecvMsg(&kvpb.Response{}); status.Code(err) != codes.InvalidArgument || s.(*stream).number != 1 {
			t.Errorf("%v after %d attempts, want the answer of the first", err, s.(*stream).number)
		}
	})
}

// An interceptor below that turns a message down leaves its stream alive: nobody waits for
// that stream's header.
func TestTurnedDownBelow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		var header metadata.MD
		no := status.Error(codes.InvalidArgument, "no")
		s, err := StreamClientInterceptor(Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable})(ctx,
			&grpc.StreamDesc{ServerStreams: true}, nil, "/s/m",
			func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				return waiting{played{failing: failing{ctx: ctx}, send: no}}, nil
			}, grpc.Header(&header))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SendMsg(&kvpb.Request{}); err != no || time.Since(begin) != 0 {
			t.Errorf("%v after %v, want the refusal at once", err, time.Since(begin))
		}
	})
}

// waiting is a stream whose header comes when its context ends.
type waiting struct{ played }

func (w waiting) Header() (metadata.MD, error) { <-w.ctx.Done(); return nil, w.ctx.Err() }

// When the caller's deadline comes together with the attempt's timeout, it is the deadline
// that the caller is told of, whichever of the two cut the stream off: before the first
// message, after it, and by a stream that ignores which it was.
func TestDeadlineIsToldAsSuch(t *testing.T) {
	for _, after := range []int{0, 1} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*ms)
			defer cancel()
			n := 0
			s, err := StreamClientInterceptor(Config{MaxAttempts: 3, Backoff: doubling, AttemptTimeout: 10 * ms})(ctx,
				&grpc.StreamDesc{ServerStreams: true}, nil, "/s/m",
				func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
					return played{failing: failing{ctx: ctx}, recv: func() error {
						if n++; n <= after {
							time.Sleep(11 * ms)
							return nil
						}
						<-ctx.Done()
						return status.Error(codes.Canceled, "cut off")
					}}, nil
				})
			if err != nil {
				t.Fatal(err)
			}
			for range after {
				if err := s.RecvMsg(&kvpb.Response{}); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.RecvMsg(&kvpb.Response{}); status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("after %d messages: %v, want DEADLINE_EXCEEDED", after, err)
			}
		})
	}
}

// A stream whose caller's time runs out while it opens is opened: receiving tells the rest.
func TestOpenedTooLate(t *testing.T) {
	for _, limit := range []time.Duration{0, 10 * ms} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*ms)
			defer cancel()
			s, err := StreamClientInterceptor(Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable, AttemptTimeout: limit})(ctx,
				&grpc.StreamDesc{ServerStreams: true}, nil, "/s/m",
				func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
					time.Sleep(11 * ms)
					return played{failing: failing{ctx: ctx}, recv: func() error { return status.FromContextError(ctx.Err()).Err() }}, nil
				})
			if err != nil {
				t.Fatalf("timeout %v: %v, want it opened", limit, err)
			}
			if err := s.RecvMsg(&kvpb.Response{}); status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("timeout %v: %v, want DEADLINE_EXCEEDED", limit, err)
			}
		})
	}
}
