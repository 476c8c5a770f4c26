package loadbalance

import (
	"math"
	"slices"
	"strconv"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func simReplicas(n int) []*replica {
	var rs []*replica
	for i := range n {
		rs = append(rs, &replica{e: &endpoint{key: strconv.Itoa(i)}})
	}
	return rs
}

// held returns the keys in the pool, by slot.
func (p *pool) held() (keys []string) {
	for i := range p.slots {
		if s := p.slots[i].Load(); s != nil {
			keys = append(keys, s.of.e.key)
		}
	}
	return keys
}

// A report takes the place of the endpoint's older one, else a free slot, else that of the
// oldest.
func TestPoolPut(t *testing.T) {
	rs := simReplicas(20)
	var p pool
	for i := range poolSize {
		p.put(rs[i], time.Duration(10+i), report{rif: int64(i), latency: ms}, 1)
	}
	p.put(rs[0], 30, report{rif: 7, latency: ms}, 1)
	if s := p.slots[0].Load(); s.rif != 7 || s.at != 30 {
		t.Errorf("endpoint 0 has the report %+v, want the second one", s.report)
	}
	p.put(rs[0], 29, report{rif: 8}, 1)
	if s := p.slots[0].Load(); s.rif != 7 {
		t.Error("a report that is older has replaced a newer one")
	}
	p.put(rs[16], 31, report{latency: ms}, 1)
	if got := p.slots[1].Load().of; got != rs[16] {
		t.Errorf("the newcomer is not in the place of the oldest: %q", p.held())
	}
	p.drop(rs[5])
	p.put(rs[17], 32, report{latency: ms}, 1)
	if got := p.slots[5].Load().of; got != rs[17] {
		t.Errorf("the newcomer is not in the free slot: %q", p.held())
	}
	if n := len(p.held()); n != poolSize {
		t.Errorf("%d probes, want %d", n, poolSize)
	}
}

// A server that knows no latency counts as one like the others.
func TestPoolTypicalLatency(t *testing.T) {
	rs := simReplicas(3)
	var p pool
	p.put(rs[0], 0, report{latency: 10 * ms}, 1)
	p.put(rs[1], 0, report{latency: 26 * ms}, 1)
	p.put(rs[2], 0, report{}, 1)
	if got := p.slots[2].Load().latency; got != 11*ms {
		t.Errorf("latency %v, want 11ms", got)
	}
}

// What this client begins and ends at an endpoint after a report shows in it.
func TestProbeStaysFresh(t *testing.T) {
	r := simReplicas(1)[0]
	begin, release := func() { r.e.begin(false) }, func() { r.e.release(false) }
	begin()
	begin()
	var p pool
	p.put(r, 0, report{rif: 5, latency: 60 * ms}, 1)
	s := p.slots[0].Load()
	for i, step := range []struct {
		do    func()
		fresh int64
		cost  time.Duration
	}{
		{func() {}, 5, 60 * ms},
		{begin, 6, 70 * ms},
		{func() { r.e.begin(true) }, 7, 80 * ms},
		{release, 6, 70 * ms},
		{func() { release(); release() }, 4, 50 * ms},
	} {
		step.do()
		if got := s.fresh(); got != step.fresh {
			t.Errorf("step %d: RIF %d, want %d", i, got, step.fresh)
		}
		if got := time.Duration(s.cost(s.fresh())); got != step.cost {
			t.Errorf("step %d: latency %v, want %v", i, got, step.cost)
		}
	}
	// A report that knows nothing of what is in flight from here is wrong.
	p.put(r, 0, report{rif: 0, latency: ms}, 1)
	for range 4 {
		begin()
	}
	p.slots[0].Load().own = 6
	if got := p.slots[0].Load().fresh(); got != r.own() {
		t.Errorf("RIF %d, want the %d of our own", got, r.own())
	}
}

// The quantile is that of the last recentRIFs reports.
func TestPoolQuantile(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		q := rapid.SampledFrom([]float64{0, 0.5, 0.75, 0.84, 1}).Draw(t, "q")
		all := rapid.SliceOfN(rapid.Float64Range(0, 5), 1, 200).Draw(t, "rifs")
		var p pool
		for i, rif := range all {
			rif = math.Round(rif) // so that some are equal
			all[i] = rif
			p.count(rif, q)
			recent := slices.Clone(all[max(0, i+1-recentRIFs) : i+1])
			slices.Sort(recent)
			// The least that a part q of them does not exceed.
			want := recent[len(recent)-1]
			for k, x := range recent {
				if float64(k+1) >= q*float64(len(recent)) {
					want = x
					break
				}
			}
			if got := math.Float64frombits(p.hot.Load()); got != want {
				t.Fatalf("after %d reports the quantile %v is %v, want %v", i+1, q, got, want)
			}
		}
	})
}

// Removals are earned by probes, and no more are saved up than the pool has slots.
func TestPoolRemovals(t *testing.T) {
	var p pool
	take := func() (n int) {
		for p.mayRemove() {
			n++
		}
		return n
	}
	for i, step := range []struct {
		probes, want int
	}{{0, 0}, {2, 0}, {2, 1}, {6, 2}, {300, poolSize}} {
		for range step.probes {
			p.earn(0.34)
		}
		if got := take(); got != step.want {
			t.Errorf("step %d: %d removals, want %d", i, got, step.want)
		}
	}
}
