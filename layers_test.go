package bobtail_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// Two layers that make 3 attempts each, the lower one down, 1,000 calls: the naive
// product is 9 attempts at the bottom for each call. Retries are not retried below, which
// leaves 3 + 1 + 1; and two budgets of 10% leave 1.1 x 1.1.
func TestTwoLayers(t *testing.T) {
	const calls = 1000
	for _, tc := range []struct {
		name, extraLoad string
		min, max        float64
	}{
		{"extraLoad 0.1 at both", `"extraLoad": {"max": 0.1, "window": "2s"},`, 1.05, 1.3},
		{"no extraLoad", ``, 4.9, 5},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				text := fmt.Sprintf(`{%s "methodConfig": [{"name": [{"service": "kv.KV"}], "retryPolicy": {
					"maxAttempts": 3, "initialBackoff": "0.01s", "maxBackoff": "0.1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`, tc.extraLoad)
				bottom := grpctest.NewFleet(t, 3, grpctest.Handlers{
					Unary: func(context.Context, *grpctest.Backend, *kvpb.Request) (*kvpb.Response, error) {
						return nil, status.Error(codes.Unavailable, "down")
					},
				})
				below, _ := client(t, bottom, policy(t, text))
				middle := grpctest.NewFleet(t, 3, grpctest.Handlers{
					Unary: func(ctx context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
						return below.Get(ctx, req)
					},
				})
				user, _ := client(t, middle, policy(t, text))
				done := make(chan error, calls)
				for range calls {
					time.Sleep(10 * ms) // 100 calls/s
					go func() {
						_, err := user.Get(t.Context(), &kvpb.Request{})
						done <- err
					}()
				}
				for range calls {
					if err := <-done; status.Code(err) != codes.Unavailable {
						t.Fatal(err)
					}
				}
				started := func(b *grpctest.Backend) int64 { return b.Started.Load() }
				per := float64(bottom.Total(started)) / calls
				t.Logf("attempts per call: %.3f at the middle, %.3f at the bottom", float64(middle.Total(started))/calls, per)
				if per < tc.min || per > tc.max {
					t.Errorf("%.3f attempts at the bottom per call, want %v to %v", per, tc.min, tc.max)
				}
			})
		})
	}
}
