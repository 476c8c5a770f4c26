package shedding

import "time"

// lane is a list of all that wait in it, and, if the queue is sharded, one for each shard.
type lane struct {
	queueList
	shards []queueList
	turn   int // the shard that is served next, if somebody waits there
}

type place struct {
	Waiter
	until                  time.Time
	flow                   uint64
	older, newer           uint32 // in the lane
	shardOlder, shardNewer uint32 // in the shard
	allOlder, allNewer     uint32 // of all
	heap                   int32  // where in byEnd
	shard                  uint8
	taken                  bool
}

func (q *Queue) take(i uint32) Waiter {
	p := &q.places[i]
	w := p.Waiter
	lane := &q.lanes[w.Level.lane()]
	q.part(lane, i)
	lane.n--
	if lane.oldest == i {
		lane.oldest = p.newer
	}
	if lane.newest == i {
		lane.newest = p.older
	}
	q.places[p.older].newer = p.newer
	q.places[p.newer].older = p.older
	if q.oldest == i {
		q.oldest = p.allNewer
	}
	if q.newest == i {
		q.newest = p.allOlder
	}
	q.places[p.allOlder].allNewer = p.allNewer
	q.places[p.allNewer].allOlder = p.allOlder

	h, last := int(p.heap), len(q.byEnd)-1
	q.swap(h, last)
	q.byEnd = q.byEnd[:last]
	if h < last {
		q.down(h)
		q.up(h)
	}
	p.taken = false
	p.Owner = nil // for the collector
	p.newer = q.free
	q.free = i
	return w
}

func (q *Queue) before(a, b int) bool {
	return q.places[q.byEnd[a]].until.Before(q.places[q.byEnd[b]].until)
}

func (q *Queue) swap(a, b int) {
	q.byEnd[a], q.byEnd[b] = q.byEnd[b], q.byEnd[a]
	q.places[q.byEnd[a]].heap = int32(a)
	q.places[q.byEnd[b]].heap = int32(b)
}

// up and down are container/heap's, which would allocate.
func (q *Queue) up(i int) {
	q.places[q.byEnd[i]].heap = int32(i)
	for i > 0 {
		parent := (i - 1) / 2
		if !q.before(i, parent) {
			return
		}
		q.swap(i, parent)
		i = parent
	}
}

func (q *Queue) down(i int) {
	for {
		child := 2*i + 1
		if child >= len(q.byEnd) {
			return
		}
		if right := child + 1; right < len(q.byEnd) && q.before(right, child) {
			child = right
		}
		if !q.before(child, i) {
			return
		}
		q.swap(i, child)
		i = child
	}
}
