package latency

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// The buckets tile the whole range: every boundary opens the next bucket, and
// the nanosecond before it still belongs to the last.
func TestBucketsTileTheRange(t *testing.T) {
	b, edge := underflow, shortest
	for edge < longest {
		if got := bucketOf(edge - 1); got != b {
			t.Fatalf("bucketOf(%d ns) = %d, want %d", edge-1, got, b)
		}
		b++
		if got := bucketOf(edge); got != b {
			t.Fatalf("bucketOf(%d ns) = %d, want %d", edge, got, b)
		}
		octave := time.Duration(1) << int(math.Log2(float64(edge)))
		edge += octave / 32
	}
	if b != overflow-1 {
		t.Errorf("the last bucket before longest is %d, want %d", b, overflow-1)
	}
	for _, d := range []time.Duration{longest, longest + 1, math.MaxInt64} {
		if got := bucketOf(d); got != overflow {
			t.Errorf("bucketOf(%d ns) = %d, want overflow %d", d, got, overflow)
		}
	}
	for _, d := range []time.Duration{math.MinInt64, -1, 0, shortest - 1} {
		if got := bucketOf(d); got != underflow {
			t.Errorf("bucketOf(%d ns) = %d, want underflow", d, got)
		}
	}
}

// Whatever the fraction, the answer for a bucket is within 2% of every duration
// that the bucket may hold.
func TestWithinIsWithinTwoPercent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := rapid.Custom(func(t *rapid.T) time.Duration {
			exp := rapid.Float64Range(minExp, maxExp-1e-9).Draw(t, "exp")
			return time.Duration(math.Exp2(exp))
		}).Draw(t, "d")
		f := rapid.Float64Range(0, 1).Draw(t, "f")
		got := within(bucketOf(d), f)
		if e := relative(got, d); math.Abs(e) > 0.02 {
			t.Fatalf("within(bucketOf(%v), %v) = %v, off by %.2f%%", d, f, got, 100*e)
		}
	})
	// The edges of one bucket, which random durations seldom meet.
	for b := 1; b < overflow; b++ {
		low := edgeOf(b)
		high := edgeOf(b+1) - 1
		for _, f := range []float64{0, 0.5, 1} {
			v := within(b, f)
			if math.Abs(relative(v, low)) > 0.02 || math.Abs(relative(v, high)) > 0.02 {
				t.Fatalf("bucket %d [%d, %d]: within(%v) = %d ns, off by more than 2%%", b, low, high, f, v)
			}
		}
	}
}

// edgeOf returns the shortest duration of bucket b, found by looking.
func edgeOf(b int) time.Duration {
	low, high := time.Duration(0), longest+1
	for low < high {
		if mid := (low + high) / 2; bucketOf(mid) < b {
			low = mid + 1
		} else {
			high = mid
		}
	}
	return low
}

func relative(got, want time.Duration) float64 {
	return float64(got-want) / float64(want)
}
