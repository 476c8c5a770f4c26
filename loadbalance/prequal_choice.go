package loadbalance

import (
	"math"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// enoughProbes is how many usable probes a choice needs: the paper's.
	enoughProbes = 2
	// removePerPick is r_remove: the paper's.
	removePerPick = 1
	// reuseSlack is delta of the reuse limit: the paper's.
	reuseSlack = 1

	// holdOff is for how long the reports of an endpoint are not believed after an attempt has
	// failed there. It doubles with each failure in a row up to maxHoldOff. So an
	// endpoint that fails all that it gets at once, and so has few in flight and
	// answers probes promptly, gets one attempt in 10 s; one that fails each
	// twentieth loses a tenth of a second for it.
	holdOff    = 100 * time.Millisecond
	maxHoldOff = 10 * time.Second

	// patientProbes is how many probes an endpoint that has never answered any may leave
	// unanswered before it counts as one that does not report.
	patientProbes = 3
	// quietFor is how long an endpoint without the service is not probed again; and one
	// that leaves its probes unanswered not, in the end. Its quiet begins at leastQuiet, after
	// patientProbes of them, and doubles.
	quietFor   = 30 * time.Second
	leastQuiet = 100 * time.Millisecond
	// exploreEvery is how often an endpoint that reports no more gets a pick of this client
	// all the same: it may serve well though it answers no probe.
	exploreEvery = time.Second

	// What a report may say at most. Servers are not to be believed anything.
	mostRIF     = 1 << 40
	mostLatency = time.Hour
)

// A replica is what Prequal knows of an endpoint beside its probe in the pool. What picks
// read are atomics, as reports and ends of attempts write them.
type replica struct {
	e *endpoint
	// index is the endpoint's place among the members of the newest chooser that has
	// it: a hint, as an older one may still be asked. seen is that chooser's number.
	index atomic.Int32
	seen  uint64 // guarded by replicas.mu
	// pool is where its probe goes. An atomic because a zone may become another.
	pool atomic.Pointer[pool]

	// failures counts the attempts that have failed since one was answered last; no report is
	// believed before until.
	failures atomic.Int32
	until    atomic.Int64

	// heard says that it has answered a probe; missed counts those without an answer since.
	heard  atomic.Bool
	missed atomic.Int32
	// explore is when a pick may go to it though it reports no more.
	explore atomic.Int64
	// asked says that a probe is on its way; until quiet none is to be sent.
	asked atomic.Bool
	quiet atomic.Int64
}

func (r *replica) own() int64 {
	unary, streams := r.e.inFlight()
	return unary + streams
}

// silent reports whether the endpoint does not report.
func (r *replica) silent() bool { return !r.heard.Load() && r.missed.Load() >= patientProbes }

// replicas are what the choosers of one balancer share: what is known of the endpoints,
// and the pools. It is a deterministic core: the time is an argument. The zero value is ready.
type replicas struct {
	// pools are that of the endpoints of the caller's zone, and that of the others. With one
	// for both, either's probes would take the other's slots, and what is hot nearby
	// would be told by what is idle far away.
	pools [2]pool
	// changes counts how often an endpoint has become silent or ceased to be.
	changes atomic.Uint32
	// known maps *endpoint to *replica. A sync.Map, as the end of every attempt looks one up.
	known sync.Map

	mu   sync.Mutex // guards what follows
	size int        // of known
	made uint64     // choosers, so far
}

// A prequal chooses among endpoints by what they report (Wydrowski, Kleinberg, Rumble &
// Archer, "Load is not what you should balance: Introducing Prequal", NSDI 2024,
// https://www.usenix.org/conference/nsdi24/presentation/wydrowski). A prober asks random
// endpoints for their requests in flight (RIF) and their latency, ahead of the calls; of
// the answers in the pool, an endpoint is hot whose RIF is above a quantile of those
// reported of late. A pick goes to the cold one with the lowest latency, or, if all are
// hot, to the one with the lowest RIF.
//
// A probe is used at most
//
//	b_reuse = max(1, (1 + delta) / ((1 - m/n) r_probe - r_remove))
//
// times, where m is the size of the pool and n the number of endpoints; any number of times
// where the divisor is not positive, as then probes come in faster than they can
// be told apart. Each pick removes one probe, the oldest and the worst in turn, so that
// the pool does not fill with what no pick wants. With up to m endpoints each has a
// slot of its own, and nothing is removed.
//
// Beyond the paper: our own attempts since a probe are known, and count (probe.fresh,
// probe.cost). What calls bring back is a probe for nothing. An endpoint's reports are
// not believed for a while after an attempt has failed there, as fast failures look
// idle. RIF and latency count relative to the endpoint's weight. And an endpoint that has
// ended nothing of late invites a pick: while the load is light it might never get a call
// otherwise, and tell of a slow past for ever. It invites one client a
// second, so that all clients of a fleet do not try it at once.
//
// With fewer than two usable probes, and while any member has never answered one, it is p2c:
// those that do not would get nothing otherwise. One that answers no more gets a pick a
// second, or as many as the reports that its calls bring earn it. And so it is while four fifths of what is in
// flight at the servers in the pool is this client's own: then it knows at first hand, to
// the call, what the reports tell it late and from a sample.
//
// It is immutable but for its census, and safe for concurrent use. A pick takes no lock.
type prequal struct {
	*replicas
	members  []member
	of       []*replica // of[i] belongs to members[i]
	pool     *pool      // theirs
	fallback chooser
	cfg      *prequalConfig
	q        float64 // the quantile of RIF
	uses     float64 // b_reuse
	prober   *prober // nil in simulations
	// census is how many members are silent, in its low half, as of the number of changes
	// in its high half, plus 1. An atomic as picks renew it.
	census atomic.Uint64
}

// choose makes the chooser for some members.
func (s *replicas) choose(members []member, cfg *prequalConfig, p *prober) *prequal {
	c := &prequal{
		replicas: s,
		members:  members,
		of:       make([]*replica, len(members)),
		pool:     &s.pools[0],
		fallback: newP2C(members, cfg.decayTime),
		cfg:      cfg,
		q:        quantile(cfg.qRIF, len(members)),
		uses:     reuse(cfg.probesPerPick, len(members)),
		prober:   p,
	}
	if len(members) > 0 && members[0].far { // then all are
		c.pool = &s.pools[1]
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.made++
	for i := range members {
		e := members[i].endpoint
		r := s.lookup(e)
		if r == nil {
			r = &replica{e: e}
			s.known.Store(e, r)
			s.size++
		}
		r.index.Store(int32(i))
		r.pool.Store(c.pool)
		r.seen = s.made
		c.of[i] = r
	}
	if s.size > 2*len(members)+1024 {
		s.forget()
	}
	return c
}

// forget drops those that none of the last 64 choosers has had. s.mu is held.
func (s *replicas) forget() {
	s.known.Range(func(e, v any) bool {
		if v.(*replica).seen+64 < s.made {
			s.known.Delete(e)
			s.size--
		}
		return true
	})
}

func (s *replicas) lookup(e *endpoint) *replica {
	if v, ok := s.known.Load(e); ok {
		return v.(*replica)
	}
	return nil
}

// removePer is r_remove for a rate of probes: with less than the paper's three probes for a
// pick, removals are as much rarer.
func removePer(probesPerPick float64) float64 {
	return removePerPick * min(1, probesPerPick/defaultProbesPerPick)
}

// quantile returns Q_RIF for n endpoints: so low that a single one among few can be hot. Of
// five, one that is overloaded makes a fifth of the reports, and would be the 0.9 quantile itself.
func quantile(q float64, n int) float64 { return max(0, min(q, 1-1.25/float64(n))) }

// reuse returns b_reuse; +Inf if there is no limit.
func reuse(probesPerPick float64, n int) float64 {
	d := (1-float64(poolSize)/float64(n))*probesPerPick - removePer(probesPerPick)
	if d <= 0 {
		return math.Inf(1)
	}
	return max(1, (1+reuseSlack)/d)
}

// route implements chooser.
func (c *prequal) route(r *request, b bars) int {
	if c.prober != nil && !r.noted {
		r.noted = true
		c.prober.note(c)
	}
	if c.silent() > 0 {
		return c.fallback.route(r, b)
	}
	if i := c.explore(r, b); i >= 0 {
		return i
	}
	var best, worst candidate
	var oldest, host *probe
	at, guest, usable, open := 0, 0, 0, b.none()
	var own, all int64 // in flight at those in the pool
	// With up to poolSize members each has its slot, and a removal would only lose it.
	removes := len(c.members) > poolSize && c.pool.mayRemove()
	hot := math.Float64frombits(c.pool.hot.Load())
	for k := range c.pool.slots {
		slot := &c.pool.slots[k]
		s := slot.Load()
		if s == nil {
			continue
		}
		if r.now-s.at > probeAge {
			slot.CompareAndSwap(s, nil)
			continue
		}
		i := int(s.of.index.Load())
		if i >= len(c.members) || c.members[i].endpoint != s.of.e {
			continue // not ready, ejected, or in another zone
		}
		m := &c.members[i]
		x := candidate{probe: s, member: i}
		fresh := s.fresh()
		own += s.of.own()
		all += fresh
		if float64(fresh) > hot*m.weight {
			x.hot, x.score = true, float64(fresh)/m.weight
		} else {
			x.score = s.cost(fresh) / m.weight
		}
		if removes {
			if oldest == nil || s.at < oldest.at {
				oldest = s
			}
			if worst.probe == nil || worst.better(&x) {
				worst = x
			}
		}
		if r.now < time.Duration(s.of.until.Load()) || !open && b.at(m.key) {
			continue
		}
		usable++
		if !r.streaming && s.invites.Load() && fresh == 0 {
			guest, host = i, s
		}
		switch {
		case best.probe == nil || x.better(&best):
			best, at = x, k
		case !best.better(&x) && mix(r.bits+uint64(k)) > mix(r.bits+uint64(at)):
			best, at = x, k // of equals each has the same chance
		}
	}
	if removes && oldest != nil {
		if c.pool.turns.Add(1)%2 == 0 {
			oldest = worst.probe
		}
		c.pool.remove(oldest)
	}
	if usable < enoughProbes {
		return c.fallback.route(r, b)
	}
	if host != nil && host.invites.CompareAndSwap(true, false) {
		return guest
	}
	if all > 0 && 5*own >= 4*all {
		return c.fallback.route(r, b)
	}
	if best.left.Load() != unlimited && best.left.Add(-1) <= 0 {
		c.pool.remove(best.probe)
	}
	return best.member
}

// A candidate is a probe as a pick sees it.
type candidate struct {
	*probe
	member int
	hot    bool
	score  float64 // RIF if hot, else latency
}

// better reports whether x is to be chosen before y.
func (x *candidate) better(y *candidate) bool {
	if x.hot != y.hot {
		return y.hot
	}
	return x.score < y.score
}

// explore returns the member that this pick is to try because it answers no probes any more;
// -1 as a rule. Each pick looks at one.
func (c *prequal) explore(r *request, b bars) int {
	if len(c.of) == 0 || r.streaming {
		return -1
	}
	i := int(r.bits >> 16 % uint64(len(c.of)))
	of := c.of[i]
	if of.missed.Load() < patientProbes || r.now < time.Duration(of.until.Load()) || !b.none() && b.at(of.e.key) {
		return -1
	}
	at := of.explore.Load()
	if r.now < time.Duration(at) || !of.explore.CompareAndSwap(at, int64(r.now+exploreEvery)) {
		return -1
	}
	return i
}

// silent returns how many members do not report. It counts them anew when one has
// changed.
func (c *prequal) silent() int {
	now := uint64(c.changes.Load()) << 32
	if seen := c.census.Load(); seen&^math.MaxUint32 == now && seen&math.MaxUint32 > 0 {
		return int(seen&math.MaxUint32) - 1
	}
	n := 0
	for _, r := range c.of {
		if r.silent() {
			n++
		}
	}
	c.census.Store(now | uint64(n+1))
	return n
}

// unlimited is probe.left where there is no limit.
const unlimited = math.MaxInt64

// take takes a report; probed says that a probe has brought it, not a call. u is uniform in
// [0, 1), and rounds the reuse limit.
func (c *prequal) take(of *replica, now time.Duration, r report, probed bool, u float64) {
	r.rif = min(max(r.rif, 0), mostRIF)
	r.latency = min(max(r.latency, 0), mostLatency)
	if probed {
		// A call's report does not show that probes are answered.
		of.missed.Store(0)
		if !of.heard.Load() {
			of.heard.Store(true)
			c.changes.Add(1)
		}
	}
	if i := int(of.index.Load()); probed && i < len(c.members) && c.members[i].endpoint == of.e {
		c.pool.earn(removePer(c.cfg.probesPerPick) / c.cfg.probesPerPick)
		c.pool.count(float64(r.rif)/c.members[i].weight, c.q)
	}
	if now < time.Duration(of.until.Load()) {
		return
	}
	uses := int64(unlimited)
	if !math.IsInf(c.uses, 1) {
		uses = int64(c.uses + u)
	}
	of.pool.Load().put(of, now, r, uses) // c may be the chooser of the other zone
}

// missed notes that a probe has brought nothing, because there is no such service if
// unknown.
func (s *replicas) missed(of *replica, now time.Duration, unknown bool) {
	was := of.silent()
	if unknown {
		// A server that has been replaced by an older one no longer reports.
		of.heard.Store(false)
		of.missed.Store(patientProbes)
		of.quiet.Store(int64(now + quietFor))
		s.drop(of)
	} else if n := of.missed.Load() + 1; n < 30 {
		of.missed.Store(n)
		if n >= patientProbes {
			of.quiet.Store(int64(now + min(quietFor, leastQuiet<<(n-patientProbes))))
		}
	}
	if of.silent() != was {
		s.changes.Add(1)
	}
}

// failed notes that an attempt has failed.
func (s *replicas) failed(of *replica, now time.Duration) {
	n := min(of.failures.Load(), 7) + 1
	of.failures.Store(n)
	of.until.Store(int64(now + min(maxHoldOff, holdOff<<(n-1))))
	s.drop(of)
}

// drop forgets the probe of an endpoint.
func (s *replicas) drop(of *replica) {
	for i := range s.pools {
		s.pools[i].drop(of)
	}
}

// answered notes that an attempt was not in vain.
func (of *replica) answered() {
	if of.failures.Load() != 0 {
		of.failures.Store(0)
	}
}
