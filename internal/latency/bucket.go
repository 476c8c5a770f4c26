package latency

import (
	"math/bits"
	"time"
)

// Buckets are log-linear, as in HdrHistogram: each octave is cut into equal
// parts, so that the index is a bits.Len64 and a shift, with no logarithm.
const (
	// subBits makes 32 buckets per octave, each at most 1/32 = 3.1% of its value
	// wide, which is as wide as an error of 2% allows: see within.
	subBits   = 5
	perOctave = 1 << subBits

	minExp   = 13 // 2^13 ns = 8.192 us: 10 us lies in this octave
	maxExp   = 36 // 2^36 ns = 68.7 s: 60 s lies in the octave below
	shortest = time.Duration(1) << minExp
	longest  = time.Duration(1) << maxExp

	buckets   = (maxExp-minExp)*perOctave + 2
	underflow = 0           // the bucket of what is shorter than shortest
	overflow  = buckets - 1 // and of what is not shorter than longest

	// innermost and outermost bound the fraction of a bucket that an answer may
	// lie at: see within.
	innermost = 0.36
	outermost = 0.64
)

// bucketOf returns the index of the bucket that d falls into.
func bucketOf(d time.Duration) int {
	switch {
	case d < shortest:
		return underflow
	case d >= longest:
		return overflow
	}
	exp := bits.Len64(uint64(d)) - 1
	sub := int(d>>(exp-subBits)) & (perOctave - 1)
	return 1 + (exp-minExp)*perOctave + sub
}

// edge returns where bucket b begins, and how wide it is.
func edge(b int) (low, width time.Duration) {
	exp := minExp + (b-1)/perOctave
	width = time.Duration(1) << (exp - subBits)
	return width * time.Duration(perOctave+(b-1)%perOctave), width
}

// offset returns at which fraction of its bucket b the duration d lies, in [0, 1].
func offset(b int, d time.Duration) float64 {
	if b == underflow || b == overflow {
		return 1
	}
	low, width := edge(b)
	return float64(d-low) / float64(width)
}

// within returns the duration at fraction f of bucket b, f in [0, 1].
//
// Interpolating all the way to the edges would answer 1/32 too much when all the
// samples of a bucket sit at the other edge. The answer that is wrong by at most
// 2% wherever they sit lies between 0.36 and 0.64 of the bucket: lower by 0.64/32
// of the low edge, higher by 0.64/33 of the high one. Over evenly spread samples
// its mean error is half of that of the bucket's middle.
func within(b int, f float64) time.Duration {
	switch b {
	case underflow:
		return shortest
	case overflow:
		return longest
	}
	low, width := edge(b)
	return low + time.Duration(float64(width)*min(max(f, innermost), outermost))
}
