package grpctest_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// A handler that takes half a minute takes exactly that long, of virtual time.
func TestVirtualTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 3, grpctest.Handlers{
			Unary: func(ctx context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
				time.Sleep(30 * time.Second)
				return &kvpb.Response{Id: req.Id, Backend: b.Name}, nil
			},
		})
		cc := f.Dial(grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`))
		start := time.Now()
		res, err := kvpb.NewKVClient(cc).Get(t.Context(), &kvpb.Request{Id: 7})
		if err != nil {
			t.Fatal(err)
		}
		if res.Id != 7 {
			t.Errorf("id %d, want 7", res.Id)
		}
		if d := time.Since(start); d != 30*time.Second {
			t.Errorf("took %v, want exactly 30s", d)
		}
	})
}

// A stopped backend is out; a started one is in again.
func TestStopStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 1, grpctest.Handlers{})
		c := kvpb.NewKVClient(f.Dial())
		if _, err := c.Get(t.Context(), &kvpb.Request{}); err != nil {
			t.Fatal(err)
		}
		f.Stop(0)
		if _, err := c.Get(t.Context(), &kvpb.Request{}); err == nil {
			t.Fatal("a stopped backend answered")
		}
		f.Start(0)
		if _, err := c.Get(t.Context(), &kvpb.Request{}, grpc.WaitForReady(true)); err != nil {
			t.Fatal(err)
		}
	})
}
