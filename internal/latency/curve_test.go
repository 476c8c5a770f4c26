package latency

import (
	"fmt"
	"math"
	"testing"
	"time"
)

type sample struct {
	d        time.Duration
	censored bool
}

// fitted returns the curve of samples as a fresh Tracker makes it.
func fitted(samples []sample) *curve {
	var words [buckets]uint64
	for _, s := range samples {
		if s.censored {
			words[bucketOf(s.d)] += oneCensored
		} else {
			words[bucketOf(s.d)] += oneCompleted
		}
	}
	c := new(curve)
	c.fit(&words, uint64(len(samples)))
	return c
}

// Freireich et al. 1963, the weeks in remission of 21 leukaemia patients on
// 6-MP, the example of most textbooks (Kleinbaum and Klein, "Survival Analysis",
// table 2.1 and section 2.IV). Survival and Greenwood's standard errors below are
// the published ones.
// Where one is censored in the week in which others relapse, the textbook takes
// him to be at risk for all of it, so here he is censored half a week later, in
// another bucket.
func TestFitTextbook(t *testing.T) {
	const week = 10 * time.Millisecond
	var samples []sample
	for _, w := range []float64{6, 6, 6, 7, 10, 13, 16, 22, 23} {
		samples = append(samples, sample{time.Duration(w * float64(week)), false})
	}
	for _, w := range []float64{6.5, 9, 10.5, 11, 17, 19, 20, 25, 32, 32, 34, 35} {
		samples = append(samples, sample{time.Duration(w * float64(week)), true})
	}
	c := fitted(samples)
	for _, want := range []struct{ week, survival, se float64 }{
		{5, 1, 0},
		{6, 0.8571, 0.0764}, // 1 x 18/21
		{7, 0.8067, 0.0869}, // x 16/17
		{10, 0.7529, 0.0963},
		{13, 0.6902, 0.1068},
		{16, 0.6275, 0.1141},
		{22, 0.5378, 0.1282},
		{23, 0.4482, 0.1346},
		{34, 0.4482, 0.1346}, // the longest four are all censored: flat to the end
	} {
		point := c.points[bucketOf(time.Duration(want.week*float64(week)))].Load()
		survival := 1 - float64(point>>32)/scale
		if math.Abs(survival-want.survival) > 0.00006 {
			t.Errorf("week %v: survival %.4f, want %.4f", want.week, survival, want.survival)
		}
		// effective n is rounded to a whole number, hence the wider tolerance
		se := 0.0
		if n := float64(point % scale); n > 0 {
			se = math.Sqrt(survival * (1 - survival) / n)
		}
		if math.Abs(se-want.se) > 0.0025 {
			t.Errorf("week %v: standard error %.4f, want %.4f", want.week, se, want.se)
		}
	}
	// The curve ends at 0.55, so there is a median and no p60.
	if _, ok := c.quantile(0.60); ok {
		t.Error("p60 is ok, but the curve never reaches it")
	}
}

// A censored sample in the bucket of a completed one is at risk for half of it:
// 1 - 1/(4 - 1/2), not 1 - 1/4 or 1 - 1/3.
func TestFitHalvesTies(t *testing.T) {
	const d = 10 * time.Millisecond
	c := fitted([]sample{{d, false}, {d, true}, {2 * d, false}, {3 * d, false}})
	got := 1 - float64(c.upTo(bucketOf(d)))/scale
	if want := 1 - 1/3.5; math.Abs(got-want) > 1e-9 {
		t.Errorf("survival %v, want %v", got, want)
	}
}

// Without censoring the effective sample size is the number of samples, in
// every bucket, and a quantile is answered exactly from the documented n on.
func TestEnoughSamples(t *testing.T) {
	for _, tc := range []struct {
		q    float64
		need int
	}{{0.50, 6}, {0.95, 72}, {0.99, 368}, {0.999, 3688}} {
		for _, n := range []int{1, tc.need - 1, tc.need, tc.need + 1, 3 * tc.need} {
			t.Run(fmt.Sprintf("p%v of %d", 100*tc.q, n), func(t *testing.T) {
				var samples []sample
				for i := range n {
					samples = append(samples, sample{time.Duration(i+1) * 100 * time.Microsecond, false})
				}
				c := fitted(samples)
				for b := range buckets {
					point := c.points[b].Load()
					if point>>32 != 0 && point%scale != uint64(n) {
						t.Fatalf("bucket %d: effective n %d, want %d", b, point%scale, n)
					}
				}
				if _, ok := c.quantile(tc.q); ok != (n >= tc.need) {
					t.Errorf("ok is %v with %d samples, needs %d", ok, n, tc.need)
				}
			})
		}
	}
}

// The quantile k/n of n samples is the k-th shortest, not the one after.
func TestQuantileRank(t *testing.T) {
	var samples []sample
	for k := range 100 {
		samples = append(samples, sample{time.Duration(math.Pow(1.07, float64(k)) * float64(time.Millisecond)), false})
	}
	c := fitted(samples)
	for k := 1; k <= 95; k++ {
		q := float64(k) / 100
		if d, _ := c.quantile(q); math.Abs(relative(d, samples[k-1].d)) > 0.02 {
			t.Errorf("p%d = %v, want %v", k, d, samples[k-1].d)
		}
	}
}

// What censoring leaves must suffice: the same rules, seen from below and above.
func TestCensoringCosts(t *testing.T) {
	const ms = time.Millisecond
	// spread returns n samples evenly over (from, to].
	spread := func(n int, from, to time.Duration, censored bool) (s []sample) {
		for i := range n {
			s = append(s, sample{from + (to-from)*time.Duration(i+1)/time.Duration(n), censored})
		}
		return s
	}
	join := func(parts ...[]sample) (all []sample) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	for _, tc := range []struct {
		name    string
		samples []sample
		q       float64
		want    time.Duration // 0: not ok
	}{
		{"all completed", spread(1000, 0, 100*ms, false), 0.95, 95 * ms},
		{"all censored", spread(1000, 0, 100*ms, true), 0.50, 0},
		{"all censored beyond the quantile", join(
			spread(960, 0, 96*ms, false), spread(40, 96*ms, 100*ms, true)), 0.95, 95 * ms},
		{"all censored before the quantile", join(
			spread(940, 0, 94*ms, false), spread(60, 94*ms, 100*ms, true)), 0.95, 0},
		// 20 of 1000 outlive a cut at 50 ms and 2% of those decide p99: less than
		// one attempt. Of a hundred times as many 40 do.
		{"few survivors", join(
			spread(500, 0, 50*ms, false), spread(480, 50*ms, 51*ms, true),
			spread(20, 51*ms, 101*ms, false)), 0.99, 0},
		{"many survivors", join(
			spread(50_000, 0, 50*ms, false), spread(48_000, 50*ms, 51*ms, true),
			spread(2000, 51*ms, 101*ms, false)), 0.99, 100 * ms},
		// Ten or so are enough by their number, and still too vague.
		{"some survivors", join(
			spread(10_000, 0, 50*ms, false), spread(9600, 50*ms, 51*ms, true),
			spread(400, 51*ms, 101*ms, false)), 0.99, 0},
		// Half of the attempts fail at once: they tell nothing, the others all.
		{"early failures, too few left", join(
			spread(110, 0, ms, true), spread(60, ms, 100*ms, false)), 0.95, 0},
		{"early failures, enough left", join(
			spread(90, 0, ms, true), spread(100, ms, 101*ms, false)), 0.95, 96 * ms},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d, ok := fitted(tc.samples).quantile(tc.q)
			if ok != (tc.want != 0) {
				t.Fatalf("p%v = %v, %v; want ok %v", 100*tc.q, d, ok, tc.want != 0)
			}
			if ok && math.Abs(relative(d, tc.want)) > 0.03 {
				t.Errorf("p%v = %v, want %v", 100*tc.q, d, tc.want)
			}
		})
	}
}
