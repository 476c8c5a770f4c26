package retry

import (
	"fmt"
	"math"
	"math/big"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// epoch0 has no monotonic reading, so every time in these tests is exact.
var epoch0 = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

func at(d time.Duration) time.Time { return epoch0.Add(d) }

func newBudget(t testing.TB, cfg BudgetConfig) *Budget {
	t.Helper()
	b, err := NewBudget(cfg, epoch0)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestBudgetSteps tells the life of one budget: Max 0.5, a window of 10 s.
func TestBudgetSteps(t *testing.T) {
	const ms, s = time.Millisecond, time.Second
	type step struct {
		at      time.Duration
		op      string // "deposit", "take", "refused" or "back"
		n       int
		arg     time.Duration // the withdrawal that "back" gives back
		balance float64       // after it
		why     string
	}
	for _, test := range []struct {
		name  string
		cfg   BudgetConfig
		steps []step
	}{
		{"a first attempt pays in half", BudgetConfig{Max: 0.5}, []step{
			{at: 0, op: "deposit", n: 0, balance: 1, why: "the first call may be hedged"},
			{at: 0, op: "take", n: 1, balance: 0},
			{at: 0, op: "refused", n: 1, balance: 0},
			{at: 1 * ms, op: "deposit", n: 1, balance: 0.5},
			{at: 2 * ms, op: "refused", n: 1, balance: 0.5, why: "a refusal costs nothing"},
			{at: 3 * ms, op: "deposit", n: 1, balance: 1},
			{at: 4 * ms, op: "take", n: 1, balance: 0},
		}},
		{"a window's budget at once, nothing older", BudgetConfig{Max: 0.5}, []step{
			{at: 0, op: "deposit", n: 100, balance: 51},
			{at: 9 * s, op: "deposit", n: 20, balance: 61},
			{at: 9999 * ms, op: "deposit", n: 0, balance: 61, why: "the first slot is whole in the window"},
			{at: 10 * s, op: "deposit", n: 0, balance: 11, why: "no longer"},
			{at: 10 * s, op: "take", n: 11, balance: 0},
			{at: 10 * s, op: "refused", n: 1, balance: 0},
			{at: 19 * s, op: "refused", n: 1, balance: 0},
			{at: 20039 * ms, op: "refused", n: 1, balance: 0, why: "some may have been spent within the last 10 s"},
			{at: 20040 * ms, op: "take", n: 1, balance: 0, why: "the 1; the total would have paid for 50"},
		}},
		{"what is given back can be taken again", BudgetConfig{Max: 0.5}, []step{
			{at: 1 * s, op: "take", n: 1, balance: 0},
			{at: 2 * s, op: "back", arg: 1 * s, balance: 1},
			{at: 2 * s, op: "take", n: 1, balance: 0},
			{at: 2 * s, op: "refused", n: 1, balance: 0},
		}},
		{"given back late, it is the total's alone", BudgetConfig{Max: 0.5}, []step{
			{at: 1 * s, op: "take", n: 1, balance: 0},
			{at: 60 * s, op: "refused", n: 1, balance: 0, why: "no traffic: the total is spent"},
			{at: 60 * s, op: "back", arg: 1 * s, balance: 1},
			{at: 60 * s, op: "take", n: 1, balance: 0},
			{at: 61 * s, op: "refused", n: 1, balance: 0},
		}},
		{"given back late, another in its place in the ring", BudgetConfig{Max: 1}, []step{
			{at: 1 * s, op: "take", n: 1, balance: 0},
			{at: 1 * s, op: "deposit", n: 9, balance: 9},
			{at: 11240 * ms, op: "take", n: 1, balance: 0, why: "256 slots on"},
			{at: 11240 * ms, op: "back", arg: 1 * s, balance: 0},
			{at: 11300 * ms, op: "refused", n: 1, balance: 0},
		}},
		{"deposited late, another in its place in the ring", BudgetConfig{Max: 1}, []step{
			{at: 15 * s, op: "deposit", n: 3, balance: 4},
			{at: 4760 * ms, op: "deposit", n: 1, balance: 1, why: "256 slots before"},
			{at: 15100 * ms, op: "deposit", n: 0, balance: 4},
		}},
		{"given back what was never taken", BudgetConfig{Max: 0.5}, []step{
			{at: 1 * s, op: "back", arg: 1 * s, balance: 1},
			{at: 1 * s, op: "take", n: 1, balance: 0},
			{at: 1 * s, op: "back", arg: 1 * s, balance: 1},
			{at: 1 * s, op: "back", arg: 1 * s, balance: 1},
		}},
		{"minPerSecond: a quiet client can retry", BudgetConfig{Max: 0.5, MinPerSecond: 1}, []step{
			{at: 0, op: "take", n: 1, balance: 0, why: "no time has passed"},
			{at: 500 * ms, op: "refused", n: 1, balance: 0.5},
			{at: 1 * s, op: "take", n: 1, balance: 0},
			{at: 100 * s, op: "take", n: 11, balance: 0, why: "1 + 1/s x 10 s, not the 100 that passed"},
			{at: 100 * s, op: "refused", n: 1, balance: 0},
		}},
		{"time going back changes nothing", BudgetConfig{Max: 0.5}, []step{
			{at: 30 * s, op: "deposit", n: 4, balance: 3},
			{at: 30 * s, op: "take", n: 2, balance: 1},
			{at: 25 * s, op: "take", n: 1, balance: 0, why: "counts as made at 30 s"},
			{at: 25 * s, op: "back", arg: 25 * s, balance: 0, why: "the slot of 25 s has none to give"},
			{at: -5 * s, op: "deposit", n: 1, balance: 0},
			{at: 20 * s, op: "refused", n: 1, balance: 0},
			{at: 1 * s, op: "deposit", n: 20, balance: 0, why: "long out of the window"},
			{at: 30 * s, op: "refused", n: 1, balance: 0},
			{at: 31 * s, op: "deposit", n: 2, balance: 1},
			{at: 25 * s, op: "deposit", n: 2, balance: 1, why: "late, in the window; the 2 of 31 s are in its future"},
			{at: 31 * s, op: "deposit", n: 0, balance: 2},
			{at: 30500 * ms, op: "deposit", n: 1, balance: 1.5, why: "from the future, which TryWithdraw does not see"},
			{at: 31 * s, op: "deposit", n: 0, balance: 2.5},
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := newBudget(t, test.cfg)
			for i, s := range test.steps {
				switch s.op {
				case "deposit":
					for range s.n {
						b.Deposit(at(s.at))
					}
				case "back":
					b.GiveBack(at(s.arg))
				default:
					for j := range s.n {
						if got, want := b.TryWithdraw(at(s.at)), s.op == "take"; got != want {
							t.Fatalf("step %d, withdrawal %d at %v = %v, want %v %s", i, j, s.at, got, want, s.why)
						}
					}
				}
				if got := b.Balance(at(s.at)); math.Abs(got-s.balance) > 1e-9 {
					t.Fatalf("step %d, %s at %v: balance %v, want %v %s", i, s.op, s.at, got, s.balance, s.why)
				}
			}
		})
	}
}

func TestNewBudgetFaults(t *testing.T) {
	for _, test := range []struct {
		cfg  BudgetConfig
		want string // "" is none
	}{
		{BudgetConfig{Max: 1}, ""},
		{BudgetConfig{Max: 0.000001, MinPerSecond: 1e6, Window: time.Hour}, ""},
		{BudgetConfig{Max: 1.5}, "retry: budget max 1.5, want (0, 1]"},
		{BudgetConfig{}, "retry: budget max 0, want (0, 1]"},
		{BudgetConfig{Max: math.NaN()}, "retry: budget max NaN, want (0, 1]"},
		{BudgetConfig{Max: 1e-7}, "retry: budget max 1e-07, want at least 0.000001"},
		{BudgetConfig{Max: 1, MinPerSecond: 1e-7}, "retry: budget minPerSecond 1e-07, want 0 or at least 0.000001"},
		{BudgetConfig{Max: 1, MinPerSecond: math.Inf(1)}, "retry: budget minPerSecond +Inf, want [0, 1000000]"},
		{BudgetConfig{Max: 1, Window: time.Millisecond}, "retry: budget window 1ms, want [10ms, 1h0m0s]"},
		{BudgetConfig{Max: -1, MinPerSecond: -2, Window: -3}, "retry: budget max -1, want (0, 1]\n" +
			"retry: budget minPerSecond -2, want [0, 1000000]\nretry: budget window -3ns, want [10ms, 1h0m0s]"},
	} {
		b, err := NewBudget(test.cfg, epoch0)
		switch {
		case test.want == "" && err != nil:
			t.Errorf("NewBudget(%+v): %v", test.cfg, err)
		case test.want != "" && (err == nil || err.Error() != test.want):
			t.Errorf("NewBudget(%+v): %v, want %s", test.cfg, err, test.want)
		case (b == nil) == (err == nil):
			t.Errorf("NewBudget(%+v) = %v, %v", test.cfg, b, err)
		}
	}
}

// 0.0157 x 10^6 is 15699.999999999998 in float64; 2/3 must not be rounded up.
func TestBudgetMaxToAMillionth(t *testing.T) {
	for _, test := range []struct {
		max  float64
		want uint64
	}{{0.0157, 15_700}, {0.29, 290_000}, {2.0 / 3, 666_666}, {0.000001, 1}, {0.07, 70_000}, {1, 1_000_000}} {
		if got := newBudget(t, BudgetConfig{Max: test.max}).max; got != test.want {
			t.Errorf("max %v counts as %d millionths, want %d", test.max, got, test.want)
		}
	}
}

// ledger is the dumb model: every first attempt and every extra one that is not
// given back, by its time, sorted.
type ledger struct {
	max, min       int64 // millionths
	window         time.Duration
	firsts, extras []time.Duration
	late           []time.Duration // when deposits that came late were made
}

func insert(times []time.Duration, d time.Duration) []time.Duration {
	i := sort.Search(len(times), func(i int) bool { return times[i] > d })
	return slices.Insert(times, i, d)
}

func remove(times []time.Duration, d time.Duration) []time.Duration {
	i, _ := slices.BinarySearch(times, d)
	return slices.Delete(times, i, i+1)
}

// since counts the times after d.
func since(times []time.Duration, d time.Duration) int64 {
	return int64(len(times) - sort.Search(len(times), func(i int) bool { return times[i] > d }))
}

// within reports extra <= slack + max x first + min x span, in integers.
func (l *ledger) within(extra, slack, first int64, span time.Duration) bool {
	unit := big.NewInt(1e15)
	left := new(big.Int).Mul(big.NewInt(extra-slack), unit)
	right := new(big.Int).Mul(big.NewInt(l.max*first), big.NewInt(1e9))
	right.Add(right, new(big.Int).Mul(big.NewInt(l.min), big.NewInt(int64(span))))
	return left.Cmp(right) <= 0
}

// check is the promise: both bounds, at a withdrawal that has just been made.
func (l *ledger) check(now time.Duration) error {
	if extra, first := int64(len(l.extras)), int64(len(l.firsts)); !l.within(extra, 1, first, now) {
		return fmt.Errorf("at %v: %d extra attempts after %d first ones since the start", now, extra, first)
	}
	extra, first := since(l.extras, now-l.window), since(l.firsts, now-l.window)
	if !l.within(extra, 1, first, l.window) {
		return fmt.Errorf("at %v: %d extra attempts and %d first ones in the last %v", now, extra, first, l.window)
	}
	return nil
}

// mustGrant reports that a refusal would be wrong: one more extra attempt keeps
// both bounds, even with a slot to spare at either end.
func (l *ledger) mustGrant(now time.Duration) bool {
	slot := l.window / windowSlots
	late := since(l.late, now-slot) // it may not know of these yet
	return l.within(int64(len(l.extras))+1, 1, int64(len(l.firsts))-late, now) &&
		l.within(since(l.extras, now-l.window-slot-1)+1, 1, since(l.firsts, now-l.window+slot)-late, l.window)
}

// TestBudgetBounds drives a budget with random traffic from 1 to 100,000 calls/s
// and holds every answer against the model: what is granted keeps both bounds
// exactly, what is refused would have broken one (to a slot).
func TestBudgetBounds(t *testing.T) {
	var granted, refused, stalls int
	rapid.Check(t, func(t *rapid.T) {
		window := rapid.SampledFrom([]time.Duration{minWindow, 100 * time.Millisecond, time.Second, 3333333250, defaultWindow, time.Minute}).Draw(t, "window")
		l := &ledger{window: window}
		l.max = rapid.OneOf(rapid.SampledFrom([]int64{10_000, 50_000, 200_000, 1_000_000}), rapid.Int64Range(1, 1_000_000)).Draw(t, "max")
		if rapid.Bool().Draw(t, "minimum") {
			l.min = rapid.OneOf(rapid.SampledFrom([]int64{1_000_000, 333_333}), rapid.Int64Range(1, 50_000_000)).Draw(t, "min")
		}
		b, err := NewBudget(BudgetConfig{Max: float64(l.max) / 1e6, MinPerSecond: float64(l.min) / 1e6, Window: window}, epoch0)
		if err != nil {
			t.Fatal(err)
		}
		var now, latest time.Duration // latest is the last withdrawal's
		// A clock that jumps back books a withdrawal later than its own now, and a
		// give-back may miss it: the bounds hold, the refusals are not judged.
		jumpy := rapid.Bool().Draw(t, "jumpy")
		withdraw := func() {
			when := now
			if jumpy && rapid.IntRange(0, 9).Draw(t, "jump") == 0 {
				when -= time.Duration(rapid.Int64Range(0, int64(window)).Draw(t, "back"))
			}
			effective := max(when, latest)
			must := !jumpy && l.mustGrant(effective)
			if (b.Balance(at(when)) >= 1) != b.TryWithdraw(at(when)) {
				t.Fatalf("at %v: Balance and TryWithdraw disagree", when)
			}
			// The two cannot disagree, so the book says what was granted.
			if before := len(l.extras); b.extraTotal > uint64(before) {
				latest = effective
				l.extras = insert(l.extras, effective)
				granted++
				if err := l.check(effective); err != nil {
					t.Fatal(err)
				}
				if rapid.IntRange(0, 7).Draw(t, "unsent") == 0 {
					if d := time.Duration(rapid.Int64Range(0, 2*int64(window)).Draw(t, "unsent for")); rapid.Bool().Draw(t, "later") {
						now += d
					}
					b.GiveBack(at(when))
					l.extras = remove(l.extras, effective)
				}
			} else {
				refused++
				if must {
					t.Fatalf("at %v: refused, with %d extra attempts after %d first ones, %d and %d of them in the last %v",
						effective, len(l.extras), len(l.firsts), since(l.extras, effective-window), since(l.firsts, effective-window), window)
				}
			}
		}
		for range rapid.IntRange(1, 12).Draw(t, "phases") {
			rate := math.Pow(10, rapid.Float64Range(0, 5).Draw(t, "log rate"))
			gap := time.Duration(float64(time.Second) / rate)
			demand := rapid.SampledFrom([]float64{0, 0.05, 0.3, 1, 3}).Draw(t, "demand")
			wanted := 0.0
			for range rapid.IntRange(1, 300).Draw(t, "calls") {
				now += gap
				stamp := now
				if rapid.IntRange(0, 19).Draw(t, "late") == 0 {
					stamp = max(0, stamp-time.Duration(rapid.Int64Range(0, 2*int64(window)).Draw(t, "by")))
				}
				b.Deposit(at(stamp))
				l.firsts = insert(l.firsts, stamp)
				if stamp != now {
					l.late = append(l.late, now)
				}
				for wanted += demand; wanted >= 1; wanted-- {
					withdraw()
				}
			}
			switch rapid.IntRange(0, 3).Draw(t, "then") {
			case 0: // a pause, of up to three windows
				now += time.Duration(rapid.Int64Range(0, 3*int64(window)).Draw(t, "pause"))
			case 1: // a stall: everyone wants an extra attempt at once
				stalls++
				for range rapid.IntRange(1, 50).Draw(t, "burst") {
					withdraw()
				}
			}
		}
	})
	t.Logf("%d withdrawals granted, %d refused, %d stalls", granted, refused, stalls)
	if granted == 0 || refused == 0 {
		t.Error("the property was vacuous")
	}
}

// TestBudgetIsUsable is the other half of a bound: under steady demand the whole
// of Max is granted, at any rate; after a calm window it is there at once; and
// nothing older.
func TestBudgetIsUsable(t *testing.T) {
	rates := []int{1, 5, 100, 1_000, 10_000, 100_000}
	if testing.Short() {
		rates = rates[:5] // the last takes three seconds under the race detector
	}
	for _, rate := range rates {
		for _, limit := range []float64{0.01, 0.05, 0.5, 1} {
			t.Run(fmt.Sprintf("rate=%d,max=%v", rate, limit), func(t *testing.T) {
				window := 10 * time.Second
				if rate >= 10_000 {
					window = time.Second // as many slots, fewer calls to make
				}
				perWindow := rate * int(window/time.Second)
				gap := time.Second / time.Duration(rate)

				b := newBudget(t, BudgetConfig{Max: limit, Window: window})
				var now time.Duration
				calls, extras := max(5*perWindow, int(100/limit)), 0
				for range calls {
					now += gap
					b.Deposit(at(now))
					if b.TryWithdraw(at(now)) {
						extras++
					}
				}
				if got := float64(extras) / (limit * float64(calls)); got < 0.97 || got > 1+1/(limit*float64(calls)) {
					t.Errorf("steady demand got %d extra attempts after %d calls, %.4f of max", extras, calls, got)
				}

				b = newBudget(t, BudgetConfig{Max: limit, Window: window})
				now = 0
				for range 3*perWindow + 1 {
					b.Deposit(at(now))
					now += gap
				}
				now -= gap
				for extras = 0; b.TryWithdraw(at(now)); extras++ {
				}
				full := limit * float64(perWindow)
				if low, high := math.Floor(1+0.996*full-limit), math.Floor(1+full); float64(extras) < low || float64(extras) > high {
					t.Errorf("a stall after a calm window got %d extra attempts, want %v to %v", extras, low, high)
				}

				now += window + window/windowSlots
				for extras = 0; b.TryWithdraw(at(now)); extras++ {
				}
				// The total forbids even the 1 when the stall has spent all of it.
				if extras > 1 {
					t.Errorf("after a silent window: %d extra attempts, want at most 1", extras)
				}
			})
		}
	}
}

// event is one line of the log of a concurrent run. A first attempt or a
// give-back is numbered before its call and a withdrawal after it, so whatever a
// withdrawal can have seen stands before it.
type event struct {
	n    int64
	kind byte // 'f'irst, 'e'xtra, 'g'iven back
	at   time.Duration
}

// TestBudgetConcurrent runs eight goroutines through slots of virtual time, at 1
// to 100,000 calls/s, and holds both bounds at every withdrawal of the log. All
// wait for each other between slots, so that the log's order is the clock's.
func TestBudgetConcurrent(t *testing.T) {
	const goroutines = 8
	for _, rate := range []int{1, 10, 1_000, 100_000} {
		for _, limit := range []float64{0.05, 0.5} {
			t.Run(fmt.Sprintf("rate=%d,max=%v", rate, limit), func(t *testing.T) {
				window := time.Second
				switch {
				case rate <= 10:
					window = time.Minute
				case rate == 100_000 && testing.Short():
					window = time.Second / 10
				}
				slot := window / windowSlots
				l := &ledger{max: int64(limit * 1e6), window: window}
				b := newBudget(t, BudgetConfig{Max: limit, Window: window})
				var seq atomic.Int64
				var log []event
				calls := 0.0
				for phase := 0; phase < 700; phase++ {
					switch phase {
					case 300:
						phase += 125 // a pause of half a window
					case 450:
						phase += 251 // and of a whole one
					}
					calls += float64(rate) * slot.Seconds()
					n := int(calls)
					calls -= float64(n)
					var wg sync.WaitGroup
					logs := make([][]event, goroutines)
					for g := range goroutines {
						wg.Go(func() {
							record := func(kind byte, d time.Duration) {
								logs[g] = append(logs[g], event{seq.Add(1), kind, d})
							}
							// Stamps run through the slot, each goroutine at its own pace.
							now := time.Duration(phase)*slot + slot*time.Duration(g)/goroutines
							for i := g; i < n; i += goroutines {
								now += slot / time.Duration(goroutines*(n+1))
								record('f', now)
								b.Deposit(at(now))
								if b.TryWithdraw(at(now)) {
									record('e', now)
									if i%5 == 0 {
										record('g', now)
										b.GiveBack(at(now))
									}
								}
							}
							if n == 0 && b.TryWithdraw(at(now)) {
								record('e', now)
							}
						})
					}
					wg.Wait()
					log = append(log, slices.Concat(logs...)...)
				}
				firsts, extras := checkLog(t, l, log)
				t.Logf("%d first attempts, %d extra", firsts, extras)
				if extras == 0 {
					t.Error("no withdrawal: vacuous")
				}
				if got := int(b.extraTotal); got != extras {
					t.Errorf("the budget counts %d extra attempts, the log %d", got, extras)
				}
				b.sums.epoch = -1 // see the late ones, too
				if got := int(b.funds(b.elapsed).total.whole); got != int(l.max)*firsts/million {
					t.Errorf("the budget has %d paid for after %d first attempts: deposits were lost", got, firsts)
				}
			})
		}
	}
}

// checkLog holds both bounds at every withdrawal of a log.
func checkLog(t *testing.T, l *ledger, log []event) (firsts, extras int) {
	t.Helper()
	slices.SortFunc(log, func(a, b event) int { return int(a.n - b.n) })
	for _, e := range log {
		switch e.kind {
		case 'f':
			l.firsts = insert(l.firsts, e.at)
		case 'g':
			l.extras = remove(l.extras, e.at)
		case 'e':
			l.extras = insert(l.extras, e.at)
			if err := l.check(e.at); err != nil {
				t.Fatalf("event %d: %v", e.n, err)
			}
		}
	}
	return len(l.firsts), len(l.extras)
}

// TestBudgetConcurrentFreely lets goroutines race through one virtual clock with
// no order among them: slots are taken over while late deposits still arrive. The
// total must hold at every withdrawal, and not one deposit may be lost.
func TestBudgetConcurrentFreely(t *testing.T) {
	const goroutines, calls = 8, 20_000
	b := newBudget(t, BudgetConfig{Max: 0.2, Window: minWindow})
	l := &ledger{max: 200_000, window: time.Hour} // the window is not judged here
	var clock, seq atomic.Int64
	logs := make([][]event, goroutines)
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			for i := range calls {
				// From 1 call in 100 ns to one in 100 us: a slot. In between, jumps.
				step := int64(100) << (i / 2000)
				if i%4000 == 0 {
					step = int64(3 * minWindow)
				}
				now := time.Duration(clock.Add(step))
				logs[g] = append(logs[g], event{seq.Add(1), 'f', now})
				b.Deposit(at(now))
				if b.TryWithdraw(at(now)) {
					logs[g] = append(logs[g], event{seq.Add(1), 'e', now})
				}
			}
		})
	}
	wg.Wait()
	log := slices.Concat(logs...)
	slices.SortFunc(log, func(a, b event) int { return int(a.n - b.n) })
	var firsts, extras int64
	for _, e := range log {
		if e.kind == 'f' {
			firsts++
		} else if extras++; !l.within(extras, 1, firsts, 0) {
			t.Fatalf("event %d: %d extra attempts after %d first ones", e.n, extras, firsts)
		}
	}
	b.sums.epoch = -1 // see the late ones, too
	if got := b.funds(b.elapsed).total.whole; got != goroutines*calls/5 {
		t.Errorf("%d deposits pay for %d, want %d", goroutines*calls, got, goroutines*calls/5)
	}
	if extras < goroutines*calls/5/2 {
		t.Errorf("%d extra attempts, want at least half of %d", extras, goroutines*calls/5)
	}
}

// TestBudgetFullSlot fills one slot's 26 bits: the rest counts in the total alone.
func TestBudgetFullSlot(t *testing.T) {
	b := newBudget(t, BudgetConfig{Max: 1, Window: time.Hour})
	b.first[0].Store(countMask - 1)
	for range 3 {
		b.Deposit(at(0))
	}
	f := b.funds(0)
	if f.window.whole != countMask || f.total.whole != countMask+2 {
		t.Errorf("window %d, total %d, want %d and %d", f.window.whole, f.total.whole, countMask, countMask+2)
	}
	// A year of a million calls/s overflows nothing.
	b.gone.Store(32e12)
	b.extraTotal = 32e12
	year := 365 * 24 * time.Hour
	if got := b.Balance(at(year)); got != 1 {
		t.Errorf("balance %v, want 1: the window is empty", got)
	}
}

func TestBudgetAllocatesNothing(t *testing.T) {
	b := newBudget(t, BudgetConfig{Max: 0.5})
	now := epoch0
	if n := testenv.Allocs(1000, func() {
		now = now.Add(time.Millisecond)
		b.Deposit(now)
		if b.TryWithdraw(now) {
			b.GiveBack(now)
		}
		b.Balance(now)
	}); n != 0 {
		t.Errorf("%v allocations per call, want 0", n)
	}
}

func BenchmarkBudget(b *testing.B) {
	// Time passes at 100,000 calls/s.
	const gap = 10 * time.Microsecond
	serial := func(name string, call func(*Budget, time.Time)) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			budget := newBudget(b, BudgetConfig{Max: 0.05})
			now := epoch0
			for b.Loop() {
				now = now.Add(gap)
				call(budget, now)
			}
		})
		b.Run(name+"Parallel", func(b *testing.B) {
			b.ReportAllocs()
			budget := newBudget(b, BudgetConfig{Max: 0.05})
			b.RunParallel(func(pb *testing.PB) {
				now := epoch0
				for pb.Next() {
					now = now.Add(gap)
					call(budget, now)
				}
			})
		})
	}
	serial("Deposit", (*Budget).Deposit)
	serial("TryWithdraw", func(b *Budget, now time.Time) { b.TryWithdraw(now) })
	// A call as hedging makes it when one in twenty wants an extra attempt.
	serial("Call", func(b *Budget, now time.Time) {
		b.Deposit(now)
		if now.UnixMicro()/10%20 == 0 {
			b.TryWithdraw(now)
		}
	})
}

// Level tells what is left beside what the window pays for in all.
func TestBudgetLevel(t *testing.T) {
	start := time.Unix(1_800_000_000, 0)
	b, err := NewBudget(BudgetConfig{Max: 0.1, Window: 10 * time.Second}, start)
	if err != nil {
		t.Fatal(err)
	}
	check := func(when string, at time.Duration, balance, allowance float64) {
		t.Helper()
		l, a := b.Level(start.Add(at))
		if math.Abs(l-balance) > 1e-6 || math.Abs(a-allowance) > 1e-6 {
			t.Errorf("%s: %v of %v, want %v of %v", when, l, a, balance, allowance)
		}
	}
	check("new", 0, 1, 1)
	for range 100 {
		b.Deposit(start)
	}
	check("after 100 first attempts", time.Second, 11, 11)
	for range 4 {
		b.TryWithdraw(start.Add(time.Second))
	}
	check("4 withdrawn", 2*time.Second, 7, 11)
	b.GiveBack(start.Add(time.Second))
	check("one given back", 2*time.Second, 8, 11)
	check("after a window of silence", time.Minute, 1, 1)
}
