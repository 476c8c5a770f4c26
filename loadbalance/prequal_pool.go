package loadbalance

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// poolSize is how many probes are kept: the paper's.
	poolSize = 16
	// probeAge is for how long a probe is believed: the paper's.
	probeAge = time.Second
	// recentRIFs is how many reported RIFs the quantile rests on: one pool and three
	// before it, so that it follows within a fraction of a second.
	recentRIFs = 64
)

// A report is the load of a server, as it told it.
type report struct {
	rif     int64
	latency time.Duration // to expect at this RIF; 0 if it is not known yet
	invites bool          // whether the server asks for a request
}

// A probe is a report in the pool. It is immutable but for its atomics.
type probe struct {
	report
	of  *replica
	at  time.Duration // when it came
	own int64         // how many of our own attempts were in flight there then
	// perRIF is the latency, in nanoseconds, over RIF + 1.
	perRIF float64
	// left is how many picks may still use it. An atomic as they do so concurrently.
	left atomic.Int64
	// invites says that no pick has followed the invitation yet. Likewise.
	invites atomic.Bool
}

// fresh returns the RIF to expect now: the reported one, and what this client itself has
// begun there since, less what has ended. The paper adds 1 for each use of a probe;
// this takes it back when the attempt ends, and knows of hedges and picks that used no
// probe, at no write.
func (p *probe) fresh() int64 {
	own := p.of.own()
	return max(own, p.rif+own-p.own)
}

// cost returns the latency to expect now: the reported one in proportion to how the RIF
// has changed since, as p2c has it. Without, picks between two probes of an endpoint all
// see the same latency and go there until it is hot: in TestSharedFleet the p99 of ten
// servers was 100 instead of 81 ms.
func (p *probe) cost(fresh int64) float64 {
	return p.perRIF * float64(fresh+1)
}

// A pool is the probes to choose by: at most poolSize, and one of each endpoint. Picks
// read and empty its slots without a lock. The zero value is ready.
type pool struct {
	// slots are atomics because picks read them while reports replace them.
	slots [poolSize]atomic.Pointer[probe]
	// hot is the quantile of the RIFs that probes reported of late, a float64: an endpoint
	// that has more is hot.
	hot atomic.Uint64
	// earned is how many removals probes have paid for and picks not yet made, in units
	// of 1/removal; turns counts those made.
	earned atomic.Int64
	turns  atomic.Uint64

	mu sync.Mutex // guards what follows, and the writing of probes into slots
	// rifs are the RIFs reported of late, n of them, ascending; order the same as they
	// came, the oldest at next once there are recentRIFs.
	rifs, order [recentRIFs]float64
	n, next     int
	typical     float64 // latency, ns, moving average
}

// removal is the unit of pool.earned: a third of it is whole.
const removal = 3 << 10

// put takes a report that may be used so often, at most: in the place of the endpoint's older
// one, else in a free slot, else in that of the oldest.
func (p *pool) put(of *replica, now time.Duration, r report, uses int64) {
	n := &probe{report: r, of: of, at: now, own: of.own()}
	n.left.Store(uses)
	n.invites.Store(r.invites)
	p.mu.Lock()
	defer p.mu.Unlock()
	// A server that knows no latency yet is taken for one like the others: as the
	// fastest of all it would draw every client at once.
	switch x := float64(r.latency); {
	case x == 0:
		n.latency = time.Duration(p.typical)
	case p.typical == 0:
		p.typical = x
	default:
		p.typical += (x - p.typical) / poolSize
	}
	n.perRIF = float64(n.latency) / float64(n.rif+1)
	at, oldest := 0, time.Duration(math.MaxInt64)
	for i := range p.slots {
		switch s := p.slots[i].Load(); {
		case s == nil:
			if oldest > math.MinInt64 {
				at, oldest = i, math.MinInt64
			}
		case s.of == of:
			if s.at <= now {
				p.slots[i].Store(n)
			}
			return
		case s.at < oldest:
			at, oldest = i, s.at
		}
	}
	p.slots[at].Store(n)
}

// count takes a RIF, relative to the endpoint's weight, that a probe has brought. Those
// that calls bring are not counted: they come from where calls went, so that the
// quantile would be one of the better endpoints.
func (p *pool) count(rif, q float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.n == recentRIFs {
		i, _ := slices.BinarySearch(p.rifs[:], p.order[p.next])
		copy(p.rifs[i:], p.rifs[i+1:])
		p.n--
	}
	i, _ := slices.BinarySearch(p.rifs[:p.n], rif)
	copy(p.rifs[i+1:p.n+1], p.rifs[i:p.n])
	p.rifs[i] = rif
	p.n++
	p.order[p.next] = rif
	p.next = (p.next + 1) % recentRIFs
	rank := max(1, math.Ceil(q*float64(p.n)))
	p.hot.Store(math.Float64bits(p.rifs[int(rank)-1]))
}

// remove empties the slot of a probe.
func (p *pool) remove(s *probe) {
	for i := range p.slots {
		if p.slots[i].Load() == s {
			p.slots[i].CompareAndSwap(s, nil)
			return
		}
	}
}

// drop forgets the probe of an endpoint.
func (p *pool) drop(of *replica) {
	for i := range p.slots {
		if s := p.slots[i].Load(); s != nil && s.of == of {
			p.slots[i].CompareAndSwap(s, nil)
		}
	}
}

// earn adds a part of a removal. As many as there are slots are saved up.
func (p *pool) earn(part float64) {
	if p.earned.Add(int64(part*removal)) > poolSize*removal {
		p.earned.Store(poolSize * removal)
	}
}

// mayRemove takes one removal that has been earned, and reports whether there was one.
func (p *pool) mayRemove() bool {
	n := p.earned.Load()
	return n >= removal && p.earned.CompareAndSwap(n, n-removal)
}
