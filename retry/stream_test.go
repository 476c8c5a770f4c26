package retry

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// scans is a fleet whose streams serve says what to do, told the number of the attempt.
func scans(t *testing.T, serve func(k int, req *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error) *grpctest.Fleet {
	var mu sync.Mutex
	n := 0
	return grpctest.NewFleet(t, 3, grpctest.Handlers{
		Scan: func(_ *grpctest.Backend, req *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
			mu.Lock()
			n++
			k := n
			mu.Unlock()
			return serve(k, req, s)
		},
	})
}

var down = status.Error(codes.Unavailable, "down")

// What the caller has been given commits the stream: a message, or a header that it asked
// for. A header that nobody has seen does not.
func TestCommitted(t *testing.T) {
	for _, tc := range []struct {
		name  string
		serve func(k int, s grpc.ServerStreamingServer[kvpb.Response]) error
		ask   bool // for the header first
		want  int  // attempts
		code  codes.Code
		got   int // messages
	}{
		{"a message", func(_ int, s grpc.ServerStreamingServer[kvpb.Response]) error {
			s.Send(&kvpb.Response{})
			return down
		}, false, 1, codes.Unavailable, 1},
		{"a header that the caller has seen", func(_ int, s grpc.ServerStreamingServer[kvpb.Response]) error {
			s.SendHeader(metadata.Pairs("a", "b"))
			time.Sleep(ms)
			return down
		}, true, 1, codes.Unavailable, 0},
		{"a header that nobody has seen", func(k int, s grpc.ServerStreamingServer[kvpb.Response]) error {
			s.SendHeader(metadata.Pairs("a", "b"))
			time.Sleep(ms)
			if k == 1 {
				return down
			}
			return s.Send(&kvpb.Response{})
		}, false, 2, codes.OK, 1},
		{"no header, though the caller asks: the next attempt has one", func(k int, s grpc.ServerStreamingServer[kvpb.Response]) error {
			if k == 1 {
				return down
			}
			return s.Send(&kvpb.Response{})
		}, true, 2, codes.OK, 1},
		{"no header at all", func(int, grpc.ServerStreamingServer[kvpb.Response]) error { return down }, true, 3, codes.Unavailable, 0},
		{"the end of an empty stream", func(k int, _ grpc.ServerStreamingServer[kvpb.Response]) error {
			if k == 1 {
				return down
			}
			return nil
		}, false, 2, codes.OK, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := scans(t, func(k int, _ *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error { return tc.serve(k, s) })
				kv := dial(f, Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable})
				s, err := kv.Scan(t.Context(), &kvpb.Request{})
				if err != nil {
					t.Fatal(err)
				}
				if tc.ask {
					md, err := s.Header()
					if err != nil || (md != nil) != (tc.got > 0 || tc.name == "a header that the caller has seen") {
						t.Errorf("header %v, %v", md, err)
					}
				}
				got := 0
				for {
					if _, err = s.Recv(); err != nil {
						break
					}
					got++
				}
				if err == io.EOF {
					err = nil
				}
				if n := f.Total(func(b *grpctest.Backend) int64 { return b.Started.Load() }); status.Code(err) != tc.code || got != tc.got || int(n) != tc.want {
					t.Errorf("%v after %d messages and %d attempts, want %v, %d, %d", err, got, n, tc.code, tc.got, tc.want)
				}
				if _, again := s.Recv(); again == nil {
					t.Error("a message after the end")
				}
			})
		})
	}
}

// The attempt's timeout is until the first message; what follows may take as long as it
// likes. An attempt that it ends is retried, and its CANCELLED is never seen.
func TestStreamAttemptTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := scans(t, func(k int, _ *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
			if k == 1 {
				<-s.Context().Done()
				return s.Context().Err()
			}
			time.Sleep(20 * ms)
			if err := s.Send(&kvpb.Response{}); err != nil {
				return err
			}
			time.Sleep(time.Hour)
			return s.Send(&kvpb.Response{})
		})
		kv := dial(f, Config{MaxAttempts: 2, Backoff: doubling, AttemptTimeout: 30 * ms})
		s, err := kv.Scan(t.Context(), &kvpb.Request{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 2 {
			if _, err := s.Recv(); err != nil {
				t.Fatalf("message %d: %v", i+1, err)
			}
		}
		if _, err := s.Recv(); err != io.EOF {
			t.Errorf("%v, want the end", err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		f := scans(t, func(_ int, _ *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
			<-s.Context().Done()
			return s.Context().Err()
		})
		kv := dial(f, Config{MaxAttempts: 2, Backoff: doubling, AttemptTimeout: 30 * ms})
		_, err := makeCall(t.Context(), kv, "server streaming")
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("all attempts time out: %v, want DEADLINE_EXCEEDED", err)
		}
	})
}

// The caller may use its request again as soon as SendMsg returns: each attempt sends what
// it was then. The race detector looks on.
func TestStreamRequestIsTheCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var keys []string
		f := scans(t, func(k int, req *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
			mu.Lock()
			keys = append(keys, req.Key)
			mu.Unlock()
			if k < 3 {
				return down
			}
			return s.Send(&kvpb.Response{})
		})
		kv := dial(f, Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable})
		req := &kvpb.Request{Key: "as sent"}
		s, err := kv.Scan(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		req.Key = "changed"
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		for _, k := range keys {
			if k != "as sent" || len(keys) != 3 {
				t.Errorf("the attempts sent %q", keys)
			}
		}
	})
}

// Header and RecvMsg may be called at the same time, as grpc allows; Trailer and Context
// at any time after.
func TestHeaderBesideRecv(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := scans(t, func(k int, _ *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
			time.Sleep(ms)
			if k < 3 {
				return down
			}
			return s.Send(&kvpb.Response{})
		})
		kv := dial(f, Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable})
		for range 10 {
			s, err := kv.Scan(t.Context(), &kvpb.Request{})
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				if _, err := s.Header(); err != nil {
					t.Error(err)
				}
			})
			if _, err := s.Recv(); err != nil {
				t.Error(err)
			}
			wg.Wait()
			if s.Context().Err() != nil {
				t.Error("the stream's context has ended before the stream")
			}
			if _, err := s.Recv(); err != io.EOF {
				t.Error(err)
			}
			s.Trailer()
		}
	})
}

// A stream that ends because its caller leaves, before or after the first message, tells
// OnFinish once, though nobody receives; and nothing is left behind (goleak and the bubble
// look on).
func TestStreamAbandoned(t *testing.T) {
	for _, received := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := scans(t, func(_ int, _ *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
				s.Send(&kvpb.Response{})
				<-s.Context().Done()
				return s.Context().Err()
			})
			kv := dial(f, Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable, AttemptTimeout: time.Minute})
			ctx, cancel := context.WithCancel(t.Context())
			var ends []error
			s, err := kv.Scan(ctx, &kvpb.Request{}, grpc.OnFinish(func(err error) { ends = append(ends, err) }))
			if err != nil {
				t.Fatal(err)
			}
			if received {
				if _, err := s.Recv(); err != nil {
					t.Fatal(err)
				}
			}
			cancel()
			synctest.Wait()
			if len(ends) != 1 || status.Code(ends[0]) != codes.Canceled {
				t.Errorf("received %v: OnFinish was told %v, want CANCELLED once", received, ends)
			}
		})
	}
}

// Streams whose client streams pass as they are; one whose request is no proto message is
// sent once.
func TestStreamsThatPass(t *testing.T) {
	cfg := Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable}
	opened := 0
	open := func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
		opened++
		return failing{ctx: ctx}, nil
	}
	in := StreamClientInterceptor(cfg)
	for _, desc := range []*grpc.StreamDesc{{ClientStreams: true}, {ClientStreams: true, ServerStreams: true}} {
		s, err := in(t.Context(), desc, nil, "/s/m", open)
		if _, same := s.(failing); !same || err != nil {
			t.Errorf("%+v is wrapped", desc)
		}
	}
	opened = 0
	s, err := in(t.Context(), &grpc.StreamDesc{ServerStreams: true}, nil, "/s/m", open)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SendMsg([]byte("raw")); err != nil {
		t.Fatal(err)
	}
	if err := s.RecvMsg(nil); !errors.Is(err, down) || opened != 1 {
		t.Errorf("%v after %d attempts, want one", err, opened)
	}
}

// failing is a stream that its server has turned down.
type failing struct {
	grpc.ClientStream
	ctx context.Context
}

func (failing) SendMsg(any) error            { return nil }
func (failing) CloseSend() error             { return nil }
func (failing) RecvMsg(any) error            { return down }
func (failing) Header() (metadata.MD, error) { return nil, nil }
func (failing) Trailer() metadata.MD         { return nil }
func (f failing) Context() context.Context   { return f.ctx }

// Whatever follows a failure to open for good is harmless.
func TestNeverOpened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := scans(t, func(k int, _ *kvpb.Request, _ grpc.ServerStreamingServer[kvpb.Response]) error { return down })
		kv := dial(f, Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: unavailable})
		s, err := kv.Scan(t.Context(), &kvpb.Request{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 3 { // gone by the time of the second attempt
			f.Stop(i)
		}
		if _, err := s.Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("%v", err)
		}
		if md, err := s.Header(); md != nil || err != nil {
			t.Errorf("header %v, %v", md, err)
		}
		s.Trailer()
		s.Context()
		s.CloseSend()
		if _, err := s.Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("again: %v", err)
		}
	})
}
