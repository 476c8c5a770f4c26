// Package control holds bobtail's balancers beside outlier_detection_experimental, which
// is linked by grpc's xds alone: hence a module of its own.
package control

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	_ "google.golang.org/grpc/xds" // registers outlier_detection_experimental

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/loadbalance"
)

const ms = time.Millisecond

// Callers cancel at one backend of five and at no other. Under outlier_detection that
// backend goes to 0 picks; ours keep it in rotation.
func TestCancellationsEjectNobodyButByOutlierDetection(t *testing.T) {
	for _, who := range []struct {
		name     string
		slow     time.Duration // what backend 0 takes; the others take 2 ms
		patience time.Duration // after which callers leave; 0: never
		leave    uint64        // how many of 10 callers leave backend 0 after 1 ms
	}{
		{"slower than their patience", 100 * ms, 20 * ms, 0},
		{"for reasons of their own", 2 * ms, 0, 6},
	} {
		if testing.Short() && who.leave > 0 {
			continue
		}
		for _, tc := range []struct {
			name, config string
			least, most  int64 // calls at backend 0, of 2,600
		}{
			{"outlier_detection", `{"outlier_detection_experimental": {"successRateEjection": {}, "failurePercentageEjection": {},
				"childPolicy": [{"round_robin": {}}]}}`, 0, 0},
			// Judged by few calls, as two choices leave it few.
			{"p2c", `{"bobtail_p2c": {"ejection": {"minimumCalls": 1}}}`, 1, 520},
			{"rendezvous", `{"bobtail_rendezvous": {}}`, 260, 1040},
		} {
			t.Run(who.name+"/"+tc.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var leave sync.Map // by the id of a call, its cancellation
					f := grpctest.NewFleet(t, 5, grpctest.Handlers{Unary: func(ctx context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
						took := 2 * ms
						if b.Index == 0 {
							took = who.slow
							if cancel, ok := leave.Load(req.Id); ok && req.Id%10 < who.leave {
								time.AfterFunc(ms, cancel.(context.CancelFunc))
							}
						}
						select {
						case <-time.After(took):
							return &kvpb.Response{Id: req.Id}, nil
						case <-ctx.Done():
							return nil, status.FromContextError(ctx.Err()).Err()
						}
					}})
					client := kvpb.NewKVClient(f.Dial(grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [` + tc.config + `]}`)))
					// Events are told to whoever asks.
					ejections := make(chan loadbalance.Event, 64)
					base := loadbalance.WithEventHandler(t.Context(), func(e loadbalance.Event) { ejections <- e })
					var calls sync.WaitGroup
					var before int64
					for i := range uint64(3800) { // 38 s
						// outlier_detection judges each 10 s, and ejects for 30 s.
						if i == 1200 {
							before = f.Backends[0].Started.Load()
						}
						ctx, cancel := context.WithCancel(loadbalance.WithKey(base, fmt.Sprint("user-", i%50)))
						leave.Store(i, cancel)
						if who.patience > 0 {
							time.AfterFunc(who.patience, cancel)
						}
						calls.Go(func() {
							defer cancel()
							_, err := client.Get(ctx, &kvpb.Request{Id: i}, grpc.WaitForReady(true))
							leave.Delete(i)
							if code := status.Code(err); code != codes.OK && code != codes.Canceled {
								t.Errorf("call %d: %v", i, err)
							}
						})
						time.Sleep(10 * ms)
					}
					picks := f.Backends[0].Started.Load() - before
					calls.Wait()
					t.Logf("%d of 2600 calls at backend 0 after 12 s; %d before", picks, before)
					if picks < tc.least || picks > tc.most {
						t.Errorf("%d of 2600 calls at backend 0, want %d to %d", picks, tc.least, tc.most)
					}
					for len(ejections) > 0 {
						t.Errorf("event %+v, want none", <-ejections)
					}
				})
			})
		}
	}
}
