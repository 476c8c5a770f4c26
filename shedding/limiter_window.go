package shedding

import (
	"math"
	"time"
)

// window is what has ended since start.
type window struct {
	start            time.Time
	all, near        times // near: of those during whom the limit was reached, or nearly so
	dropped, untimed int
	peak             int // of those in flight
}

// times are those of handlers.
type times struct {
	n          int
	sum, sumSq float64 // ns
}

func (t *times) add(d float64) {
	t.n++
	t.sum += d
	t.sumSq += d * d
}

func (t *times) mean() float64 { return t.sum / float64(t.n) }

// spread is the square of their coefficient of variation.
func (t *times) spread() float64 {
	mean := t.mean()
	return max(0, t.sumSq/float64(t.n)/(mean*mean)-1)
}

// deviation is the standard error of their mean, as a fraction of it.
func (t *times) deviation() float64 { return math.Sqrt(t.spread() / float64(t.n)) }

// drops is the share of those that ended, timed or not, who did not get their work done.
func (w *window) drops() float64 { return float64(w.dropped) / float64(w.all.n+w.untimed) }

// full tells whether the limit is as good as reached.
func (l *Limiter) full(inFlight int) bool { return float64(inFlight) >= nearly*float64(l.Limit()) }

// settling is how long it takes until what ends has seen no other limit than this one. The
// times of a server that has hung for a while say nothing of that.
func (l *Limiter) settling() time.Duration {
	return min(time.Duration(2*l.short), time.Duration(2*l.base)+hangsAfter)
}

func (l *Limiter) reopen(now time.Time, inFlight int) {
	l.window = window{start: now, peak: inFlight}
}

// enough is how many samples a window needs. A window that ended as soon as its own
// samples are alike would end when they are all short by chance, so those before count as
// much.
func (l *Limiter) enough() int {
	share := 100.0
	if l.probe > 0 {
		share = 200 // base serves for many windows
	}
	return int(min(max(windowFew, share*l.window.all.spread(), share*l.spread), windowMany))
}
