package latency_test

import (
	"fmt"
	"time"

	"github.com/bobtail-rpc/bobtail/internal/latency"
)

// A hedge is sent at 20 ms and wins at 25 ms. Its own duration is 5 ms; of the
// first attempt, cancelled then, only a lower bound is known.
func ExampleTracker() {
	now := time.Now()
	tracker := latency.New(latency.DefaultWindow, now)
	for range 99 {
		tracker.Record(now, 10*time.Millisecond, false)
	}
	tracker.Record(now, 25*time.Millisecond, true)
	tracker.Record(now, 5*time.Millisecond, false)

	if delay, ok := tracker.Quantile(now, 0.95); ok {
		fmt.Println(delay.Round(time.Millisecond))
	}
	_, ok := tracker.Quantile(now, 0.99)
	fmt.Println(ok) // p99 takes 368 samples
	// Output:
	// 10ms
	// false
}
