package shedding

import (
	"context"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// The tap refuses what is below the cursor, with a status that says what the interceptor's
// says; what it lets pass has the same cohort behind it.
func TestTap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, staticServer(10, 10))
		client, f := dial(t, s)
		cursor := LevelOf(Critical, true, 0)
		for _, tc := range []struct {
			class   Criticality
			extra   string
			refused bool
		}{
			{Sheddable, "0", true}, {SheddablePlus, "0", true}, {Critical, "1", false}, {Critical, "0", false}, {CriticalPlus, "3", false},
		} {
			s.gate.Publish(verdict(cursor, 250*ms)) // a call behind the tap publishes its own
			started := f.Backends[0].Started.Load()
			ctx := metadata.AppendToOutgoingContext(WithCriticality(t.Context(), tc.class), "grpc-previous-rpc-attempts", tc.extra)
			_, err := client.Get(ctx, &kvpb.Request{})
			if !tc.refused {
				if err != nil {
					t.Errorf("%v: %v", tc.class, err)
				}
				continue
			}
			if d, ok := outcome.RetryDelay(err); status.Code(err) != codes.Unavailable || !ok || d != 250*ms {
				t.Errorf("%v: %v, RetryInfo %v", tc.class, err, d)
			}
			if len(status.Convert(err).Details()) != 2 {
				t.Errorf("%v: details %v, want ErrorInfo and RetryInfo", tc.class, status.Convert(err).Details())
			}
			if n := f.Backends[0].Started.Load(); n != started {
				t.Error("its handler ran")
			}
		}
		// What it says about coming again follows the verdict.
		for _, after := range []time.Duration{ms, 2 * ms, ms} {
			s.gate.Publish(verdict(levels, after))
			_, err := s.TapHandle(context.Background(), &tap.Info{FullMethodName: "/kv.KV/Get"})
			if d, _ := outcome.RetryDelay(err); d != after {
				t.Errorf("RetryInfo %v, want %v", d, after)
			}
		}
		// The pass of the tap: dealt cohorts are dealt once.
		s.gate.Publish(verdict(1, ms))
		ctx, err := s.TapHandle(context.Background(), &tap.Info{FullMethodName: "/kv.KV/Get"})
		a, ok := ctx.Value(arrivalKey{}).(*arrival)
		if err != nil || !ok || a.cohort != s.dealt.Load()>>26 {
			t.Errorf("%v, arrival %+v", err, a)
		}
	})
}

// What the tap refuses belongs to the demand, in the window in which it came.
func TestTapReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, ServerConfig{Queue: &QueueConfig{}})
		s.unlock(s.lock())
		s.core.Tick(time.Now())
		s.gate.Publish(verdict(levels, ms))
		info := &tap.Info{FullMethodName: "/kv.KV/Get"}
		for range 50 {
			if _, err := s.TapHandle(context.Background(), info); err == nil {
				t.Fatal("not refused")
			}
		}
		time.Sleep(longWindow)
		now := s.lock()
		if n := s.core.flow.arrivals; n != 50 {
			t.Errorf("%d arrivals, want 50", n)
		}
		s.core.Tick(now)
		if d := s.core.flow.demand; d != 50 {
			t.Errorf("demand %v/s, want 50", d)
		}
		s.unlock(now)
		if st := s.Stats(); st.Refused != 50 {
			t.Errorf("%+v", st)
		}
	})
}

// The cost of the tap where nobody is refused, which is what every call pays.
func BenchmarkTapOpen(b *testing.B) {
	s := newServer(b, ServerConfig{Queue: &QueueConfig{}})
	info := &tap.Info{FullMethodName: "/kv.KV/Get", Header: metadata.Pairs(CriticalityKey, "critical")}
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.TapHandle(ctx, info); err != nil {
			b.Fatal(err)
		}
	}
}

// The cost of the interceptor where nobody is refused, beside the bare handler.
func BenchmarkServerAdmitted(b *testing.B) {
	s := newServer(b, ServerConfig{Queue: &QueueConfig{}})
	unary := s.UnaryServerInterceptor()
	info := &grpc.UnaryServerInfo{FullMethod: "/kv.KV/Get"}
	ctx := metadata.NewIncomingContext(context.Background(), metadata.Pairs(":authority", "kv", "content-type", "application/grpc", "user-agent", "grpc-go"))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := unary(ctx, nil, info, func(context.Context, any) (any, error) { return nil, nil }); err != nil {
			b.Fatal(err)
		}
	}
}

// cpu is the time that the process has computed.
func cpu(t testing.TB) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// refusalCost returns the CPU time of a refusal of n, by real gRPC, the client's part
// included, which is the same in both: in the tap, and in the interceptor.
func refusalCost(t testing.TB, n, rounds int, size int) (inTap, inInterceptor time.Duration) {
	t.Helper()
	byTap, byInterceptor := newServer(t, staticServer(1, 1)), newServer(t, ServerConfig{Limiter: LimiterConfig{Algorithm: Static, Limit: 1}})
	byTap.gate.Publish(verdict(levels, time.Second))
	now := byInterceptor.lock()
	byInterceptor.core.Arrive(now, Request{}) // takes the only slot, for ever
	byInterceptor.unlock(now)
	call := func(s *Server) func() {
		f := grpctest.NewFleet(t, 1, grpctest.Handlers{}, grpc.ChainUnaryInterceptor(s.UnaryServerInterceptor()), grpc.InTapHandle(s.TapHandle))
		client := kvpb.NewKVClient(f.Dial())
		req := &kvpb.Request{Value: make([]byte, size)}
		return func() {
			if _, err := client.Get(context.Background(), req); status.Code(err) != codes.Unavailable {
				t.Fatal(err)
			}
		}
	}
	inTheTap, inTheInterceptor := call(byTap), call(byInterceptor)
	measure := func(call func()) time.Duration {
		begin := cpu(t)
		for range n {
			call()
		}
		return cpu(t) - begin
	}
	measure(inTheTap) // connections, and the garbage collector's pace
	measure(inTheInterceptor)
	for range rounds { // in turn: the machine is not alone
		inTap += measure(inTheTap)
		inInterceptor += measure(inTheInterceptor)
	}
	return inTap / time.Duration(n*rounds), inInterceptor / time.Duration(n*rounds)
}

// A refusal in the tap costs less than 0.75 of one in the interceptor.
func TestTapIsCheap(t *testing.T) {
	if testing.Short() || testenv.Race {
		t.Skip("measures CPU time, which the race detector takes")
	}
	var ratio float64
	for range 3 { // the machine is not alone
		inTap, inInterceptor := refusalCost(t, 500, 10, 1<<10)
		ratio = float64(inTap) / float64(inInterceptor)
		t.Logf("tap %v, interceptor %v, ratio %.2f", inTap, inInterceptor, ratio)
		if ratio <= 0.75 {
			return
		}
	}
	t.Errorf("ratio %.2f, want 0.75", ratio)
}

// BenchmarkRefusal tells the CPU time of a refusal in the tap and in the interceptor.
func BenchmarkRefusal(b *testing.B) {
	for _, size := range []int{0, 1 << 10, 16 << 10} {
		b.Run(byteSize(size), func(b *testing.B) {
			var inTap, inInterceptor time.Duration
			for b.Loop() {
				inTap, inInterceptor = refusalCost(b, 500, 10, size)
			}
			b.ReportMetric(float64(inTap.Nanoseconds()), "tap-ns")
			b.ReportMetric(float64(inInterceptor.Nanoseconds()), "interceptor-ns")
			b.ReportMetric(float64(inTap)/float64(inInterceptor), "ratio")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func byteSize(n int) string {
	switch {
	case n == 0:
		return "empty"
	case n < 16<<10:
		return "1KiB"
	}
	return "16KiB"
}

// When the timer fires, what the tap has refused until then is in the count, though the window
// is not over yet: else it would last for as long as that of a server that hardly anybody calls.
func TestTimerReportsTap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, ServerConfig{Queue: &QueueConfig{}})
		s.unlock(s.lock())
		s.core.Tick(time.Now())
		s.gate.Publish(verdict(levels, ms))
		for range fewArrivals {
			if _, err := s.TapHandle(context.Background(), &tap.Info{FullMethodName: "/kv.KV/Get"}); err == nil {
				t.Fatal("not refused")
			}
		}
		time.Sleep(interval / 2)
		s.tick()
		if n := s.core.flow.arrivals; n != fewArrivals {
			t.Errorf("%d arrivals, want %d", n, fewArrivals)
		}
	})
}
