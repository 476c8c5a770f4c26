package hedging_test

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// What a handler of the queueing fleet is asked to do, in the key of the request.
const (
	failing  = "fail"   // UNAVAILABLE, but for a third attempt
	stalling = "stall"  // never, but for a third attempt
	heading  = "header" // sets headers
)

// queueing is a fleet of servers of one worker and a queue each.
type queueing struct {
	*grpctest.Fleet
	t       *testing.T
	servers []*shedding.Server
	silent  atomic.Bool // they do not tell of a start

	mu      sync.Mutex      // guards the rest
	begin   time.Time       // of the story
	started []time.Duration // when handlers did, since begin
	numbers []string        // how many attempts of the call came before each
	calls   map[int64]int   // and how many there were of each call, by epoch_unix_ns
}

func newQueueing(t *testing.T, n int) *queueing {
	q := &queueing{t: t}
	for range n {
		s, err := shedding.NewServer(shedding.ServerConfig{
			Limiter: shedding.LimiterConfig{Algorithm: shedding.Static, Limit: 1},
			Queue:   &shedding.QueueConfig{Target: time.Second, MaxWait: time.Second},
		})
		if err != nil {
			t.Fatal(err)
		}
		q.servers = append(q.servers, s)
	}
	// All backends of a fleet have the same options; which one is called, info knows.
	admit := func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		if q.silent.Load() {
			md, _ := metadata.FromIncomingContext(ctx)
			md = md.Copy()
			md.Delete("bobtail-tied")
			ctx = metadata.NewIncomingContext(ctx, md)
		}
		i := info.Server.(*grpctest.Backend).Index
		return q.servers[i].UnaryServerInterceptor()(ctx, req, info, handler)
	}
	q.Fleet = grpctest.NewFleet(t, n, grpctest.Handlers{Unary: q.serve}, grpc.ChainUnaryInterceptor(admit))
	return q
}

func (q *queueing) serve(ctx context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
	k := metadata.ValueFromIncomingContext(ctx, "grpc-previous-rpc-attempts")
	q.mu.Lock()
	q.started = append(q.started, time.Since(q.begin))
	q.numbers = append(q.numbers, strings.Join(k, ""))
	q.calls[req.EpochUnixNs]++
	q.mu.Unlock()
	third := len(k) == 1 && k[0] == "2"
	took := time.Duration(req.Id) * ms
	switch {
	case req.Key == stalling && !third:
		took = time.Hour
	case req.Key == heading:
		if err := grpc.SetHeader(ctx, metadata.Pairs("set", "first")); err != nil {
			return nil, err
		}
		if err := grpc.SendHeader(ctx, metadata.Pairs("sent", "second")); err != nil {
			return nil, err
		}
	}
	select {
	case <-time.After(took):
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if req.Key == failing && !third {
		return nil, status.Error(codes.Unavailable, "failed as asked")
	}
	return &kvpb.Response{Id: req.Id, Backend: b.Name}, nil
}

// tied connects with a policy of two tied attempts, and else as cfg says. opts are those
// of the connection, by default StatsHandler's. The connection picks in turn.
func (q *queueing) tied(cfg hedging.Config, opts ...grpc.DialOption) kvpb.KVClient {
	cfg.MaxAttempts, cfg.Tied, cfg.NonFatalCodes = 2, true, []codes.Code{codes.Unavailable}
	if opts == nil {
		opts = []grpc.DialOption{grpc.WithStatsHandler(hedging.StatsHandler())}
	}
	cc := q.Dial(append(opts, roundRobin, grpc.WithChainUnaryInterceptor(hedging.UnaryClientInterceptor(cfg)))...)
	cc.Connect()
	time.Sleep(time.Second)
	return kvpb.NewKVClient(cc)
}

// tell begins a story: backend i is busy for as long as busy[i] says.
func (q *queueing) tell(busy ...time.Duration) {
	q.mu.Lock()
	q.begin, q.started, q.numbers, q.calls = time.Now(), nil, nil, map[int64]int{}
	q.mu.Unlock()
	for i, d := range busy {
		go q.servers[i].UnaryServerInterceptor()(context.Background(), nil, &grpc.UnaryServerInfo{FullMethod: "/kv.KV/Other"}, //nolint:errcheck // it is admitted at once
			func(context.Context, any) (any, error) { time.Sleep(d); return nil, nil })
	}
	synctest.Wait()
}

// expect holds when handlers started, and of which attempts.
func (q *queueing) expect(numbers string, started ...time.Duration) {
	q.t.Helper()
	synctest.Wait()
	q.mu.Lock()
	defer q.mu.Unlock()
	if !slices.Equal(q.started, started) || strings.Join(q.numbers, ",") != numbers {
		q.t.Errorf("handlers started at %v, previous attempts %q; want %v, %q", q.started, strings.Join(q.numbers, ","), started, numbers)
	}
}

func (q *queueing) queued() (n int) {
	synctest.Wait()
	for _, s := range q.servers {
		n += s.Stats().Queued
	}
	return n
}

func (l *ledger) expect(t *testing.T, withdrawn, given int) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.withdrawn != withdrawn || l.given != given {
		t.Errorf("%d tokens taken and %d given back, want %d and %d", l.withdrawn, l.given, withdrawn, given)
	}
}

// A call waits in two queues. The server that is free first starts it, and the copy leaves
// the other queue at that moment, not when the answer has come: it is served once, and the
// token comes back. So whichever of the two attempts it is.
func TestTied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueueing(t, 2)
		b := &ledger{tokens: 5}
		c := q.tied(hedging.Config{Budget: b})
		numbers := map[string]int{}
		// The first attempts go to the same backend both times.
		for i, busy := range [][]time.Duration{{20 * ms, 10 * ms}, {10 * ms, 20 * ms}} {
			q.tell(busy...)
			time.AfterFunc(10*ms, func() {
				if n := q.queued(); n != 0 {
					t.Errorf("at 10ms %d copies are still queued", n)
				}
			})
			time.AfterFunc(9*ms, func() {
				if n := q.queued(); n != 2 {
					t.Errorf("at 9ms %d copies are queued, want 2", n)
				}
			})
			res, err := c.Get(t.Context(), &kvpb.Request{Id: 5})
			if err != nil || time.Since(q.begin) != 15*ms {
				t.Errorf("answered after %v, %v, want 15ms", time.Since(q.begin), err)
			}
			if want := q.Backends[1-i].Name; res.GetBackend() != want {
				t.Errorf("served by %q, want %q", res.GetBackend(), want)
			}
			time.Sleep(50 * ms)
			q.expect(q.numbers[0], 10*ms)
			numbers[q.numbers[0]]++
			b.expect(t, i+1, i+1)
		}
		if numbers[""] != 1 || numbers["1"] != 1 {
			t.Errorf("previous attempts of what was served: %v, want one first attempt and one copy", numbers)
		}
	})
}

// A server that need not queue the call says so before the copy is due.
func TestTiedServedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueueing(t, 2)
		b := &ledger{tokens: 5}
		c := q.tied(hedging.Config{Budget: b})
		q.tell()
		if _, err := c.Get(t.Context(), &kvpb.Request{Id: 50}); err != nil {
			t.Error(err)
		}
		q.expect("", 0)
		b.expect(t, 0, 0)
	})
}

// Where nobody tells of a start, the copy is a hedge at the tie delay, and stays paid for:
// be it the server that does not, or the client that does not listen.
func TestTiedUntold(t *testing.T) {
	for _, tc := range []struct {
		name   string
		silent bool
		opts   []grpc.DialOption
	}{
		{"by the server", true, nil},
		{"to the client", false, []grpc.DialOption{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				q := newQueueing(t, 2)
				q.silent.Store(tc.silent)
				b := &ledger{tokens: 5}
				c := q.tied(hedging.Config{Budget: b, TieDelay: 3 * ms}, tc.opts...)
				q.tell()
				if _, err := c.Get(t.Context(), &kvpb.Request{Id: 20}); err != nil || time.Since(q.begin) != 20*ms {
					t.Errorf("answered after %v, %v, want 20ms", time.Since(q.begin), err)
				}
				q.expect(",1", 0, 3*ms)
				b.expect(t, 1, 0)
			})
		})
	}
}

// While some servers of a fleet do not tell, as when it is being updated, no token comes
// back: one that did not tell may well have started.
func TestTiedMixedFleet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueueing(t, 2)
		b := &ledger{tokens: 9}
		c := q.tied(hedging.Config{Budget: b})
		ask := func(busy ...time.Duration) {
			t.Helper()
			q.tell(busy...)
			if _, err := c.Get(t.Context(), &kvpb.Request{Id: 5}); err != nil {
				t.Error(err)
			}
			time.Sleep(50 * ms)
		}
		ask(20*ms, 10*ms)
		b.expect(t, 1, 1)
		q.silent.Store(true)
		ask(0, 0)
		q.silent.Store(false)
		b.expect(t, 2, 1)
		ask(20*ms, 10*ms)
		b.expect(t, 3, 1)
		time.Sleep(hedging.Window)
		ask(20*ms, 10*ms)
		b.expect(t, 4, 2)
	})
}

// The attempt that goes on fails: the copy that was withdrawn does not count, and another
// attempt is sent at once.
func TestTiedLeaderFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueueing(t, 2)
		b := &ledger{tokens: 5}
		var rep hedging.Report
		c := q.tied(hedging.Config{Budget: b, Report: func(_ context.Context, r hedging.Report) { rep = r }})
		q.tell(20*ms, 20*ms)
		if _, err := c.Get(t.Context(), &kvpb.Request{Id: 5, Key: failing}); err != nil {
			t.Error(err)
		}
		if n := len(q.started); n < 2 || n > 3 || q.numbers[n-1] != "2" {
			t.Errorf("previous attempts %q, want a third attempt at the end", q.numbers)
		}
		if want := (hedging.Report{Method: get, Attempts: 3, Winner: 3, Withdrawn: 1, Delay: -1}); rep != want {
			t.Errorf("%+v, want %+v", rep, want)
		}
	})
}

// The handler that has started is slow: the hedging delay counts from its start.
func TestTiedSlowHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueueing(t, 3)
		c := q.tied(hedging.Config{Delay: 30 * ms})
		q.tell(20*ms, 22*ms, 24*ms)
		if _, err := c.Get(t.Context(), &kvpb.Request{Id: 5, Key: stalling}); err != nil {
			t.Error(err)
		}
		if took := time.Since(q.begin); took != q.started[0]+35*ms || q.numbers[1] != "2" {
			t.Errorf("handlers started at %v, previous attempts %q, answered after %v: want a third attempt 30ms after the first start", q.started, q.numbers, took)
		}
	})
}

// A hedge that has started stays paid for, though it is cancelled. The copy that never
// started does not.
func TestTiedHedgeStaysPaidFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueueing(t, 3)
		b := &ledger{tokens: 5}
		c := q.tied(hedging.Config{Delay: 30 * ms, Budget: b})
		q.tell(20*ms, 22*ms, 24*ms)
		if _, err := c.Get(t.Context(), &kvpb.Request{Id: 40}); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if len(q.started) != 2 {
			t.Errorf("handlers started at %v, want the one that was slow and its hedge", q.started)
		}
		b.expect(t, 2, 1)
	})
}

// The caller leaves while both copies are queued: both leave their queues, nobody serves
// them, and the token comes back.
func TestTiedCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueueing(t, 2)
		b := &ledger{tokens: 5}
		c := q.tied(hedging.Config{Budget: b})
		q.tell()
		if _, err := c.Get(t.Context(), &kvpb.Request{}); err != nil { // so that it is known that they tell
			t.Error(err)
		}
		q.tell(20*ms, 20*ms)
		ctx, cancel := context.WithTimeout(t.Context(), 5*ms)
		defer cancel()
		if _, err := c.Get(ctx, &kvpb.Request{Id: 5}); status.Code(err) != codes.DeadlineExceeded || time.Since(q.begin) != 5*ms {
			t.Errorf("after %v: %v, want DEADLINE_EXCEEDED at 5ms", time.Since(q.begin), err)
		}
		if n := q.queued(); n != 0 {
			t.Errorf("%d copies are still queued", n)
		}
		time.Sleep(50 * ms)
		q.expect("")
		b.expect(t, 1, 1)
	})
}

// tokens is a budget without bound that says when more comes back than was taken.
type tokens struct{ taken, given atomic.Int64 }

func (b *tokens) Deposit(time.Time)          {}
func (b *tokens) TryWithdraw(time.Time) bool { b.taken.Add(1); return true }
func (b *tokens) GiveBack(time.Time)         { b.given.Add(1) }

// Calls of every ending, many at once: served, failing, slow, and left by their callers
// before, while and after they are started. Nothing stays behind in any server, and every
// execution of a call beyond its first is paid for.
func TestTiedEndings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueueing(t, 3)
		b := &tokens{}
		var withdrawn atomic.Int64
		c := q.tied(hedging.Config{Delay: 15 * ms, Budget: b, Report: func(_ context.Context, r hedging.Report) {
			withdrawn.Add(int64(r.Withdrawn))
		}})
		q.tell()
		rnd := rand.New(rand.NewPCG(1, 2))
		var wg sync.WaitGroup
		for i := range 3000 {
			req := &kvpb.Request{EpochUnixNs: int64(i), Id: rnd.Uint64N(8), Key: []string{"", "", "", failing, stalling}[rnd.IntN(5)]}
			patience := time.Duration(rnd.Int64N(int64(40 * ms)))
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				if _, err := c.Get(ctx, req); err != nil && status.Code(err) != codes.DeadlineExceeded && status.Code(err) != codes.Unavailable {
					t.Error(err)
				}
			})
			time.Sleep(time.Duration(rnd.Int64N(int64(8 * ms))))
		}
		wg.Wait()
		time.Sleep(time.Second)
		for i, s := range q.servers {
			if st := s.Stats(); st.InFlight != 0 || st.Queued != 0 {
				t.Errorf("server %d: %d in flight and %d queued, want none", i, st.InFlight, st.Queued)
			}
		}
		var extra int64
		for _, n := range q.calls {
			extra += int64(n - 1)
		}
		taken, given := b.taken.Load(), b.given.Load()
		t.Logf("%d calls executed, %d times more than once; %d tokens taken, %d given back; %d attempts withdrawn",
			len(q.calls), extra, taken, given, withdrawn.Load())
		if extra > taken-given || given == 0 || extra == 0 || withdrawn.Load() == 0 {
			t.Errorf("%d executions beyond the first for %d-%d tokens; %d attempts withdrawn", extra, taken, given, withdrawn.Load())
		}
	})
}

// A server that has no room for one attempt does not end a call of which another is in
// flight, whatever the policy says of the code, nor is there a further one. Alone it does.
func TestShedAttempt(t *testing.T) {
	shed := (&outcome.Refusal{Cause: errors.New("no time"), Code: codes.DeadlineExceeded, Reason: "DEADLINE_HOPELESS"}).GRPCStatus().Err()
	for _, tc := range []struct {
		shed int // the attempt that is
		code codes.Code
		took time.Duration
	}{{2, codes.OK, 20 * ms}, {1, codes.DeadlineExceeded, 2 * ms}} {
		synctest.Test(t, func(t *testing.T) {
			h := hedger(t, hedging.Config{MaxAttempts: 3, Delay: 5 * ms})
			begun := time.Now()
			var last atomic.Int64
			err := h.InvokeUnary(t.Context(), get, &kvpb.Request{}, &kvpb.Response{}, nil,
				func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, opts ...grpc.CallOption) error {
					k := number(ctx)
					if last.Store(int64(k)); k == tc.shed {
						time.Sleep(2 * ms)
						return shed
					}
					return served(20*ms)(ctx, method, req, reply, cc, opts...)
				})
			if took := time.Since(begun); status.Code(err) != tc.code || took != tc.took || last.Load() != int64(tc.shed) {
				t.Errorf("attempt %d shed: %v after %v, last attempt %d; want %v after %v", tc.shed, err, took, last.Load(), tc.code, tc.took)
			}
		})
	}
}

// What a handler sets as header reaches the caller in the trailer, whichever attempt it is
// of. The header tells of the start alone.
func TestTiedHeaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueueing(t, 2)
		c := q.tied(hedging.Config{})
		for _, busy := range [][]time.Duration{{20 * ms, 10 * ms}, {10 * ms, 20 * ms}} {
			q.tell(busy...)
			var header, trailer metadata.MD
			if _, err := c.Get(t.Context(), &kvpb.Request{Id: 5, Key: heading}, grpc.Header(&header), grpc.Trailer(&trailer)); err != nil {
				t.Error(err)
			}
			if header.Len() != 2 || len(header["bobtail-tied"]) != 1 || len(header["content-type"]) != 1 {
				t.Errorf("header %v, want content-type and bobtail-tied", header)
			}
			if trailer.Get("set")[0] != "first" || trailer.Get("sent")[0] != "second" {
				t.Errorf("trailer %v, want what the handler set and sent as header", trailer)
			}
			time.Sleep(50 * ms)
		}
	})
}

// A call that is made under the context of an attempt, to fetch a token say, is not it:
// that its handler starts says nothing.
func TestTiedNestedCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueueing(t, 3) // in turn, so that no Get queues behind the other
		inner := func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if method == get {
				q.silent.Store(false)
				if err := invoker(ctx, "/kv.KV/Put", &kvpb.Request{}, &kvpb.Response{}, cc); err != nil {
					return err
				}
				q.silent.Store(true)
			}
			return invoker(ctx, method, req, reply, cc, opts...)
		}
		cfg := hedging.Config{MaxAttempts: 2, Tied: true}
		cc := q.Dial(roundRobin, grpc.WithStatsHandler(hedging.StatsHandler()),
			grpc.WithChainUnaryInterceptor(hedging.UnaryClientInterceptor(cfg), inner))
		cc.Connect()
		time.Sleep(time.Second)
		q.tell()
		if _, err := kvpb.NewKVClient(cc).Get(t.Context(), &kvpb.Request{Id: 20}); err != nil {
			t.Error(err)
		}
		// Were the start of Put taken for that of Get, there would be no copy.
		synctest.Wait()
		if n := len(q.started); n != 4 {
			t.Errorf("%d handlers started, want a Put and a Get of each of two attempts", n)
		}
	})
}

// In shadow, and of streams, nothing is marked: servers do what they always did.
func TestTiedUnmarked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 1, grpctest.Handlers{
			Unary: func(ctx context.Context, _ *grpctest.Backend, _ *kvpb.Request) (*kvpb.Response, error) {
				return &kvpb.Response{Id: uint64(len(metadata.ValueFromIncomingContext(ctx, "bobtail-tied")))}, nil
			},
			Scan: func(_ *grpctest.Backend, _ *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
				return s.Send(&kvpb.Response{Id: uint64(len(metadata.ValueFromIncomingContext(s.Context(), "bobtail-tied")))})
			},
		})
		for _, shadow := range []bool{false, true} {
			cfg := hedging.Config{MaxAttempts: 2, Tied: true, Shadow: shadow}
			c := kvpb.NewKVClient(f.Dial(roundRobin, grpc.WithChainUnaryInterceptor(hedging.UnaryClientInterceptor(cfg)),
				grpc.WithChainStreamInterceptor(hedging.StreamClientInterceptor(cfg))))
			res, err := c.Get(t.Context(), &kvpb.Request{})
			if err != nil || (res.Id == 1) == shadow {
				t.Errorf("shadow %v: marked %d times, %v", shadow, res.GetId(), err)
			}
			s, err := c.Scan(t.Context(), &kvpb.Request{})
			if err != nil {
				t.Fatal(err)
			}
			if m, err := s.Recv(); err != nil || m.Id != 0 {
				t.Errorf("a stream is marked: %v, %v", m, err)
			}
			if _, err := s.Recv(); err != io.EOF {
				t.Error(err)
			}
		}
		// Nor is a stream hedged at once, as a delay of 0 would have it without tied.
		synctest.Wait()
		if n := f.Backends[0].Started.Load(); n != 4 {
			t.Errorf("%d handlers started, want 4", n)
		}
	})
}

// Faults of the configuration name the field, the value and the bound.
func TestTiedConfig(t *testing.T) {
	for _, tc := range []struct {
		cfg  hedging.Config
		want string
	}{
		{hedging.Config{Tied: true, TieDelay: -1}, "hedging: tie delay -1ns, want at least 0"},
		{hedging.Config{TieDelay: ms}, "hedging: tie delay 1ms, want tied beside it"},
	} {
		tc.cfg.MaxAttempts = 2
		if err := tc.cfg.Validate(); err == nil || err.Error() != tc.want {
			t.Errorf("%v, want %s", err, tc.want)
		}
	}
}

// A copy that is withdrawn while its pick waits, and then has nowhere to go, was never sent:
// it is not told of, and its token comes back, whether or not all servers tell of starts.
func TestTiedWithdrawnUnsent(t *testing.T) {
	for _, unsent := range []int{1, 2} {
		synctest.Test(t, func(t *testing.T) {
			q := newQueueing(t, 2)
			b := &ledger{tokens: 5}
			var rep hedging.Report
			cfg := hedging.Config{MaxAttempts: 2, Tied: true, Budget: b, TieDelay: 2 * ms, NonFatalCodes: []codes.Code{codes.Unavailable},
				Report: func(_ context.Context, r hedging.Report) { rep = r }}
			picks := func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				if number(ctx) == unsent {
					<-ctx.Done() // withdrawn
					attempt.FromContext(ctx).MarkUnsent()
					return status.FromContextError(ctx.Err()).Err()
				}
				return invoker(ctx, method, req, reply, cc, opts...)
			}
			// Another call has been answered untold, so that no token comes back for being told
			// of no start.
			q.silent.Store(true)
			cc := q.Dial(roundRobin, grpc.WithStatsHandler(hedging.StatsHandler()),
				grpc.WithChainUnaryInterceptor(hedging.UnaryClientInterceptor(cfg), func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
					if q.silent.Load() {
						return invoker(ctx, method, req, reply, cc, opts...)
					}
					return picks(ctx, method, req, reply, cc, invoker, opts...)
				}))
			cc.Connect()
			time.Sleep(time.Second)
			c := kvpb.NewKVClient(cc)
			q.tell()
			if _, err := c.Get(t.Context(), &kvpb.Request{}); err != nil {
				t.Error(err)
			}
			q.silent.Store(false)
			q.tell(10*ms, 10*ms)
			begin := time.Now()
			if _, err := c.Get(t.Context(), &kvpb.Request{Id: 20}); err != nil {
				t.Error(err)
			}
			synctest.Wait()
			want := hedging.Report{Method: get, Attempts: 1, Winner: 3 - unsent, Delay: -1, Suppressed: hedging.NoBackend}
			// At once, or when the withdrawn one tells that it went nowhere: the two race.
			if at := rep.SuppressedAt.Sub(begin); at != 0 && at != 10*ms {
				t.Errorf("attempt %d unsent: suppressed after %v, want 0 or 10ms", unsent, at)
			}
			want.SuppressedAt = rep.SuppressedAt
			if rep != want {
				t.Errorf("attempt %d unsent: %+v, want %+v", unsent, rep, want)
			}
			b.expect(t, 1, 1)
		})
	}
}
