package retry

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// A reserved attempt counts from its reservation until a window after it was sent.
func TestReserveSteps(t *testing.T) {
	const s = time.Second
	b := newBudget(t, BudgetConfig{Max: 0.5, Window: 10 * s})
	balance := func(d time.Duration, want float64) {
		t.Helper()
		if got := b.Balance(at(d)); got != want {
			t.Errorf("at %v: balance %v, want %v", d, got, want)
		}
	}
	reserve := func(d time.Duration, want bool) {
		t.Helper()
		if got := b.TryReserve(at(d)); got != want {
			t.Errorf("at %v: TryReserve %v, want %v", d, got, want)
		}
	}
	for range 4 {
		b.Deposit(at(0))
	}
	balance(0, 3)
	reserve(0, true)
	reserve(0, true)
	balance(0, 1)
	b.Release()
	balance(0, 2)
	for range 20 {
		b.Deposit(at(9 * s))
	}
	balance(9*s, 12)
	b.SendReserved(at(9 * s))
	balance(9*s, 12) // it was counted already
	// The deposits of 0 s are gone by now, and so would be an attempt sent then.
	balance(15*s, 10)
	balance(19*s-1, 10)
	// The window of 10 s and a 250th of it after it was sent; then the 1 alone is left.
	balance(19*s+40*time.Millisecond, 1)

	// What is neither sent nor released never leaves the window.
	reserve(30*s, true)
	balance(300*s, 0)
	reserve(300*s, false)
	b.Release()
	balance(300*s, 1)
	// Once too often is harmless.
	b.Release()
	b.SendReserved(at(300 * s))
	balance(300*s, 1)
	if b.extraTotal != 1 || b.reserved != 0 {
		t.Errorf("%d in all, %d reserved, want 1, 0", b.extraTotal, b.reserved)
	}
}

// Whatever the traffic, backoffs of up to a window, withdrawals beside reservations:
// at every grant, what was sent in the window that ends then, and what is still to be
// sent, is within the bound. A budget that books a reservation when it is made lets
// two windows' worth be sent in one.
func TestReserveBounds(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		cfg := BudgetConfig{
			Max:    rapid.SampledFrom([]float64{0.05, 0.5, 1}).Draw(rt, "max"),
			Window: rapid.SampledFrom([]time.Duration{time.Second, 10 * time.Second}).Draw(rt, "window"),
		}
		b := newBudget(t, cfg)
		var firsts, sent []time.Duration
		var due []time.Duration // reserved, sorted by nothing
		now := time.Duration(0)
		for range rapid.IntRange(1, 400).Draw(rt, "events") {
			now += time.Duration(rapid.Int64Range(0, int64(cfg.Window)/20).Draw(rt, "gap"))
			rest := due[:0]
			for _, d := range due {
				switch {
				case d > now:
					rest = append(rest, d)
				default:
					b.SendReserved(at(now))
					sent = append(sent, now)
				}
			}
			due = rest
			granted := false
			switch rapid.IntRange(0, 9).Draw(rt, "event") {
			case 0, 1, 2, 3, 4:
				b.Deposit(at(now))
				firsts = append(firsts, now)
			case 5, 6, 7:
				if granted = b.TryReserve(at(now)); granted {
					due = append(due, now+time.Duration(rapid.Int64Range(0, int64(cfg.Window)).Draw(rt, "backoff")))
				}
			case 8:
				if granted = b.TryWithdraw(at(now)); granted {
					sent = append(sent, now)
				}
			case 9:
				if len(due) > 0 {
					due = due[1:]
					b.Release()
				}
			}
			if !granted {
				continue
			}
			in := func(all []time.Duration) (n float64) {
				for _, d := range all {
					if d > now-cfg.Window {
						n++
					}
				}
				return n
			}
			extra := in(sent) + float64(len(due))
			if bound := 1 + cfg.Max*in(firsts); extra > bound+1e-9 {
				rt.Fatalf("at %v: %v extra attempts sent in the window or reserved, bound %v", now, extra, bound)
			}
			if total, bound := float64(len(sent)+len(due)), 1+cfg.Max*float64(len(firsts)); total > bound+1e-9 {
				rt.Fatalf("at %v: %v extra attempts in all, bound %v", now, total, bound)
			}
		}
	})
}
