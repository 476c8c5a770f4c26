package report

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/bobtail-rpc/bobtail/bench/load"
)

// Needs is the number of samples from which the 95% interval of percentile q is
// finite: with fewer, all may lie below it more often than one time in forty.
// 6, 36, 368 and 3,688 for p50, p90, p99 and p99.9.
func Needs(q float64) int { return int(math.Ceil(math.Log(0.025) / math.Log(q))) }

// minBlocks is the fewest blocks that are resampled: the spread of two or three
// says nothing about that of all.
const minBlocks = 5

// resamples of the bootstrap: the ends of a 95% interval are then its 25th and
// 975th, steady to a twentieth of its width.
const resamples = 1000

// sample is a merged histogram that remembers which block each count came from.
type sample struct {
	blocks int
	counts []count // ascending by value
	total  []int64 // requests of each block, failures included
}

type count struct {
	value int64 // microseconds, the upper end of an HdrHistogram bucket
	block int
	n     int64
}

func newSample(blocks []Block) *sample {
	s := &sample{blocks: len(blocks), total: make([]int64, len(blocks))}
	h := load.NewHistogram()
	for i, b := range blocks {
		s.total[i] = int64(b.requests())
		h.Reset()
		for _, d := range b.Latencies {
			load.Record(h, d.Round(time.Microsecond))
		}
		for _, bar := range h.Distribution() {
			if bar.Count > 0 {
				s.counts = append(s.counts, count{bar.To, i, bar.Count})
			}
		}
	}
	slices.SortFunc(s.counts, func(a, b count) int { return cmp.Compare(a.value, b.value) })
	return s
}

// quantiles returns the percentiles of all blocks together, in ms: nil where
// one falls among the failures, or there is nothing.
func (s *sample) quantiles(qs []float64) []*float64 {
	once := make([]int64, s.blocks)
	for i := range once {
		once[i] = 1
	}
	out := make([]*float64, len(qs))
	for i, v := range s.weighted(once, qs) {
		if v != failed {
			out[i] = millis(v)
		}
	}
	return out
}

// failed ranks above every latency.
const failed = math.MaxInt64

// weighted walks the histogram once, each block counted as often as its weight
// says, and returns the nearest-rank percentiles qs (ascending) in microseconds.
func (s *sample) weighted(weight []int64, qs []float64) []int64 {
	var total int64
	for b, w := range weight {
		total += w * s.total[b]
	}
	out := make([]int64, len(qs))
	var i int
	var seen int64
	for _, c := range s.counts {
		seen += weight[c.block] * c.n
		for i < len(qs) && seen >= max(int64(math.Ceil(qs[i]*float64(total))), 1) {
			out[i] = c.value
			i++
		}
		if i == len(qs) {
			return out
		}
	}
	for ; i < len(qs); i++ {
		out[i] = failed
	}
	return out
}

// bootstrap returns the 95% interval of each percentile by drawing whole blocks
// with replacement: what happens in one block, a stall say, is one event and no
// thousand independent ones. nil where an end falls among the failures.
func (s *sample) bootstrap(seed uint64, qs []float64) []*[2]float64 {
	out := make([]*[2]float64, len(qs))
	if s.blocks < minBlocks {
		return out
	}
	rng := rand.New(rand.NewPCG(seed, 0xb007))
	draws := make([][]int64, len(qs))
	weight := make([]int64, s.blocks)
	for range resamples {
		clear(weight)
		for range s.blocks {
			weight[rng.IntN(s.blocks)]++
		}
		for i, v := range s.weighted(weight, qs) {
			draws[i] = append(draws[i], v)
		}
	}
	for i, d := range draws {
		slices.Sort(d)
		lo, hi := d[resamples*25/1000], d[resamples*975/1000-1]
		if hi != failed {
			out[i] = &[2]float64{*millis(lo), *millis(hi)}
		}
	}
	return out
}

func millis(us int64) *float64 {
	v := float64(us) / 1000
	return &v
}
