package loadbalance

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// Callers who cancel, at one backend of five and at no other, eject it nowhere: neither
// those who find it slower than their patience nor those who have reasons of their own.
// What outlier_detection makes of the same calls is told by the module in folder control.
func TestCancellationsEjectNobody(t *testing.T) {
	for _, name := range balancers() {
		for _, tc := range []struct {
			name     string
			slow     time.Duration // what backend 0 takes; the others take 2 ms
			patience time.Duration // after which callers leave; 0: never
			leave    uint64        // how many of 10 callers leave backend 0 after 1 ms
			// least is how many of the 1,500 calls in each 30 s go to backend 0 at least.
			least map[string]int64
		}{
			// By two choices a slow one gets a probe in each 2 decay times. A key stays.
			{"slower than their patience", 100 * ms, 20 * ms, 0, map[string]int64{P2CName: 1, RendezvousName: 200, PrequalName: 1}},
			// By exposure per answer it takes (0.4 x 2 + 0.6 x 1) / 0.4 = 3.5 ms instead of 2: one
			// that is idle gets a call when that has decayed to 2, after 0.56 decay times.
			{"for reasons of their own", 2 * ms, 0, 6, map[string]int64{P2CName: 4, RendezvousName: 200, PrequalName: 1}},
		} {
			t.Run(name+"/"+tc.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var leave sync.Map // by the id of a call, its cancellation
					c := newCluster(t, 5, func(ctx context.Context, i int, req *kvpb.Request) (*kvpb.Response, error) {
						took := 2 * ms
						if i == 0 {
							took = tc.slow
							if cancel, ok := leave.Load(req.Id); ok && req.Id%10 < tc.leave {
								time.AfterFunc(ms, cancel.(context.CancelFunc))
							}
						}
						select {
						case <-time.After(took):
							return &kvpb.Response{Id: req.Id}, nil
						case <-ctx.Done():
							return nil, status.FromContextError(ctx.Err()).Err()
						}
					})
					// Judged by few calls, as two choices leave it few.
					client := c.dial(name, `{"ejection": {"minimumCalls": 1}}`, indexes(5))
					// Without a call, whose answer would say how slow backend 0 is.
					c.cc.Connect()
					time.Sleep(time.Second)
					events := make(chan Event, maxEvents)
					base := WithEventHandler(t.Context(), func(e Event) { events <- e })
					var id uint64
					for window := range 2 {
						picks, cancelled := -c.servers[0].calls.Load(), 0
						codeOf := make(chan codes.Code, 1500)
						for range 1500 {
							id++
							ctx, cancel := context.WithCancel(WithKey(base, fmt.Sprint("user-", id%50)))
							leave.Store(id, cancel)
							if tc.patience > 0 {
								time.AfterFunc(tc.patience, cancel)
							}
							req := &kvpb.Request{Id: id}
							go func() {
								defer cancel()
								_, err := client.Get(ctx, req)
								leave.Delete(req.Id)
								codeOf <- status.Code(err)
							}()
							time.Sleep(20 * ms)
						}
						for range 1500 {
							switch code := <-codeOf; code {
							case codes.Canceled:
								cancelled++
							case codes.OK:
							default:
								t.Errorf("a call ended with %v", code)
							}
						}
						picks += c.servers[0].calls.Load()
						t.Logf("window %d: %d of 1500 calls at backend 0, %d cancelled", window, picks, cancelled)
						if picks < tc.least[name] {
							t.Errorf("window %d: %d of 1500 calls at backend 0, want at least %d", window, picks, tc.least[name])
						}
						if tc.least[name] > 0 && cancelled == 0 {
							t.Errorf("window %d: nobody cancelled", window)
						}
					}
					for len(events) > 0 {
						t.Errorf("%+v, want no event", <-events)
					}
					for key, r := range c.spy.inner.Load().records() {
						if r.out || r.times > 0 || r.flights != 0 {
							t.Errorf("%s: %+v, want it never ejected, and nothing in flight", key, r)
						}
						if strings.HasSuffix(key, "0") && r.failures > 0 {
							t.Errorf("%s: %v failures, want none", key, r.failures)
						}
					}
				})
			})
		}
	}
}
