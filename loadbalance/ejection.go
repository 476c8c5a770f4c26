package loadbalance

import (
	"cmp"
	"context"
	"math"
	"slices"
	"time"

	"google.golang.org/grpc/grpclog"
)

const (
	// sweepEvery is how often the endpoints are judged, while attempts end.
	sweepEvery = time.Second
	// strikesOut is in how many sweeps in a row an endpoint must be too slow. With one,
	// seven stragglers of 2% among an endpoint's last 50 attempts would eject it, which
	// happens to one of five endpoints about once in an hour at 1,000 calls/s.
	strikesOut = 2
	// goodProbes, in a row, end an ejection.
	goodProbes = 3
	// longest is how many times the base time an ejection lasts at most, however often it
	// has happened; and how long an endpoint that gets no probes stays out.
	longest = 10
	// maxEvents is how many events wait for a call that takes them.
	maxEvents = 64
	// mostDeclined is how many ends of attempts that do not take it an event waits for.
	mostDeclined = 1000
)

var logger = grpclog.Component("bobtail")

// ejection is when an endpoint leaves the rotation and how it comes back.
//
// It is judged beside its peers: one that is as bad as all of them stays. By latency
// these are the endpoints of its zone. Latency
// (Dean & Barroso, "The Tail at Scale", CACM 56(2), 2013, "latency-induced
// probation", https://cacm.acm.org/research/the-tail-at-scale/) is too high if it
// exceeds
//
//	latencyFactor x median, median + 5 x 1.4826 x MAD, and latencyFloor
//
// in two sweeps in a row, in each by attempts that ended since the last. The median and the
// median absolute deviation are those of the endpoints in rotation that have had
// minimumCalls: unlike mean and standard deviation, they do not move with the outlier
// itself (1.4826 MAD is the standard deviation of a normal distribution). Failures are too many if their share reaches failureRatio and
// exceeds three times the median of the peers. Attempts that the caller gave up count as
// neither.
//
// Two endpoints tell nothing by latency, as each is the other's deviation.
type ejection struct {
	// latencyFactor, (1, 1000]. Default 3.
	latencyFactor float64
	// latencyFloor, [0s, 1h], is a latency that nobody is ejected for. Default 5ms.
	latencyFloor time.Duration
	// failureRatio, (0, 1], is a share of attempts. Default 0.2.
	failureRatio float64
	// minimumCalls, [1, 49], is how many attempts an endpoint is judged by at least.
	// Default 20.
	minimumCalls int64
	// baseTime, [1ms, 1h], is the least time for which an endpoint is out when it is so
	// for the first time; the second time twice, up to ten times. Default 10s.
	baseTime time.Duration
	// maxEjectionPercent, [0, 100], is how many of the endpoints may be out at once,
	// rounded down. 0: none ever is. Default 34: one of three, three of ten.
	maxEjectionPercent float64
	// panicThreshold, [0, 100]: while fewer of all endpoints than this percentage are both
	// ready and in rotation, the ejected ones take part again. Default 50.
	panicThreshold float64
	// probeEvery, [2, 1e9]: at most one of so many calls goes to an ejected endpoint, to
	// see whether it has recovered; and at most one in a fifth of baseTime, which doubles
	// with each that fails, up to baseTime. Default 100.
	probeEvery int64
}

// sample is what an endpoint is judged by.
type sample struct {
	calls    float64
	latency  float64 // in nanoseconds
	failures float64 // as a share of calls
	far      bool    // not of the caller's zone
}

// Reason says why an [Event] happened.
type Reason string

const (
	// ReasonLatency: the endpoint took much longer than its peers.
	ReasonLatency Reason = "latency"
	// ReasonFailures: it failed much more often than its peers.
	ReasonFailures Reason = "failures"
	// ReasonProbes: an ejected endpoint answered three probes well in a row.
	ReasonProbes Reason = "probes"
	// ReasonTime: it was out for long, and had no probe that was bad.
	ReasonTime Reason = "time"
	// ReasonReconnected: it was away, and is back.
	ReasonReconnected Reason = "reconnected"
	// ReasonLimit: more were out than may be, as the fleet has become smaller.
	ReasonLimit Reason = "limit"
	// ReasonDisabled: the configuration ejects nobody any more.
	ReasonDisabled Reason = "disabled"
)

// EventKind is what happened.
type EventKind string

const (
	// Ejected: the endpoint left the rotation and receives probes only.
	Ejected EventKind = "ejected"
	// Readmitted: it is back, with a slow start.
	Readmitted EventKind = "readmitted"
	// PanicBegan: so few endpoints are left that the ejected ones take part.
	PanicBegan EventKind = "panic began"
	// PanicEnded: they do not any more.
	PanicEnded EventKind = "panic ended"
)

// Event is a change of who is in the rotation.
type Event struct {
	Kind EventKind
	// Target is that of the connection, as in grpc.ClientConn.Target.
	Target string
	// Endpoint is its addresses, sorted and joined with commas. Empty for a panic.
	Endpoint string
	Reason   Reason

	// Latency and FailureRatio are what an ejected endpoint was judged by, PeerLatency and
	// PeerFailureRatio the medians of the others.
	Latency, PeerLatency           time.Duration
	FailureRatio, PeerFailureRatio float64
	// Out is how long a readmitted endpoint was out.
	Out time.Duration
	// Ready and Ejected are how many endpoints are, for a panic.
	Ready, Ejected int
}

// median returns the median of sorted numbers, of which there is one at least.
func median(sorted []float64) float64 {
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// peers returns the median of the others, for each of some numbers, and the deviation
// that is normal among all.
func peers(xs []float64) (medianOf func(i int) float64, deviation float64) {
	if len(xs) == 0 {
		return nil, 0
	}
	sorted := slices.Clone(xs)
	slices.Sort(sorted)
	m := median(sorted)
	off := make([]float64, len(xs))
	for i, x := range xs {
		off[i] = math.Abs(x - m)
	}
	slices.Sort(off)
	others := make([]float64, 0, len(xs))
	return func(i int) float64 {
		if len(xs) < 2 {
			return xs[i]
		}
		k, _ := slices.BinarySearch(sorted, xs[i])
		others = append(append(others[:0], sorted[:k]...), sorted[k+1:]...)
		return median(others)
	}, 1.4826 * median(off)
}

// judge returns an event for each endpoint that is too bad, the zero Event for the others.
func (c *ejection) judge(all []sample) []Event {
	out := make([]Event, len(all))
	var who []int
	var failures []float64
	// By zone: to be farther away is no fault.
	var latencies [2][]float64
	for z, far := range [...]bool{false, true} {
		for i, s := range all {
			if s.far == far && s.calls >= float64(c.minimumCalls) {
				who = append(who, i)
				failures = append(failures, s.failures)
				latencies[z] = append(latencies[z], s.latency)
			}
		}
	}
	if len(who) < 2 {
		return out // there are no peers
	}
	usual, _ := peers(failures)
	var typicals [2]func(int) float64
	var deviations [2]float64
	for z := range latencies {
		typicals[z], deviations[z] = peers(latencies[z])
	}
	for k, i := range who {
		s := all[i]
		z, at := 0, k
		if s.far {
			z, at = 1, k-len(latencies[0])
		}
		typical := typicals[z](at)
		e := Event{Latency: time.Duration(s.latency), FailureRatio: s.failures}
		switch {
		case s.failures >= c.failureRatio && s.failures > 3*usual(k):
			e.Reason = ReasonFailures
		case s.latency > float64(c.latencyFloor) && s.latency > c.latencyFactor*typical && s.latency > typical+5*deviations[z]:
			e.Reason = ReasonLatency
		default:
			continue
		}
		e.PeerLatency, e.PeerFailureRatio = time.Duration(typical), usual(k)
		out[i] = e
	}
	return out
}

// limit is the latency of a good probe of an endpoint that was ejected: half way back.
func (c *ejection) limit(e Event) time.Duration {
	if e.Reason != ReasonLatency {
		return math.MaxInt64
	}
	return max(c.latencyFloor, time.Duration((1+c.latencyFactor)/2*float64(e.PeerLatency)))
}

// allowed is how many of n endpoints may be out.
func (c *ejection) allowed(n int) int { return int(c.maxEjectionPercent * float64(n) / 100) }

// A probation is how an endpoint has stood before the detector.
type probation struct {
	out     bool
	since   time.Duration // of out, or of the readmission
	times   int           // it was ejected, not long ago
	strikes int           // sweeps in a row in which it was too slow
	struck  time.Duration // the latest of them
}

// sweep judges the endpoints if it is time, and changes the rotation.
func (b *shards) sweep(now time.Duration) {
	due := b.due.Load()
	if now < time.Duration(due) || !b.due.CompareAndSwap(due, int64(now+sweepEvery)) {
		return // another attempt's end does it
	}
	defer b.log()
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.current
	if p == nil {
		return
	}
	for far := range b.typical {
		b.typical[far].Store(math.Float64bits(typicalOf(p.ready, far == 1)))
	}
	changed := b.judge(p, now)
	if b.policy.zone.local != "" {
		changed = b.steer(p, now) || changed
	}
	if changed || p.rotation.Load().ramping {
		p.rotation.Store(b.arrange(p, now))
	}
}

// typicalOf returns the median latency of the endpoints in rotation of the caller's zone, or
// of the others; 0 if none is known.
func typicalOf(ready []seated, far bool) float64 {
	xs := make([]float64, 0, len(ready))
	for _, s := range ready {
		if s.far == far && !s.out && s.known.Load() == measured {
			xs = append(xs, math.Float64frombits(s.cost.Load()))
		}
	}
	return medianOf(xs)
}

// judge ejects and readmits; it reports whether it did. b.mu is held.
func (b *shards) judge(p *picker, now time.Duration) (changed bool) {
	c := &b.policy.ejection
	var in []*remembered
	var samples []sample
	for _, s := range p.ready {
		if !s.out {
			in = append(in, s.remembered)
			x := s.sample()
			x.far = s.far
			samples = append(samples, x)
			if s.times > 0 && now-s.since > longest*c.baseTime {
				s.times = 0
			}
			continue
		}
		lasted := now - s.since
		good := s.tried()
		switch {
		case good >= goodProbes && lasted >= c.baseTime*time.Duration(min(s.times, longest)):
			b.readmit(s.remembered, now, Event{Reason: ReasonProbes})
		case lasted >= longest*c.baseTime && s.untried():
			b.readmit(s.remembered, now, Event{Reason: ReasonTime})
		default:
			s.relax(c.limit(Event{Reason: ReasonLatency, PeerLatency: b.typicalLatency(s.far)}))
			continue
		}
		changed = true
	}
	out := b.trim(c.allowed(p.named), now)
	verdicts := c.judge(samples)
	var bad []int
	for i, v := range verdicts {
		e := in[i]
		switch v.Reason {
		case ReasonFailures:
			bad = append(bad, i)
		case ReasonLatency:
			// The same attempts are no second strike. Where the policy avoids a slow endpoint
			// there are no others, and each pause of 100 ms would eject it.
			if e.strikes == 0 || time.Duration(e.last.Load()) > e.struck {
				e.strikes++
				e.struck = now
			}
			if e.strikes >= strikesOut {
				bad = append(bad, i)
			}
		default:
			e.strikes = 0
		}
	}
	// The worst first, as not all may go.
	slices.SortStableFunc(bad, func(i, j int) int {
		x, y := verdicts[i], verdicts[j]
		return cmp.Or(cmp.Compare(y.FailureRatio, x.FailureRatio), cmp.Compare(y.Latency, x.Latency))
	})
	for _, i := range bad[:min(len(bad), max(0, c.allowed(p.named)-out))] {
		e := in[i]
		e.out, e.since, e.strikes = true, now, 0
		e.times++
		e.try(now, c.limit(verdicts[i]), c.baseTime/5, c.baseTime)
		v := verdicts[i]
		v.Kind, v.Endpoint = Ejected, e.key
		b.tell(v)
		changed = true
	}
	return changed
}

// trim readmits those that have been out for longest while more are than may be: there may
// be fewer endpoints now, or others than were counted then. It returns how many are out. b.mu is held.
func (b *shards) trim(allowed int, now time.Duration) int {
	var out []*remembered
	for _, e := range b.endpoints {
		if e.named && e.out {
			out = append(out, e)
		}
	}
	if len(out) <= allowed {
		return len(out)
	}
	slices.SortFunc(out, func(x, y *remembered) int {
		return cmp.Or(cmp.Compare(x.since, y.since), cmp.Compare(x.key, y.key))
	})
	for _, e := range out[:len(out)-allowed] {
		b.readmit(e, now, Event{Reason: ReasonLimit})
	}
	return allowed
}

// typicalLatency is what picks go by. b.mu is held.
func (b *shards) typicalLatency(far bool) time.Duration {
	i := 0
	if far {
		i = 1
	}
	return time.Duration(math.Float64frombits(b.typical[i].Load()))
}

// readmit brings an ejected endpoint back. b.mu is held.
func (b *shards) readmit(e *remembered, now time.Duration, why Event) {
	why.Kind, why.Endpoint, why.Out = Readmitted, e.key, now-e.since
	e.out, e.since, e.strikes = false, now, 0
	e.ramp = now
	e.acquit()
	b.tell(why)
}

// tell queues an event for the next call that takes them. b.mu is held.
func (b *shards) tell(e Event) {
	e.Target = b.target
	b.unlogged = append(b.unlogged, e)
	if len(b.events) == maxEvents {
		b.events = slices.Delete(b.events, 0, 1)
	}
	b.events = append(b.events, e)
	b.declined.Store(0)
	b.news.Store(true)
}

// log writes what has been told since the last time. b.mu is not held: a log may be slow, or
// make calls of its own.
func (b *shards) log() {
	b.mu.Lock()
	events := b.unlogged
	b.unlogged = nil
	b.mu.Unlock()
	for _, e := range events {
		logger.Infof("loadbalance: %s: %s %s: %s (latency %v, peers' %v; failures %.2f, peers' %.2f; %d of %d ready ones ejected)",
			e.Target, e.Endpoint, e.Kind, e.Reason, e.Latency, e.PeerLatency, e.FailureRatio, e.PeerFailureRatio, e.Ejected, e.Ready)
	}
}

// handler is the context key of who takes events.
type handler struct{}

// WithEventHandler returns a context whose calls take the events of the balancers that
// they use: ejections, readmissions, panics. An event waits for the end of the next such
// call of its connection (the newest 64 do) and is handed to one call only; when 1,000 attempts or
// more that do not take it have ended since the latest, it is dropped. The handler
// is called from the end of an attempt: it must not block. Without any handler the events are
// in gRPC's log, at level INFO, component "bobtail".
func WithEventHandler(ctx context.Context, h func(Event)) context.Context {
	return context.WithValue(ctx, handler{}, h)
}

// deliver hands the events to the call of ctx if it takes them.
func (b *shards) deliver(ctx context.Context) {
	h, _ := ctx.Value(handler{}).(func(Event))
	if h == nil && b.declined.Add(1) < mostDeclined {
		return
	}
	b.mu.Lock()
	if h == nil && b.declined.Load() < mostDeclined {
		b.mu.Unlock()
		return // there is another one
	}
	events := b.events
	b.events = nil
	b.news.Store(false)
	b.mu.Unlock()
	if h == nil {
		return // nobody takes them, and to look for who does costs each call something
	}
	for _, e := range events {
		h(e)
	}
}
