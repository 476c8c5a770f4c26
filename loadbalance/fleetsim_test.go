// One goroutine that computes for minutes under the race detector, which has nothing to
// find here.

//go:build !race

package loadbalance

import (
	"math/rand/v2"
	"slices"
	"time"
)

// simMean is the mean service time of every server that nothing slows down: 1 in the tables.
const simMean = 10 * time.Millisecond

// A fleetSim is many clients of a fleet of servers in virtual time, around the pure cores:
// no gRPC, no goroutine. It is for sizes where shared, of prequal_sim_test.go, is too slow:
// events are values in a typed heap, or in queues where their delay is constant, calls come
// from a free list, and a call costs no allocation. Fill in the fields of the first block,
// and run it once.
type fleetSim struct {
	clients, servers, workers int           // workers per server
	rate                      float64       // calls per second of all clients, Poisson
	from, until               time.Duration // calls that begin in between are counted
	timeout                   time.Duration // 0: none
	// lag is how much later than it happens a client learns of the end of a call, and of what
	// a server has reported.
	lag time.Duration
	// work draws what a call needs, relative to simMean; nil: exponential, of mean 1.
	work func(r *rand.Rand) float64
	// slow is by which factor a server stretches what begins now; nil: 1.
	slow func(server int, now time.Duration) float64
	// stolen says that slow is due to the neighbours on the machine: what they take is not
	// in the server's report of its utilization.
	stolen bool
	// sinkhole says that server 0 fails whatever it gets, after 100 us of work.
	sinkhole bool

	r      *rand.Rand
	now    time.Duration
	steer  []simClient
	req    request // of all picks, so that none allocates
	names  []string
	seats  []simSeat
	jobs   []simJob
	free   int32 // the first of the free list, -1 if there is none
	done   simHeap
	late   line[simDeadline]
	lagged line[simEnd]
	asked  line[simProbe]
	told   line[simProbe]
	gauges []gauge // nil unless a client reads them
	// board is the queue lengths as they were boardAge ago; nil unless a client reads them.
	board    *board
	boardAge time.Duration
	bulletin bool // it is renewed every boardAge instead
	posts    line[post]
	wrr      simWeights

	// Of the calls that are counted.
	calls, open, timeouts, failures, probes int
	latency                                 []time.Duration
	sent                                    []int
	longest                                 int32 // most in flight at one server
	sum                                     float64
}

// A simClient is the balancer of one client.
type simClient interface {
	pick() int
	end(server int, elapsed time.Duration, v verdict, load report)
}

// A simSeat is a server: those that wait for a worker are linked through simJob.next.
type simSeat struct {
	busy, inFlight, first, last int32
	// For weighted round robin, fading sums: calls, those that failed, seconds of processors.
	ended, failed, used float64
}

// A simJob is a call.
type simJob struct {
	start          time.Duration
	met            int64 // RIF on arrival
	client, server int32
	next           int32  // in the server's queue, or in the free list; -1 at its end
	generation     uint32 // how often this job has been another call
	counted, over  bool
	v              verdict
}

// simDeadline is when a call runs into the timeout, unless it has become another.
type simDeadline struct {
	at         time.Duration
	job        int32
	generation uint32
}

// simEnd is what a client has yet to learn.
type simEnd struct {
	at, elapsed    time.Duration
	client, server int32
	v              verdict
	load           report
}

func (x simDeadline) due() time.Duration { return x.at }
func (x simEnd) due() time.Duration      { return x.at }

// simDone is when a worker becomes free.
type simDone struct {
	at  time.Duration
	job int32
}

// A simHeap is a binary heap. Of equals, the order is that of the heap: the same in every run.
type simHeap []simDone

func (h *simHeap) push(x simDone) {
	q := append(*h, x)
	i := len(q) - 1
	for i > 0 {
		up := (i - 1) / 2
		if q[up].at <= x.at {
			break
		}
		q[i] = q[up]
		i = up
	}
	q[i] = x
	*h = q
}

func (h *simHeap) pop() simDone {
	q := *h
	top, x := q[0], q[len(q)-1]
	q = q[:len(q)-1]
	*h = q
	for i := 0; len(q) > 0; {
		down := 2*i + 1
		if down+1 < len(q) && q[down+1].at < q[down].at {
			down++
		}
		if down >= len(q) || x.at <= q[down].at {
			q[i] = x
			break
		}
		q[i] = q[down]
		i = down
	}
	return top
}

// A line is a queue of what happens after a constant delay, and so in the order of its
// beginning. The zero value is ready.
type line[T interface{ due() time.Duration }] struct {
	ring    []T
	head, n int
}

func (l *line[T]) push(x T) {
	if l.n == len(l.ring) {
		ring := make([]T, max(64, 2*l.n))
		for i := range l.n {
			ring[i] = l.ring[(l.head+i)%l.n]
		}
		l.ring, l.head = ring, 0
	}
	l.ring[(l.head+l.n)&(len(l.ring)-1)] = x
	l.n++
}

// before returns at, or when the first is due if that is earlier.
func (l *line[T]) before(at time.Duration) time.Duration {
	if l.n > 0 {
		return min(at, l.ring[l.head].due())
	}
	return at
}

// take returns the first if it is due by now.
func (l *line[T]) take(now time.Duration) (x T, ok bool) {
	if l.n == 0 || l.ring[l.head].due() > now {
		return x, false
	}
	x = l.ring[l.head]
	l.head = (l.head + 1) & (len(l.ring) - 1)
	l.n--
	return x, true
}

// run lets calls come until those that are counted have ended, or half as long again as these
// came: what has not ended by then took at least so long, as a balancer must not look good
// by what it has buried.
func (f *fleetSim) run(seed uint64, policy func(*fleetSim)) *fleetSim {
	f.r = rand.New(rand.NewPCG(seed, 5))
	f.req.intn = f.r.IntN
	f.free = -1
	f.seats = make([]simSeat, f.servers)
	for i := range f.seats {
		f.seats[i].first = -1
	}
	f.sent = make([]int, f.servers)
	f.latency = make([]time.Duration, 0, int(1.05*f.rate*(f.until-f.from).Seconds())+1000)
	policy(f)
	arrival := f.gap()
	last := f.until + (f.until-f.from)/2
	for {
		at := arrival
		if len(f.done) > 0 {
			at = min(at, f.done[0].at)
		}
		at = f.posts.before(f.told.before(f.asked.before(f.lagged.before(f.late.before(at)))))
		if at > last || at > f.until && f.open == 0 {
			break
		}
		f.now = at
		f.step()
		if at == arrival {
			f.arrive()
			arrival += f.gap()
		}
	}
	for i := range f.jobs {
		if j := &f.jobs[i]; j.counted && !j.over {
			f.note(last - j.start)
		}
	}
	slices.Sort(f.latency)
	return f
}

// gap draws the time to the next call.
func (f *fleetSim) gap() time.Duration {
	return max(1, time.Duration(f.r.ExpFloat64()/f.rate*1e9))
}

// step does what is due now, but for the arrival of a call.
func (f *fleetSim) step() {
	for x, ok := f.posts.take(f.now); ok; x, ok = f.posts.take(f.now) {
		f.board.add(x.server, x.delta)
	}
	for len(f.done) > 0 && f.done[0].at <= f.now {
		f.finish(f.done.pop().job)
	}
	for x, ok := f.late.take(f.now); ok; x, ok = f.late.take(f.now) {
		if j := &f.jobs[x.job]; j.generation == x.generation && !j.over {
			if j.counted {
				f.timeouts++
			}
			f.end(j, failed)
		}
	}
	for x, ok := f.lagged.take(f.now); ok; x, ok = f.lagged.take(f.now) {
		f.steer[x.client].end(int(x.server), x.elapsed, x.v, x.load)
	}
	for x, ok := f.asked.take(f.now); ok; x, ok = f.asked.take(f.now) {
		g := &f.gauges[x.server]
		x.load = g.load(f.now)
		x.load.invites = g.invite(f.now)
		x.at += probeWay + f.lag
		f.told.push(x)
	}
	for x, ok := f.told.take(f.now); ok; x, ok = f.told.take(f.now) {
		f.steer[x.client].(*simProber).take(x)
	}
}

func (f *fleetSim) arrive() {
	client := f.r.IntN(f.clients)
	server := f.steer[client].pick()
	if f.free < 0 {
		f.jobs = append(f.jobs, simJob{next: -1})
		f.free = int32(len(f.jobs) - 1)
	}
	id := f.free
	j := &f.jobs[id]
	f.free = j.next
	*j = simJob{start: f.now, client: int32(client), server: int32(server), next: -1, generation: j.generation + 1,
		counted: f.now >= f.from && f.now < f.until}
	seat := &f.seats[server]
	seat.inFlight++
	if j.counted {
		f.calls++
		f.open++
		f.sent[server]++
		f.longest = max(f.longest, seat.inFlight)
	}
	f.post(j.server, 1)
	if f.gauges != nil {
		j.met = f.gauges[server].begin()
	}
	if f.timeout > 0 {
		f.late.push(simDeadline{f.now + f.timeout, id, j.generation})
	}
	switch {
	case int(seat.busy) < f.workers:
		f.serve(id)
	case seat.first < 0:
		seat.first, seat.last = id, id
	default:
		f.jobs[seat.last].next = id
		seat.last = id
	}
}

// serve begins the work at a call.
func (f *fleetSim) serve(id int32) {
	j := &f.jobs[id]
	seat := &f.seats[j.server]
	seat.busy++
	var units float64
	if f.work == nil {
		units = f.r.ExpFloat64()
	} else {
		units = f.work(f.r)
	}
	if f.sinkhole && j.server == 0 {
		j.v = failed
		units = 0.01
	}
	took := units
	if f.slow != nil {
		took *= f.slow(int(j.server), f.now)
	}
	if f.stolen {
		seat.used += units * simMean.Seconds()
	} else {
		seat.used += took * simMean.Seconds()
	}
	f.done.push(simDone{f.now + time.Duration(took*float64(simMean)), id})
}

// finish frees the worker that a call had, for the next that waits: one whose deadline has
// passed is dropped there.
func (f *fleetSim) finish(id int32) {
	j := &f.jobs[id]
	seat := &f.seats[j.server]
	seat.busy--
	seat.ended++
	if j.v == failed {
		seat.failed++
	}
	if f.gauges != nil && !j.over && j.v == answered {
		f.gauges[j.server].record(f.now, f.now-j.start, j.met)
	}
	f.leave(j)
	if !j.over {
		f.end(j, j.v)
	}
	f.release(id)
	for seat.first >= 0 {
		next := seat.first
		j := &f.jobs[next]
		seat.first = j.next
		if !j.over {
			f.serve(next)
			return
		}
		f.leave(j)
		f.release(next)
	}
}

// leave takes a call off its server.
func (f *fleetSim) leave(j *simJob) {
	f.seats[j.server].inFlight--
	f.post(j.server, -1)
	if f.gauges != nil {
		f.gauges[j.server].release()
	}
}

func (f *fleetSim) release(id int32) {
	f.jobs[id].counted = false
	f.jobs[id].next = f.free
	f.free = id
}

// end ends a call for its client, which learns of it after the lag.
func (f *fleetSim) end(j *simJob, v verdict) {
	j.over = true
	elapsed := f.now - j.start
	if j.counted {
		f.open--
		f.note(elapsed)
		if v == failed {
			f.failures++
		}
	}
	var load report
	if f.gauges != nil && v == answered {
		load = f.gauges[j.server].load(f.now)
	}
	if f.lag > 0 {
		f.lagged.push(simEnd{f.now + f.lag, elapsed, j.client, j.server, v, load})
		return
	}
	f.steer[j.client].end(int(j.server), elapsed, v, load)
}

func (f *fleetSim) note(d time.Duration) {
	f.latency = append(f.latency, d)
	f.sum += float64(d)
}

// quantile returns a quantile of the latencies, in service times.
func (f *fleetSim) quantile(q float64) float64 {
	return inUnits(f.latency[int(q*float64(len(f.latency)-1))])
}

// mean returns the mean latency, in service times.
func (f *fleetSim) mean() float64 { return f.sum / float64(len(f.latency)) / float64(simMean) }

func inUnits(d time.Duration) float64 { return float64(d) / float64(simMean) }

// share returns which part of the calls the first servers got, in percent.
func (f *fleetSim) share(servers int) float64 {
	n := 0
	for _, x := range f.sent[:servers] {
		n += x
	}
	return 100 * float64(n) / float64(f.calls)
}

// units is so many mean service times.
func units(n float64) time.Duration { return time.Duration(n * float64(simMean)) }
