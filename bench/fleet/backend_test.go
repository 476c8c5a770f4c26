package fleet

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

func virtualSleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A backend takes as long as the scenario says for this call, attempt and
// moment, and leaves when the caller does.
func TestBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := scenario.Named("slow-replica")
		if err != nil {
			t.Fatal(err)
		}
		timed := func(index int, id uint64, previous ...string) time.Duration {
			ctx := t.Context()
			for _, p := range previous {
				ctx = metadata.NewIncomingContext(ctx, metadata.Pairs("grpc-previous-rpc-attempts", p))
			}
			begun := time.Now()
			if _, err := NewBackend(s, 7, index, virtualSleep).Get(ctx, &kvpb.Request{Id: id}); err != nil {
				t.Error(err)
			}
			return time.Since(begun)
		}
		for id := range uint64(20) {
			for _, c := range []struct {
				previous []string
				attempt  int
			}{{nil, 0}, {[]string{"1"}, 1}, {[]string{"3"}, 3}, {[]string{"x"}, 0}, {[]string{"-1"}, 0}} {
				if got, want := timed(2, id, c.previous...), s.Service(7, id, c.attempt, 2, 0); got != want {
					t.Errorf("call %d, previous attempts %q: %v, want %v", id, c.previous, got, want)
				}
			}
		}

		// The timeline counts from the request's epoch: find a moment in a stall.
		s.Stalls = &scenario.Stalls{MeanInterval: scenario.Duration(time.Second), Min: scenario.Duration(500e6), Max: scenario.Duration(500e6)}
		at := time.Duration(0)
		for s.Service(7, 0, 0, 0, at) < 400*time.Millisecond {
			at += 10 * time.Millisecond
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		begun := time.Now()
		if _, err := NewBackend(s, 7, 0, virtualSleep).Get(ctx, &kvpb.Request{EpochUnixNs: begun.Add(-at).UnixNano()}); err == nil {
			t.Error("a stalled backend answered")
		}
		if took := time.Since(begun); took != 100*time.Millisecond {
			t.Errorf("left after %v, want when the caller did, 100ms", took)
		}
	})
}

// slow is one backend whose calls take 100 ms.
func slow(change func(*scenario.Scenario)) *scenario.Scenario {
	s := &scenario.Scenario{Backends: 1, ServiceTime: []scenario.Component{
		{Weight: 1, Constant: &scenario.Constant{Value: scenario.Duration(100 * time.Millisecond)}}}}
	change(s)
	return s
}

// answer is what a call was told, and when, in ms from the epoch.
type answer struct {
	code codes.Code
	ms   int64
}

// ask makes calls at the given moments in ms, which stay for patience, and returns
// their answers.
func ask(t *testing.T, s *scenario.Scenario, patience time.Duration, moments ...int) []answer {
	t.Helper()
	out := make([]answer, len(moments))
	synctest.Test(t, func(t *testing.T) {
		b := NewBackend(s, 1, 0, virtualSleep)
		epoch := time.Now()
		var wg sync.WaitGroup
		for i, at := range moments {
			wg.Go(func() {
				time.Sleep(time.Duration(at)*time.Millisecond + time.Duration(i)) // in this order
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				_, err := b.Get(ctx, &kvpb.Request{Id: uint64(i), EpochUnixNs: epoch.UnixNano()})
				out[i] = answer{status.Code(err), time.Since(epoch).Milliseconds()}
			})
		}
		wg.Wait()
	})
	return out
}

// What a backend does with faults, workers and patience.
func TestBackendFaults(t *testing.T) {
	span := func(ms int) scenario.Duration { return scenario.Duration(ms * 1e6) }
	for _, c := range []struct {
		what     string
		scenario func(*scenario.Scenario)
		patience time.Duration
		moments  []int
		want     []answer
	}{
		{"an error answers at once, in its time only", func(s *scenario.Scenario) {
			s.Faults = []scenario.Fault{{Kind: scenario.Error, From: span(50), For: span(50), Code: scenario.Code(codes.Internal), Probability: 1}}
		}, time.Second, []int{0, 60, 100}, []answer{{codes.OK, 100}, {codes.Internal, 60}, {codes.OK, 200}}},
		{"a black hole keeps its callers until they leave", func(s *scenario.Scenario) {
			s.Faults = []scenario.Fault{{Kind: scenario.Blackhole, From: span(50), For: span(50)}}
		}, time.Second, []int{60, 100}, []answer{{codes.DeadlineExceeded, 1060}, {codes.OK, 200}}},
		{"or the proxy loses patience", func(s *scenario.Scenario) {
			s.Faults, s.ServerTimeout = []scenario.Fault{{Kind: scenario.Blackhole}}, span(300)
		}, time.Second, []int{60}, []answer{{codes.Unavailable, 360}}},
		{"a stall holds work up", func(s *scenario.Scenario) {
			s.Faults = []scenario.Fault{{Kind: scenario.Stall, From: span(50), For: span(500)}}
		}, time.Second, []int{0, 60, 540}, []answer{{codes.OK, 600}, {codes.OK, 650}, {codes.OK, 650}}},
		{"the proxy's patience", func(s *scenario.Scenario) {
			s.Faults = []scenario.Fault{{Kind: scenario.Stall, From: span(50), For: span(500)}}
			s.ServerTimeout = span(200)
		}, time.Second, []int{0, 500}, []answer{{codes.Unavailable, 200}, {codes.OK, 650}}},
		// The third waits for a worker until after the fault.
		{"slow while it begins", func(s *scenario.Scenario) {
			s.Workers = 1
			s.Faults = []scenario.Fault{{Kind: scenario.Slowed, From: span(50), For: span(300), Factor: 2, Add: span(100)}}
		}, time.Second, []int{0, 10, 340}, []answer{{codes.OK, 100}, {codes.OK, 400}, {codes.OK, 500}}},
		{"without workers nobody waits", func(*scenario.Scenario) {}, time.Second, []int{0, 0, 0}, []answer{{codes.OK, 100}, {codes.OK, 100}, {codes.OK, 100}}},
		{"two workers", func(s *scenario.Scenario) { s.Workers = 2 }, time.Second,
			[]int{0, 0, 0, 50, 350}, []answer{{codes.OK, 100}, {codes.OK, 100}, {codes.OK, 200}, {codes.OK, 200}, {codes.OK, 450}}},
		{"two workers, and a stall that they share", func(s *scenario.Scenario) {
			s.Workers = 2
			s.Faults = []scenario.Fault{{Kind: scenario.Stall, From: span(50), For: span(500)}}
		}, time.Second, []int{0, 0, 0}, []answer{{codes.OK, 600}, {codes.OK, 600}, {codes.OK, 700}}},
		// The second leaves at its turn's half, the third from the queue.
		{"who leaves makes room", func(s *scenario.Scenario) { s.Workers = 1 }, 150 * time.Millisecond,
			[]int{0, 0, 0, 100}, []answer{{codes.OK, 100}, {codes.DeadlineExceeded, 150}, {codes.DeadlineExceeded, 150}, {codes.OK, 250}}},
		{"or does not", func(s *scenario.Scenario) { s.Workers, s.ServeAbandoned = 1, true }, 250 * time.Millisecond,
			[]int{0, 0, 0, 100}, []answer{{codes.OK, 100}, {codes.OK, 200}, {codes.DeadlineExceeded, 250}, {codes.DeadlineExceeded, 350}}},
		{"nor does the proxy's patience", func(s *scenario.Scenario) { s.Workers, s.ServeAbandoned, s.ServerTimeout = 1, true, span(250) }, time.Second,
			[]int{0, 0, 0, 100, 200}, []answer{{codes.OK, 100}, {codes.OK, 200}, {codes.Unavailable, 250}, {codes.Unavailable, 350}, {codes.Unavailable, 450}}},
		{"an error needs no worker", func(s *scenario.Scenario) {
			s.Workers = 1
			s.Faults = []scenario.Fault{{Kind: scenario.Error, From: span(10), Code: scenario.Code(codes.Unavailable), Probability: 1}}
		}, time.Second, []int{0, 10}, []answer{{codes.OK, 100}, {codes.Unavailable, 10}}},
	} {
		got := ask(t, slow(c.scenario), c.patience, c.moments...)
		for i := range got {
			if got[i] != c.want[i] {
				t.Errorf("%s: call %d: %v after %d ms, want %v after %d", c.what, i, got[i].code, got[i].ms, c.want[i].code, c.want[i].ms)
			}
		}
	}
}

// Calls before the timeline's zero, the warm-up's, find the workers free.
func TestQueueInWarmup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBackend(slow(func(s *scenario.Scenario) { s.Workers, s.ServeAbandoned = 1, true }), 1, 0, virtualSleep)
		begun := time.Now()
		if _, err := b.Get(t.Context(), &kvpb.Request{EpochUnixNs: begun.Add(time.Second).UnixNano()}); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took != 100*time.Millisecond {
			t.Errorf("took %v, want 100ms", took)
		}
	})
}
