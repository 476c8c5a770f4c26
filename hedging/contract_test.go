package hedging_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// A nil request is an empty one, as without hedging.
func TestNilRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(part{After: 50 * ms})
		c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms})
		_, err := c.Get(t.Context(), nil)
		if err != nil {
			t.Errorf("Get(nil): %v", err)
		}
	})
}

// A call whose end Header met is finished by RecvMsg like any other.
func TestHeaderThenEnd(t *testing.T) {
	for _, first := range []string{"header", "none"} {
		synctest.Test(t, func(t *testing.T) {
			s := newStage(part{After: 3 * ms, Code: codes.NotFound, Push: "7"})
			var ctxs []context.Context
			note := func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, m string, st grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
				ctxs = append(ctxs, ctx)
				return st(ctx, d, cc, m, o...)
			}
			c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms}, grpc.WithChainStreamInterceptor(note))
			var trailer metadata.MD
			var fin []error
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			ss, err := c.Scan(ctx, &kvpb.Request{}, grpc.Trailer(&trailer), grpc.OnFinish(func(e error) { fin = append(fin, e) }))
			if err != nil {
				t.Fatal(err)
			}
			if first == "header" {
				ss.Header()
			}
			_, err = ss.Recv()
			synctest.Wait()
			if len(fin) != 1 || status.Code(fin[0]) != codes.NotFound || status.Code(err) != codes.NotFound || trailer == nil || ctxs[0].Err() == nil {
				t.Errorf("%s first: %v; OnFinish %v, trailer %v, context %v", first, err, fin, trailer, ctxs[0].Err())
			}
		})
	}
}

// A send that fails is the end of the stream: nobody will receive from it.
func TestSendFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(part{After: 3 * ms})
		var ctxs []context.Context
		note := func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, m string, st grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
			ctxs = append(ctxs, ctx)
			return st(ctx, d, cc, m, o...)
		}
		c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms}, grpc.WithChainStreamInterceptor(note))
		var fin []error
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		_, err := c.Scan(ctx, &kvpb.Request{Value: make([]byte, 100)}, grpc.MaxCallSendMsgSize(10), grpc.OnFinish(func(e error) { fin = append(fin, e) }))
		synctest.Wait()
		if status.Code(err) != codes.ResourceExhausted || len(fin) != 1 || ctxs[0].Err() == nil {
			t.Errorf("%v; OnFinish %v, context %v", err, fin, ctxs[0].Err())
		}
	})
}

// The caller's context may end while the stream is being opened; OnFinish runs once.
func TestContextEndsWhileOpening(t *testing.T) {
	for range 200 {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		_, err := hedging.StreamClientInterceptor(hedging.Config{MaxAttempts: 2, Delay: time.Second})(ctx, scan, nil, "/kv.KV/Scan",
			func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
				cancel()
				return &fake{}, nil
			}, grpc.OnFinish(func(error) { close(done) }))
		if err != nil {
			t.Fatal(err)
		}
		<-done
	}
}

// Trap: an interceptor below appends to an attempt's options, in place.
func TestHedgeHasItsOwnOptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(part{After: time.Second}, part{After: 5 * ms})
		var seen []string
		add := func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, m string, st grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
			var names []string
			for _, x := range o {
				names = append(names, strings.TrimPrefix(strings.TrimSpace(fmt.Sprintf("%T", x)), "grpc."))
			}
			seen = append(seen, strings.Join(names, ","))
			if number(ctx) == 1 {
				var md metadata.MD
				o = append(o, grpc.Header(&md))
			}
			return st(ctx, d, cc, m, o...)
		}
		c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms}, grpc.WithChainStreamInterceptor(add))
		ss, err := c.Scan(t.Context(), &kvpb.Request{}, grpc.StaticMethod())
		if err != nil {
			t.Fatal(err)
		}
		ss.Recv()
		for {
			if _, err := ss.Recv(); err != nil {
				break
			}
		}
		if !strings.Contains(seen[1], "FailFast") {
			t.Errorf("the hedge's options are %s", seen[1])
		}
	})
}

// The same by hedges that run concurrently.
func TestHedgesMayAppendOptions(t *testing.T) {
	add := func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, m string, o ...grpc.CallOption) (grpc.ClientStream, error) {
		_ = append(o, grpc.WaitForReady(true)) // as an interceptor would
		return &slow{until: time.Now().Add(3 * ms)}, nil
	}
	synctest.Test(t, func(t *testing.T) {
		s, err := hedging.StreamClientInterceptor(hedging.Config{MaxAttempts: 4})(t.Context(), scan, nil, "/kv.KV/Scan", add,
			grpc.OnFinish(func(error) {}), grpc.OnFinish(func(error) {}))
		if err != nil {
			t.Fatal(err)
		}
		s.SendMsg(&kvpb.Request{})
		if err := s.RecvMsg(&kvpb.Response{}); err != nil {
			t.Error(err)
		}
		time.Sleep(20 * ms)
	})
}

// A hedge that finds no backend ready does not fail a call that is willing to wait.
func TestWaitForReadyIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, hedge := range []bool{false, true} {
			cfg := hedging.Config{MaxAttempts: 2, Delay: 20 * ms}
			opts := []grpc.DialOption{roundRobin, grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return nil, errors.New("down") })}
			if hedge {
				opts = append(opts, grpc.WithChainUnaryInterceptor(hedging.UnaryClientInterceptor(cfg)))
			}
			cc, err := grpc.NewClient("passthrough:///x", opts...)
			if err != nil {
				t.Fatal(err)
			}
			cc.Connect()
			ctx, cancel := context.WithTimeout(context.Background(), 300*ms)
			_, err = kvpb.NewKVClient(cc).Get(ctx, &kvpb.Request{}, grpc.WaitForReady(true))
			cancel()
			cc.Close()
			if status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("hedged=%v: a wait-for-ready call failed with %v", hedge, status.Code(err))
			}
		}
	})
}

// grpc allows one goroutine to send while another receives.
func TestSendBesideReceive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := openStream(t, hedging.Config{MaxAttempts: 2, Delay: time.Hour},
			func() (grpc.ClientStream, error) { return &slow{until: time.Now().Add(3 * ms)}, nil })
		if err != nil {
			t.Fatal(err)
		}
		go s.SendMsg(&kvpb.Request{})
		if err := s.RecvMsg(&kvpb.Response{}); err != nil {
			t.Error(err)
		}
	})
}

type boom struct{ fake }

func (boom) RecvMsg(any) error { panic("boom") }

// A caller that recovers a panic of RecvMsg can go on asking.
func TestPanicLeavesNoLock(t *testing.T) {
	s, err := openStream(t, hedging.Config{MaxAttempts: 2, Delay: time.Hour},
		func() (grpc.ClientStream, error) { return &boom{}, nil })
	if err != nil {
		t.Fatal(err)
	}
	s.SendMsg(&kvpb.Request{})
	func() {
		defer func() { recover() }()
		s.RecvMsg(&kvpb.Response{})
	}()
	s.Header() // or the test hangs
	if err := s.RecvMsg(&kvpb.Response{}); status.Code(err) != codes.Internal {
		t.Errorf("RecvMsg after the panic: %v, want INTERNAL", err)
	}
}
