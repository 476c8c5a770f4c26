package experiment

import (
	"math"
	"time"

	"github.com/bobtail-rpc/bobtail/bench/load"
)

// plan cuts one schedule into blocks. Every policy runs every block, so all face
// the same arrivals and, by the ids, the same luck.
type plan struct {
	arrivals *load.Arrivals
	block    time.Duration
	gap      time.Duration // mean, between two requests
	nextID   uint64
	begun    time.Duration // where on the timeline the next block begins

	warm   int // blocks of warm-up still to come
	blocks int // measured blocks still to come, if calls is not what counts
	calls  int // requests still to come, if blocks is not what counts
}

// block is one stretch of the schedule.
type block struct {
	warmup  bool
	at      []time.Duration
	firstID uint64
	// offset is where the block begins on the scenario's timeline; in the warm-up of
	// a scenario with faults it is negative.
	offset, length time.Duration
}

func newPlan(c Config) *plan {
	p := &plan{
		arrivals: load.NewArrivals(c.Seed, c.Scenario.Rate, c.Scenario.Arrivals),
		block:    c.Block,
		gap:      time.Duration(float64(time.Second) / c.Scenario.Rate),
		warm:     ceil(c.Warmup, c.Block),
	}
	if c.Duration > 0 {
		p.blocks = ceil(c.Duration, c.Block)
	} else {
		p.calls = c.Scenario.Requests
	}
	if c.Scenario.SideBySide || len(c.Scenario.Faults) > 0 {
		// A fault "from 10s" begins 10 s into what is measured, however long the warm-up.
		p.begun = -time.Duration(p.warm) * p.block
	}
	return p
}

func ceil(d, block time.Duration) int { return int((d + block - 1) / block) }

// next returns the next block; ok is false after the last.
func (p *plan) next() (b block, ok bool) {
	switch {
	case p.warm > 0:
		p.warm--
		b.warmup = true
		b.at, b.length = p.arrivals.Next(p.block), p.block
	case p.blocks > 0:
		p.blocks--
		b.at, b.length = p.arrivals.Next(p.block), p.block
	case p.calls > 0:
		b.at, b.length = p.upTo(p.calls)
		p.calls -= len(b.at)
	default:
		return b, false
	}
	b.firstID, b.offset = p.nextID, p.begun
	p.nextID += uint64(len(b.at))
	p.begun += b.length
	return b, true
}

// upTo is a block of at most n requests. The last block takes in what would be
// less than half a block: blocks are what the bootstrap draws, and should weigh alike.
func (p *plan) upTo(n int) (at []time.Duration, length time.Duration) {
	mean := p.block.Seconds() / p.gap.Seconds()
	for {
		for _, a := range p.arrivals.Next(p.block) {
			at = append(at, length+a)
		}
		length += p.block
		if left := n - len(at); left <= 0 {
			at = at[:n]
			return at, min(length, at[n-1]+p.gap)
		} else if float64(left) >= mean/2 {
			return at, length
		}
	}
}

// expected is about how many requests each policy will make in all: for progress.
func (c Config) expected() int {
	perBlock := c.Scenario.Rate * c.Block.Seconds()
	warm := float64(ceil(c.Warmup, c.Block)) * perBlock
	if c.Duration > 0 {
		return int(math.Round(warm + float64(ceil(c.Duration, c.Block))*perBlock))
	}
	return int(math.Round(warm)) + c.Scenario.Requests
}
