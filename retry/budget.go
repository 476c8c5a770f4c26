package retry

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// defaultWindow is what Finagle's RetryBudget looks back over, too.
	defaultWindow = 10 * time.Second

	// Below minWindow a slot is shorter than what the goroutines of one process
	// differ by in their idea of now. Above maxWindow a busy client's slot fills.
	minWindow = 10 * time.Millisecond
	maxWindow = time.Hour

	maxMinPerSecond = 1e6
)

const (
	// A window is windowSlots slots long. Firsts are counted in the current slot
	// and the windowSlots-1 before it, which is never more than the window that
	// ends now; extras in one slot more, which is never less. So the bound holds
	// for the exact window, at the price of up to one part in windowSlots of it. With
	// 100 slots that price was visible in the p99.9 of hedged calls.
	windowSlots = 250
	// ringSlots is the next power of two that holds windowSlots+1.
	ringSlots = 256

	// A slot's word is its epoch and, in the low countBits, its first attempts.
	// 2^24 of them in a 250th of an hour are 1.1 million calls/s; what comes on top
	// counts in the total alone. The epoch's 40 bits repeat after 139 years of 1 s
	// windows, 500 days of the shortest ones.
	countBits = 24
	countMask = 1<<countBits - 1

	million = 1_000_000
	// unit is one attempt in the finest fraction there is: a millionth of an
	// attempt per second, for one nanosecond.
	unit = million * 1_000_000_000
)

// BudgetConfig says how many extra attempts a [Budget] allows.
type BudgetConfig struct {
	// Max is the number of extra attempts that each first attempt pays for, in
	// (0, 1], to a millionth (what is finer is cut off). At 0.05 a client of 5
	// calls/s gets 2.5 extra attempts in 10 s, one of 50,000 calls/s 25,000. There
	// is no default: above 1 every call could be sent twice and more.
	Max float64

	// MinPerSecond is the number of extra attempts allowed per second whatever
	// the traffic, in [0, 1e6], to a millionth. Default 0. It is for clients so
	// quiet that Max pays for nothing in time: at Max 0.05 and 1 call/minute an
	// extra attempt is earned in 20 minutes, with MinPerSecond 1 in a second. It
	// is load on top of Max: a thousand clients may send a thousand such attempts
	// per second.
	MinPerSecond float64

	// Window is how far back first attempts pay for extra ones, in [10ms, 1h].
	// Default 10s, because a stall of a backend lasts about that long and a
	// larger store of old budget would be spent on it all at once. It is cut to a
	// multiple of 250ns.
	Window time.Duration
}

// Budget is the one budget of a target's extra attempts, hedges and retries
// together. First attempts pay for it, so it needs no tuning to the traffic.
//
// Two bounds hold, exactly (in integers), at any rate and from any number of goroutines:
//
//   - since the start, extra <= 1 + Max x first + MinPerSecond x time
//   - in any span of Window that ends at a withdrawal or a reservation,
//     extra <= 1 + Max x first in it + MinPerSecond x Window,
//     where extra has those that are reserved and not sent yet
//
// The second speaks of spans that end at a withdrawal because no program can see
// the future: when traffic stops after the extra attempts were sent, a span that
// starts in mid-traffic and ends in the silence contains them, and not the first
// attempts that paid.
//
// For instance Max 0.05 at 5 calls/s: a window of 10 s holds 50 first attempts,
// so at most 1 + 0.05 x 50 = 3.5, that is 3, extra attempts fall into any 10 s,
// and in the long run one into 4 s. A stall can be answered with these 3 at once;
// the hour of calm before it adds nothing.
//
// The 1 lets the very first call of a client have an extra attempt.
//
// The methods take the time as an argument and read no clock. A time earlier than one
// already seen is harmless: a late Deposit counts where it belongs (from the next
// 250th of the window on), or only in the total when that part of the window
// is gone; a late withdrawal counts as made at the time of the latest one. A Budget is made by [NewBudget]; its
// methods are safe for concurrent use and do not allocate. Its memory is 3 KiB.
//
// After the RetryBudget of Finagle: deposit, tryWithdraw, balance.
type Budget struct {
	start time.Time
	slot  time.Duration // a 250th of the window
	max   uint64        // millionths of an attempt per first attempt
	min   uint64        // millionths of an attempt per second
	// windowWhole and windowPart are MinPerSecond x Window.
	windowWhole, windowPart uint64

	_ [64]byte // keeps the above, read by every call, off a line that calls write

	// first counts first attempts per slot: an epoch and a count in one word, so
	// that a deposit is one compare-and-swap and the counts of two rounds of the
	// ring can never mix. Atomic because every RPC deposits; none may wait.
	first [ringSlots]atomic.Uint64
	// gone are first attempts whose slot was taken over by a later round. Atomic
	// because deposits move them here.
	gone atomic.Uint64

	mu         sync.Mutex        // guards what follows; withdrawals are few
	extra      [ringSlots]uint32 // extra attempts per slot, of the slots up to latest
	extraTotal uint64
	reserved   uint64        // taken out and not sent yet; in extraTotal, in no slot
	elapsed    time.Duration // at the latest withdrawal
	sums       sums          // a cache
}

// sums is what the slots add up to, seen from one epoch, but for first attempts
// of that very epoch. It is added up once per slot, so that a refusal, which in an
// outage is what every call gets, does not go through the ring.
type sums struct {
	epoch         int64 // -1: none yet
	total, window uint64
	extra         uint64 // in the window, and kept up to date
}

// NewBudget returns a full budget that starts at start. All faults of cfg are
// reported together.
func NewBudget(cfg BudgetConfig, start time.Time) (*Budget, error) {
	var faults []error
	limit, minimum := floorMillionths(cfg.Max), floorMillionths(cfg.MinPerSecond)
	switch {
	case !(cfg.Max > 0 && cfg.Max <= 1):
		faults = append(faults, fmt.Errorf("retry: budget max %v, want (0, 1]", cfg.Max))
	case limit == 0:
		faults = append(faults, fmt.Errorf("retry: budget max %v, want at least 0.000001", cfg.Max))
	}
	switch {
	case !(cfg.MinPerSecond >= 0 && cfg.MinPerSecond <= maxMinPerSecond):
		faults = append(faults, fmt.Errorf("retry: budget minPerSecond %v, want [0, %d]", cfg.MinPerSecond, int(maxMinPerSecond)))
	case cfg.MinPerSecond > 0 && minimum == 0:
		faults = append(faults, fmt.Errorf("retry: budget minPerSecond %v, want 0 or at least 0.000001", cfg.MinPerSecond))
	}
	if cfg.Window == 0 {
		cfg.Window = defaultWindow
	}
	if cfg.Window < minWindow || cfg.Window > maxWindow {
		faults = append(faults, fmt.Errorf("retry: budget window %v, want [%v, %v]", cfg.Window, minWindow, maxWindow))
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	b := &Budget{start: start, slot: cfg.Window / windowSlots, max: limit, min: minimum, sums: sums{epoch: -1}}
	b.windowWhole, b.windowPart = mulDiv(b.min, uint64(b.slot)*windowSlots, unit)
	return b, nil
}

// floorMillionths cuts x to whole millionths. The slack of a ten-thousandth of
// one forgives decimal fractions that float64 holds a hair too low, such as 0.0157.
func floorMillionths(x float64) uint64 {
	if !(x > 0 && x <= maxMinPerSecond) {
		return 0
	}
	return uint64(math.Floor(x*million + 1e-4))
}

// Deposit pays in for one first attempt.
func (b *Budget) Deposit(now time.Time) {
	epoch := int64(b.since(now) / b.slot)
	slot := &b.first[epoch%ringSlots]
	for {
		old := slot.Load()
		var next, pushedOut uint64
		switch a := age(epoch, old); {
		case a < 0, a == 0 && old&countMask == countMask:
			// The slot is of a later round already, or full: out of the window,
			// but not out of the total.
			b.gone.Add(1)
			return
		case a == 0:
			next = old + 1
		default:
			next, pushedOut = uint64(epoch)<<countBits|1, old&countMask
		}
		if slot.CompareAndSwap(old, next) {
			if pushedOut > 0 {
				b.gone.Add(pushedOut)
			}
			return
		}
	}
}

// TryWithdraw takes out one extra attempt, or reports false and changes nothing.
// Either send the attempt or give it back.
func (b *Budget) TryWithdraw(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	elapsed := max(b.since(now), b.elapsed)
	f := b.funds(elapsed)
	// The 1 of both bounds is the attempt that is being taken out.
	if f.extraTotal > f.total.whole || f.extraWindow > f.window.whole {
		return false
	}
	b.book(elapsed)
	b.extraTotal++
	return true
}

// book counts an extra attempt as sent at elapsed, which is not before b.elapsed. b.mu
// is held, and funds was called for elapsed.
func (b *Budget) book(elapsed time.Duration) {
	epoch := int64(elapsed / b.slot)
	for e := max(int64(b.elapsed/b.slot), epoch-ringSlots) + 1; e <= epoch; e++ {
		b.extra[e%ringSlots] = 0
	}
	b.elapsed = elapsed
	b.extra[epoch%ringSlots]++
	b.sums.extra++
}

// TryReserve takes out one extra attempt that is to be sent later, after a backoff, or
// reports false and changes nothing. Follow it by [Budget.SendReserved] or
// [Budget.Release], once. Until then it counts as if it were sent now, whenever now is,
// so that what is reserved in one window and sent in the next, beside the next one's
// own, does not make two windows' worth of attempts in one.
func (b *Budget) TryReserve(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.funds(max(b.since(now), b.elapsed))
	if f.extraTotal > f.total.whole || f.extraWindow > f.window.whole {
		return false
	}
	b.extraTotal++
	b.reserved++
	return true
}

// Window is how far back first attempts pay.
func (b *Budget) Window() time.Duration { return b.slot * windowSlots }

// SendReserved says that a reserved extra attempt is sent now.
func (b *Budget) SendReserved(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.reserved == 0 {
		return
	}
	elapsed := max(b.since(now), b.elapsed)
	b.funds(elapsed)
	b.reserved--
	b.book(elapsed)
}

// Release gives a reserved extra attempt back: it will not be sent.
func (b *Budget) Release() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.reserved == 0 {
		return
	}
	b.reserved--
	b.extraTotal--
}

// GiveBack returns an extra attempt that was never sent. withdrawn is the time
// given to the TryWithdraw that took it out; the call may come at any later time, once
// for each withdrawal. After more than a window it raises the total alone: what was
// not sent then is no claim on the traffic of now.
func (b *Budget) GiveBack(withdrawn time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.extraTotal == 0 {
		return
	}
	b.extraTotal--
	epoch, latest := int64(b.since(withdrawn)/b.slot), int64(b.elapsed/b.slot)
	if epoch > latest || epoch <= latest-ringSlots {
		return
	}
	// 0 only where a late withdrawal was booked in a later slot; that one then
	// stays in the window for longer than it need, never for less.
	if n := &b.extra[epoch%ringSlots]; *n > 0 {
		*n--
		if epoch >= b.sums.epoch-windowSlots {
			b.sums.extra--
		}
	}
}

// Balance is how many extra attempts could be withdrawn at now, with fractions:
// TryWithdraw succeeds from 1 on.
func (b *Budget) Balance(now time.Time) float64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.funds(max(b.since(now), b.elapsed))
	return max(0, 1+min(f.total.less(f.extraTotal), f.window.less(f.extraWindow)))
}

// Level returns the Balance at now beside the allowance: how many extra attempts
// the window that ends at now (or the time since the start, while that pays for
// fewer) pays for in all, whether spent or not. Their ratio tells a caller how near
// the bound is before it is refused, so that it can spend on what matters most.
func (b *Budget) Level(now time.Time) (balance, allowance float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.funds(max(b.since(now), b.elapsed))
	balance = max(0, 1+min(f.total.less(f.extraTotal), f.window.less(f.extraWindow)))
	return balance, 1 + min(f.total.less(0), f.window.less(0))
}

// since is the time from the start to now, never negative.
func (b *Budget) since(now time.Time) time.Duration {
	return max(0, now.Sub(b.start))
}

// funds are the four numbers that the two bounds compare.
type funds struct {
	total, window           attempts
	extraTotal, extraWindow uint64
}

// funds adds up what is paid for, and what is spent, as of elapsed, which is not
// before b.elapsed. b.mu is held. Deposits go on meanwhile, which can only raise
// what is paid for.
func (b *Budget) funds(elapsed time.Duration) funds {
	epoch := int64(elapsed / b.slot)
	if epoch != b.sums.epoch {
		b.addUp(epoch)
	}
	total, window := b.sums.total, b.sums.window
	if word := b.first[epoch%ringSlots].Load(); age(epoch, word) == 0 {
		total, window = total+word&countMask, window+word&countMask
	}
	minWhole, minPart := mulDiv(b.min, uint64(elapsed), unit)
	return funds{
		total:       b.paid(total).plus(minWhole, minPart),
		window:      b.paid(window).plus(b.windowWhole, b.windowPart),
		extraTotal:  b.extraTotal,
		extraWindow: b.sums.extra + b.reserved,
	}
}

// addUp goes through the ring. A deposit that comes late for its slot is missed
// until the next slot; one that moves from its slot to gone meanwhile likewise,
// and is not counted twice, because gone is read first.
func (b *Budget) addUp(epoch int64) {
	s := sums{epoch: epoch, total: b.gone.Load()}
	for i := range b.first {
		word := b.first[i].Load()
		// A slot of the future, by a clock ahead of ours, has a negative age.
		a := age(epoch, word)
		if a != 0 {
			s.total += word & countMask
		}
		if a > 0 && a < windowSlots {
			s.window += word & countMask
		}
	}
	latest := int64(b.elapsed / b.slot)
	for e := max(0, epoch-windowSlots); e <= latest; e++ {
		s.extra += uint64(b.extra[e%ringSlots])
	}
	b.sums = s
}

// age is how many slots before epoch the slot with this word began.
func age(epoch int64, word uint64) int64 {
	return int64(uint64(epoch)<<countBits-word&^uint64(countMask)) >> countBits
}

// paid is Max x first.
func (b *Budget) paid(first uint64) attempts {
	whole, part := mulDiv(b.max, first, million)
	return attempts{whole, part * (unit / million)}
}

// attempts is a number of attempts as an integer and a fraction in 1/unit, so
// that sums neither round nor overflow in the lifetime of a process.
type attempts struct{ whole, part uint64 }

func (a attempts) plus(whole, part uint64) attempts {
	a.whole, a.part = a.whole+whole, a.part+part
	if a.part >= unit {
		a.whole, a.part = a.whole+1, a.part-unit
	}
	return a
}

func (a attempts) less(spent uint64) float64 {
	return float64(int64(a.whole-spent)) + float64(a.part)/unit
}

// mulDiv is x*y / z and the rest, through 128 bits. x < z, so the quotient fits.
func mulDiv(x, y, z uint64) (whole, part uint64) {
	hi, lo := bits.Mul64(x, y)
	return bits.Div64(hi, lo, z)
}
