package hedging_test

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

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// The first attempt is on its way before anybody receives; the hedge is not, since
// nobody knows yet that there is no answer.
func TestStreamIsSentAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(part{After: 30 * ms}, part{After: 5 * ms})
		c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms})
		ss, err := c.Scan(t.Context(), &kvpb.Request{})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * ms) // the caller has other things to do
		if got := s.Arrivals(); len(got) != 1 || got[0] != 0 {
			t.Errorf("attempts arrived at %v, want one at once", got)
		}
		begin := time.Now()
		for range 3 {
			if res, err := ss.Recv(); err != nil || res.Id != 1 {
				t.Fatalf("%v, %v", res, err)
			}
		}
		if _, err := ss.Recv(); err != io.EOF {
			t.Errorf("%v, want EOF", err)
		}
		if d := time.Since(begin); d != 0 {
			t.Errorf("receiving what had arrived took %v", d)
		}
	})
}

// Header before the first message starts the race; whoever has a header wins.
func TestStreamHeaderFirst(t *testing.T) {
	for _, tc := range []struct {
		name  string
		parts []part
		want  uint64
		at    time.Duration
		code  codes.Code
	}{
		{"the hedge has one first", []part{{After: time.Hour}, {After: 5 * ms}}, 2, 15 * ms, codes.OK},
		{"the first attempt has", []part{{After: 12 * ms}, {After: 5 * ms}}, 1, 12 * ms, codes.OK},
		{"none has: the failure comes with RecvMsg", []part{{After: 3 * ms, Code: codes.NotFound}}, 0, 3 * ms, codes.NotFound},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStage(tc.parts...)
				c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms})
				ss, err := c.Scan(t.Context(), &kvpb.Request{})
				if err != nil {
					t.Fatal(err)
				}
				md, err := ss.Header()
				if err != nil || time.Since(s.Begin) != tc.at {
					t.Errorf("%v after %v, want after %v", err, time.Since(s.Begin), tc.at)
				}
				res, err := ss.Recv()
				if status.Code(err) != tc.code || res.GetId() != tc.want {
					t.Fatalf("%v, %v, want attempt %d, %v", res, err, tc.want, tc.code)
				}
				if err == nil && md.Get("served-by")[0] != res.Backend {
					t.Errorf("header %v, message of %s", md, res.Backend)
				}
				for err == nil {
					_, err = ss.Recv()
				}
			})
		})
	}
}

// Trap: the caller changes its request between the call and the hedge.
func TestStreamRequestIsTheCallersAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(part{After: time.Hour}, part{After: ms})
		c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms})
		req := &kvpb.Request{Id: 41}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ss, err := c.Scan(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		req.Id = 42
		if _, err := ss.Recv(); err != nil {
			t.Fatal(err)
		}
		if s.IDs[1] != 41 || s.IDs[2] != 41 {
			t.Errorf("the attempts carried %v, want 41", s.IDs)
		}
	})
}

// A stream that ends without a message is an answer like another.
func TestStreamEmpty(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 2, grpctest.Handlers{Scan: func(b *grpctest.Backend, req *kvpb.Request, ss grpc.ServerStreamingServer[kvpb.Response]) error {
			if md, _ := metadata.FromIncomingContext(ss.Context()); md.Get("bobtail-attempt") == nil {
				<-ss.Context().Done()
				return ss.Context().Err()
			}
			ss.SetTrailer(metadata.Pairs("end", b.Name))
			return nil
		}})
		cc := f.Dial(roundRobin, grpc.WithChainStreamInterceptor(hedging.StreamClientInterceptor(hedging.Config{MaxAttempts: 2, Delay: 10 * ms})))
		var finished []error
		var trailer metadata.MD
		ss, err := kvpb.NewKVClient(cc).Scan(t.Context(), &kvpb.Request{}, grpc.Trailer(&trailer),
			grpc.OnFinish(func(err error) { finished = append(finished, err) }))
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := ss.Recv(); err != io.EOF {
				t.Fatalf("%v, want EOF", err)
			}
		}
		if len(finished) != 1 || finished[0] != nil {
			t.Errorf("OnFinish ran with %v, want once with nil", finished)
		}
		if len(trailer.Get("end")) != 1 || len(ss.Trailer().Get("end")) != 1 {
			t.Errorf("trailers %v and %v", trailer, ss.Trailer())
		}
	})
}

// A caller that walks away ends its stream by its context: everything is released,
// and OnFinish runs.
func TestStreamAbandoned(t *testing.T) {
	for _, when := range []string{"before the race", "during the race", "after the race"} {
		t.Run(when, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStage(part{After: 20 * ms})
				c, f := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms})
				ctx, cancel := context.WithCancel(t.Context())
				var mu sync.Mutex
				var finished []error
				ss, err := c.Scan(ctx, &kvpb.Request{}, grpc.OnFinish(func(err error) {
					mu.Lock()
					defer mu.Unlock()
					finished = append(finished, err)
				}))
				if err != nil {
					t.Fatal(err)
				}
				switch when {
				case "during the race":
					time.AfterFunc(15*ms, cancel)
					if _, err := ss.Recv(); status.Code(err) != codes.Canceled {
						t.Errorf("%v, want CANCELLED", err)
					}
				case "after the race":
					if _, err := ss.Recv(); err != nil {
						t.Error(err)
					}
				}
				cancel()
				time.Sleep(time.Second)
				mu.Lock()
				defer mu.Unlock()
				if len(finished) != 1 || status.Code(finished[0]) != codes.Canceled {
					t.Errorf("OnFinish ran with %v, want once with CANCELLED", finished)
				}
				if a, b := f.Total(started), f.Total(ended); a != b {
					t.Errorf("%d handlers began, %d ended", a, b)
				}
			})
		})
	}
}

func started(b *grpctest.Backend) int64 { return b.Started.Load() }
func ended(b *grpctest.Backend) int64   { return b.Ended.Load() }

// A stream that cannot even be opened is a failure like another.
func TestStreamThatDoesNotOpen(t *testing.T) {
	for _, tc := range []struct {
		nonFatal []codes.Code
		want     codes.Code
	}{{nil, codes.Unavailable}, {[]codes.Code{codes.Unavailable}, codes.OK}} {
		synctest.Test(t, func(t *testing.T) {
			s := newStage(part{After: ms})
			refuseFirst := func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, m string, st grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
				if hedging.AttemptNumber(ctx) == 1 {
					return nil, status.Error(codes.Unavailable, "no")
				}
				return st(ctx, d, cc, m, o...)
			}
			c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms, NonFatalCodes: tc.nonFatal},
				grpc.WithChainStreamInterceptor(refuseFirst))
			res, err := drain(t.Context(), c)
			if status.Code(errors.Unwrap(err)) != tc.want && status.Code(err) != tc.want {
				t.Errorf("%v, want %v", err, tc.want)
			}
			if tc.want == codes.OK && res.GetId() != 2 {
				t.Errorf("%v, want attempt 2", res)
			}
		})
	}
}

// Streams of the client pass through untouched.
func TestOtherStreamsPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(part{})
		c, f := s.dial(t, hedging.Config{MaxAttempts: 3})
		up, err := c.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			if err := up.Send(&kvpb.Request{}); err != nil {
				t.Fatal(err)
			}
		}
		if res, err := up.CloseAndRecv(); err != nil || res.Id != 5 {
			t.Errorf("%v, %v, want 5 messages", res, err)
		}
		both, err := c.Sync(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for i := range uint64(3) {
			if err := both.Send(&kvpb.Request{Id: i}); err != nil {
				t.Fatal(err)
			}
			if res, err := both.Recv(); err != nil || res.Id != i {
				t.Errorf("%v, %v", res, err)
			}
		}
		both.CloseSend()
		if _, err := both.Recv(); err != io.EOF {
			t.Errorf("%v, want EOF", err)
		}
		if n := f.Total(started); n != 2 {
			t.Errorf("%d streams were opened, want 2", n)
		}
	})
}
