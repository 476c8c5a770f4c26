package hedging

import (
	"sync"
	"time"
)

const (
	// minTie is the least tie delay, and that which serves until the distance is known:
	// "The Tail at Scale" has 1 ms. Below it scheduling noise sends the copies.
	minTie = DefaultMinDelay
	// maxTie bounds what a path that only seems to be long can do.
	maxTie = 100 * time.Millisecond
	// distanceSpan is how long the shortest of the times seen is believed, to twice of
	// it: as long as BBR believes its least round trip (draft-cardwell-iccrg-bbr).
	distanceSpan = 10 * time.Second
	// distanceKnown is how many starts it takes to know the distance: the first calls may
	// all have queued.
	distanceKnown = 8
)

// distance estimates how long it takes to be told that a handler has started if the call
// need not queue: twice the one-way delay. The times of calls that did queue are among
// those that it is shown; it goes by those of at most twice the shortest of the last
// spans, and smooths these as TCP does (RFC 6298): the mean plus four times the
// deviation. At the mean itself every second copy would go out just before the news.
//
// It also remembers whether the servers do tell. The zero value knows nothing. It is
// safe for concurrent use; now comes in, as the time since any fixed moment.
type distance struct {
	mu       sync.Mutex // guards everything below
	seen     int        // starts, up to distanceKnown
	least    time.Duration
	before   time.Duration // least of the span before; noTime if it had none
	turned   time.Duration // when the span of least began
	mean     time.Duration
	spread   time.Duration
	silent   bool // whether an answer came untold
	silentAt time.Duration
}

// told records that a header said, d after its attempt was sent, that the handler starts.
func (e *distance) told(now, d time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.seen < distanceKnown {
		e.seen++
	}
	if e.seen == 1 {
		e.least, e.before, e.turned = d, noTime, now
		e.mean, e.spread = d, d/2
		return
	}
	if gone := now - e.turned; gone >= distanceSpan {
		e.before, e.least, e.turned = e.least, noTime, now
		if gone >= 2*distanceSpan {
			e.before = noTime
		}
	}
	e.least = min(e.least, d)
	near := 2 * max(min(e.least, e.before), minTie/2)
	switch {
	case d > near:
		return // it has queued
	case e.mean > near:
		// What was smoothed was queueing, or a connection in the making.
		e.mean, e.spread = d, d/2
		return
	}
	// RFC 6298, 2.3, with alpha 1/8 and beta 1/4; the deviation first.
	e.spread += ((e.mean - d).Abs() - e.spread) / 4
	e.mean += (d - e.mean) / 8
}

// untold records an answer whose header said nothing of a start.
func (e *distance) untold(now time.Duration) {
	e.mu.Lock()
	e.silent, e.silentAt = true, now
	e.mu.Unlock()
}

// tells reports whether a server that has not told of a start has not started: some have
// told, and nobody has answered untold for a whole Window.
func (e *distance) tells(now time.Duration) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.seen > 0 && !(e.silent && now-e.silentAt < Window)
}

// tie is the tie delay that follows.
func (e *distance) tie() time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.seen < distanceKnown {
		return minTie
	}
	return min(max(e.mean+4*e.spread, minTie), maxTie)
}

// ties reports whether calls are marked as tied ones. In shadow they are not: a mark
// changes what the server does.
func (h *Hedger) ties() bool { return h.cfg.Tied && !h.cfg.Shadow }

func (h *Hedger) tieDelay() time.Duration {
	if h.cfg.TieDelay > 0 {
		return h.cfg.TieDelay
	}
	return h.distance.tie()
}
