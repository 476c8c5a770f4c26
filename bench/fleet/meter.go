package fleet

import (
	"math"
	"sync"
	"time"
)

// meterWindow is over what time a backend's load is averaged. It is chosen for the good of
// weighted_round_robin, which takes up new weights once per second: averaged over 1 s, the
// weights chase the queues that they have just made (scenario skewed, two seeds, two runs:
// a p99 of 164 to 997 ms); over 5 s, 63 and 71 ms; over 10 s, 60 and 66. Reports without
// the queue give 103 to 111 ms.
const meterWindow = 5 * time.Second

// meter measures the load of a backend for those who are to be told: averages that fade
// by e^(-dt/meterWindow). It reads no clock: now counts from any moment, the same for all
// calls.
type meter struct {
	workers float64

	mu      sync.Mutex // guards what follows
	last    time.Duration
	present int
	// present and the rates of all calls and of failed ones, per second, averaged.
	inFlight, calls, errors float64
}

// newMeter is that of a backend of so many workers; where all calls are served at
// once, 0, of one.
func newMeter(workers int) *meter { return &meter{workers: float64(max(workers, 1))} }

// levels are what a meter shows.
type levels struct {
	// utilization is (busy workers + queue) / workers: beyond 1, calls wait.
	utilization float64
	// qps and eps are calls and failures per second.
	qps, eps float64
}

func (m *meter) begin(now time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fade(now)
	m.present++
}

// ending is how a call ended.
type ending uint8

const (
	answered ending = iota
	failed
	left // its caller has: neither work done nor the backend's failure
)

func (m *meter) end(now time.Duration, how ending) levels {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fade(now)
	m.present--
	if how != left {
		m.calls += 1 / meterWindow.Seconds()
	}
	if how == failed {
		m.errors += 1 / meterWindow.Seconds()
	}
	return levels{m.inFlight / m.workers, m.calls, m.errors}
}

func (m *meter) fade(now time.Duration) {
	if now <= m.last {
		return // two calls read the clock and came here in the other order
	}
	keep := math.Exp(-float64(now-m.last) / float64(meterWindow))
	m.inFlight = m.inFlight*keep + float64(m.present)*(1-keep)
	m.calls *= keep
	m.errors *= keep
	m.last = now
}
