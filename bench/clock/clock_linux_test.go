package clock

import (
	"context"
	"testing"
	"time"
)

// Who gives up leaves the queue: a benchmark cancels half its waits.
func TestQueueEmpties(t *testing.T) {
	c := open(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 100 {
		c.Sleep(ctx, time.Hour)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.queue); n != 0 {
		t.Errorf("%d waits are left", n)
	}
}
