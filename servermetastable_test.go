package bobtail_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// The example of "Metastable Failures in Distributed Systems" (HotOS 2021): a server of 300
// calls/s is offered 280, and stands still for 10 s. Callers give up after a second and try
// once more. Work that nobody waits for any more is done all the same, so the plain pair
// is stuck at 560 attempts/s, of which none is answered in time, for good. With the default
// policies at both ends, the client's in place of that retry, it is back within 5 s; and
// within 10 s if callers retry on top of it, as they should not.
func TestMetastable(t *testing.T) {
	const (
		from, to = 10, 20 // the outage
		seconds  = 40
	)
	perSecond, capacity := 280, 300
	if testenv.Race || testing.Short() { // a minute of 280/s takes as long as that
		perSecond, capacity = perSecond/5, capacity/5
	}
	run := func(t *testing.T, tries int, dial []grpc.DialOption, serve []grpc.ServerOption) []float64 {
		begin := time.Now()
		worker := make(chan struct{}, 1) // its senders wait in the order of their arrival
		fleet := grpctest.NewFleet(t, 1, grpctest.Handlers{
			Unary: func(_ context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
				worker <- struct{}{}
				defer func() { <-worker }()
				if at := time.Since(begin); at >= from*time.Second && at < to*time.Second {
					time.Sleep(to*time.Second - at)
				}
				time.Sleep(time.Second / time.Duration(capacity))
				return &kvpb.Response{Id: req.Id}, nil
			},
		}, serve...)
		cc := fleet.Dial(dial...)
		kv := kvpb.NewKVClient(cc)
		cc.Connect()
		time.Sleep(time.Second)
		begin = time.Now()

		call := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := kv.Get(ctx, &kvpb.Request{})
			return err
		}
		var mu sync.Mutex
		good := make([]float64, seconds)
		var calls sync.WaitGroup
		for i := range seconds * perSecond {
			at := time.Duration(i) * time.Second / time.Duration(perSecond)
			time.Sleep(time.Until(begin.Add(at)))
			calls.Go(func() {
				for range tries {
					if call() == nil {
						mu.Lock() // nothing within waits
						good[at/time.Second] += 1 / float64(perSecond)
						mu.Unlock()
						return
					}
				}
			})
		}
		calls.Wait()
		return good
	}
	synctest.Test(t, func(t *testing.T) {
		good := run(t, 2, nil, nil)
		t.Logf("plain: goodput by second %.2f", good)
		for s, g := range good[to+5:] {
			if g > 0.05 {
				t.Errorf("plain: %.2f of the calls of second %d are answered, want none: it never recovers", g, to+5+s)
			}
		}
	})
	for _, tc := range []struct{ tries, within int }{{1, 5}, {2, 8}} {
		synctest.Test(t, func(t *testing.T) {
			client, err := bobtail.NewClient(bobtail.DefaultPolicy(), bobtail.WithLogger(nil))
			if err != nil {
				t.Fatal(err)
			}
			server, err := bobtail.NewServer(bobtail.DefaultServerPolicy(), bobtail.WithLogger(nil))
			if err != nil {
				t.Fatal(err)
			}
			good := run(t, tc.tries, client.DialOptions(), server.ServerOptions())
			t.Logf("both default policies, %d tries: goodput by second %.2f", tc.tries, good)
			for s, g := range good {
				if (s < from-1 || s >= to+tc.within) && g < 0.9 {
					t.Errorf("both default policies, %d tries: %.2f of the calls of second %d are answered, want at least 0.9", tc.tries, g, s)
				}
			}
		})
	}
}
