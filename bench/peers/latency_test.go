// Package peers measures bobtail's hot paths beside the libraries that do the
// same. It is a module of its own so that nobody who imports bobtail downloads
// them.
package peers

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/DataDog/sketches-go/ddsketch"
	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/bobtail-rpc/bobtail/internal/latency"
)

// percentiles is what a hedging client needs on every call. None of the peers
// knows censored samples, so all of them are given completed ones.
type percentiles interface {
	Record(now time.Time, d time.Duration)
	Quantile(now time.Time, q float64) time.Duration
}

type bobtail struct{ *latency.Tracker }

func (b bobtail) Record(now time.Time, d time.Duration) { b.Tracker.Record(now, d, false) }

func (b bobtail) Quantile(now time.Time, q float64) time.Duration {
	d, _ := b.Tracker.Quantile(now, q)
	return d
}

// sketch is a DDSketch of 2% accuracy. It has no window: it would have to be
// reset or rotated on top of this.
type sketch struct {
	mu sync.Mutex
	s  *ddsketch.DDSketch
}

func (s *sketch) Record(_ time.Time, d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.s.Add(float64(d)); err != nil {
		panic(err)
	}
}

func (s *sketch) Quantile(_ time.Time, q float64) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.s.GetValueAtQuantile(q)
	if err != nil {
		panic(err)
	}
	return time.Duration(v)
}

// hdr is an HdrHistogram of 2 significant digits (1% accuracy), without a window.
type hdr struct {
	mu sync.Mutex
	h  *hdrhistogram.Histogram
}

func (h *hdr) Record(_ time.Time, d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.h.RecordValue(int64(d)); err != nil {
		panic(err)
	}
}

func (h *hdr) Quantile(_ time.Time, q float64) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return time.Duration(h.h.ValueAtQuantile(100 * q))
}

// hdrWindow is a WindowedHistogram of six parts of 5 s. It merges them on every
// read, or, if every is not 0, only when the last merge is that old.
type hdrWindow struct {
	mu      sync.Mutex
	w       *hdrhistogram.WindowedHistogram
	every   time.Duration
	rotated time.Time
	merged  *hdrhistogram.Histogram
	at      time.Time
}

func (h *hdrWindow) Record(now time.Time, d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if now.Sub(h.rotated) >= 5*time.Second {
		h.w.Rotate()
		h.rotated = now
	}
	if err := h.w.Current.RecordValue(int64(d)); err != nil {
		panic(err)
	}
}

func (h *hdrWindow) Quantile(now time.Time, q float64) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.merged == nil || now.Sub(h.at) >= h.every {
		h.merged, h.at = h.w.Merge(), now
	}
	return time.Duration(h.merged.ValueAtQuantile(100 * q))
}

var peers = []struct {
	name string
	new  func(start time.Time) percentiles
}{
	{"bobtail", func(start time.Time) percentiles {
		return bobtail{latency.New(30*time.Second, start)}
	}},
	{"ddsketch+mutex,no-window", func(time.Time) percentiles {
		s, err := ddsketch.LogCollapsingLowestDenseDDSketch(0.02, 2048)
		if err != nil {
			panic(err)
		}
		return &sketch{s: s}
	}},
	{"hdr+mutex,no-window", func(time.Time) percentiles {
		return &hdr{h: hdrhistogram.New(10_000, 60_000_000_000, 2)}
	}},
	{"hdr-windowed+mutex", func(start time.Time) percentiles {
		return &hdrWindow{w: hdrhistogram.NewWindowed(6, 10_000, 60_000_000_000, 2), rotated: start}
	}},
	{"hdr-windowed+mutex,merged-each-100ms", func(start time.Time) percentiles {
		return &hdrWindow{w: hdrhistogram.NewWindowed(6, 10_000, 60_000_000_000, 2), rotated: start, every: 100 * time.Millisecond}
	}},
}

// durations is 98% around 2 ms and 2% 50 ms later; a power of two of them, so
// that drawing one costs a mask.
var durations = func() (ds [1 << 12]time.Duration) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range ds {
		ds[i] = time.Duration(1e6 + 2e6*rnd.ExpFloat64())
		if rnd.IntN(50) == 0 {
			ds[i] += 50 * time.Millisecond
		}
	}
	return ds
}()

var operations = []struct {
	name string
	do   func(p percentiles, now time.Time, d time.Duration)
}{
	{"Record", func(p percentiles, now time.Time, d time.Duration) { p.Record(now, d) }},
	{"Quantile", func(p percentiles, now time.Time, _ time.Duration) { p.Quantile(now, 0.95) }},
	{"Mixed", func(p percentiles, now time.Time, d time.Duration) {
		p.Quantile(now, 0.95)
		p.Record(now, d)
	}},
}

// BenchmarkLatency is one operation of a client that makes 10,000 calls/s in
// virtual time, so that rotation and refresh are in the figures at the rate at
// which they happen. Record, Quantile and Mixed (one of each) run alone and from
// GOMAXPROCS goroutines.
func BenchmarkLatency(b *testing.B) {
	const every = 100 * time.Microsecond
	start := time.Now() // with the monotonic reading that real callers have
	// filled has 20 s of samples.
	filled := func(p percentiles) time.Time {
		now := start
		for i := range 200_000 {
			now = now.Add(every)
			p.Record(now, durations[i%len(durations)])
		}
		return now
	}
	for _, op := range operations {
		for _, peer := range peers {
			b.Run("op="+op.name+"/mode=serial/peer="+peer.name, func(b *testing.B) {
				p := peer.new(start)
				now := filled(p)
				b.ReportAllocs()
				i := 0
				for b.Loop() {
					// Without this a run of Quantile alone would outlive the window.
					if op.name != "Quantile" || i%1024 == 0 {
						now = now.Add(every)
					}
					op.do(p, now, durations[i%len(durations)])
					i++
				}
			})
			b.Run("op="+op.name+"/mode=parallel/peer="+peer.name, func(b *testing.B) {
				p := peer.new(start)
				begin := filled(p)
				b.ReportAllocs()
				b.ResetTimer()
				b.RunParallel(func(pb *testing.PB) {
					// Each goroutine has its own clock, so that the clock is not what
					// is measured; 1/8 as fast, so that they stay in one window.
					now := begin
					for i := 0; pb.Next(); i++ {
						if i%8 == 0 && op.name != "Quantile" {
							now = now.Add(every)
						}
						op.do(p, now, durations[i%len(durations)])
					}
				})
			})
		}
	}
}
