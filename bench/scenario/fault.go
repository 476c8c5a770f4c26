package scenario

import (
	"cmp"
	"math"
	"slices"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/codes"
)

// Fault is something that goes wrong at known moments of the timeline. Its zero is
// the first measured request: the warm-up comes before it.
//
// It is in force from From for For. With Every it comes back: in each period of
// Every, from From to From + For. Without For it stays to the end. With none of
// the three it is in force always, in the warm-up too; any other only from 0 on.
type Fault struct {
	// Kind is what happens to calls while the fault is in force.
	Kind FaultKind `json:"kind"`
	// From is when it begins, up to 1h, default 0.
	From Duration `json:"from,omitempty"`
	// For is how long it lasts, 1ms to 1h. Absent: to the end. A stall and a down need
	// it.
	For Duration `json:"for,omitempty"`
	// Every is the period in which it comes back, at least From + For, 10ms to 1h.
	// Absent: it comes once.
	Every Duration `json:"every,omitempty"`
	// Backends are those that have it, counted from 0; all, if none is named.
	Backends []int `json:"backends,omitempty"`

	// Code is what an error answers, by its name, default "UNAVAILABLE". For
	// errors only.
	Code Code `json:"code,omitempty"`
	// Probability is the share of attempts that an error hits, 0.000001 to 1,
	// default 1. For errors only.
	Probability float64 `json:"probability,omitempty"`

	// Factor is how many times as long work takes that begins while a slow fault is in
	// force, 0 to 1,000, default 1. For a slow fault only.
	Factor float64 `json:"factor,omitempty"`
	// Add is how much longer it takes on top of that, up to 1h, default 0. For a slow
	// fault only, which has at least one of the two.
	Add Duration `json:"add,omitempty"`
}

// FaultKind says what a fault does.
type FaultKind string

const (
	// Error is answered at once with a code.
	Error FaultKind = "error"
	// Blackhole accepts a call and never answers, until the caller leaves (or the
	// proxy's ServerTimeout has passed).
	Blackhole FaultKind = "blackhole"
	// Stall serves nothing: work and queue wait until it ends.
	Stall FaultKind = "stall"
	// Slowed serves, but takes longer over it.
	Slowed FaultKind = "slow"
	// Down is no server at all: its connections are cut and new ones are refused until
	// it ends. What it was working on is lost.
	Down FaultKind = "down"
)

// Code is a gRPC status code, written by its name: "UNAVAILABLE".
type Code codes.Code

// MarshalText implements encoding.TextMarshaler.
func (c Code) MarshalText() ([]byte, error) { return []byte(code.Code(c).String()), nil }

// Span is a stretch of the timeline, without its end.
type Span struct{ From, To time.Duration }

// Contains says whether the moment at lies in it.
func (s Span) Contains(at time.Duration) bool { return s.From <= at && at < s.To }

// always has no beginning and no end that a run reaches.
var always = Span{math.MinInt64, math.MaxInt64}

// Fault returns the error or the black hole that an attempt meets at a backend at
// the moment at, nil if none; of several the one listed first. Like the service
// time, luck depends on seed, call (id) and attempt; backend and moment only say
// whether the fault is in force. Pure and safe for concurrent use.
func (s *Scenario) Fault(seed, id uint64, attempt, backend int, at time.Duration) *Fault {
	for i := range s.Faults {
		f := &s.Faults[i]
		if f.Kind != Error && f.Kind != Blackhole || !f.holds(backend, at) {
			continue
		}
		if f.Kind == Error && (draw{seed, id, uint64(attempt)}).uniform(faulty+uint64(i)) >= f.Probability {
			continue
		}
		return f
	}
	return nil
}

// holds says whether the fault is in force at a backend at the moment at.
func (f *Fault) holds(backend int, at time.Duration) bool {
	if !on(f.Backends, backend) {
		return false
	}
	w, ok := f.window(at)
	return ok && w.Contains(at)
}

// Down returns, of the stretches in which a backend is no server at all and that end
// after the moment at, the one that begins first; ok is false if there is none. The
// next may begin before its end.
func (s *Scenario) Down(backend int, at time.Duration) (w Span, ok bool) {
	for i := range s.Faults {
		f := &s.Faults[i]
		if f.Kind != Down || !on(f.Backends, backend) {
			continue
		}
		if next, more := f.window(at); more && (!ok || next.From < w.From) {
			w, ok = next, true
		}
	}
	return w, ok
}

// window returns the first stretch in which the fault is in force and that ends
// after the moment at; ok is false if there is none.
func (f *Fault) window(at time.Duration) (w Span, ok bool) {
	from, length, every := time.Duration(f.From), time.Duration(f.For), time.Duration(f.Every)
	switch {
	case from == 0 && length == 0:
		return always, true
	case length == 0:
		return Span{from, math.MaxInt64}, true
	case every > 0 && at >= from+length:
		from += ((at-from-length)/every + 1) * every
	}
	return Span{from, from + length}, from+length > at
}

// TimedFaults says whether any fault begins or ends.
func (s *Scenario) TimedFaults() bool {
	return slices.ContainsFunc(s.Faults, func(f Fault) bool { return f.From > 0 || f.For > 0 })
}

// FaultSpans returns the stretches of [0, until) in which any fault is in force
// that begins or ends, merged and in order. The last may reach beyond until.
func (s *Scenario) FaultSpans(until time.Duration) []Span {
	var all []Span
	for i := range s.Faults {
		f := &s.Faults[i]
		for w, ok := f.window(0); ok && w != always && w.From < until; w, ok = f.window(w.To) {
			all = append(all, w)
			if w.To == math.MaxInt64 {
				break
			}
		}
	}
	slices.SortFunc(all, func(a, b Span) int { return cmp.Compare(a.From, b.From) })
	var merged []Span
	for _, w := range all {
		if n := len(merged); n > 0 && w.From <= merged[n-1].To {
			merged[n-1].To = max(merged[n-1].To, w.To)
			continue
		}
		merged = append(merged, w)
	}
	return merged
}
