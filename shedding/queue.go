package shedding

import "time"

// Ticket names one that waits, or has waited. No two are the same in the life of a queue
// (until a place has been taken four billion times). The zero value names nobody.
type Ticket struct {
	place      uint32
	generation uint32
}

// Waiter is one who waits in a [Queue].
type Waiter struct {
	Ticket  Ticket
	Level   Level
	Arrived time.Time
	Owner   any // who put it there: the queue does not look at it
}

// Queue is where requests wait for a slot: the highest class first, and in a class the
// oldest first, or the newest first while [Queue.NewestFirst] says so. The first attempts
// of a class and its extra ones are two lanes: who has to go goes from the lowest lane. The
// sheddable classes may be served [Queue.Together].
// The queue is bounded in length, and each waits until a time of its own, and no longer
// than MaxWait.
//
// Newest first is for an overload: of those who cannot all be served in time, the newest
// have the most time left; the oldest first, all are served late (Maurer, "Fail at
// Scale").
//
// A Queue is made by [NewQueue], reads no clock, and is not safe for concurrent use. What it
// does costs O(log n) at most, and of shards their number. It allocates only when it is longer than it has ever been.
type Queue struct {
	cfg         QueueConfig
	newestFirst bool
	together    bool
	// bound is how long those in lanes below boundBelow wait, however long they might
	// have when they came.
	bound      time.Duration
	boundBelow int

	// places are those who wait and those that are free; free ones are linked by next in
	// their lane. The first is nobody's, so that 0 is none.
	places []place
	free   uint32
	lanes  [lanes]lane
	// oldest and newest are the ends of the list of all, by arrival.
	oldest, newest uint32
	// byEnd is a heap of all, the first to have waited until its time at the root.
	byEnd []uint32
}

// NewQueue returns an empty queue. All faults of cfg are reported together.
func NewQueue(cfg QueueConfig) (*Queue, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	q := &Queue{places: make([]place, 1)}
	q.configure(cfg)
	return q, nil
}

// Len is how many wait.
func (q *Queue) Len() int { return len(q.byEnd) }

// NewestFirst says in which order a class is served from now on.
func (q *Queue) NewestFirst(on bool) { q.newestFirst = on }

// Together says whether from now on the two sheddable classes are served as one, in the order
// of arrival. Who has to go is of the lower one as before.
func (q *Queue) Together(on bool) { q.together = on }

// Bound says how long those in lanes below that of the given level wait from now on,
// whoever waits already too.
func (q *Queue) Bound(d time.Duration, below Level) {
	q.bound, q.boundBelow = max(d, 0), below.lane()
}

// Full tells whether as many wait as may.
func (q *Queue) Full() bool { return q.Len() >= q.cfg.MaxLength }

// Push puts a request of a flow at the end of its lane, to wait until the given time at most (zero:
// as long as MaxWait lets it). It is not ok when the queue is full; to make room is up to
// the caller ([Queue.Displace]). Times of calls must not go back.
func (q *Queue) Push(now time.Time, level Level, flow uint64, until time.Time, owner any) (Ticket, bool) {
	if q.Full() {
		return Ticket{}, false
	}
	i := q.free
	if i == 0 {
		i = uint32(len(q.places))
		q.places = append(q.places, place{})
	} else {
		q.free = q.places[i].newer
	}
	if end := now.Add(q.cfg.MaxWait); until.IsZero() || end.Before(until) {
		until = end
	}
	p := &q.places[i]
	lane := &q.lanes[level.lane()]
	ticket := Ticket{place: i, generation: p.Ticket.generation + 1}
	*p = place{
		Waiter: Waiter{Ticket: ticket, Level: level, Arrived: now, Owner: owner},
		until:  until, flow: flow, older: lane.newest, allOlder: q.newest, taken: true,
	}
	q.places[lane.newest].newer = i // place 0 may be written to: nobody reads it
	q.places[q.newest].allNewer = i
	lane.newest, q.newest = i, i
	if lane.oldest == 0 {
		lane.oldest = i
	}
	if q.oldest == 0 {
		q.oldest = i
	}
	lane.n++
	q.join(lane, i)
	q.byEnd = append(q.byEnd, i)
	q.up(len(q.byEnd) - 1)
	return ticket, true
}

// Pop takes out the one whose turn it is.
func (q *Queue) Pop() (Waiter, bool) {
	for lane := lanes - 1; lane > 0; lane -= 2 {
		first := q.earlier(q.head(&q.lanes[lane].queueList), q.head(&q.lanes[lane-1].queueList))
		if q.together && lane == 2*SheddablePlus.rank()+1 {
			first = q.earlier(first, q.earlier(q.head(&q.lanes[lane-2].queueList), q.head(&q.lanes[lane-3].queueList)))
		}
		if first == 0 {
			continue
		}
		// In his lane it is the turn of a shard, which may not be his.
		l := &q.lanes[q.places[first].Level.lane()]
		next := q.head(l.inTurn())
		l.turn = int(q.places[next].shard) + 1
		return q.take(next), true
	}
	return Waiter{}, false
}

// earlier is which of two is served before the other; 0 is nobody.
func (q *Queue) earlier(a, b uint32) uint32 {
	switch {
	case a == 0:
		return b
	case b == 0:
		return a
	}
	if first, second := q.places[a].Arrived, q.places[b].Arrived; q.newestFirst && second.After(first) || !q.newestFirst && second.Before(first) {
		return b
	}
	return a
}

// head is who is next in a list, or 0.
func (q *Queue) head(l *queueList) uint32 {
	if q.newestFirst {
		return l.newest
	}
	return l.oldest
}

// Displace takes out the one who goes first when somebody of the given level wants to come
// in and there is no room: the newest of the lowest lane, if that lane is below that of
// the level; while the newest are served first, the oldest, and that of its own lane too.
// Of a lane with shards it is one in the longest, and of its own lane too if that is longer than
// the shard where one of the flow would wait would then be. Those in lanes not below that
// of the other level are left alone.
func (q *Queue) Displace(level Level, flow uint64, below Level) (Waiter, bool) {
	for lane := range min(level.lane()+1, below.lane()) {
		l := &q.lanes[lane]
		if l.n == 0 {
			continue
		}
		longest := l.longest()
		switch {
		case q.newestFirst:
			return q.take(longest.oldest), true
		case lane < level.lane():
			return q.take(longest.newest), true
		case q.sharded() && longest.n > l.shards[q.shardOf(l, flow)].n+1:
			return q.take(longest.newest), true
		}
	}
	return Waiter{}, false
}

// Shed takes out the one who has waited longest in the lowest lane (in the longest shard of it), if that is below the
// lane of the given level: who goes when there are more than should be.
func (q *Queue) Shed(below Level) (Waiter, bool) {
	for lane := range below.lane() {
		if l := &q.lanes[lane]; l.n > 0 {
			return q.take(l.longest().oldest), true
		}
	}
	return Waiter{}, false
}

// Remove takes out the one that a ticket names. It is not ok when that one does not wait
// any more.
func (q *Queue) Remove(t Ticket) (Waiter, bool) {
	if t.place == 0 || int(t.place) >= len(q.places) {
		return Waiter{}, false
	}
	if p := &q.places[t.place]; !p.taken || p.Ticket != t {
		return Waiter{}, false
	}
	return q.take(t.place), true
}

// Expire takes out one who has waited until its time.
func (q *Queue) Expire(now time.Time) (Waiter, bool) {
	end, first := q.nextEnd()
	if first == 0 || end.After(now) {
		return Waiter{}, false
	}
	return q.take(first), true
}

// NextEnd is when the next one will have waited until its time. It is not ok when nobody
// waits.
func (q *Queue) NextEnd() (end time.Time, ok bool) {
	end, first := q.nextEnd()
	return end, first != 0
}

func (q *Queue) nextEnd() (end time.Time, first uint32) {
	if len(q.byEnd) == 0 {
		return time.Time{}, 0
	}
	first = q.byEnd[0]
	end = q.places[first].until
	for i := range q.boundBelow {
		l := &q.lanes[i]
		if l.n == 0 {
			continue
		}
		if e := q.places[l.oldest].Arrived.Add(q.bound); e.Before(end) {
			end, first = e, l.oldest
		}
	}
	return end, first
}

// Wait is for how long the oldest has waited; 0 when nobody waits.
func (q *Queue) Wait(now time.Time) time.Duration {
	if q.oldest == 0 {
		return 0
	}
	return max(0, now.Sub(q.places[q.oldest].Arrived))
}

// Ahead is how many will be served before one of the given level and flow that comes now, if
// nobody comes after it.
func (q *Queue) Ahead(level Level, flow uint64) int {
	n, class := 0, q.servedAs(level.lane())
	for i := range q.lanes {
		l := &q.lanes[i]
		switch c := q.servedAs(i); {
		case c > class:
			n += l.n
		case c < class || q.newestFirst:
		case l.shards == nil:
			n += l.n
		default:
			// In turn: of each shard as many as wait in its own.
			own := l.shards[q.shardOf(l, flow)].n
			for k := range l.shards {
				n += min(l.shards[k].n, own+1)
			}
		}
	}
	return n
}

// servedAs is the class as which those of a lane are served.
func (q *Queue) servedAs(lane int) int {
	if class := lane / 2; !q.together || class != SheddablePlus.rank() {
		return class
	}
	return Sheddable.rank()
}

// lane is the lane that the level is of; that of [levels], which is above all, is above
// all.
func (l Level) lane() int { return min(int(l)/Cohorts, lanes) }
