package shedding

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// medianSamples of exponential times have a median that is off by 18% (one standard
	// deviation), which is good enough to tell what is hopeless.
	medianSamples = 64
	// medianEvery is after how many samples it is computed: 64 are sorted in 1 us.
	medianEvery = 16
	// medianFew is how many there must be.
	medianFew = 8
	// medianAge is how long a median lives of which no call has been seen. If it was
	// learnt in bad times and no deadline is long enough for it, all are refused as
	// hopeless, and nothing but forgetting it would tell that times are good again.
	medianAge = time.Second
)

// median is that of the times of the last handlers of a method. It is safe for concurrent
// use; the zero value knows of none. It takes 0.5 KiB. now is the time since the server was
// made, and not that of a clock on the wall: if that were set back by an hour, a bad median
// would be believed for as long.
type median struct {
	value atomic.Int64 // ns; 0: not known; what a call that arrives reads
	last  atomic.Int64 // ns; when the last sample came, likewise

	mu      sync.Mutex // guards the rest
	n       int
	samples [medianSamples]time.Duration
}

// at returns the median; 0 if it is not known.
func (m *median) at(now time.Duration) time.Duration {
	if int64(now)-m.last.Load() > int64(medianAge) {
		return 0
	}
	return time.Duration(m.value.Load())
}

// record adds a handler's time.
func (m *median) record(now, ran time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if int64(now)-m.last.Load() > int64(medianAge) {
		m.n = 0
		m.value.Store(0)
	}
	m.samples[m.n%medianSamples] = ran
	m.n++
	m.last.Store(int64(now))
	if m.n == medianFew || m.n%medianEvery == 0 {
		sorted := m.samples
		known := sorted[:min(m.n, medianSamples)]
		slices.Sort(known)
		m.value.Store(int64(known[len(known)/2]))
	}
}
