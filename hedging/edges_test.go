package hedging_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// What the caller's reply held before the call is gone, as after any decoding.
func TestReplyIsReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		res := &kvpb.Response{Backend: "stale", Labels: map[string]string{"stale": "1"}}
		err := invoke(t.Context(), hedging.Config{MaxAttempts: 2, Delay: ms}, &kvpb.Request{}, res, served(time.Hour, ms))
		if err != nil || res.Id != 2 || res.Backend != "" || len(res.Labels) != 0 {
			t.Errorf("%v, %v", res, err)
		}
	})
}

// A loser that answers all the same, later, counts for nothing in the throttle.
func TestLateAnswerOfALoser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := &counting{}
		err := invoke(t.Context(), hedging.Config{MaxAttempts: 2, Delay: ms, Throttle: th}, &kvpb.Request{}, &kvpb.Response{},
			func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				time.Sleep(time.Duration(4*number(ctx)) * ms)
				return nil
			})
		time.Sleep(time.Second)
		if err != nil || th.ok.Load() != 1 {
			t.Errorf("%v, %d successes, want 1", err, th.ok.Load())
		}
	})
}

// The caller's own cancellation is no failure to make good, though the policy calls
// its code non-fatal.
func TestNoHedgeForACallerWhoLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var rep hedging.Report
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(ms, cancel)
		err := invoke(ctx, hedging.Config{MaxAttempts: 3, Delay: 10 * ms, NonFatalCodes: []codes.Code{codes.Canceled},
			Report: func(_ context.Context, r hedging.Report) { rep = r }}, &kvpb.Request{}, &kvpb.Response{}, served(time.Hour))
		if status.Code(err) != codes.Canceled || rep.Attempts != 1 {
			t.Errorf("%v, %+v, want one attempt", err, rep)
		}
	})
}

// fake is a client stream whose parts a test plays.
type fake struct {
	grpc.ClientStream
	send, recv error
}

func (f *fake) SendMsg(any) error            { return f.send }
func (f *fake) CloseSend() error             { return nil }
func (f *fake) RecvMsg(any) error            { return f.recv }
func (f *fake) Trailer() metadata.MD         { return nil }
func (f *fake) Header() (metadata.MD, error) { return nil, nil }
func (f *fake) Context() context.Context     { return context.Background() }

var scan = &grpc.StreamDesc{StreamName: "Scan", ServerStreams: true}

// openStream opens a stream through an interceptor over fakes, attempt k by
// parts[k-1].
func openStream(t *testing.T, cfg hedging.Config, parts ...func() (grpc.ClientStream, error)) (grpc.ClientStream, error) {
	t.Helper()
	return hedging.StreamClientInterceptor(cfg)(t.Context(), scan, nil, "/kv.KV/Scan",
		func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
			return parts[number(ctx)-1]()
		})
}

// A stream that breaks while the request is sent is a failure like another: grpc
// says io.EOF then, and the status with RecvMsg.
func TestStreamBreaksWhileSending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := status.Error(codes.Unavailable, "down")
		s, err := openStream(t, hedging.Config{MaxAttempts: 2, Delay: time.Second, NonFatalCodes: []codes.Code{codes.Unavailable}},
			func() (grpc.ClientStream, error) { return &fake{send: io.EOF, recv: down}, nil },
			func() (grpc.ClientStream, error) { return &fake{}, nil })
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SendMsg(&kvpb.Request{}); err != nil {
			t.Errorf("SendMsg: %v", err)
		}
		if err := s.RecvMsg(&kvpb.Response{}); err != nil {
			t.Errorf("RecvMsg: %v", err)
		}
	})
}

// When no attempt can even be opened, whatever the caller asks says so, each time.
func TestNoStreamOpens(t *testing.T) {
	for _, first := range []string{"Header", "RecvMsg"} {
		t.Run(first, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				down := func() (grpc.ClientStream, error) { return nil, status.Error(codes.Unavailable, "down") }
				s, err := openStream(t, hedging.Config{MaxAttempts: 2, NonFatalCodes: []codes.Code{codes.Unavailable}}, down, down)
				if err != nil {
					t.Fatal(err)
				}
				s.SendMsg(&kvpb.Request{})
				s.CloseSend()
				if first == "Header" {
					if md, err := s.Header(); md != nil || err != nil {
						t.Errorf("Header: %v, %v", md, err)
					}
				}
				for range 3 {
					if err := s.RecvMsg(&kvpb.Response{}); status.Code(err) != codes.Unavailable {
						t.Errorf("RecvMsg: %v", err)
					}
				}
				if md := s.Trailer(); md != nil {
					t.Errorf("Trailer: %v", md)
				}
				s.Context()
			})
		})
	}
}

// The end of an empty stream is a success, not an UNKNOWN to be made good.
func TestEmptyStreamIsNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opened := 0
		th := &counting{}
		empty := func() (grpc.ClientStream, error) { opened++; return &fake{recv: io.EOF}, nil }
		s, err := openStream(t, hedging.Config{MaxAttempts: 3, Delay: time.Second, Throttle: th, NonFatalCodes: []codes.Code{codes.Unknown}}, empty, empty, empty)
		if err != nil {
			t.Fatal(err)
		}
		s.SendMsg(&kvpb.Request{})
		if err := s.RecvMsg(&kvpb.Response{}); err != io.EOF || opened != 1 || th.ok.Load() != 1 {
			t.Errorf("%v after %d attempts, %d successes", err, opened, th.ok.Load())
		}
	})
}

// Trap: the contexts of a stream's attempts stay registered with the caller's.
func TestStreamContextsAreReleased(t *testing.T) {
	for _, winner := range []int{1, 2} {
		synctest.Test(t, func(t *testing.T) {
			first := part{After: 15 * ms}
			if winner == 2 {
				first.After = time.Hour
			}
			var mu sync.Mutex
			var contexts []context.Context
			note := func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, m string, st grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
				mu.Lock()
				contexts = append(contexts, ctx)
				mu.Unlock()
				return st(ctx, d, cc, m, o...)
			}
			s := newStage(first, part{After: 8 * ms})
			c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms}, grpc.WithChainStreamInterceptor(note))
			res, err := drain(t.Context(), c)
			if err != nil || res.Id != uint64(winner) {
				t.Fatalf("%v, %v", res, err)
			}
			synctest.Wait()
			if len(contexts) != 2 {
				t.Fatalf("%d attempts, want 2", len(contexts))
			}
			for i, ctx := range contexts {
				if ctx.Err() == nil {
					t.Errorf("the context of attempt %d is still alive", i+1)
				}
			}
		})
	}
}

// How long the caller takes to receive says nothing about the server.
func TestCallersPauseIsNoLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := hedger(t, hedging.Config{MaxAttempts: 2, Percentile: 50})
		for i := range 200 {
			s, err := h.OpenStream(t.Context(), scan, nil, "/kv.KV/Scan",
				func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
					return &slow{until: time.Now().Add(5 * ms)}, nil
				})
			if err != nil {
				t.Fatal(err)
			}
			s.SendMsg(&kvpb.Request{})
			if i%3 != 0 {
				time.Sleep(50 * ms)
			}
			if err := s.RecvMsg(&kvpb.Response{}); err != nil {
				t.Fatal(err)
			}
		}
		if d, ok := h.Delay(time.Now()); !ok || d > 6*ms {
			t.Errorf("the median is %v, %v, want 5ms", d, ok)
		}
	})
}

// slow is a stream whose first message is there at a certain time.
type slow struct {
	fake
	until time.Time
}

func (s *slow) RecvMsg(any) error { time.Sleep(time.Until(s.until)); return nil }

// A function that says that it was cancelled is taken at its word.
func TestDoCancelledByItself(t *testing.T) {
	calls := 0
	h := hedger(t, hedging.Config{MaxAttempts: 3, Delay: time.Minute, NonFatalCodes: []codes.Code{codes.Unknown}})
	_, err := hedging.Do(t.Context(), h, func(context.Context) (int, error) { calls++; return 0, context.Canceled })
	if err != context.Canceled || calls != 1 {
		t.Errorf("%v after %d calls", err, calls)
	}
}

// What the caller's options point at is what the winner's held, when a hedge wins.
func TestOptionsAreCopied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		addr := func(k int) net.Addr { return &net.TCPAddr{Port: k} }
		var header, trailer metadata.MD
		var p peer.Peer
		err := invoke(t.Context(), hedging.Config{MaxAttempts: 2, Delay: ms}, &kvpb.Request{}, &kvpb.Response{},
			func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, opts ...grpc.CallOption) error {
				err := served(time.Hour, ms)(ctx, m, req, reply, cc)
				k := number(ctx)
				for _, o := range opts { // as grpc does at the end of an attempt
					switch o := o.(type) {
					case grpc.HeaderCallOption:
						*o.HeaderAddr = metadata.Pairs("k", fmt.Sprint(k))
					case grpc.TrailerCallOption:
						*o.TrailerAddr = metadata.Pairs("k", fmt.Sprint(k))
					case grpc.PeerCallOption:
						*o.PeerAddr = peer.Peer{Addr: addr(k)}
					}
				}
				return err
			}, grpc.Header(&header), grpc.Trailer(&trailer), grpc.Peer(&p))
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(header.Get("k"), trailer.Get("k"), p.Addr); got != fmt.Sprint([]string{"2"}, []string{"2"}, addr(2)) {
			t.Errorf("header, trailer, peer of attempts %s, want 2", got)
		}
	})
}
