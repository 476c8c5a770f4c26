package shedding

import (
	"math"
	"sync/atomic"
	"time"
)

// flow is what comes and what is done, by windows: at least an interval, and then as long
// as it takes for a few requests to come, up to a second.
type flow struct {
	start time.Time
	come  [levels]uint32 // in this window
	arrivals,
	asked, // of them: for a slot; not refused before
	foundFree, // of those: one was free
	completed int
	sum, sumSq float64 // ns; of the times of those completed
	timed      int

	rates    [levels]float64 // requests/s, smoothed; those refused included
	demand   float64         // the sum of rates
	capacity float64         // handlers/s; 0 until it is known
	steady   float64         // capacity, smoothed over some seconds: probes do not show
	room     float64         // by how much more than capacity is let in, to see whether it can be done; 0: none
	mean     float64         // ns; of the handlers' times, smoothed; 0 until it is known
	spread   float64         // the square of the times' coefficient of variation
}

const (
	fewArrivals = 30
	longWindow  = time.Second
	// weight of a window: a Poisson load of 800/s is known to 3% then.
	weight = 0.15

	idle       = 0.01   // the share of slots that may be idle by chance, in an overload
	idleFits   = 0.0225 // and the share of a load that just fits that may be refused
	mostExcess = 0.5    // of demand above the cursor
	leastLeft  = 0.2    // excess, beyond the one aimed at, that the cursor cannot take away
	moreRoom   = 1.1    // of what is let in, when the queue stays short in spite of the margin
	overAt     = 0.1    // the excess from which an overload is not over
	roomy      = 0.92   // of the capacity: a demand that fits, as far as both are known

	// leastCapacity is what a server that does nothing at all is taken to do, in handlers/s: it
	// will have to be divided by.
	leastCapacity = 0.001
	longestWait   = time.Hour
)

// forRequests is how long n requests take at a rate per second; 0 if that is not known.
func forRequests(n, rate float64) time.Duration {
	if rate <= 0 {
		return 0
	}
	return time.Duration(min(n/rate*float64(time.Second), float64(longestWait)))
}

func (f *flow) arrived(level Level, n int) {
	f.come[level] += uint32(n)
	f.arrivals += n
}

func (f *flow) done(ran time.Duration, r Result) {
	f.completed++
	if r != Ignored && r != Untimed && r != UntimedDrop {
		t := float64(ran)
		f.sum += t
		f.sumSq += t * t
		f.timed++
	}
}

// due is when the window ends.
func (f *flow) due() time.Time {
	if f.arrivals < fewArrivals {
		return f.start.Add(longWindow)
	}
	return f.start.Add(interval)
}

// roll ends the window.
func (f *flow) roll(now time.Time) {
	took := now.Sub(f.start).Seconds()
	if took <= 0 {
		return
	}
	w := weight
	if f.demand == 0 {
		w = 1
	}
	f.demand = 0
	for i := range f.rates {
		f.rates[i] += w * (float64(f.come[i])/took - f.rates[i])
		f.demand += f.rates[i]
	}
	// What was done is what can be done only if the slots were taken. If they were not,
	// the server can do at least that much.
	done := float64(f.completed) / took
	switch {
	case f.capacity == 0:
		f.capacity = done
	case done > f.capacity || f.asked > 0 && 10*f.foundFree <= f.asked:
		f.capacity = max(f.capacity+weight*(done-f.capacity), leastCapacity)
		f.room *= 1 - weight
	}
	if f.steady == 0 {
		f.steady = f.capacity
	}
	f.steady += weight / 8 * (f.capacity - f.steady)
	if f.timed > 0 && f.sum > 0 {
		mean := f.sum / float64(f.timed)
		if f.mean == 0 {
			f.mean = mean
		}
		f.mean += weight * (mean - f.mean)
		f.spread += weight * (max(0, f.sumSq/float64(f.timed)/(mean*mean)-1) - f.spread)
	}
	f.start = now
	f.come = [levels]uint32{}
	f.arrivals, f.asked, f.foundFree, f.completed, f.timed = 0, 0, 0, 0, 0
	f.sum, f.sumSq = 0, 0
}

// hoped is the capacity, and the room that is tried.
func (f *flow) hoped() float64 { return f.capacity * (1 + f.room) }

// excess is by what fraction of the capacity that is hoped for demand is more than it; 0 if it
// is not known.
func (f *flow) excess() float64 {
	if f.capacity <= 0 {
		return 0
	}
	return f.demand/f.hoped() - 1
}

// plan is what an overload is met with.
type plan struct {
	cursor      Level
	fits        Level         // all demand from here up is less than the capacity; the start of a lane
	length      int           // of the queue, for those below fits
	bound       time.Duration // of their wait
	newestFirst bool
	together    bool
}

func (f *flow) plan(cfg QueueConfig) plan {
	if f.capacity <= 0 {
		return plan{length: cfg.MaxLength, bound: cfg.MaxWait, fits: levels, together: true}
	}
	// A queue as short as Target would be no overload any more.
	least := max(1, 1.6*cfg.Target.Seconds()*f.capacity)
	// The least excess that a queue of that length can live on.
	margin := 0.05
	for margin < mostExcess && f.needed(margin) > least {
		margin *= 1.25
	}
	var p plan
	kept, level := 0.0, Level(levels)
	p.fits = levels
	for level > 0 && kept < (1+margin)*f.hoped() {
		level--
		kept += f.rates[level]
		if level%Cohorts == 0 && kept < roomy*max(f.capacity, f.steady) {
			p.fits = level
		}
	}
	if f.demand-kept > 0.01*f.capacity {
		p.cursor = level
	}
	excess := kept/f.capacity - 1
	if p.cursor == 0 {
		excess = f.demand/f.capacity - 1
	}
	p.length = int(min(math.Round(max(f.needed(excess), least)), float64(cfg.MaxLength)))
	waits := 1.25
	if p.cursor == 0 {
		waits = 1
	}
	p.bound = max(forRequests(waits*float64(p.length), f.capacity), cfg.Target)
	p.newestFirst = excess > margin+leastLeft
	p.together = p.cursor == 0 && !p.newestFirst
	return p
}

// needed is how long a queue must be for slots not to be idle by chance, at an excess of
// demand over capacity: see [Admission].
func (f *flow) needed(excess float64) float64 {
	s := 1 + f.spread
	if excess < 0.01 {
		return s / (2 * idleFits)
	}
	return min(s/(2*idleFits), s/(2*excess)*math.Log1p(excess/idle))
}

// Verdict is what can be told of a request by its level alone, in one word: the cursor,
// and when to come again. The zero value refuses nothing.
type Verdict uint64

const cursorBits = 16

func verdict(cursor Level, retryAfter time.Duration) Verdict {
	return Verdict(retryAfter.Microseconds())<<cursorBits | Verdict(cursor)
}

// Refuses tells whether requests of the level are refused.
func (v Verdict) Refuses(l Level) bool { return l < Level(v&(1<<cursorBits-1)) }

// RetryAfter is when it makes sense for one that is refused to come again.
func (v Verdict) RetryAfter() time.Duration {
	return time.Duration(v>>cursorBits) * time.Microsecond
}

// Gate lets a request be refused before anything is known of it but its level, without
// waiting for anybody: the verdict is one atomic word. The refused are counted, one
// atomic more, for the cursor to know them. The zero value refuses nothing. A Gate is
// safe for concurrent use, and must not be copied.
type Gate struct {
	verdict atomic.Uint64
	refused [levels]atomic.Uint32
}

// Publish sets the verdict.
func (g *Gate) Publish(v Verdict) {
	// Most calls change nothing, and a store would take the word from all who read it.
	if g.verdict.Load() != uint64(v) {
		g.verdict.Store(uint64(v))
	}
}

// Refuse tells whether a request of the level is refused, and counts it if it is.
func (g *Gate) Refuse(l Level) (Verdict, bool) {
	v := Verdict(g.verdict.Load())
	if !v.Refuses(l) {
		return v, false
	}
	g.refused[min(l, levels-1)].Add(1)
	return v, true
}

// Report tells a of those that were refused since the last report. The caller holds what
// guards a, calls it before [Admission.Tick], and so at least as often as
// [Admission.NextWake] asks for.
func (g *Gate) Report(a *Admission) {
	for l := range g.refused {
		if n := g.refused[l].Load(); n > 0 {
			a.RefusedEarly(Level(l), int(g.refused[l].Swap(0)))
		}
	}
}
