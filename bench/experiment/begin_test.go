package experiment

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

type beginKey struct{}

// begun is a request as it was told.
type begun struct {
	Request
	arm   int
	ended int
	err   error
	took  time.Duration // since Intended
}

// watched runs a comparison of two policies of 100 requests/s each, in turns of 1 s, whose
// handler takes as long as slow says, and returns what was told of the requests of each.
func watched(t *testing.T, ctx context.Context, slow func(id uint64) time.Duration, change func(*Config)) [2]map[uint64]*begun {
	f := grpctest.NewFleet(t, 1, grpctest.Handlers{
		Unary: func(ctx context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
			select {
			case <-time.After(slow(req.Id)):
				return &kvpb.Response{Id: req.Id}, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		},
	})
	var mu sync.Mutex
	got := [2]map[uint64]*begun{{}, {}}
	c := Config{
		Scenario: &scenario.Scenario{Name: "test", Rate: 100, Arrivals: "uniform", Requests: 200, Fanout: 1, Timeout: scenario.Duration(10 * time.Second)},
		Seed:     1, Block: time.Second, Warmup: time.Second,
		// It sends each request 3 ms late.
		Sleep: func(ctx context.Context, d time.Duration) error { return sleep(ctx, d+3*time.Millisecond) },
		Arms:  []Arm{{"a", f.Dial()}, {"b", f.Dial()}},
		Begin: func(ctx context.Context, arm int, r Request) (context.Context, func(error)) {
			mu.Lock()
			defer mu.Unlock()
			b := &begun{Request: r, arm: arm}
			if got[arm][r.ID] != nil {
				t.Errorf("request %d of policy %d is told twice", r.ID, arm)
			}
			got[arm][r.ID] = b
			return context.WithValue(ctx, beginKey{}, b), func(err error) {
				mu.Lock()
				defer mu.Unlock()
				b.ended++
				b.err, b.took = err, time.Since(r.Intended)
			}
		},
	}
	if change != nil {
		change(&c)
	}
	if _, err := Run(ctx, c); err != nil {
		t.Fatal(err)
	}
	return got
}

// Each request is told once and ends once, at its intended start on the clock and on the
// timeline, which are the same for all policies; the warm-up is marked.
func TestBegin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		got := watched(t, t.Context(), func(uint64) time.Duration { return 7 * time.Millisecond }, nil)
		for arm, requests := range got {
			if len(requests) != 299 { // at 10 ms, 20 ms, ..., so the warm-up has 99
				t.Errorf("policy %d: %d requests, want 299", arm, len(requests))
			}
			for id, b := range requests {
				if b.ended != 1 || b.err != nil || b.took != 10*time.Millisecond {
					t.Errorf("policy %d, request %d ended %d times after %v: %v", arm, id, b.ended, b.took, b.err)
				}
				if b.Warmup != (id < 99) || b.At != got[0][id].At {
					t.Errorf("policy %d, request %d: warm-up %v, at %v, want at %v", arm, id, b.Warmup, b.At, got[0][id].At)
				}
				// In turns the blocks alternate, a b, b a, a b, 1 s each; the timeline is that of one policy.
				round := int(b.At / time.Second)
				turn := (arm + round) % 2
				if want := start.Add(time.Duration(round)*time.Second + time.Duration(turn)*time.Second + b.At); !b.Intended.Equal(want) {
					t.Fatalf("policy %d, request %d at %v: intended at %v, want %v", arm, id, b.At, b.Intended.Sub(start), want.Sub(start))
				}
			}
		}
	})
}

// Of what an interrupt cuts off it is told that the report does not have it.
func TestBeginAbandoned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(500*time.Millisecond, cancel)
		got := watched(t, ctx, func(id uint64) time.Duration {
			if id >= 10 {
				return 9 * time.Second
			}
			return time.Millisecond
		}, func(c *Config) { c.Warmup = 0 })
		if n := len(got[0]); n < 40 || n > 60 {
			t.Errorf("%d requests, want about 50", n)
		}
		for id, b := range got[0] {
			if b.ended != 1 || errors.Is(b.err, ErrAbandoned) != (id >= 10) || id < 10 && b.err != nil {
				t.Errorf("request %d ended %d times: %v", id, b.ended, b.err)
			}
		}
	})
}
