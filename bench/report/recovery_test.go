package report

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

// shares are blocks of half a second with 100 requests each, of which so many
// succeed; -1 leaves a block out.
func shares(percent ...int) (blocks []Block) {
	for i, ok := range percent {
		if ok < 0 {
			continue
		}
		blocks = append(blocks, Block{At: time.Duration(i) * time.Second / 2, Length: time.Second / 2,
			Latencies: make([]time.Duration, ok), Errors: 100 - ok, Calls: 100, Attempts: int64(200 - ok)})
	}
	return blocks
}

func TestRecovered(t *testing.T) {
	const s = time.Second
	for _, c := range []struct {
		what   string
		blocks []Block
		from   time.Duration
		to     time.Duration
		want   float64 // -1: never
	}{
		{"at once", shares(0, 0, 100, 100, 100), s, 10 * s, 0},
		{"was never gone", shares(100, 100, 100, 100, 100), s, 10 * s, 0},
		{"95% is enough", shares(0, 0, 95, 95), s, 10 * s, 0},
		{"94% is not", shares(0, 0, 94, 95, 95), s, 10 * s, 0.5},
		{"later", shares(0, 0, 0, 50, 90, 100, 100), s, 10 * s, 1.5},
		{"back for too short", shares(0, 0, 100, 0, 100, 100), s, 10 * s, 1},
		{"good too shortly before the end", shares(0, 0, 0, 0, 100), s, 10 * s, -1},
		{"or before the next fault", shares(0, 0, 0, 100, 100), s, 2 * s, -1},
		{"never", shares(0, 0, 0, 0, 0), s, 10 * s, -1},
		{"nothing after it", shares(0, 0), s, 10 * s, -1},
		{"nothing at all", nil, s, 10 * s, -1},
		{"a block without requests says nothing", shares(0, 0, 100, -1, 100), s, 10 * s, 0},
		{"a block with both does not count", shares(0, 0, 100, 100, 100), 1250 * time.Millisecond, 10 * s, 0.25},
	} {
		got := recovered(c.blocks, scenario.Span{From: c.from, To: c.to})
		switch {
		case c.want < 0 && got != nil:
			t.Errorf("%s: after %v s, want never", c.what, *got)
		case c.want >= 0 && (got == nil || *got != c.want):
			t.Errorf("%s: %v, want after %v s", c.what, got, c.want)
		}
	}
}

// Before, in and after faults, of which the last that ended counts.
func TestRecovery(t *testing.T) {
	half := func(n int) scenario.Duration { return scenario.Duration(time.Duration(n) * time.Second / 2) }
	f := func(v float64) *float64 { return &v }
	once := scenario.Fault{From: half(2), For: half(2)}
	for _, c := range []struct {
		what   string
		faults []scenario.Fault
		blocks []Block
		want   *Recovery
	}{
		{"no fault", nil, shares(100), nil},
		{"always", []scenario.Fault{{}}, shares(100), nil},
		{"once", []scenario.Fault{once}, shares(100, 90, 20, 0, 50, 100, 100), &Recovery{
			Before: Phase{f(1.05), f(0.95)}, During: Phase{f(1.9), f(0.1)}, After: Phase{f(1 + 0.5/3), f(2.5 / 3)}, RecoveredS: f(0.5), Ended: true}},
		{"twice", []scenario.Fault{{From: half(2), For: half(2), Every: half(6)}}, shares(100, 100, 0, 0, 100, 100, 100, 100, 0, 0, 0, 0, 100, 100), &Recovery{
			Before: Phase{f(1), f(1)}, During: Phase{f(2), f(0)}, After: Phase{f(1.25), f(0.75)}, RecoveredS: f(1), Ended: true}},
		{"never well again", []scenario.Fault{once}, shares(100, 100, 0, 0, 0, 0), &Recovery{
			Before: Phase{f(1), f(1)}, During: Phase{f(2), f(0)}, After: Phase{f(2), f(0)}, Ended: true}},
		{"cut off in it", []scenario.Fault{once}, shares(100, 100, 0), &Recovery{
			Before: Phase{f(1), f(1)}, During: Phase{f(2), f(0)}}},
		{"ends as the run does", []scenario.Fault{once}, shares(100, 100, 0, 0), &Recovery{
			Before: Phase{f(1), f(1)}, During: Phase{f(2), f(0)}}},
		{"cut off in the second", []scenario.Fault{{From: half(2), For: half(2), Every: half(6)}}, shares(100, 100, 0, 0, 0, 100, 100, 100, 0), &Recovery{
			Before: Phase{f(1), f(1)}, During: Phase{f(2), f(0)}, After: Phase{f(1.25), f(0.75)}, RecoveredS: f(0.5), Ended: true}},
		{"cut off before it", []scenario.Fault{once}, shares(100), &Recovery{Before: Phase{f(1), f(1)}}},
		{"without end", []scenario.Fault{{From: half(1)}}, shares(100, 0), &Recovery{Before: Phase{f(1), f(1)}, During: Phase{f(2), f(0)}}},
	} {
		got := Policy{Blocks: c.blocks}.recovery(&scenario.Scenario{Faults: c.faults})
		near := cmp.Comparer(func(a, b float64) bool { return a-b < 1e-9 && b-a < 1e-9 })
		if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(Recovery{}), near); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.what, diff)
		}
	}
}
