package experiment

import (
	"context"
	"maps"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/bobtail-rpc/bobtail/bench/load"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// Every policy's calls have the keys that the scenario says.
func TestKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := fixture(t, quick)
		var mu sync.Mutex
		keys := map[string]map[uint64]string{}
		for _, name := range []string{"a", "b"} {
			keys[name] = map[uint64]string{}
			f := grpctest.NewFleet(t, 1, grpctest.Handlers{
				Unary: func(_ context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
					mu.Lock()
					defer mu.Unlock()
					keys[name][req.Id] = req.Key
					return &kvpb.Response{Id: req.Id}, nil
				},
			})
			c.Arms = append(c.Arms, Arm{name, f.Dial(load.CountAttempts())})
		}
		c.Seed = 7
		c.Scenario.Keys = &scenario.Keys{Count: 10, Exponent: 1, Hot: 0.3}
		if _, err := Run(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		want := map[uint64]string{}
		for id := range uint64(300) {
			want[id] = c.Scenario.Key(7, id)
		}
		for name, got := range keys {
			if !maps.Equal(got, want) {
				t.Errorf("%s: keys %v, want %v", name, got, want)
			}
		}
	})
}
