package loadbalance

import (
	"context"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/loadbalance/loadpb"
)

const (
	// maxProbing is how many probes are on their way at once, at most; and one to each
	// endpoint.
	maxProbing = poolSize
	// leastNap is the least time between two looks at what picks want: a timer is not
	// finer, and at 100,000 picks a second one look serves a hundred of them.
	leastNap = time.Millisecond
	// longNap is the time to the next look when there was nobody to probe.
	longNap = 10 * time.Millisecond
)

// A pacer says how many probes to send. It is a deterministic core. In any span of time t it
// allows at most max t + burst of them, and per pick probesPerPick; picks that come too
// fast are not owed for.
type pacer struct {
	last         time.Duration
	tokens, owed float64
}

// take returns how many probes to send for the picks since the last time.
func (p *pacer) take(now time.Duration, picks uint64, cfg *prequalConfig) int {
	burst := p.burst(cfg)
	p.tokens = min(burst, p.tokens+(now-p.last).Seconds()*float64(cfg.maxProbes))
	p.last = now
	p.owed = min(burst, p.owed+float64(picks)*cfg.probesPerPick)
	n := math.Floor(min(p.owed, p.tokens))
	p.owed -= n
	p.tokens -= n
	return int(n)
}

// burst is what one pick wants, or what is due after the least nap.
func (p *pacer) burst(cfg *prequalConfig) float64 {
	return max(1, math.Ceil(cfg.probesPerPick), float64(cfg.maxProbes)*leastNap.Seconds())
}

// A prober asks endpoints for their load while there are picks. It sleeps otherwise,
// without a timer.
type prober struct {
	replicas replicas

	// picks counts them; last is the chooser of the latest. Atomics, as all picks write them.
	picks atomic.Uint64
	last  atomic.Pointer[prequal]
	// asleep says that the next pick has to wake it.
	asleep atomic.Bool
	wake   chan struct{} // holds one
	// probing is how many probes are on their way.
	probing atomic.Int32

	// What follows belongs to run.
	pacer  pacer
	served uint64   // picks
	of     *prequal // whose members order has
	order  []int32  // indexes of members, those from drawn on in random order
	drawn  int
}

func newProber() *prober { return &prober{wake: make(chan struct{}, 1)} }

// note counts a pick. It never waits.
func (p *prober) note(c *prequal) {
	// In this order: who sees a pick sees a chooser.
	if p.last.Load() != c {
		p.last.Store(c)
	}
	p.picks.Add(1)
	if p.asleep.Load() && p.asleep.CompareAndSwap(true, false) {
		select {
		case p.wake <- struct{}{}:
		default:
		}
	}
}

// run probes until ctx ends.
func (p *prober) run(ctx context.Context, now func() time.Duration) {
	nap := time.NewTimer(time.Hour)
	nap.Stop()
	for p.await(ctx) {
		nap.Reset(p.probe(ctx, now))
		select {
		case <-nap.C:
		case <-ctx.Done():
			nap.Stop()
			return
		}
	}
}

// await returns when there are picks that are not served; false if ctx ends before.
func (p *prober) await(ctx context.Context) bool {
	for p.picks.Load() == p.served && p.pacer.owed < 1 {
		p.asleep.Store(true)
		// A pick may have come before it could see that.
		if p.picks.Load() != p.served {
			p.asleep.Store(false)
			break
		}
		select {
		case <-p.wake:
		case <-ctx.Done():
			return false
		}
	}
	return ctx.Err() == nil
}

// probe sends the probes that are due, and returns how long to wait for the next ones.
func (p *prober) probe(ctx context.Context, now func() time.Duration) time.Duration {
	c := p.last.Load()
	picks := p.picks.Load()
	t := now()
	n := p.pacer.take(t, picks-p.served, c.cfg)
	p.served = picks
	sent := 0
	for range min(n, maxProbing-int(p.probing.Load())) {
		i := p.target(c, t)
		if i < 0 {
			break
		}
		if p.send(ctx, c, i, now) {
			sent++
		}
	}
	if n > 0 && sent == 0 {
		return longNap
	}
	return max(leastNap, time.Second/time.Duration(c.cfg.maxProbes))
}

// target returns a member to probe; -1 if there is none. The members come in random
// order, each once before any comes again: so none is forgotten for long.
func (p *prober) target(c *prequal, now time.Duration) int {
	if p.of != c {
		p.of, p.order, p.drawn = c, p.order[:0], 0
		for i := range c.members {
			p.order = append(p.order, int32(i))
		}
	}
	for range min(len(p.order), poolSize) {
		if p.drawn == len(p.order) {
			p.drawn = 0
		}
		j := p.drawn + rand.IntN(len(p.order)-p.drawn)
		p.order[p.drawn], p.order[j] = p.order[j], p.order[p.drawn]
		i := int(p.order[p.drawn])
		p.drawn++
		if r := c.of[i]; !r.asked.Load() && now >= time.Duration(r.quiet.Load()) {
			return i
		}
	}
	return -1
}

// probing makes clients of the probe service on connections of endpoints.
type probing struct{}

func (probing) Build(conn any) (balancer.Producer, func()) {
	return loadpb.NewLoadReportClient(conn.(grpc.ClientConnInterface)), func() {}
}

// send sends a probe to a member, and reports whether it could.
func (p *prober) send(ctx context.Context, c *prequal, i int, now func() time.Duration) bool {
	res, err := c.members[i].leaf.Pick(balancer.PickInfo{FullMethodName: loadpb.LoadReport_Get_FullMethodName, Ctx: ctx})
	if err != nil {
		return false // not ready any more
	}
	producer, release := res.SubConn.GetOrBuildProducer(probing{})
	of := c.of[i]
	of.asked.Store(true)
	p.probing.Add(1)
	go func() {
		defer p.probing.Add(-1)
		defer of.asked.Store(false)
		defer release()
		if res.Done != nil {
			defer res.Done(balancer.DoneInfo{})
		}
		ctx, cancel := context.WithTimeout(ctx, c.cfg.probeTimeout)
		defer cancel()
		r, err := producer.(loadpb.LoadReportClient).Get(ctx, &loadpb.GetRequest{})
		if err != nil {
			p.replicas.missed(of, now(), status.Code(err) == codes.Unimplemented)
			return
		}
		c.take(of, now(), report{
			rif:     max(0, r.GetRequestsInFlight()),
			latency: time.Duration(max(0, r.GetLatencyNs())),
			invites: r.GetInvites(),
		}, true, rand.Float64())
	}()
	return true
}

// ended takes the end of an attempt, and the load report that may have come with it. u
// is uniform in [0, 1).
func (p *prober) ended(e *endpoint, now time.Duration, v verdict, load any, u float64) {
	of := p.replicas.lookup(e)
	if of == nil {
		return
	}
	switch v {
	case failed:
		p.replicas.failed(of, now)
		return // whatever it says of its load
	case answered:
		of.answered()
	}
	if r, ok := reported(load); ok {
		p.last.Load().take(of, now, r, false, u)
	}
}
