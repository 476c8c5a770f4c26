//go:build !race

package loadbalance

import (
	"context"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"
)

// A board is the queue lengths of the servers: it finds one of the shortest, by chance among
// equals, without looking at all of them.
type board struct {
	length, place []int32   // place is the server's in its set
	sets          [][]int32 // sets[l] are the servers of length l
	least         int
}

// A post is a change of a queue that the board has yet to show.
type post struct {
	at            time.Duration
	server, delta int32
}

func (x post) due() time.Duration { return x.at }

func newBoard(n int) *board {
	b := &board{length: make([]int32, n), place: make([]int32, n), sets: make([][]int32, 1)}
	for i := range int32(n) {
		b.place[i] = i
		b.sets[0] = append(b.sets[0], i)
	}
	return b
}

func (b *board) add(server, delta int32) {
	l, at := b.length[server], b.place[server]
	set := b.sets[l]
	moved := set[len(set)-1]
	set[at], b.place[moved] = moved, at
	b.sets[l] = set[:len(set)-1]
	l += delta
	if int(l) == len(b.sets) {
		b.sets = append(b.sets, make([]int32, 0, 8))
	}
	b.length[server], b.place[server] = l, int32(len(b.sets[l]))
	b.sets[l] = append(b.sets[l], server)
	b.least = min(b.least, int(l))
}

func (b *board) shortest(r *rand.Rand) int {
	for len(b.sets[b.least]) == 0 {
		b.least++
	}
	set := b.sets[b.least]
	return int(set[r.IntN(len(set))])
}

// post tells the board of a change.
func (f *fleetSim) post(server, delta int32) {
	switch {
	case f.board == nil:
	case f.boardAge == 0:
		f.board.add(server, delta)
	case f.bulletin:
		f.posts.push(post{(f.now/f.boardAge + 1) * f.boardAge, server, delta})
	default:
		f.posts.push(post{f.now + f.boardAge, server, delta})
	}
}

// each gives every client a balancer of its own.
func (f *fleetSim) each(newClient func() simClient) {
	for range f.clients {
		f.steer = append(f.steer, newClient())
	}
}

// A reference is a client that learns nothing from its calls.
type reference struct {
	*fleetSim
	choose func(f *fleetSim) int
}

func (c reference) pick() int                             { return c.choose(c.fleetSim) }
func (reference) end(int, time.Duration, verdict, report) {}

func steerRandom(f *fleetSim) {
	f.each(func() simClient { return reference{f, func(f *fleetSim) int { return f.r.IntN(f.servers) }} })
}

// steerJSQ joins the shortest queue, as the queues were so long ago.
func steerJSQ(age time.Duration) func(*fleetSim) {
	return func(f *fleetSim) {
		f.board, f.boardAge = newBoard(f.servers), age
		f.each(func() simClient { return reference{f, func(f *fleetSim) int { return f.board.shortest(f.r) }} })
	}
}

// bulletin has the board renewed all at once, as often, instead: half as old on average.
func bulletin(policy func(*fleetSim)) func(*fleetSim) {
	return func(f *fleetSim) {
		policy(f)
		f.bulletin = true
	}
}

// steerTwo joins the shorter of two queues, as the queues were so long ago: the power of two choices
// of the textbook.
func steerTwo(age time.Duration) func(*fleetSim) {
	return func(f *fleetSim) {
		f.board, f.boardAge = newBoard(f.servers), age
		f.each(func() simClient {
			return reference{f, func(f *fleetSim) int { return f.lesser(f.board.length) }}
		})
	}
}

// lesser draws two distinct servers and returns the one with less.
func (f *fleetSim) lesser(of []int32) int {
	i, j := f.r.IntN(f.servers), f.r.IntN(f.servers-1)
	if j >= i {
		j++
	}
	if of[j] < of[i] {
		return j
	}
	return i
}

// A simLeast is least request: of two the one where fewer of the client's own calls are.
type simLeast struct {
	*fleetSim
	own []int32
}

func (c *simLeast) pick() int {
	i := c.lesser(c.own)
	c.own[i]++
	return i
}
func (c *simLeast) end(i int, _ time.Duration, _ verdict, _ report) { c.own[i]-- }

func steerLeast(f *fleetSim) {
	f.each(func() simClient { return &simLeast{f, make([]int32, f.servers)} })
}

// simWeights are those of weighted round robin, gRFC A58, every second anew from what each
// server reports:
//
//	weight = qps / (utilization + errors per second / qps)
//
// where the errors' factor is A58's default, 1. The reports are averages over some ten
// seconds: as ratios of counts are biased, those of the 20 calls of one second favour the idle by
// several percent, which is no merit of the policy. All clients have the same weights, as if
// each server told all of them; and a client draws by them, which is rougher than a round.
type simWeights struct {
	at   time.Duration
	over float64 // seconds that the sums of simSeat stand for
	cum  []float64
}

// weightKeep is which part of the sums each second leaves.
const weightKeep = 0.9

func (f *fleetSim) byWeight() int {
	w := &f.wrr
	if w.cum == nil || f.now-w.at >= time.Second {
		w.over += (f.now - w.at).Seconds()
		w.at = f.now
		w.cum = w.cum[:0]
		sum := 0.0
		for i := range f.seats {
			s := &f.seats[i]
			x := 1 / simMean.Seconds()
			if s.used > 0 && s.ended > 0 {
				x = s.ended / (s.used + s.failed/s.ended*w.over*float64(f.workers))
			}
			s.ended *= weightKeep
			s.failed *= weightKeep
			s.used *= weightKeep
			sum += x
			w.cum = append(w.cum, sum)
		}
		w.over *= weightKeep
	}
	i, _ := slices.BinarySearch(w.cum, f.r.Float64()*w.cum[len(w.cum)-1])
	return min(i, len(w.cum)-1)
}

func steerWRR(f *fleetSim) {
	f.each(func() simClient { return reference{f, (*fleetSim).byWeight} })
}

// A simCore is a client with one of our choosers.
type simCore struct {
	*fleetSim
	members []member
	seated  []seated
	tau     time.Duration
	choose  chooser
	typical float64
	sweep   time.Duration
	keys    []context.Context // one of them for each call; nil: none
}

func (f *fleetSim) core(tau time.Duration) *simCore {
	for len(f.names) < f.servers {
		f.names = append(f.names, strconv.Itoa(len(f.names)))
	}
	c := &simCore{fleetSim: f, tau: tau, members: make([]member, f.servers), seated: make([]seated, f.servers)}
	all := make([]remembered, f.servers)
	endpoints := make([]endpoint, f.servers)
	for i := range c.members {
		endpoints[i].key = f.names[i]
		c.members[i] = member{endpoint: &endpoints[i], weight: 1}
		all[i].endpoint = &endpoints[i]
		c.seated[i].remembered = &all[i]
	}
	return c
}

func (c *simCore) pick() int {
	if c.now >= c.sweep { // as shards.sweep does, but that it ejects nobody
		c.sweep = c.now + sweepEvery
		c.typical = typicalOf(c.seated, false)
	}
	q := &c.req
	q.now, q.typical, q.bits = c.now, c.typical, c.r.Uint64()
	if c.keys != nil {
		q.ctx = c.keys[c.r.IntN(len(c.keys))]
	}
	i := c.choose.route(q, bars{})
	c.members[i].begin(false)
	return i
}

func (c *simCore) end(i int, elapsed time.Duration, v verdict, _ report) {
	c.members[i].release(false)
	c.members[i].record(c.now, elapsed, c.tau, v)
}

func steerP2C(f *fleetSim) {
	f.each(func() simClient {
		c := f.core(defaultDecayTime)
		c.choose = newP2C(c.members, c.tau)
		return c
	})
}

// keysPerServer is how many keys there are, all asked for equally often. With 50, the
// busiest of 1,000 servers is the first for 1.5 times its share of them.
const keysPerServer = 50

func steerRendezvous(f *fleetSim) {
	keys := make([]context.Context, keysPerServer*f.servers)
	for i := range keys {
		keys[i] = WithKey(context.Background(), strconv.Itoa(i))
	}
	f.each(func() simClient {
		c := f.core(defaultDecayTime)
		all := new(crowd)
		for i := range c.members {
			c.members[i].crowd = all
		}
		c.choose = newRendezvous(c.members, &rendezvousConfig{eps: defaultEps}, all)
		c.keys = keys
		return c
	})
}

// probeWay is the time that a probe takes, and its answer: a fortieth of a service time.
const probeWay = simMean / 40

// simProbe is a probe on its way.
type simProbe struct {
	at             time.Duration
	client, server int32
	load           report
}

func (x simProbe) due() time.Duration { return x.at }

// A simProber is a client with Prequal.
type simProber struct {
	*simCore
	*prequal
	id      int32
	pacer   pacer
	targets []int32
	drawn   int
}

func steerPrequal(f *fleetSim) {
	cfg := defaultPrequal()
	f.gauges = make([]gauge, f.servers)
	f.each(func() simClient {
		c := &simProber{simCore: f.core(cfg.decayTime), id: int32(len(f.steer)), targets: make([]int32, f.servers)}
		c.prequal = new(replicas).choose(c.simCore.members, cfg, nil)
		c.simCore.choose = c.prequal
		for i := range c.targets {
			c.targets[i] = int32(i)
		}
		return c
	})
}

func (c *simProber) pick() int {
	i := c.simCore.pick()
	for range c.pacer.take(c.now, 1, c.cfg) {
		// In random order, each once before any again: a step of Fisher-Yates at each.
		if c.drawn == len(c.targets) {
			c.drawn = 0
		}
		k := c.drawn + c.r.IntN(len(c.targets)-c.drawn)
		c.targets[c.drawn], c.targets[k] = c.targets[k], c.targets[c.drawn]
		if c.now >= c.from && c.now < c.until {
			c.probes++
		}
		c.asked.push(simProbe{at: c.now + probeWay, client: c.id, server: c.targets[c.drawn]})
		c.drawn++
	}
	return i
}

// take takes the answer of a probe.
func (c *simProber) take(x simProbe) {
	c.prequal.take(c.of[x.server], c.now, x.load, true, c.r.Float64())
}

func (c *simProber) end(i int, elapsed time.Duration, v verdict, load report) {
	c.simCore.end(i, elapsed, v, load)
	if v == failed {
		c.failed(c.of[i], c.now)
		return
	}
	c.of[i].answered()
	c.prequal.take(c.of[i], c.now, load, false, c.r.Float64())
}

// A contender is a policy and the name that it has in tables.
type contender struct {
	name   string
	policy func(*fleetSim)
	lag    time.Duration
}

var (
	randomly    = contender{name: "random", policy: steerRandom}
	leastOfTwo  = contender{name: "least request of 2, own", policy: steerLeast}
	weighted    = contender{name: "weighted round robin", policy: steerWRR}
	twoQueues   = contender{name: "P2C on queue lengths", policy: steerTwo(0)}
	shortest    = contender{name: "JSQ", policy: steerJSQ(0)}
	realP2C     = contender{name: P2CName, policy: steerP2C}
	realPrequal = contender{name: PrequalName, policy: steerPrequal}
	realKeys    = contender{name: RendezvousName, policy: steerRendezvous}

	// What is 10 service times old: exactly, or as a bulletin that is renewed as often.
	staleTwo    = contender{name: "P2C, 10 late", policy: steerTwo(units(10))}
	staleJSQ    = contender{name: "JSQ, 10 late", policy: steerJSQ(units(10))}
	boardTwo    = contender{name: "P2C, every 10", policy: bulletin(steerTwo(units(10)))}
	boardJSQ    = contender{name: "JSQ, every 10", policy: bulletin(steerJSQ(units(10)))}
	lateP2C     = late(realP2C, 10)
	latePrequal = late(realPrequal, 10)
)

// late returns a contender that learns everything so many service times later.
func late(c contender, n int) contender {
	return contender{c.name + ", " + strconv.Itoa(n) + " late", c.policy, units(float64(n))}
}
