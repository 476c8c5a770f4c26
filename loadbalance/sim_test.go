package loadbalance

import (
	"container/heap"
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
)

// A sim is a client and its endpoints in virtual time, around the pure core: no
// gRPC, no goroutine. Fill in the fields of the first block and run it.
type sim struct {
	n       int
	rate    float64 // calls per second, Poisson
	until   time.Duration
	hedge   time.Duration // 0: no hedging
	giveUp  time.Duration // when the caller cancels; 0: never
	workers int           // per endpoint; 0: no queueing
	service func(r *rand.Rand, ep int, now time.Duration) time.Duration
	fails   func(r *rand.Rand, ep int, now time.Duration) bool // after 100 us
	policy  policy

	r     *rand.Rand
	now   time.Duration
	q     events
	seq   int
	busy  []int
	queue [][]*simAttempt

	calls, extra int
	latency      []time.Duration
	first        [][]int         // first attempts, per second and endpoint
	lastFirst    []time.Duration // when each endpoint had its last one
	gap          []time.Duration // the longest time without one
}

// policy is what the sim steers by.
type policy interface {
	choose(now time.Duration, v attempt.View, r *rand.Rand) int
	begin(ep int)
	end(ep int, now, elapsed time.Duration, v verdict)
	name(ep int) string
}

// underTest is the policy under test.
type underTest struct {
	p       p2c
	sweep   time.Duration
	typical float64
}

func newReal(n int) policy {
	p := &underTest{p: p2c{tau: 10 * time.Second}}
	for i := range n {
		p.p.ready = append(p.p.ready, member{endpoint: &endpoint{key: string(rune('a' + i))}, weight: 1})
	}
	return p
}

func (p *underTest) choose(now time.Duration, v attempt.View, r *rand.Rand) int {
	if now >= p.sweep { // as shards.sweep does
		p.sweep = now + sweepEvery
		var ready []seated
		for _, m := range p.p.ready {
			ready = append(ready, seated{remembered: &remembered{endpoint: m.endpoint}})
		}
		p.typical = typicalOf(ready, false)
	}
	return chooseAt(&p.p, now, p.typical, v, false, r)
}
func (p *underTest) begin(ep int) { p.p.ready[ep].begin(false) }
func (p *underTest) end(ep int, now, elapsed time.Duration, v verdict) {
	p.p.ready[ep].release(false)
	p.p.ready[ep].record(now, elapsed, p.p.tau, v)
}
func (p *underTest) name(ep int) string { return p.p.ready[ep].key }

// choose asks a chooser as a rotation does.
func choose(c chooser, now time.Duration, v attempt.View, streaming bool, r *rand.Rand) int {
	return chooseAt(c, now, 0, v, streaming, r)
}

func chooseAt(c chooser, now time.Duration, typical float64, v attempt.View, streaming bool, r *rand.Rand) int {
	q := &request{ctx: context.Background(), now: now, typical: typical, streaming: streaming, bits: r.Uint64(), intn: r.IntN}
	b := bars{view: v}
	i := c.route(q, b)
	if i < 0 && !b.none() {
		b.running = true
		i = c.route(q, b)
	}
	return i
}

// membersOf makes members of endpoints, of the given weights, 1 where there is none.
func membersOf(ready []*endpoint, weights ...float64) []member {
	ms := make([]member, len(ready))
	for i, e := range ready {
		ms[i] = member{endpoint: e, weight: 1}
		if i < len(weights) {
			ms[i].weight = weights[i]
		}
	}
	return ms
}

// peak is what the estimate is compared with: Finagle's peak EWMA, where a
// censored attempt raises a floor, over a fraction of completed attempts that
// never falls below min. With min 1 the fraction plays no part.
type peak struct {
	min float64
	eps []peakEndpoint
}

type peakEndpoint struct {
	cost, fraction float64
	last           time.Duration
	tried          bool
	n              int
}

func newPeak(min float64) func(int) policy {
	return func(n int) policy { return &peak{min, make([]peakEndpoint, n)} }
}

func (p *peak) load(now time.Duration, ep int) float64 {
	e := &p.eps[ep]
	n := float64(e.n + 1)
	switch {
	case !e.tried && e.n == 0:
		return 0
	case !e.tried:
		return pending * n
	case e.n == 0:
		return e.cost / max(e.fraction, p.min) * math.Exp(-(now-e.last).Seconds()/10)
	}
	return e.cost / max(e.fraction, p.min) * n
}

func (p *peak) choose(now time.Duration, v attempt.View, r *rand.Rand) int {
	for {
		i, j := r.IntN(len(p.eps)), r.IntN(len(p.eps)-1)
		if j >= i {
			j++
		}
		if v.Tried(p.name(i)) || v.Tried(p.name(j)) {
			continue
		}
		if p.load(now, j) < p.load(now, i) {
			return j
		}
		return i
	}
}
func (p *peak) begin(ep int)       { p.eps[ep].n++ }
func (p *peak) name(ep int) string { return string(rune('a' + ep)) }
func (p *peak) end(ep int, now, elapsed time.Duration, v verdict) {
	e := &p.eps[ep]
	e.n--
	x := float64(elapsed)
	if !e.tried {
		e.tried, e.cost, e.fraction, e.last = true, x, 1, now
	}
	w := math.Exp(-(now - e.last).Seconds() / 10)
	e.last = now
	if v != answered {
		e.cost = max(e.cost, x)
		e.fraction *= 0.95 * w
		return
	}
	e.fraction = e.fraction*0.95*w + 1 - 0.95*w
	if x > e.cost {
		e.cost = x
	} else {
		e.cost = e.cost*w + x*(1-w)
	}
}

// leastRequest is least request, the choice of those who measure nothing.
type leastRequest struct{ peak }

func newLeast(n int) policy { return &leastRequest{peak{1, make([]peakEndpoint, n)}} }

func (p *leastRequest) end(ep int, _, _ time.Duration, _ verdict) {
	p.eps[ep].n--
	p.eps[ep].tried, p.eps[ep].cost, p.eps[ep].fraction = true, 1, 1
}

type event struct {
	at  time.Duration
	seq int
	do  func()
}
type events []event

func (q events) Len() int { return len(q) }
func (q events) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}
func (q events) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *events) Push(x any)   { *q = append(*q, x.(event)) }
func (q *events) Pop() any {
	x := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return x
}

type simAttempt struct {
	attempt.Attempt
	call         *simCall
	ep           int
	start        time.Duration
	over, queued bool
}

type simCall struct {
	attempt.Call
	start time.Duration
	over  bool
	sent  []*simAttempt
}

func (s *sim) after(d time.Duration, do func()) {
	s.seq++
	heap.Push(&s.q, event{s.now + d, s.seq, do})
}

func (s *sim) run(seed uint64) *sim {
	s.r = rand.New(rand.NewPCG(seed, 2))
	s.busy, s.queue = make([]int, s.n), make([][]*simAttempt, s.n)
	s.lastFirst, s.gap = make([]time.Duration, s.n), make([]time.Duration, s.n)
	s.after(0, s.arrive)
	for len(s.q) > 0 {
		e := heap.Pop(&s.q).(event)
		if e.at > s.until {
			break
		}
		s.now = e.at
		e.do()
	}
	for ep := range s.n {
		s.gap[ep] = max(s.gap[ep], s.until-s.lastFirst[ep])
	}
	slices.Sort(s.latency)
	return s
}

func (s *sim) arrive() {
	c := &simCall{start: s.now}
	s.calls++
	s.launch(c)
	if s.hedge > 0 {
		s.after(s.hedge, func() {
			if !c.over {
				s.extra++
				s.launch(c)
			}
		})
	}
	if s.giveUp > 0 {
		s.after(s.giveUp, func() { s.finish(c) })
	}
	s.after(time.Duration(s.r.ExpFloat64()/s.rate*1e9), s.arrive)
}

func (s *sim) launch(c *simCall) {
	a := &simAttempt{call: c, start: s.now}
	a.Init(&c.Call, len(c.sent)+1, attempt.First)
	v := a.View()
	a.ep = s.policy.choose(s.now, v, s.r)
	if a.ep < 0 {
		return
	}
	a.Claim(v, s.policy.name(a.ep))
	s.policy.begin(a.ep)
	c.sent = append(c.sent, a)
	if len(c.sent) == 1 {
		for len(s.first) <= int(s.now.Seconds()) {
			s.first = append(s.first, make([]int, s.n))
		}
		s.first[int(s.now.Seconds())][a.ep]++
		s.gap[a.ep] = max(s.gap[a.ep], s.now-s.lastFirst[a.ep])
		s.lastFirst[a.ep] = s.now
	}
	if s.workers > 0 && s.busy[a.ep] == s.workers {
		a.queued = true
		s.queue[a.ep] = append(s.queue[a.ep], a)
		return
	}
	s.busy[a.ep]++
	s.serve(a)
}

func (s *sim) serve(a *simAttempt) {
	a.queued = false
	if s.fails != nil && s.fails(s.r, a.ep, s.now) {
		s.after(100*time.Microsecond, func() { s.end(a, failed) })
		return
	}
	s.after(s.service(s.r, a.ep, s.now), func() { s.end(a, answered) })
}

func (s *sim) end(a *simAttempt, v verdict) {
	if a.over {
		return
	}
	a.over = true
	a.End()
	s.policy.end(a.ep, s.now, s.now-a.start, v)
	if !a.queued {
		s.busy[a.ep]--
		for s.workers > 0 && len(s.queue[a.ep]) > 0 {
			next := s.queue[a.ep][0]
			s.queue[a.ep] = s.queue[a.ep][1:]
			if !next.over {
				s.busy[a.ep]++
				s.serve(next)
				break
			}
		}
	}
	if !a.call.over {
		s.latency = append(s.latency, s.now-a.call.start)
	}
	s.finish(a.call)
}

// finish ends a call: what of it is still in flight is cancelled.
func (s *sim) finish(c *simCall) {
	if c.over {
		return
	}
	c.over = true
	for _, a := range c.sent {
		s.end(a, cut)
	}
}

// share returns which part of the first attempts, in percent, endpoint ep got
// between two seconds of the run.
func (s *sim) share(ep, from, to int) float64 {
	var n, all int
	for _, sec := range s.first[min(from, len(s.first)):min(to, len(s.first))] {
		for e, c := range sec {
			all += c
			if e == ep {
				n += c
			}
		}
	}
	return 100 * float64(n) / float64(max(1, all))
}

// spread returns the least and the greatest share that any of the endpoints got
// in any one second.
func (s *sim) spread(eps ...int) (lo, hi float64) {
	lo = 100
	for sec := 1; sec < len(s.first)-1; sec++ {
		for _, ep := range eps {
			x := s.share(ep, sec, sec+1)
			lo, hi = min(lo, x), max(hi, x)
		}
	}
	return lo, hi
}

// longestGap returns the longest time for which any endpoint, beginning with the
// given one, got no first attempt.
func (s *sim) longestGap(from int) time.Duration { return slices.Max(s.gap[from:]) }

// quantile returns a quantile of the latencies in milliseconds.
func (s *sim) quantile(q float64) float64 {
	return s.latency[int(q*float64(len(s.latency)-1))].Seconds() * 1000
}

// heavy is the service time of the tests: lognormal around 2 ms, and 50 ms more
// for 2%.
func heavy(r *rand.Rand) time.Duration {
	d := 2e6 * math.Exp(0.3*r.NormFloat64())
	if r.Float64() < 0.02 {
		d += 50e6
	}
	return time.Duration(d)
}
