package bobtail

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/bobtail-rpc/bobtail/breaker"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
	"github.com/bobtail-rpc/bobtail/internal/telemetry"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// guard is all that may refuse a call of one method before anything of it is sent:
// nil parts refuse nothing.
type guard struct {
	method   string
	shadow   bool // refuse nobody, tell whom it would have been
	bulkhead *shedding.Bulkhead
	rate     *shedding.RateLimit
	throttle *throttles
	breaker  *breaker.Breaker
	report   func(context.Context, Refusal)
}

// throttles is a method's adaptive throttle for each class of criticality: a server that
// refuses all that is sheddable, to serve all that is critical, would be throttled for both by
// one. The SRE book keeps them apart, too (chapter 21, "Handling Overload").
type throttles [shedding.CriticalPlus - shedding.Sheddable + 1]*breaker.Throttle

func newThrottles(cfg breaker.ThrottleConfig, now time.Time) (*throttles, error) {
	var all throttles
	for i := range all {
		var err error
		if all[i], err = breaker.NewThrottle(cfg, now); err != nil {
			return nil, err
		}
	}
	return &all, nil
}

// of returns the throttle of the calls that are made under ctx.
func (t *throttles) of(ctx context.Context) *breaker.Throttle {
	return t[shedding.OutgoingCriticality(ctx)-shedding.Sheddable]
}

// probability is the highest that any class is refused with.
func (t *throttles) probability(now time.Time) float64 {
	var p float64
	for _, class := range t {
		p = max(p, class.Probability(now))
	}
	return p
}

// Refusal is a call that was refused before anything of it was sent.
type Refusal struct {
	// Method is the full method name.
	Method string
	// Code and Reason are those that the caller sees, in the status and in its
	// google.rpc.ErrorInfo: BREAKER_OPEN, THROTTLED, RATE_LIMITED or BULKHEAD_FULL.
	Code   codes.Code
	Reason string
	// Shadow says that in mode shadow the call was let through all the same.
	Shadow bool
	// Err is the error of the call.
	Err error
}

// pass is what a call holds that the guard has let in. It is given back by leave.
type pass struct {
	guard    *guard
	permit   breaker.Permit
	throttle *breaker.Throttle // which counts the call; may be nil
	held     bool              // a place of the bulkhead
	asked    bool              // permit is the breaker's
}

// enter lets a call in, or returns the error to refuse it with. The bulkhead comes first: its
// places bound those who wait for their turn, too, and nobody waits for a turn only to find
// it full.
func (g *guard) enter(ctx context.Context) (p pass, err error) {
	p.guard = g
	// Whatever was taken before a refusal, or before a panic in somebody's hook, goes back.
	err = errAbandoned
	defer func() {
		if err != nil {
			p.leave(err)
			p = pass{}
		}
	}()
	err = g.fill(ctx, &p)
	return p, err
}

// fill takes for p what the parts of the guard give.
func (g *guard) fill(ctx context.Context, p *pass) error {
	if g.bulkhead != nil {
		if err := g.bulkhead.Enter(); err == nil {
			p.held = true
		} else if err := g.refuse(ctx, err); err != nil {
			return err
		}
	}
	if g.rate != nil {
		if err := g.turn(ctx); err != nil {
			return err
		}
	}
	if g.breaker != nil {
		permit, err := g.breaker.Admit()
		if err == nil {
			p.permit, p.asked = permit, true
		} else if err := g.refuse(ctx, err); err != nil {
			return err
		}
	}
	if g.throttle != nil {
		t := g.throttle.of(ctx)
		if err := t.Admit(time.Now(), rand.Float64()); err == nil {
			p.throttle = t
		} else if err := g.refuse(ctx, err); err != nil {
			return err
		}
	}
	return nil
}

// turn waits for the rate limit.
func (g *guard) turn(ctx context.Context) error {
	decide := g.rate.Wait
	if g.shadow {
		decide = func(ctx context.Context) error {
			_, err := g.rate.Shadow(ctx)
			return err
		}
	}
	err := decide(ctx)
	if outcome.IsRefusal(err) {
		return g.refuse(ctx, err)
	}
	return err // the caller's own end, if any
}

// refuse returns the error of a refused call: nil in mode shadow, which only tells.
func (g *guard) refuse(ctx context.Context, err error) error {
	if g.report != nil {
		code, reason := refusal(err)
		g.report(ctx, Refusal{Method: g.method, Code: code, Reason: reason, Shadow: g.shadow, Err: err})
	}
	if g.shadow {
		return nil
	}
	return err
}

// leave gives back what the call held, and tells whoever let it in how it ended: an
// error that is a refusal counts for nobody.
func (p *pass) leave(err error) {
	if p.held {
		p.guard.bulkhead.Leave()
	}
	if p.throttle != nil {
		p.throttle.Record(time.Now(), err)
	}
	if p.asked {
		p.permit.Done(err)
	}
}

// leaveStream is leave for a stream, whose length is no latency.
func (p *pass) leaveStream(err error) {
	if p.asked {
		p.permit.DoneStream(err)
		p.asked = false
	}
	p.leave(err)
}

// guard makes the guard that an entry wants for a method, of the parts that are kept
// where the entry has not changed them. The parts that it no longer wants are kept as
// well: a policy that is switched off and on again goes on where it was.
func (k *kept) guard(c *Client, target string, m *method, e *entry, name string) error {
	if e.breaker == nil && e.throttling == nil && e.rate == nil && e.maxInFlight == 0 {
		return nil
	}
	g := &guard{method: name, shadow: e.mode == modeShadow, report: c.refusalReports}
	k.shadow.Store(g.shadow)
	if e.maxInFlight > 0 {
		// Resized, not replaced: a new one would not know of the calls in flight.
		var err error
		if k.bulkhead == nil {
			k.bulkhead, err = shedding.NewBulkhead(e.maxInFlight, name)
		} else {
			err = k.bulkhead.Resize(e.maxInFlight)
		}
		if err != nil {
			return err
		}
		g.bulkhead = k.bulkhead
	}
	if e.rate != nil {
		var err error
		switch cfg := *e.rate; {
		case k.rate == nil:
			cfg.Method = name
			k.rate, err = shedding.NewRateLimit(cfg)
		case k.rateOf != cfg:
			err = k.rate.Reconfigure(cfg)
		}
		if err != nil {
			return err
		}
		k.rateOf = *e.rate
		g.rate = k.rate
	}
	if e.throttling != nil {
		if k.throttle == nil || k.throttleOf != *e.throttling {
			cfg := *e.throttling
			cfg.Method = name
			t, err := newThrottles(cfg, time.Now())
			if err != nil {
				return err
			}
			k.throttle, k.throttleOf = t, *e.throttling
		}
		g.throttle = k.throttle
	}
	if e.breaker != nil {
		// Not comparable, for it holds a function, which is nil in every document.
		if k.breaker == nil || !reflect.DeepEqual(k.breakerOf, e.breaker) {
			cfg := *e.breaker
			cfg.Method = name
			cfg.OnStateChange = func(ch breaker.Change) { c.breakerChanged(target, m.telemetry, ch, k.shadow.Load()) }
			b, err := breaker.New(cfg)
			if err != nil {
				return err
			}
			k.breaker, k.breakerOf = b, e.breaker
		}
		g.breaker = k.breaker
	}
	m.guard = g
	return nil
}

// breakerChanged logs what an operator wants to have been told.
func (c *Client) breakerChanged(target string, m *telemetry.Method, ch breaker.Change, shadow bool) {
	m.BreakerChanged(context.Background(), ch.To.String(), string(ch.Reason))
	level := slog.LevelInfo
	if ch.To == breaker.Open && !shadow { // in shadow nobody is refused
		level = slog.LevelWarn
	}
	c.log.Log(context.Background(), level, "bobtail: circuit breaker "+ch.To.String(), "target", target,
		"method", ch.Method, "from", ch.From.String(), "reason", string(ch.Reason), "shadow", shadow)
}
