package balancing

import (
	"context"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/wrapperspb"
)

var seed = flag.Uint64("seed", 1, "of the arrivals and the service times of TestBalancers")

const (
	timeout = time.Second
	// warmup is the 10 s for which weighted_round_robin distrusts reports, and the 8 s
	// that it then takes to drain what has piled up at the slow servers, and some more.
	warmup = 22 * time.Second
)

// nobody has answered a call that failed.
const nobody = -1

// A row is what one policy made of the calls.
type row struct {
	p50, p99, p999 time.Duration
	errors, calls  int
	slow           float64 // the part of the calls that went to slow servers
}

// TestBalancers sends the same calls through each balancer: 10 servers of two workers
// each, two of them five times slower, at 70% of what all can do. The whole of gRPC runs
// in virtual time; one client, without hedges or retries. A call that fails counts
// with the time it took, 1 s at most.
//
// bobtail's balancers are held to the peers' rows of the same table; the peers'
// figures are not asserted. They are of one steady state, and say nothing of
// servers that change.
func TestBalancers(t *testing.T) {
	measured, warmup := 60*time.Second, warmup
	if testing.Short() {
		measured, warmup = 5*time.Second, 3*time.Second
	}
	at := arrivals(*seed, warmup+measured)
	rows := make([]*row, len(policies))
	t.Run("policies", func(t *testing.T) {
		for i, p := range policies {
			t.Run(p.name, func(t *testing.T) {
				t.Parallel()
				if testing.Short() && (p.reports || p.name == "round_robin") {
					t.Skip("it takes long to settle, or never does")
				}
				if !p.registered() {
					t.Fatalf("no balancer is registered as %s", p.balancer)
				}
				synctest.Test(t, func(t *testing.T) { rows[i] = run(t, p, at, warmup) })
			})
		}
	})
	byName := map[string]*row{}
	for i, p := range policies {
		byName[p.name] = rows[i]
	}
	t.Log(table(rows))

	ours := byName["bobtail_p2c"]
	for _, name := range []string{"least_request(5)", "weighted_round_robin", "go-zero", "kratos"} {
		peer := byName[name]
		if ours == nil || peer == nil {
			continue // has failed, or -run left it out
		}
		for _, q := range []struct {
			name       string
			ours, peer time.Duration
		}{{"p50", ours.p50, peer.p50}, {"p99", ours.p99, peer.p99}, {"p99.9", ours.p999, peer.p999}} {
			if q.name == "p99.9" && testing.Short() {
				continue // it is the ninth longest call: chance
			}
			if q.ours >= q.peer {
				t.Errorf("%s of bobtail_p2c is %s ms, want below %s's %s", q.name, millis(q.ours), name, millis(q.peer))
			}
		}
	}
	if prequal := byName["bobtail_prequal"]; ours != nil && prequal != nil && float64(prequal.p99) > 1.05*float64(ours.p99) {
		t.Errorf("p99 of bobtail_prequal is %s ms, want at most 1.05 times bobtail_p2c's %s", millis(prequal.p99), millis(ours.p99))
	}
}

// run sends the calls through one policy and measures those after the warm-up.
func run(t *testing.T, p policy, at []time.Duration, warmup time.Duration) *row {
	// A bubble begins in the year 2000. go-zero counts time from a year before the
	// process began, and does not expect to be earlier.
	time.Sleep(time.Until(time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)))
	cc := newFleet(t, p, *seed)
	cc.Connect()
	time.Sleep(time.Second) // until all are connected

	took := make([]time.Duration, len(at))
	by := make([]int, len(at)) // which server answered
	start := time.Now()
	var calls sync.WaitGroup
	for id := range at {
		intended := start.Add(at[id])
		time.Sleep(time.Until(intended))
		calls.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			defer cancel()
			index := new(wrapperspb.UInt64Value)
			err := cc.Invoke(ctx, method, wrapperspb.UInt64(uint64(id)), index)
			took[id], by[id] = time.Since(intended), int(index.Value)
			if err != nil {
				by[id] = nobody
			}
		})
	}
	calls.Wait()

	first, _ := slices.BinarySearch(at, warmup)
	r := &row{calls: len(at) - first}
	for _, i := range by[first:] {
		switch {
		case i == nobody:
			r.errors++
		case i < slowServers:
			r.slow++
		}
	}
	r.slow /= float64(r.calls - r.errors)
	took = took[first:]
	slices.Sort(took)
	r.p50, r.p99, r.p999 = quantile(took, 0.5), quantile(took, 0.99), quantile(took, 0.999)
	return r
}

// arrivals are the moments, from the start, at which calls begin: Poisson.
func arrivals(seed uint64, length time.Duration) []time.Duration {
	// The second word is no call's id, so that arrivals and luck are independent.
	rnd := rand.New(rand.NewPCG(seed, math.MaxUint64))
	var at []time.Duration
	for now := 0.0; ; {
		now += rnd.ExpFloat64() / rate() * float64(time.Second)
		if now >= float64(length) {
			return at
		}
		at = append(at, time.Duration(now))
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// quantile is the least of the sorted durations that a part q of them does not exceed.
func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[int(math.Ceil(q*float64(len(sorted))))-1]
}

func millis(d time.Duration) string { return fmt.Sprintf("%.1f", d.Seconds()*1e3) }

func table(rows []*row) string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d, %.0f calls/s\n%-22s %8s %8s %8s %8s %8s %7s\n", *seed, rate(), "", "p50 ms", "p99 ms", "p99.9 ms", "errors", "calls", "slow")
	for i, r := range rows {
		if r == nil {
			fmt.Fprintf(&b, "%-22s not run\n", policies[i].name)
			continue
		}
		fmt.Fprintf(&b, "%-22s %8s %8s %8s %8d %8d %6.2f%%\n", policies[i].name, millis(r.p50), millis(r.p99), millis(r.p999), r.errors, r.calls, 100*r.slow)
	}
	return b.String()
}
