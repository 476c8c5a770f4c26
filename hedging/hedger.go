package hedging

import (
	"time"

	"google.golang.org/grpc/codes"

	"github.com/bobtail-rpc/bobtail/internal/latency"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// Window is the span over which a [Hedger] remembers latencies.
const Window = 30 * time.Second

// Hedger hedges the calls of one method to one server: a policy, and what has
// been learned of the method's latency. Make one with [New]. It is safe for
// concurrent use and owns no goroutine.
type Hedger struct {
	cfg      Config
	attempts int
	nonFatal uint32 // a bit for each code
	latency  *latency.Tracker
}

// New returns a Hedger. A fault of cfg is an error that names the field, its
// value and its bound.
func New(cfg Config) (*Hedger, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return build(cfg, latency.New(Window, time.Now())), nil
}

// With returns a Hedger with another configuration that keeps, and goes on
// sharing, what h has learned of the method's latency.
func (h *Hedger) With(cfg Config) (*Hedger, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return build(cfg, h.latency), nil
}

func build(cfg Config, t *latency.Tracker) *Hedger {
	h := &Hedger{cfg: cfg, attempts: min(cfg.MaxAttempts, MaxAttemptsCap), latency: t}
	for _, code := range cfg.NonFatalCodes {
		h.nonFatal |= 1 << code
	}
	return h
}

// Delay returns the hedging delay in force now; ok is false while an adaptive
// delay is not known yet and no fixed one stands in for it.
func (h *Hedger) Delay(now time.Time) (d time.Duration, ok bool) {
	d = h.delay(now)
	return max(d, 0), d >= 0
}

// delay is what the core takes: negative while no hedge is sent by time.
func (h *Hedger) delay(now time.Time) time.Duration {
	if h.cfg.Percentile == 0 {
		return h.cfg.Delay
	}
	d, ok := h.latency.Quantile(now, h.cfg.Percentile/100)
	if !ok {
		// A cold start does not hedge blind: all that is known is what the
		// configuration says.
		if h.cfg.Delay > 0 {
			return h.cfg.Delay
		}
		return -1
	}
	d = max(d, h.cfg.minDelay())
	if h.cfg.MaxDelay > 0 {
		d = min(d, h.cfg.MaxDelay)
	}
	return d
}

// pointless reports whether an attempt sent now would probably be too late:
// fewer than half of the attempts end within the time that remains.
func (h *Hedger) pointless(now time.Time, remains time.Duration) bool {
	if remains > noTime/2 {
		return false // the call has no deadline
	}
	median, ok := h.latency.Quantile(now, 0.5)
	return ok && remains < median
}

// record puts one attempt's time into the tracker. Only an attempt that was
// answered tells how long an answer takes. One that was cancelled or that failed
// tells that an answer takes longer than this: the time of a quick failure, or of
// the sibling that won, would drag the percentile down until everything is
// hedged.
func (h *Hedger) record(now time.Time, d time.Duration, code codes.Code) {
	h.latency.Record(now, d, outcome.OfCode(code) != outcome.Success)
}

// class says what an attempt's status code means to its call.
func (h *Hedger) class(code codes.Code) class {
	switch {
	case code == codes.OK:
		return success
	case code < 32 && h.nonFatal&(1<<code) != 0:
		return nonFatal
	}
	return fatal
}
