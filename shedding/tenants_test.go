package shedding

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

func TestTenantQuota(t *testing.T) {
	n := newTenants(TenantsConfig{MetadataKey: "t", PerSecond: 10, Burst: 2, Max: 2})
	for i, step := range []struct {
		at   time.Duration
		id   string
		ok   bool
		wait time.Duration
	}{
		{0, "a", true, 0}, {0, "a", true, 0}, {0, "a", false, 100 * ms},
		{40 * ms, "a", false, 60 * ms},
		{40 * ms, "b", true, 0}, // another's bucket
		{100 * ms, "a", true, 0},
		// There are two already: c and d share a bucket.
		{100 * ms, "c", true, 0}, {100 * ms, "d", true, 0}, {100 * ms, "c", false, 100 * ms}, {100 * ms, "e", false, 100 * ms},
		{tenantIdle, "a", true, 0},
		// b has been idle for long, and is forgotten: there is room for c.
		{tenantIdle + 40*ms, "c", true, 0}, {tenantIdle + 40*ms, "c", true, 0}, {tenantIdle + 40*ms, "c", false, 100 * ms},
		{tenantIdle + 40*ms, "d", true, 0}, {tenantIdle + 40*ms, "d", true, 0}, {tenantIdle + 40*ms, "d", false, 100 * ms},
	} {
		if _, ok, _, wait := n.take(simEpoch.Add(step.at), step.id, 0); ok != step.ok || wait != step.wait {
			t.Errorf("step %d %+v: %v, %v", i, step, ok, wait)
		}
	}
	if n.len() != 2 {
		t.Errorf("%d tenants, want 2", n.len())
	}
}

// A bucket that is not full yet is not forgotten, however long ago its last call was, or
// one who has used up a day's quota would get it anew.
func TestTenantNotForgottenInDebt(t *testing.T) {
	n := newTenants(TenantsConfig{MetadataKey: "t", PerSecond: 0.01, Burst: 1})
	n.take(simEpoch, "a", 0)
	at := simEpoch.Add(2 * tenantIdle)
	n.take(at, "b", 0)
	if _, ok, _, _ := n.take(at, "a", 0); ok || n.len() != 2 {
		t.Errorf("a has a new bucket after 20 s of 100, %d tenants", n.len())
	}
}

// A call that is given back can be made again, and no more than the burst is ever there.
func TestTenantGiveBack(t *testing.T) {
	n := newTenants(TenantsConfig{MetadataKey: "t", PerSecond: 10, Burst: 2})
	e, _, _, _ := n.take(simEpoch, "a", 0)
	n.take(simEpoch, "a", 0)
	e.giveBack(simEpoch)
	if _, ok, _, _ := n.take(simEpoch, "a", 0); !ok {
		t.Error("the token has not come back")
	}
	at := simEpoch.Add(time.Second) // full again
	e.giveBack(at)
	e.giveBack(at)
	at = at.Add(time.Nanosecond)
	for i := range 3 {
		if _, ok, _, _ := n.take(at, "a", 0); ok != (i < 2) {
			t.Errorf("call %d: %v", i, ok)
		}
	}
}

// A million names take no more memory than Max of them, whatever their length.
func TestTenantsMemory(t *testing.T) {
	const most = 1000
	n := newTenants(TenantsConfig{MetadataKey: "t", PerSecond: 100, Max: most})
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	long := strings.Repeat("x", 8000)
	count := 1_000_000
	if testing.Short() {
		count = 100_000
	}
	var before uint64
	for i := range count {
		id := fmt.Sprint(i)
		if i%100 == 0 {
			id = tenantID([]string{long + id})
		}
		n.take(simEpoch.Add(time.Duration(i)*ms), id, 800)
		if n.len() > most || n.used.Len() != n.len() {
			t.Fatalf("%d tenants, %d in the list", n.len(), n.used.Len())
		}
		if i == count/10 {
			before = heap()
		}
	}
	if after := heap(); after > before+100_000 {
		t.Errorf("%d bytes after %d names, %d after a tenth of them", after, count, before)
	}
	if _, ok, _, _ := n.take(simEpoch.Add(time.Duration(count)*ms+tenantIdle), "x", 800); !ok || n.len() >= most {
		t.Errorf("%d tenants: idle ones are not forgotten", n.len())
	}
	runtime.KeepAlive(n)
}

// The shares are max-min: sum of min(demand, share) is what is shared, and nobody who asks
// for less than the share is ever over it.
func TestTenantShares(t *testing.T) {
	for _, demands := range [][]float64{
		{500, 500, 500, 500},    // share 170
		{100, 100, 2000},        // 480
		{10, 20, 30, 300, 3000}, // 310
		{50, 50},                // all of it: nobody is over
	} {
		n := newTenants(TenantsConfig{MetadataKey: "t"})
		within, over := make([]float64, len(demands)), make([]float64, len(demands))
		const span = 60 // s
		next := make([]time.Duration, len(demands))
		for {
			i := 0
			for j := range next {
				if next[j] < next[i] {
					i = j
				}
			}
			now := next[i]
			if now >= span*time.Second {
				break
			}
			next[i] += time.Duration(1e9 / demands[i])
			_, ok, o, _ := n.take(simEpoch.Add(now), fmt.Sprint(i), 800)
			if !ok {
				t.Fatal("a quota where there is none")
			}
			if now < span/2*time.Second {
				continue
			}
			if o {
				over[i] += 2. / span
			} else {
				within[i] += 2. / span
			}
		}
		sum := 0.0
		for i, d := range demands {
			sum += within[i]
			if d < 0.95*n.share && over[i] > 0 {
				t.Errorf("%v: tenant %d, over its share of %v by %v", demands, i, n.share, over[i])
			}
			if d > 1.05*n.share && (within[i] < 0.9*n.share || within[i] > 1.1*n.share) {
				t.Errorf("%v: tenant %d has %v of its share of %v", demands, i, within[i], n.share)
			}
		}
		total := 0.0
		for _, d := range demands {
			total += d
		}
		if want := min(total, fairLoad*800); sum < 0.97*want || sum > 1.03*want {
			t.Errorf("%v: %v within the shares, want %v", demands, sum, want)
		}
	}
}

// Each tenant has its quota, those that name none one among them, and a call that the
// server then refuses for overload costs nothing of it.
func TestServerTenants(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := staticServer(1, 1)
		cfg.Tenants = &TenantsConfig{MetadataKey: "X-Tenant", PerSecond: 1, Burst: 2}
		client, _ := dial(t, newServer(t, cfg))
		get := func(tenants []string, id uint64) (metadata.MD, error) {
			var trailer metadata.MD
			ctx := t.Context()
			for _, name := range tenants {
				ctx = metadata.AppendToOutgoingContext(ctx, "x-tenant", name)
			}
			_, err := client.Get(ctx, &kvpb.Request{Id: id}, grpc.Trailer(&trailer))
			return trailer, err
		}
		for i, tc := range []struct {
			tenants []string
			code    codes.Code
		}{
			{[]string{"a"}, codes.OK}, {[]string{"a"}, codes.OK}, {[]string{"a"}, codes.ResourceExhausted},
			{[]string{"b"}, codes.OK},
			{nil, codes.OK}, {[]string{"a", "b"}, codes.OK}, {nil, codes.ResourceExhausted},
		} {
			if trailer, err := get(tc.tenants, 0); status.Code(err) != tc.code {
				t.Errorf("call %d of %v: %v, want %v", i, tc.tenants, err, tc.code)
			} else if err != nil {
				checkServerRefusal(t, err, trailer, codes.ResourceExhausted, "TENANT_QUOTA")
			}
		}
		// Two of other tenants take the slot and the queue; c is refused, on arrival.
		ctx, cancel := context.WithCancel(t.Context())
		for i := range 2 {
			go client.Get(metadata.AppendToOutgoingContext(ctx, "x-tenant", fmt.Sprint("other", i)), &kvpb.Request{Id: 1000}) //nolint:errcheck
			synctest.Wait()
		}
		for range 5 {
			if _, err := get([]string{"c"}, 0); status.Code(err) != codes.Unavailable {
				t.Errorf("%v, want it refused for overload, its quota being unused", err)
			}
		}
		cancel()
		synctest.Wait()
		// And by time: c waits and is refused, and both its tokens are still there.
		ctx, cancel = context.WithCancel(t.Context())
		go client.Get(ctx, &kvpb.Request{Id: 1000}) //nolint:errcheck
		time.Sleep(2 * time.Second)
		go client.Get(metadata.AppendToOutgoingContext(ctx, "x-tenant", "other"), &kvpb.Request{Id: 1000}) //nolint:errcheck
		synctest.Wait()
		for range 4 {
			if _, err := get([]string{"d"}, 0); status.Code(err) != codes.Unavailable {
				t.Errorf("%v, want it to wait too long, its quota being unused", err)
			}
		}
		cancel()
		synctest.Wait()
	})
}

// One tenant in debt, who is not forgotten, keeps no idle one in memory; nor do many.
func TestTenantInDebtKeepsNobody(t *testing.T) {
	for _, debtors := range []int{1, 30} {
		n := newTenants(TenantsConfig{MetadataKey: "t", PerSecond: 1, Burst: 10_000, Max: 100})
		for i := range debtors {
			for range 10_000 {
				n.take(simEpoch, fmt.Sprint("heavy", i), 0)
			}
		}
		for i := range 100 - debtors {
			n.take(simEpoch, fmt.Sprint(i), 0)
		}
		at, strangers := simEpoch.Add(time.Hour), 0
		for i := range 30 {
			e, ok, _, _ := n.take(at, fmt.Sprint("new", i), 0)
			if !ok || n.used.Len() != n.len() {
				t.Fatalf("%v, %d in the list of %d", ok, n.used.Len(), n.len())
			}
			if e == n.rest {
				strangers++
			}
		}
		// Two are looked at on each call.
		if most := debtors / 2; strangers > most {
			t.Errorf("%d in debt: %d of 30 new tenants share the bucket of the rest, want %d at most", debtors, strangers, most)
		}
		for i := range debtors {
			if _, _, _, _ = n.take(at, fmt.Sprint("heavy", i), 0); n.byID[fmt.Sprint("heavy", i)].bucket.TokensAt(at) > 3600 {
				t.Errorf("one in debt was forgotten")
			}
		}
	}
}

// What the quota refuses takes nothing of the share: whoever is held to half of its share is
// never over it.
func TestTenantQuotaLeavesShare(t *testing.T) {
	n := newTenants(TenantsConfig{MetadataKey: "t", PerSecond: 100, Burst: 10})
	now, let := simEpoch, 0
	for range 10_000 {
		n.share = 200
		if _, ok, over, _ := n.take(now, "a", 0); ok {
			if let++; over {
				t.Fatalf("over the share after %v, at 100 calls/s of 200", now.Sub(simEpoch))
			}
		}
		now = now.Add(ms)
	}
	if let < 1000 || let > 1011 {
		t.Errorf("%d let through in 10 s, want 1010", let)
	}
}

// However little there is of anything, the share stays within bounds from which it comes back.
func TestTenantShareBounds(t *testing.T) {
	const capacity = 800
	n := newTenants(TenantsConfig{MetadataKey: "t", Max: 1_000_000})
	now := simEpoch
	for range 600 { // a minute of one tenant at 10/s
		n.take(now, "a", capacity)
		now = now.Add(100 * ms)
	}
	if want := fairLoad * capacity; n.share != want {
		t.Errorf("share %v where there is little to share, want all: %v", n.share, want)
	}
	for i := range 60_000 { // a minute of 1000 new tenants/s, all within their shares
		n.take(now, fmt.Sprint(i), 1)
		now = now.Add(ms)
	}
	if least := fairLoad * 1 / maxTenants; n.share < least*(1-1e-9) || n.share > 1e-3 {
		t.Errorf("share %v where there are too many, want %v at least", n.share, least)
	}
}

// The time until there is a token again can be told, however rare they are; rates of which it
// could not are faults.
func TestTenantRareTokens(t *testing.T) {
	for _, rate := range []float64{1e-12, 4e-7, 0.00099, -1, math.NaN(), math.Inf(1), 2e9} {
		err := TenantsConfig{MetadataKey: "t", PerSecond: rate}.Validate()
		if err == nil || !strings.Contains(err.Error(), fmt.Sprint("perSecond ", rate, ", want [0.001, 1000000000]")) {
			t.Errorf("%v: %v", rate, err)
		}
	}
	for _, rate := range []float64{0, 0.001, 1e9} {
		if err := (TenantsConfig{MetadataKey: "t", PerSecond: rate}).Validate(); err != nil {
			t.Errorf("%v: %v", rate, err)
		}
	}
	for _, rate := range []float64{0.001, 1e-12} { // the second is none that NewServer would take
		n := newTenants(TenantsConfig{MetadataKey: "t", PerSecond: rate})
		n.take(simEpoch, "a", 0)
		if _, ok, _, wait := n.take(simEpoch, "a", 0); ok || wait != 1000*time.Second {
			t.Errorf("%v/s: %v, %v, want 1000 s", rate, ok, wait)
		}
	}
}
