package loadbalance

import (
	"container/heap"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A shared is many clients of a shared fleet in virtual time, around the pure cores:
// no gRPC, no goroutine. Fill in the fields of the first block and run it.
type shared struct {
	clients, servers, workers int
	rate                      float64 // calls per second of all clients, Poisson
	from, until               time.Duration
	timeout                   time.Duration // 0: none
	service                   func(r *rand.Rand, server int, now time.Duration) time.Duration
	fails                     func(r *rand.Rand, server int) bool // after 100 us
	new                       func(s *shared, client int) steerer

	r       *rand.Rand
	now     time.Duration
	q       moments
	seq     int
	seats   []serverSeat
	steer   []steerer
	latency []time.Duration
	late    int // calls that ran into the timeout
	calls   int
	sent    []int
	failed  int
	probes  int
	open    map[*bool]time.Duration // calls that have not ended, and when they began
}

// A steerer is the balancer of one client.
type steerer interface {
	pick(now time.Duration) int
	end(server int, now, elapsed time.Duration, v verdict, load report)
}

type serverSeat struct {
	gauge   gauge
	busy    int
	queue   []func()
	ended   int           // requests, in this second
	worked  time.Duration // time of workers, likewise
	qps, on float64       // as of the last second
}

type moment struct {
	at  time.Duration
	seq int
	do  func()
}
type moments []moment

func (q moments) Len() int { return len(q) }
func (q moments) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}
func (q moments) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *moments) Push(x any)   { *q = append(*q, x.(moment)) }
func (q *moments) Pop() any {
	x := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return x
}

func (s *shared) after(d time.Duration, do func()) {
	s.seq++
	heap.Push(&s.q, moment{s.now + d, s.seq, do})
}

func (s *shared) run(seed uint64) *shared {
	s.r = rand.New(rand.NewPCG(seed, 3))
	s.seats = make([]serverSeat, s.servers)
	s.sent = make([]int, s.servers)
	s.open = make(map[*bool]time.Duration)
	for i := range s.clients {
		s.steer = append(s.steer, s.new(s, i))
	}
	s.after(0, s.arrive)
	s.after(time.Second, s.tick)
	for len(s.q) > 0 {
		m := heap.Pop(&s.q).(moment)
		if m.at > s.until {
			break
		}
		s.now = m.at
		m.do()
	}
	// Those that have not ended took at least so long: a balancer must not look good by
	// what it has buried.
	for _, start := range s.open {
		s.latency = append(s.latency, s.until-start)
	}
	slices.Sort(s.latency)
	return s
}

// tick is what a server tells of the last second for weighted round robin.
func (s *shared) tick() {
	for i := range s.seats {
		t := &s.seats[i]
		t.qps, t.on = float64(t.ended), t.worked.Seconds()/float64(s.workers)
		t.ended, t.worked = 0, 0
	}
	s.after(time.Second, s.tick)
}

func (s *shared) arrive() {
	s.after(time.Duration(s.r.ExpFloat64()/s.rate*1e9), s.arrive)
	client := s.steer[s.r.IntN(s.clients)]
	server := client.pick(s.now)
	start := s.now
	seat := &s.seats[server]
	counted := s.now >= s.from
	if counted {
		s.calls++
		s.sent[server]++
	}
	over := false
	if counted {
		s.open[&over] = start
	}
	if s.timeout > 0 {
		s.after(s.timeout, func() {
			if !over {
				over = true
				delete(s.open, &over)
				if counted {
					s.late++
					s.latency = append(s.latency, s.timeout)
				}
				client.end(server, s.now, s.timeout, failed, report{})
			}
		})
	}
	met := seat.gauge.begin()
	serve := func() {
		took := s.service(s.r, server, s.now)
		v := answered
		if s.fails != nil && s.fails(s.r, server) {
			took, v = 100*time.Microsecond, failed
		}
		if over { // the deadline has passed: the server drops it
			took = 0
		}
		s.after(took, func() {
			seat.gauge.release()
			if v == answered && !over {
				seat.gauge.record(s.now, s.now-start, met)
			}
			seat.ended++
			seat.worked += took
			seat.busy--
			if len(seat.queue) > 0 {
				next := seat.queue[0]
				seat.queue = seat.queue[1:]
				seat.busy++
				next()
			}
			if over {
				return
			}
			over = true
			delete(s.open, &over)
			if counted {
				s.latency = append(s.latency, s.now-start)
				if v == failed {
					s.failed++
				}
			}
			client.end(server, s.now, s.now-start, v, seat.gauge.load(s.now))
		})
	}
	if seat.busy == s.workers {
		seat.queue = append(seat.queue, serve)
		return
	}
	seat.busy++
	serve()
}

func (s *shared) quantile(q float64) float64 {
	return s.latency[int(q*float64(len(s.latency)-1))].Seconds() * 1000
}

// byChooser is a client with a chooser.
type byChooser struct {
	s       *shared
	members []member
	tau     time.Duration
	choose  chooser
	typical float64
	sweep   time.Duration
}

func simMembers(n int) []member {
	var ms []member
	for i := range n {
		ms = append(ms, member{endpoint: &endpoint{key: strconv.Itoa(i)}, weight: 1})
	}
	return ms
}

func newSimP2C(s *shared, _ int) steerer {
	ms := simMembers(s.servers)
	return &byChooser{s: s, members: ms, tau: defaultDecayTime, choose: newP2C(ms, defaultDecayTime)}
}

func (c *byChooser) pick(now time.Duration) int {
	if now >= c.sweep { // as shards.sweep does
		c.sweep = now + sweepEvery
		var ready []seated
		for _, m := range c.members {
			ready = append(ready, seated{remembered: &remembered{endpoint: m.endpoint}})
		}
		c.typical = typicalOf(ready, false)
	}
	i := c.choose.route(&request{now: now, typical: c.typical, bits: c.s.r.Uint64(), intn: c.s.r.IntN}, bars{})
	c.members[i].begin(false)
	return i
}

func (c *byChooser) end(i int, now, elapsed time.Duration, v verdict, _ report) {
	c.members[i].release(false)
	c.members[i].record(now, elapsed, c.tau, v)
}

type simRandom struct{ s *shared }

func newSimRandom(s *shared, _ int) steerer                              { return simRandom{s} }
func (c simRandom) pick(time.Duration) int                               { return c.s.r.IntN(c.s.servers) }
func (simRandom) end(int, time.Duration, time.Duration, verdict, report) {}

// simWRR weighs by queries per second over utilization, every second anew, as gRFC A58.
type simWRR struct {
	s   *shared
	at  time.Duration
	cum []float64
	sum float64
}

func newSimWRR(s *shared, _ int) steerer { return &simWRR{s: s, at: -1} }
func (c *simWRR) pick(now time.Duration) int {
	if c.at < 0 || now-c.at >= time.Second {
		c.at = now
		c.sum, c.cum = 0, nil
		for i := range c.s.seats {
			w := 1.0
			if t := &c.s.seats[i]; t.on > 0 {
				w = t.qps / t.on
			}
			c.sum += w
			c.cum = append(c.cum, c.sum)
		}
	}
	i, _ := slices.BinarySearch(c.cum, c.s.r.Float64()*c.sum)
	return min(i, len(c.cum)-1)
}
func (*simWRR) end(int, time.Duration, time.Duration, verdict, report) {}

// simPrequal is a client that probes. A probe takes 0.25 ms each way.
type simPrequal struct {
	byChooser
	*prequal
	pacer   pacer
	targets []int
	drawn   int
}

func simByPrequal(cfg *prequalConfig) func(*shared, int) steerer {
	return func(s *shared, _ int) steerer {
		c := &simPrequal{byChooser: byChooser{s: s, members: simMembers(s.servers), tau: cfg.decayTime}}
		c.prequal = new(replicas).choose(c.byChooser.members, cfg, nil)
		c.byChooser.choose = c.prequal
		return c
	}
}

func (c *simPrequal) pick(now time.Duration) int {
	i := c.byChooser.pick(now)
	for range c.pacer.take(now, 1, c.cfg) {
		if c.drawn == len(c.targets) {
			c.targets, c.drawn = c.s.r.Perm(c.s.servers), 0
		}
		t := c.targets[c.drawn]
		c.drawn++
		if now >= c.s.from {
			c.s.probes++
		}
		c.s.after(250*time.Microsecond, func() {
			load := c.s.seats[t].gauge.load(c.s.now)
			load.invites = c.s.seats[t].gauge.invite(c.s.now)
			c.s.after(250*time.Microsecond, func() {
				c.take(c.of[t], c.s.now, load, true, c.s.r.Float64())
			})
		})
	}
	return i
}

func (c *simPrequal) end(i int, now, elapsed time.Duration, v verdict, load report) {
	c.byChooser.end(i, now, elapsed, v, load)
	if v == failed {
		c.failed(c.of[i], now)
		return
	}
	c.of[i].answered()
	c.take(c.of[i], now, load, false, c.s.r.Float64())
}

func tenTwo(clients, fleets int) *shared {
	return &shared{
		clients: clients, servers: 10 * fleets, workers: 2,
		// 8 of 200/s and 2 of 40/s each, 70% of which
		rate: 0.7 * 1680 * float64(fleets), from: 10 * time.Second, until: 10*time.Second + 30*time.Second/time.Duration(fleets),
		service: func(r *rand.Rand, server int, _ time.Duration) time.Duration {
			d := 10e6 * r.ExpFloat64()
			if server%5 == 0 {
				d *= 5
			}
			return time.Duration(d)
		},
	}
}

var steerers = []struct {
	name string
	new  func(*shared, int) steerer
}{
	{"random", newSimRandom},
	{"weighted round robin", newSimWRR},
	{"bobtail_p2c", newSimP2C},
	{"bobtail_prequal", simByPrequal(defaultPrequal())},
}

// compareShared runs a story under every balancer, and returns the runs by their names.
func compareShared(t *testing.T, story func() *shared, seed uint64) map[string]*shared {
	runs := make(map[string]*shared)
	for _, b := range steerers {
		s := story()
		s.new = b.new
		s.run(seed)
		runs[b.name] = s
		t.Logf("%-20s p50 %6.1f p99 %6.1f p99.9 %6.1f ms, late %.2f%%, %.2f probes per call", b.name,
			s.quantile(.5), s.quantile(.99), s.quantile(.999), 100*float64(s.late)/float64(s.calls), float64(s.probes)/float64(s.calls))
	}
	return runs
}

// One client that is all of the load sees everything that it needs, and reports cost it
// next to nothing at the tail; many clients see little of each other, and need them.
func TestSharedFleet(t *testing.T) {
	for _, tc := range []struct {
		name  string
		story func() *shared
		// The most that prequal's p99 may be, as a part of that of others.
		p2c, wrr, random float64
	}{
		{"1 client of 10", func() *shared { return tenTwo(1, 1) }, 1.05, 0.5, 0.1},
		{"100 clients of 10", func() *shared { return tenTwo(100, 1) }, 0.97, 0.65, 0.1},
		{"100 clients of 100", func() *shared { return tenTwo(100, 10) }, 0.95, 0.5, 0.1},
		{"75% of allocation", func() *shared { return antagonists(0.75) }, 0.95, 1, 1},
		// Close to what there is (205% on average), small changes tell: 379 to 511 ms.
		{"174% of allocation", func() *shared { return antagonists(1.74) }, 0.5, 0.4, 0.2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			if testing.Short() && !strings.HasPrefix(tc.name, "1 client") {
				t.Skip("a minute under the race detector")
			}
			runs := compareShared(t, tc.story, 1)
			got := runs["bobtail_prequal"].quantile(.99)
			for name, most := range map[string]float64{"bobtail_p2c": tc.p2c, "weighted round robin": tc.wrr, "random": tc.random} {
				if p99 := runs[name].quantile(.99); got > most*p99 {
					t.Errorf("p99 %.1f ms, want at most %v of the %.1f ms of %s", got, most, p99, name)
				}
			}
		})
	}
}

// antagonists: a fleet of 100 whose machines give a task between its allocation and
// three times as much, as its neighbours leave it.
func antagonists(load float64) *shared {
	const n, mean = 100, 80 * time.Millisecond
	s := &shared{
		clients: 100, servers: n, workers: 4,
		rate: load * n * 4 / mean.Seconds(), from: 3 * time.Second, until: 13 * time.Second, timeout: 5 * time.Second,
	}
	s.service = func(r *rand.Rand, server int, now time.Duration) time.Duration {
		// The same in every run, whoever balances.
		speed := 2.5
		epoch := (now + time.Duration(server)*50*time.Millisecond) / (5 * time.Second)
		if rand.New(rand.NewPCG(uint64(server), uint64(epoch))).Float64() < 0.3 {
			speed = 1
		}
		// The paper's queries: normal, of deviation equal to the mean, cut off at 0.
		d := math.Max(0, 1+r.NormFloat64()) * float64(mean) / 1.08
		return time.Duration(d / speed)
	}
	return s
}
