package load

import (
	"context"
	"slices"
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
	"github.com/bobtail-rpc/bobtail/shedding"
)

// Attempts are those that were sent, whoever decided so: here grpc's own retry.
func TestAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		failures := 2
		f := grpctest.NewFleet(t, 2, grpctest.Handlers{
			Unary: func(_ context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
				mu.Lock()
				defer mu.Unlock()
				if failures--; failures >= 0 {
					return nil, status.Error(codes.Unavailable, "not now")
				}
				return &kvpb.Response{Id: req.Id}, nil
			},
		})
		cc := f.Dial(CountAttempts(), grpc.WithDefaultServiceConfig(`{"methodConfig":[{"name":[{}],"retryPolicy":{
			"maxAttempts":4,"initialBackoff":"0.01s","maxBackoff":"0.01s","backoffMultiplier":1,"retryableStatusCodes":["UNAVAILABLE"]}}]}`))
		var a Attempts
		c := &Caller{Client: kvpb.NewKVClient(cc), Fanout: 1, Attempts: &a}
		if err := c.Send(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		if a.Sent() != 3 || a.OK() != 1 {
			t.Errorf("%d attempts, %d calls OK, want 3 and 1", a.Sent(), a.OK())
		}
		// A call that found no backend was not sent.
		f.Stop(0)
		f.Stop(1)
		synctest.Wait()
		if err := c.Send(t.Context(), 2); err == nil {
			t.Error("answered by nobody")
		}
		if a.Sent() != 3 {
			t.Errorf("%d attempts, want still 3", a.Sent())
		}
	})
}

// A request's class travels with each of its leaf calls.
func TestClass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		seen := map[uint64][]string{}
		f := grpctest.NewFleet(t, 1, grpctest.Handlers{
			Unary: func(ctx context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
				mu.Lock()
				defer mu.Unlock()
				seen[req.Id] = metadata.ValueFromIncomingContext(ctx, shedding.CriticalityKey)
				return &kvpb.Response{Id: req.Id}, nil
			},
		})
		c := &Caller{Client: kvpb.NewKVClient(f.Dial()), Fanout: 2, Attempts: new(Attempts), Class: func(id uint64) string {
			return map[uint64]string{3: "sheddable"}[id]
		}}
		for id := range uint64(5) {
			if err := c.Send(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		for id := range uint64(10) {
			var want []string
			if id/2 == 3 {
				want = []string{"sheddable"}
			}
			if got, ok := seen[id]; !ok || !slices.Equal(got, want) {
				t.Errorf("leaf call %d: class %q, want %q", id, got, want)
			}
		}
	})
}

// A request with a fan-out makes its leaf calls at once, each with an id of its
// own, and takes as long as the slowest.
func TestFanout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		seen := map[uint64]bool{}
		epoch := time.Now()
		f := grpctest.NewFleet(t, 2, grpctest.Handlers{
			Unary: func(ctx context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
				mu.Lock()
				seen[req.Id] = true
				mu.Unlock()
				if req.EpochUnixNs != epoch.UnixNano() {
					t.Errorf("epoch %d, want %d", req.EpochUnixNs, epoch.UnixNano())
				}
				if req.Id == 305 {
					return nil, status.Error(codes.NotFound, "no")
				}
				return &kvpb.Response{Id: req.Id}, sleep(ctx, time.Duration(req.Id%100)*time.Millisecond)
			},
		})
		var a Attempts
		c := &Caller{Client: kvpb.NewKVClient(f.Dial(CountAttempts())), Fanout: 10, Epoch: epoch, Attempts: &a}
		if err := c.Send(t.Context(), 0); err != nil {
			t.Fatal(err) // dials
		}
		start := time.Now()
		if err := c.Send(t.Context(), 7); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 79*time.Millisecond {
			t.Errorf("took %v, want 79ms: leaf 79 is the slowest", took)
		}
		for id := range uint64(10) {
			if !seen[70+id] {
				t.Errorf("no leaf call %d", 70+id)
			}
		}
		if a.Sent() != 20 || a.OK() != 20 {
			t.Errorf("%d attempts, %d OK, want 20", a.Sent(), a.OK())
		}
		// One leaf fails: the request fails with that error, and waits for no other leaf.
		start = time.Now()
		if err := c.Send(t.Context(), 30); status.Code(err) != codes.NotFound {
			t.Errorf("%v, want the leaf's NotFound", err)
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("took %v, want 0: a leaf failed at once", took)
		}
		synctest.Wait()
	})
}

// An answer to another call is no answer.
func TestWrongAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 1, grpctest.Handlers{
			Unary: func(context.Context, *grpctest.Backend, *kvpb.Request) (*kvpb.Response, error) {
				return &kvpb.Response{Id: 8}, nil
			},
		})
		var a Attempts
		c := &Caller{Client: kvpb.NewKVClient(f.Dial()), Fanout: 1, Attempts: &a}
		if err := c.Send(t.Context(), 7); err == nil || a.OK() != 0 {
			t.Errorf("error %v, %d OK, want an error and 0", err, a.OK())
		}
	})
}

// The key of a leaf call is in its request, and in its context, where the balancer finds it.
func TestKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		at := map[string]map[int]int{} // calls of a key at a backend
		f := grpctest.NewFleet(t, 8, grpctest.Handlers{
			Unary: func(_ context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
				mu.Lock()
				defer mu.Unlock()
				if at[req.Key] == nil {
					at[req.Key] = map[int]int{}
				}
				at[req.Key][b.Index]++
				return &kvpb.Response{Id: req.Id}, nil
			},
		})
		cc := f.Dial(grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"bobtail_rendezvous":{}}]}`))
		cc.Connect()
		time.Sleep(time.Second) // every backend is ready
		var a Attempts
		c := &Caller{Client: kvpb.NewKVClient(cc), Fanout: 10, Attempts: &a,
			Key: func(id uint64) string { return string(rune('a' + id%5)) }}
		for id := range uint64(20) {
			if err := c.Send(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		if len(at) != 5 {
			t.Errorf("calls %v, want those of 5 keys", at)
		}
		home := 0
		for _, backends := range at {
			most := 0
			for _, n := range backends {
				most = max(most, n)
			}
			home += most
		}
		// Of ten calls at once two have each key: not all have room at its backend.
		if home < 120 {
			t.Errorf("calls %v: %d of 200 at their key's backend, want most", at, home)
		}
	})
}
