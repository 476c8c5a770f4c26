package shedding

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// sim is a server in virtual time: so many workers, a FIFO before them that the admission
// cannot see, and an open loop of Poisson arrivals, which do not come more slowly because the
// server is slow.
type sim struct {
	workers   int
	mean      time.Duration // of the service
	constant  bool          // else exponential
	load      float64       // of workers/mean as they are at the start
	deadline  time.Duration // of each request
	warm, run time.Duration // what comes while warm is not counted
	config    AdmissionConfig
	plain     bool // no admission
	// mix are the parts of the load by class, or none: all Critical. extra is the part of
	// each that are extra attempts.
	mix   map[Criticality]float64
	extra float64
	// oneCohort says that all requests are of one.
	oneCohort bool
	seed      uint64
	rate      float64 // requests/s: what load comes to
	// change may change the server, once, at its time.
	changeAt time.Duration
	change   func(*sim)
	// watch sees the admission every 100 ms.
	watch func(at time.Duration, s Stats)
	// gate lets a tap refuse by the verdict.
	gate bool
}

type job struct {
	arrived, began time.Duration // began: the handler
	service        time.Duration
	ends           time.Duration
	class          Criticality
}

type tally struct {
	offered, admitted, good int
	reasons                 [Hopeless + 1]int
	latencies, waits        []time.Duration // of the admitted that ended
}

func (t *tally) refused() float64 { return 1 - float64(t.admitted)/float64(t.offered) }
func (t *tally) success() float64 { return float64(t.good) / float64(t.offered) }

type simResult struct {
	tally
	classes [classes]tally
	goodput float64 // of the best possible
	limit   float64 // mean
	stats   Stats
	early   int // refused by the gate
}

func p99(d []time.Duration) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[len(d)*99/100]
}

// simEpoch is when virtual time begins.
var simEpoch = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func (s sim) simulate(t testing.TB) simResult {
	t.Helper()
	rng := rand.New(rand.NewPCG(s.seed, 1))
	var a *Admission
	if !s.plain {
		var err error
		if a, err = NewAdmission(s.config); err != nil {
			t.Fatal(err)
		}
	}
	s.rate = s.load * float64(s.workers) / s.mean.Seconds()
	draw := func() time.Duration {
		if s.constant {
			return s.mean
		}
		return time.Duration(rng.ExpFloat64() * float64(s.mean))
	}
	var (
		r       simResult
		gate    Gate
		now     time.Duration
		arrival time.Duration
		busy    simHeap // jobs that have a worker, by end
		inside  []*job  // the FIFO of the server
		median  = float64(s.mean)
		limits  float64
		looks   int
		look    time.Duration
	)
	idle := 0 // events since now moved
	at := func() time.Time { return simEpoch.Add(now) }
	counted := func(j *job) bool { return j.arrived >= s.warm }
	serve := func() {
		for len(busy) < s.workers && len(inside) > 0 {
			j := inside[0]
			inside = inside[1:]
			j.ends = now + j.service
			busy.push(j)
		}
	}
	admit := func(j *job) {
		j.began = now
		if counted(j) {
			r.admitted++
			r.classes[j.class.rank()].admitted++
		}
		inside = append(inside, j)
	}
	refuse := func(j *job, why Reason) {
		if counted(j) {
			r.reasons[why]++
			r.classes[j.class.rank()].reasons[why]++
		}
	}
	settle := func() {
		if a == nil {
			return
		}
		for _, e := range a.Settled() {
			if j := e.Owner.(*job); e.Verb == Admitted {
				admit(j)
			} else {
				refuse(j, e.Reason)
			}
		}
		if st := a.Stats(); st.InFlight > max(st.Limit, r.stats.InFlight) {
			t.Fatalf("%v: %d in flight, more than before (%d) and than the limit %d", now, st.InFlight, r.stats.InFlight, st.Limit)
		}
		r.stats = a.Stats()
		gate.Publish(a.Verdict())
	}
	for {
		next, kind := arrival, 'a'
		if len(busy) > 0 && busy[0].ends < next {
			next, kind = busy[0].ends, 'd'
		}
		if a != nil {
			if w := a.NextWake(); !w.IsZero() && w.Sub(simEpoch) < next {
				next, kind = max(now, w.Sub(simEpoch)), 't'
			}
		}
		if look < next {
			next, kind = look, 'l'
		}
		if next >= s.run {
			break
		}
		if idle++; next > now {
			idle = 0
		} else if idle > 10_000 {
			t.Fatalf("%v: time stands still at %c", now, kind)
		}
		now = next
		if s.change != nil && now >= s.changeAt {
			s.change(&s)
			s.change = nil
		}
		switch kind {
		case 'a':
			arrival = now + time.Duration(rng.ExpFloat64()/s.rate*1e9)
			j := &job{arrived: now, service: draw(), class: s.class(rng)}
			if counted(j) {
				r.offered++
				r.classes[j.class.rank()].offered++
			}
			if a == nil {
				admit(j)
				break
			}
			req := Request{
				Criticality: j.class, Extra: rng.Float64() < s.extra, Cohort: rng.Uint32(),
				Deadline: at().Add(s.deadline), Median: time.Duration(median), Owner: j,
			}
			if s.oneCohort {
				req.Cohort = 7
			}
			if s.gate {
				if _, refused := gate.Refuse(LevelOf(req.Criticality, req.Extra, req.Cohort)); refused {
					r.early++
					refuse(j, BelowCursor)
					break
				}
			}
			switch d := a.Arrive(at(), req); d.Verb {
			case Admitted:
				admit(j)
			case Refused:
				refuse(j, d.Reason)
			}
		case 'd':
			j := busy.pop()
			took := now - j.arrived
			if counted(j) {
				r.latencies = append(r.latencies, took)
				r.waits = append(r.waits, took-j.service)
				c := &r.classes[j.class.rank()]
				c.latencies = append(c.latencies, took)
				if took <= s.deadline {
					r.good++
					c.good++
				}
			}
			if a != nil {
				ran := now - j.began
				result := Served
				if took > s.deadline {
					result = Dropped
				}
				if float64(ran) > median { // a median by small steps
					median *= 1.002
				} else {
					median /= 1.002
				}
				a.Done(at(), ran, result)
			}
		case 't':
			if s.gate {
				gate.Report(a)
			}
			a.Tick(at())
		case 'l':
			look += 100 * time.Millisecond
			if a != nil {
				if now >= s.warm {
					limits += float64(a.limiter.limit)
					looks++
				}
				if s.watch != nil {
					s.watch(now, a.Stats())
				}
			}
		}
		settle()
		serve()
	}
	span := (s.run - s.warm).Seconds()
	best := min(s.rate, float64(s.workers)/s.mean.Seconds()) * span
	r.goodput = float64(r.good) / best
	if s.load < 1 {
		r.goodput = r.success()
	}
	r.limit = limits / float64(max(looks, 1))
	return r
}

func (s *sim) class(rng *rand.Rand) Criticality {
	if s.mix == nil {
		return Critical
	}
	u := rng.Float64()
	for c := CriticalPlus; c > Sheddable; c-- {
		if u -= s.mix[c]; u < 0 {
			return c
		}
	}
	return Sheddable
}

// simHeap is a heap of jobs by end.
type simHeap []*job

func (h *simHeap) push(j *job) {
	*h = append(*h, j)
	s := *h
	for i := len(s) - 1; i > 0 && s[i].ends < s[(i-1)/2].ends; i = (i - 1) / 2 {
		s[i], s[(i-1)/2] = s[(i-1)/2], s[i]
	}
}

func (h *simHeap) pop() *job {
	s := *h
	top, last := s[0], len(s)-1
	s[0] = s[last]
	s = s[:last]
	*h = s
	for i := 0; ; {
		c := 2*i + 1
		if c >= len(s) {
			return top
		}
		if c+1 < len(s) && s[c+1].ends < s[c].ends {
			c++
		}
		if s[i].ends <= s[c].ends {
			return top
		}
		s[i], s[c] = s[c], s[i]
		i = c
	}
}

// long skips a test of minutes under the race detector, which finds nothing in a
// simulation: it is one goroutine.
func long(t *testing.T) {
	t.Helper()
	if testenv.Race {
		t.Skip("one goroutine, and long")
	}
}

// overloadSim is the server of the table: 8 workers x 10 ms, deadline 100 ms.
func overloadSim(constant bool, load float64) sim {
	return sim{
		workers: 8, mean: 10 * ms, constant: constant, load: load, deadline: 100 * ms,
		warm: 10 * time.Second, run: 70 * time.Second,
		config: AdmissionConfig{Queue: &QueueConfig{}}, seed: 1,
	}
}
