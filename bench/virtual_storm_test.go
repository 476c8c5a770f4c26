package main

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/bench/fleet"
	"github.com/bobtail-rpc/bobtail/bench/load"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// storm is what many clients did to backends that were out for a while.
type storm struct {
	// attempts per request, over the whole run and of those made in the outage.
	attempts, inOutage float64
	// peak is the highest rate of attempts in any 100 ms, in multiples of the rate
	// of requests.
	peak float64
	// saved requests failed at first in the outage and were answered by a later
	// attempt; lost ones failed; failedAfter ones failed when all was well again.
	saved, lost, failedAfter int
}

func (s storm) String() string {
	return fmt.Sprintf("attempts per request %.3f, in the outage %.3f, peak %.2fx, %d saved, %d lost, %d failed after it",
		s.attempts, s.inOutage, s.peak, s.saved, s.lost, s.failedAfter)
}

// brew runs the storm: clients, each with a connection and a state of its own,
// share the scenario's requests; every backend is out from 10 s to 15 s of 25 s.
func brew(t *testing.T, clients int, rate float64, policy options) (s storm) {
	t.Helper()
	sc := named(t, "outage")
	sc.Rate = rate
	out := sc.FaultSpans(time.Hour)
	if len(out) != 1 || out[0] != (scenario.Span{From: 10 * time.Second, To: 15 * time.Second}) {
		t.Fatalf("outage from %v, want 10s to 15s", out)
	}
	synctest.Test(t, func(t *testing.T) {
		var o observer
		f := virtualFleet(t, sc, seed, fleet.Server{}, &o)
		var callers []*load.Caller
		for range clients {
			opts, err := policy()
			if err != nil {
				t.Fatal(err)
			}
			cc := f.Dial(opts...)
			cc.Connect()
			callers = append(callers, &load.Caller{Client: kvpb.NewKVClient(cc), Fanout: 1, Attempts: new(load.Attempts)})
		}
		time.Sleep(time.Second) // every backend is ready
		start := time.Now()
		for _, c := range callers {
			c.Epoch = start
		}
		n := int(25 * rate)
		all := drive(t, sc, seed, start, n, func(ctx context.Context, id uint64) error {
			return callers[id%uint64(clients)].Send(ctx, id)
		})
		synctest.Wait()
		s = judge(all, o.attempts, start, out[0], rate)
	})
	return s
}

func judge(all []ended, attempts []arrived, start time.Time, out scenario.Span, rate float64) (s storm) {
	const bin = 100 * time.Millisecond
	bins := map[time.Duration]int{}
	var during, requests int
	failed := map[uint64]bool{} // had an attempt that failed
	for _, a := range attempts {
		at := a.at.Sub(start)
		bins[at/bin]++
		if out.Contains(at) {
			during++
		}
		if status.Code(a.err) == codes.Unavailable {
			failed[a.id] = true
		}
	}
	for id, e := range all {
		if out.Contains(e.at) {
			requests++
		}
		switch {
		case e.err == nil && failed[uint64(id)]:
			s.saved++
		case e.err != nil:
			s.lost++
			if e.end >= out.To {
				s.failedAfter++
			}
		}
	}
	for _, n := range bins {
		s.peak = max(s.peak, float64(n)/bin.Seconds()/rate)
	}
	s.attempts = float64(len(attempts)) / float64(len(all))
	s.inOutage = float64(during) / float64(requests)
	return s
}

// careful is the policy of TestVirtualOutage, but for its first backoff. An outage meets all
// clients at once, so their budgets are spent when it begins and again a window later,
// together: only what waits about as long as the budget does is sent when the backends are
// back.
const careful = `{
  "extraLoad": {"max": 0.05, "window": "2s"},
  "methodConfig": [{
    "name": [{"service": "kv.KV", "method": "Get"}],
    "retryPolicy": {
      "maxAttempts": 4, "initialBackoff": %q, "maxBackoff": "2s", "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE"]
    }
  }]
}`

// The acceptance of retry: a total outage of 5 s under 50 clients and 800
// requests/s. grpc-go's own retry makes 3.9 attempts per request of it, 4.5 times
// the load (PEERS); failsafe-go's with a breaker lets 297 requests fail after all
// is well.
func TestVirtualOutage(t *testing.T) {
	if testenv.Race {
		t.Skip("a measurement of many thousand calls: minutes under the race detector, and run without it")
	}
	t.Parallel()
	clients, rate := 50, 800.0
	if testing.Short() {
		clients, rate = 25, 400
	}
	for _, backoff := range []string{"1s", "0.5s", "0.05s"} {
		s := brew(t, clients, rate, parsed(fmt.Appendf(nil, careful, backoff)))
		t.Logf("retry, backoff from %s: %v", backoff, s)
		if s.attempts > 1.10 || s.inOutage > 1.10 {
			t.Errorf("%s: %.3f attempts per request, %.3f in the outage, want at most 1.10", backoff, s.attempts, s.inOutage)
		}
		if s.peak > 2.3 {
			t.Errorf("%s: a peak of %.2f times the load, want at most 2.3", backoff, s.peak)
		}
		// With 50 ms all retries are over before the outage is.
		if s.saved == 0 && backoff != "0.05s" {
			t.Errorf("%s: no request was saved by a retry", backoff)
		}
		if s.failedAfter > 0 {
			t.Errorf("%s: %d requests failed after the outage", backoff, s.failedAfter)
		}
		if testing.Short() {
			break
		}
	}
	if testing.Short() {
		return
	}
	naive := brew(t, clients, rate, serviceConfig(naiveConfig))
	t.Log("retry-naive:", naive)
	if naive.inOutage < 3.7 || naive.peak < 3.5 {
		t.Errorf("grpc's own retry makes %.2f attempts, %.1f times the load, want about 3.9 and 4.5", naive.inOutage, naive.peak)
	}
	none := brew(t, clients, rate, serviceConfig(noneConfig))
	t.Log("none:       ", none)
	if none.attempts != 1 || none.saved != 0 {
		t.Errorf("without a policy: %v, want one attempt each", none)
	}
	// That requests fail after the outage can be seen at all: a breaker makes some.
	broken := brew(t, clients, rate, embedded("breaker"))
	t.Log("breaker:    ", broken)
	if broken.failedAfter == 0 {
		t.Errorf("with a breaker: %v, want requests that fail after the outage", broken)
	}
}
