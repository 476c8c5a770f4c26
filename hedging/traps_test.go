package hedging_test

import (
	"bytes"
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// Each test of this file is a trap that some hedging interceptor has fallen into.
// Most only bite under -race.

const get = "/kv.KV/Get"

// number is which attempt an invoker is asked to make.
func number(ctx context.Context) int { return hedging.AttemptNumber(ctx) }

// invoke makes one unary call through an interceptor over a fake invoker.
func invoke(ctx context.Context, cfg hedging.Config, req, reply any, f grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return hedging.UnaryClientInterceptor(cfg)(ctx, get, req, reply, nil, f, opts...)
}

// Trap: all attempts decode into the caller's reply.
func TestReplyIsNotShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		value := func(k int) []byte { return bytes.Repeat([]byte{byte(k)}, 4096) }
		for i := range 200 {
			res := &kvpb.Response{Backend: "stale", Labels: map[string]string{"stale": "1"}}
			// Both attempts decode at the same instant, whatever the other does.
			err := invoke(t.Context(), hedging.Config{MaxAttempts: 2, Delay: ms}, &kvpb.Request{}, res,
				func(ctx context.Context, _ string, _, reply any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
					k := number(ctx)
					time.Sleep(time.Duration(3-k)*ms + time.Duration(i%3-1)*time.Microsecond*time.Duration(k-1))
					r := reply.(*kvpb.Response)
					proto.Reset(r)
					r.Id = uint64(k)
					r.Value = value(k)
					r.Labels = map[string]string{"k": fmt.Sprint(k)}
					return nil
				})
			if err != nil {
				t.Fatal(err)
			}
			if k := int(res.Id); k != 1 && k != 2 || !bytes.Equal(res.Value, value(k)) || res.Labels["k"] != fmt.Sprint(k) ||
				res.Backend != "" || len(res.Labels) != 1 {
				t.Fatalf("call %d: torn reply: id %d, backend %q, labels %v", i, res.Id, res.Backend, res.Labels)
			}
		}
	})
}

// Trap: Header, Trailer and Peer options point at the caller's variables, and
// OnFinish runs for each attempt.
func TestOptionsAreTheWinners(t *testing.T) {
	for _, winner := range []uint64{1, 2} {
		for _, kind := range []string{"unary", "server streaming"} {
			t.Run(fmt.Sprintf("%s/attempt %d wins", kind, winner), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					first := part{After: time.Second}
					if winner == 1 {
						first.After = 11 * ms
					}
					s := newStage(first, part{After: 5 * ms})
					c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms})
					var header, trailer metadata.MD
					var p peer.Peer
					var finished []error
					opts := []grpc.CallOption{grpc.Header(&header), grpc.Trailer(&trailer), grpc.Peer(&p),
						grpc.OnFinish(func(err error) { finished = append(finished, err) })}
					var res *kvpb.Response
					var err error
					if kind == "unary" {
						res, err = c.Get(t.Context(), &kvpb.Request{}, opts...)
					} else {
						res, err = drain(t.Context(), c, opts...)
					}
					if err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
					if res.Id != winner {
						t.Fatalf("attempt %d won, want %d", res.Id, winner)
					}
					if got := header.Get("served-by"); len(got) != 1 || got[0] != res.Backend {
						t.Errorf("header %v, want that of %s", header, res.Backend)
					}
					if p.Addr == nil {
						t.Error("no peer")
					}
					if len(finished) != 1 || finished[0] != nil {
						t.Errorf("OnFinish ran with %v, want once with nil", finished)
					}
				})
			})
		}
	}
}

// drain reads a stream to its end and returns its first message.
func drain(ctx context.Context, c kvpb.KVClient, opts ...grpc.CallOption) (*kvpb.Response, error) {
	s, err := c.Scan(ctx, &kvpb.Request{}, opts...)
	if err != nil {
		return nil, err
	}
	var first *kvpb.Response
	for i := 0; ; i++ {
		res, err := s.Recv()
		if err != nil {
			if i == 3 && first != nil {
				return first, nil
			}
			return first, fmt.Errorf("after %d messages: %w", i, err)
		}
		if first == nil {
			first = res
		}
		if res.Id != first.Id || len(res.Value) != 1 || res.Value[0] != byte(i) {
			return nil, fmt.Errorf("message %d is %v of attempt %d", i, res.Value, res.Id)
		}
	}
}

// Trap: the trailer of the failure that is returned is another attempt's.
func TestTrailerOfTheReturnedFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(part{After: 20 * ms, Code: codes.Aborted, Push: "7"}, part{After: ms, Code: codes.Aborted, Push: "-1"})
		c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms, NonFatalCodes: []codes.Code{codes.Aborted}})
		var trailer metadata.MD
		_, err := c.Get(t.Context(), &kvpb.Request{}, grpc.Trailer(&trailer))
		if got := trailer.Get("grpc-retry-pushback-ms"); status.Code(err) != codes.Aborted || len(got) != 1 || got[0] != "7" {
			t.Errorf("error %v, pushback %v, want those of attempt 1", err, got)
		}
	})
}

// Trap: a hedge still reads the request after the caller has it back.
func TestRequestIsTheCallersAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var wrong atomic.Int64
		req := &kvpb.Request{Id: 1, Labels: map[string]string{"a": "b"}, Value: make([]byte, 1024)}
		f := func(ctx context.Context, _ string, req, reply any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
			if number(ctx) == 1 {
				time.Sleep(2 * ms)
				return nil
			}
			// A hedge that is slow to see that it was cancelled.
			for range 20 {
				time.Sleep(ms / 4)
				if b, err := proto.Marshal(req.(*kvpb.Request)); err != nil || len(b) < 1024 || req.(*kvpb.Request).Id != 1 {
					wrong.Add(1)
				}
			}
			return nil
		}
		if err := invoke(t.Context(), hedging.Config{MaxAttempts: 2, Delay: ms}, req, &kvpb.Response{}, f); err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			req.Id = uint64(100 + i)
			req.Labels["a"] = fmt.Sprint(i)
			req.Value = append(req.Value[:0], byte(i))
			time.Sleep(ms / 8)
		}
		if n := wrong.Load(); n != 0 {
			t.Errorf("the hedge saw the caller's changes %d times", n)
		}
	})
}

// Trap: the caller returns, and changes its request, while the hedge that is due
// this very instant is cloning it.
func TestRequestIsNotClonedBehindTheCallersBack(t *testing.T) {
	// In real time: the timer and the end of the call meet as they happen to.
	in := hedging.UnaryClientInterceptor(hedging.Config{MaxAttempts: 2, Delay: 20 * time.Microsecond})
	req := &kvpb.Request{Labels: map[string]string{}}
	for i := range 40 {
		req.Labels[fmt.Sprint(i)] = "v"
	}
	for i := range 2000 {
		err := in(context.Background(), get, req, &kvpb.Response{}, nil,
			func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				for begin := time.Now(); number(ctx) == 1 && time.Since(begin) < 20*time.Microsecond; {
					runtime.Gosched()
				}
				return nil
			})
		if err != nil {
			t.Fatal(err)
		}
		req.Labels["7"] = fmt.Sprint(i)
	}
}

// Trap: reflect.New of a dynamicpb reply has no descriptor.
func TestDynamicMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(part{After: time.Second}, part{After: ms})
		f := grpctest.NewFleet(t, 3, s.Handlers())
		cc := f.Dial(roundRobin, grpc.WithChainUnaryInterceptor(
			hedging.UnaryClientInterceptor(hedging.Config{MaxAttempts: 2, Delay: 10 * ms})))
		req := dynamicpb.NewMessage((&kvpb.Request{}).ProtoReflect().Descriptor())
		req.Set(req.Descriptor().Fields().ByName("value"), protoreflect.ValueOfBytes([]byte("x")))
		res := dynamicpb.NewMessage((&kvpb.Response{}).ProtoReflect().Descriptor())
		if err := cc.Invoke(t.Context(), get, req, res); err != nil {
			t.Fatal(err)
		}
		fields := res.Descriptor().Fields()
		if k := res.Get(fields.ByName("id")).Uint(); k != 2 {
			t.Errorf("attempt %d answered, want 2", k)
		}
		if v := res.Get(fields.ByName("value")).Bytes(); string(v) != "x" {
			t.Errorf("value %q, want x", v)
		}
	})
}

// A reply that is no proto message cannot be made anew: such a call is not hedged.
func TestOtherCodecsAreNotHedged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int64
		var reply string
		err := invoke(t.Context(), hedging.Config{MaxAttempts: 3}, "req", &reply,
			func(_ context.Context, _ string, _, reply any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				calls.Add(1)
				time.Sleep(ms)
				*reply.(*string) = "answer"
				return nil
			})
		if err != nil || reply != "answer" || calls.Load() != 1 {
			t.Errorf("%d attempts, reply %q, %v", calls.Load(), reply, err)
		}
	})
}

// Trap: the contexts of attempts stay registered with a caller's long-lived one.
func TestContextsAreReleased(t *testing.T) {
	for _, tc := range []struct {
		name  string
		first time.Duration
	}{{"not hedged", 0}, {"the first wins", 15 * ms}, {"the hedge wins", time.Second}} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				var contexts []context.Context
				err := invoke(t.Context(), hedging.Config{MaxAttempts: 2, Delay: 10 * ms}, &kvpb.Request{}, &kvpb.Response{},
					func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
						mu.Lock()
						contexts = append(contexts, ctx)
						mu.Unlock()
						d := 8 * ms
						if number(ctx) == 1 {
							d = tc.first
						}
						select {
						case <-time.After(d):
							return nil
						case <-ctx.Done():
							return status.FromContextError(ctx.Err()).Err()
						}
					})
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				for i, ctx := range contexts {
					if ctx.Err() == nil {
						t.Errorf("the context of attempt %d is still alive", i+1)
					}
				}
			})
		})
	}
}

// A loser that ignores its context is not waited for; a first attempt that does is,
// since it runs on the caller's goroutine.
func TestCallerDoesNotWaitForHedges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		err := invoke(t.Context(), hedging.Config{MaxAttempts: 2, Delay: 10 * ms}, &kvpb.Request{}, &kvpb.Response{},
			func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				if number(ctx) == 1 {
					time.Sleep(20 * ms)
				} else {
					time.Sleep(time.Hour)
				}
				return nil
			})
		if d := time.Since(begin); err != nil || d != 20*ms {
			t.Errorf("took %v, %v, want 20ms", d, err)
		}
		time.Sleep(2 * time.Hour)
	})
}

// Trap: losers go on working on the server.
func TestLosersAreCancelledOnTheServer(t *testing.T) {
	for _, kind := range []string{"unary", "server streaming"} {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStage(part{After: time.Hour}, part{After: time.Hour}, part{After: 5 * ms})
				c, f := s.dial(t, hedging.Config{MaxAttempts: 3, Delay: 10 * ms})
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if by, err := call(ctx, c, kind); err != nil || by != 3 {
					t.Fatalf("attempt %d, %v, want 3", by, err)
				}
				synctest.Wait()
				s.Mu.Lock()
				defer s.Mu.Unlock()
				if len(s.Cancelled) != 2 || s.Cancelled[1] != 25*ms || s.Cancelled[2] != 25*ms {
					t.Errorf("cancelled at %v, want attempts 1 and 2 at 25ms", s.Cancelled)
				}
				for _, b := range f.Backends {
					if n := b.Started.Load(); n != 1 {
						t.Errorf("%s saw %d attempts, want 1", b.Name, n)
					}
				}
			})
		})
	}
}

// Trap: the caller's cancellation comes back as another code, or a superseded
// attempt's CANCELLED comes back at all.
func TestCancellation(t *testing.T) {
	for _, tc := range []struct {
		name   string
		cancel time.Duration
	}{{"before the hedge", 5 * ms}, {"after the hedge", 15 * ms}} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStage(part{After: time.Hour})
				c, f := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms,
					NonFatalCodes: []codes.Code{codes.Canceled, codes.DeadlineExceeded, codes.Unavailable}})
				ctx, cancel := context.WithCancel(t.Context())
				time.AfterFunc(tc.cancel, cancel)
				begin := time.Now()
				_, err := c.Get(ctx, &kvpb.Request{})
				if d := time.Since(begin); status.Code(err) != codes.Canceled || d != tc.cancel {
					t.Errorf("%v after %v, want CANCELLED after %v", err, d, tc.cancel)
				}
				synctest.Wait()
				for _, b := range f.Backends {
					if b.Started.Load() != b.Cancelled.Load() {
						t.Errorf("%s: %d handlers, %d cancelled", b.Name, b.Started.Load(), b.Cancelled.Load())
					}
				}
			})
		})
	}
}

// Trap: an attempt that panics on a goroutine of its own takes the process down.
func TestPanics(t *testing.T) {
	for _, tc := range []struct {
		name          string
		first, second any // panics with this, if not nil
		want          any
	}{{"the first attempt", "one", nil, "one"}, {"a hedge that decides the call", nil, "two", "two"}} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				var contexts []context.Context
				defer func() {
					if v := recover(); v != tc.want {
						t.Errorf("recovered %v, want %v", v, tc.want)
					}
					synctest.Wait()
					for i, ctx := range contexts {
						if ctx.Err() == nil {
							t.Errorf("the context of attempt %d is still alive", i+1)
						}
					}
				}()
				invoke(t.Context(), hedging.Config{MaxAttempts: 2, Delay: 10 * ms}, &kvpb.Request{}, &kvpb.Response{},
					func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
						mu.Lock()
						contexts = append(contexts, ctx)
						mu.Unlock()
						p := tc.first
						if number(ctx) == 2 {
							p = tc.second
						}
						select {
						case <-time.After(20 * ms):
						case <-ctx.Done():
							return status.FromContextError(ctx.Err()).Err()
						}
						if p == nil {
							<-ctx.Done()
							return status.FromContextError(ctx.Err()).Err()
						}
						panic(p)
					})
			})
		})
	}
}

// The path of a call that is not hedged starts no goroutine and clones nothing.
func TestUnhedgedPathIsLean(t *testing.T) {
	in := hedging.UnaryClientInterceptor(hedging.Config{MaxAttempts: 2, Delay: time.Hour})
	req, res := &kvpb.Request{Value: make([]byte, 1<<20)}, &kvpb.Response{}
	ctx := context.Background()
	goroutines := runtime.NumGoroutine()
	more := 0
	bare := func(ctx context.Context, _ string, r, reply any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
		if r != any(req) || reply != any(res) {
			t.Error("the first attempt has a request or reply of its own")
		}
		more = max(more, runtime.NumGoroutine()-goroutines)
		return nil
	}
	allocs := testenv.Allocs(1000, func() {
		if err := in(ctx, get, req, res, nil, bare); err != nil {
			t.Fatal(err)
		}
	})
	if more > 0 {
		t.Errorf("%d goroutines more while the call runs", more)
	}
	if allocs > 8 {
		t.Errorf("%v allocations above bare, want at most 8", allocs)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 100 {
		in(ctx, get, req, res, nil, bare)
	}
	runtime.ReadMemStats(&after)
	bytes := (after.TotalAlloc - before.TotalAlloc) / 100
	if bytes > 4096 {
		t.Errorf("%d bytes for a call with a request of 1 MiB: something is cloned", bytes)
	}
	t.Logf("%v allocations, %d bytes above bare", allocs, bytes)
}

// An attempt that the picker did not send was never launched: its token is given
// back, it fails nobody, and the call goes on.
func TestUnsent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &ledger{tokens: 1}
		var rep hedging.Report
		begin := time.Now()
		cfg := hedging.Config{MaxAttempts: 3, Delay: 10 * ms, Budget: b,
			Report: func(_ context.Context, r hedging.Report) { rep = r }}
		res := &kvpb.Response{}
		err := invoke(t.Context(), cfg, &kvpb.Request{}, res,
			func(ctx context.Context, _ string, _, reply any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				if number(ctx) > 1 {
					time.Sleep(ms) // a pick may have to wait
					attempt.FromContext(ctx).MarkUnsent()
					return status.Error(codes.Unavailable, "nowhere to go")
				}
				time.Sleep(50 * ms)
				reply.(*kvpb.Response).Id = 1
				return nil
			})
		if err != nil || res.Id != 1 {
			t.Errorf("id %d, %v", res.Id, err)
		}
		if b.deposits != 1 || b.withdrawn != 1 || b.given != 1 || b.tokens != 1 {
			t.Errorf("budget %+v, want one deposit, one withdrawal, given back", b)
		}
		want := hedging.Report{Method: get, Attempts: 1, Winner: 1, Delay: 10 * ms, Suppressed: hedging.NoBackend, SuppressedAt: begin.Add(11 * ms)}
		if rep != want {
			t.Errorf("report %+v, want %+v", rep, want)
		}
	})
}

// ledger is a budget with a number of tokens.
type ledger struct {
	mu                         sync.Mutex
	tokens                     int
	deposits, withdrawn, given int
	refused                    int
	at                         time.Time
}

func (l *ledger) Deposit(time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.deposits++
}

func (l *ledger) TryWithdraw(now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tokens == 0 {
		l.refused++
		return false
	}
	l.tokens--
	l.withdrawn++
	l.at = now
	return true
}

func (l *ledger) GiveBack(at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !at.Equal(l.at) {
		return // not the time of the withdrawal
	}
	l.tokens++
	l.given++
}
