package shedding

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// Calls that are in stay in, and count.
func TestResize(t *testing.T) {
	b, err := NewBulkhead(3, "")
	if err != nil {
		t.Fatal(err)
	}
	enter := func(want bool) {
		t.Helper()
		if err := b.Enter(); (err == nil) != want {
			t.Errorf("%d in flight: %v, want let in %v", b.InFlight(), err, want)
		}
	}
	resize := func(places int) {
		t.Helper()
		if err := b.Resize(places); err != nil {
			t.Fatal(err)
		}
	}
	enter(true)
	enter(true)
	resize(1)
	enter(false)
	b.Leave()
	enter(false)
	b.Leave()
	enter(true)
	resize(2)
	enter(true)
	enter(false)
	if err := b.Resize(0); err == nil || b.InFlight() != 2 {
		t.Errorf("%v, %d in flight", err, b.InFlight())
	}
	enter(false)
}

// Those who wait go on waiting, at the new rate; the tokens stay as spent as they were.
func TestReconfigure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, err := NewRateLimit(RateLimitConfig{PerSecond: 0.01, Burst: 1})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		done := make(chan time.Duration, 3)
		for range 3 {
			go func() {
				if err := l.Wait(t.Context()); err != nil {
					t.Error(err)
				}
				done <- time.Since(begin)
			}()
		}
		synctest.Wait()
		if err := l.Reconfigure(RateLimitConfig{PerSecond: -1}); err == nil {
			t.Error("a faulty configuration is accepted")
		}
		if err := l.Reconfigure(RateLimitConfig{PerSecond: 10, Burst: 1}); err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			want := time.Duration(i+1) * 100 * time.Millisecond
			if got := <-done; got < want-time.Millisecond || got > want+time.Millisecond {
				t.Errorf("turn %d after %v, want %v", i+1, got, want)
			}
		}
		// Slower again: a call with a second to live is refused, not made to wait in vain.
		if err := l.Reconfigure(RateLimitConfig{PerSecond: 0.1, Burst: 1}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := l.Wait(ctx); !errors.Is(err, ErrRateLimited) {
			t.Errorf("%v, want it refused", err)
		}
	})
}
