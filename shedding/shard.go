package shedding

// Shuffle sharding: each of those who ask (a flow) is dealt a hand of a few queues out of many,
// and waits in the shortest of them; the queues are served in turn. One who asks for far too
// much fills his own hand, and only those who share all of it wait behind him: with a hand of
// h of n queues, 1 in n over h of them. It costs what it saves from: those in the shorter
// queues are served before others who came earlier.
//
// Sources: AWS Builders' Library, "Workload isolation using shuffle-sharding"; Kubernetes API
// Priority and Fairness, KEP-1040, "Fair Queuing for Server Requests", whose dealer this is.

const (
	maxShards = 256
	maxHand   = 8
)

// queueList is a list by arrival.
type queueList struct {
	oldest, newest uint32
	n              int
}

// hand calls f with each of the shards that a flow is dealt, all of them different.
func (c *QueueConfig) hand(flow uint64, f func(shard int)) {
	var dealt [maxHand]int
	for i := range c.Hand {
		left := uint64(c.Shards - i)
		card := int(flow % left)
		flow /= left
		// It is the card-th of those that have not been dealt, which are kept in order.
		at := 0
		for ; at < i && dealt[at] <= card; at++ {
			card++
		}
		copy(dealt[at+1:i+1], dealt[at:i])
		dealt[at] = card
		f(card)
	}
}

// shardOf is where one of the flow waits in the lane: the shortest of its hand.
func (q *Queue) shardOf(l *lane, flow uint64) int {
	best := -1
	q.cfg.hand(mix(flow), func(shard int) {
		if best < 0 || l.shards[shard].n < l.shards[best].n {
			best = shard
		}
	})
	return best
}

// mix spreads a hash of 32 bits over the 64 that a hand is dealt from: the finalizer of
// SplitMix64.
func mix(x uint64) uint64 {
	x += 0x9E3779B97F4A7C15
	x = (x ^ x>>30) * 0xBF58476D1CE4E5B9
	x = (x ^ x>>27) * 0x94D049BB133111EB
	return x ^ x>>31
}

// sharded tells whether there is more than one queue in each lane.
func (q *Queue) sharded() bool { return q.cfg.Shards > 1 }

// inTurn is the part of the lane that is served next.
func (l *lane) inTurn() *queueList {
	if l.n == 0 || l.shards == nil {
		return &l.queueList
	}
	i := l.turn % len(l.shards)
	for l.shards[i].n == 0 {
		i = (i + 1) % len(l.shards)
	}
	return &l.shards[i]
}

// longest is the part of the lane in which most wait.
func (l *lane) longest() *queueList {
	best := &l.queueList
	for i := range l.shards {
		if s := &l.shards[i]; best == &l.queueList || s.n > best.n {
			best = s
		}
	}
	return best
}

// configure changes the configuration. Who waits stays, if need be in another shard.
func (q *Queue) configure(cfg QueueConfig) {
	cfg = cfg.withDefaults()
	deal := q.cfg.Shards != cfg.Shards || q.cfg.Hand != cfg.Hand
	q.cfg = cfg
	if !deal {
		return
	}
	for i := range q.lanes {
		l := &q.lanes[i]
		l.shards, l.turn = nil, 0
		if q.sharded() {
			l.shards = make([]queueList, cfg.Shards)
		}
		for p := l.oldest; p != 0; p = q.places[p].newer {
			q.join(l, p)
		}
	}
}

// join puts one who waits in the lane at the end of a shard of it.
func (q *Queue) join(l *lane, i uint32) {
	if l.shards == nil {
		return
	}
	p := &q.places[i]
	shard := q.shardOf(l, p.flow)
	s := &l.shards[shard]
	p.shard, p.shardOlder, p.shardNewer = uint8(shard), s.newest, 0
	q.places[s.newest].shardNewer = i // place 0 may be written to
	s.newest = i
	if s.oldest == 0 {
		s.oldest = i
	}
	s.n++
}

// part takes one out of its shard.
func (q *Queue) part(l *lane, i uint32) {
	if l.shards == nil {
		return
	}
	p := &q.places[i]
	s := &l.shards[p.shard]
	s.n--
	if s.oldest == i {
		s.oldest = p.shardNewer
	}
	if s.newest == i {
		s.newest = p.shardOlder
	}
	q.places[p.shardOlder].shardNewer = p.shardNewer
	q.places[p.shardNewer].shardOlder = p.shardOlder
}
