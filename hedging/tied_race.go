package hedging

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
)

// StatsHandler returns what a connection needs, beside an interceptor, for calls that are
// [Config.Tied], as an option of its dialing:
//
//	grpc.WithStatsHandler(hedging.StatsHandler())
//
// It sees the header that says that a handler has started, which is otherwise known only
// with the answer. It costs every call of the connection some 15 allocations, so leave it
// out where nothing is tied.
func StatsHandler() stats.Handler { return tiedStats{} }

// tiedStats hands the headers of tied attempts to their races.
type tiedStats struct{}

type tiedKey struct{}

// tiedContext is the context of a tied attempt, which its connection's stats handler
// finds it by.
type tiedContext struct {
	context.Context
	race   *race
	branch *branch
}

// Value answers the stats handler.
func (c *tiedContext) Value(key any) any {
	if _, ok := key.(tiedKey); ok {
		return c
	}
	return c.Context.Value(key)
}

// TagRPC implements stats.Handler.
func (tiedStats) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	if c, _ := ctx.Value(tiedKey{}).(*tiedContext); c != nil && c.race.attempts.Method != info.FullMethodName {
		// Credentials or an interceptor make a call of their own under the attempt's
		// context: its header says nothing of the attempt.
		return context.WithValue(ctx, tiedKey{}, (*tiedContext)(nil))
	}
	return ctx
}

// HandleRPC implements stats.Handler.
func (tiedStats) HandleRPC(ctx context.Context, s stats.RPCStats) {
	h, ok := s.(*stats.InHeader)
	if !ok {
		return
	}
	if c, _ := ctx.Value(tiedKey{}).(*tiedContext); c != nil {
		c.race.header(c.branch, len(h.Header.Get(attempt.TiedKey)) > 0)
	}
}

// TagConn implements stats.Handler.
func (tiedStats) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn implements stats.Handler.
func (tiedStats) HandleConn(context.Context, stats.ConnStats) {}

// header is the arrival of b's header, on the goroutine that reads its connection; begun
// says whether it tells of the start of the handler.
//
// The first header to arrive decides which attempt goes on. When two are in hand at once,
// both servers have started, and the earlier attempt goes on: it writes straight into the
// caller's reply, and its server does not take it for an extra one, to be shed before
// others. Either way the other is cancelled at once, not when the answer has come.
func (r *race) header(b *branch, begun bool) {
	now := time.Since(r.begun)
	at := r.begun.Add(now).Sub(r.h.start)
	if !begun {
		r.h.distance.untold(at)
		return
	}
	b.begun.Store(true)
	r.h.distance.told(at, now-b.started)
	if !r.mu.TryLock() {
		// A hedge may be in the making, under the lock, and the clone of a large request
		// takes long. All calls of the connection would wait for it.
		go func() {
			r.mu.Lock()
			r.lead(b)
		}()
		return
	}
	r.lead(b)
}

// lead has b go on, whose handler has started, or one that started with it. The lock is held,
// and let go.
func (r *race) lead(b *branch) {
	defer r.mu.Unlock()
	now := time.Since(r.begun)
	if b.withdrawn || b.ended {
		return
	}
	lead := b
	r.each(func(o *branch) {
		if o.begun.Load() && !o.withdrawn && !o.ended && o.number() < lead.number() {
			lead = o
		}
	})
	s := r.core.begin(now, r.h.delay(r.begun.Add(now)))
	if s.withdraw {
		r.needs().leader = lead
		r.each(func(o *branch) {
			if o != lead && !o.withdrawn && !o.ended {
				o.withdrawn = true
				o.supersede(lead)
			}
		})
	}
	if s.wake == noTime && r.timer != nil {
		r.timer.Stop()
	}
	r.arm(s, now)
}

// each calls f with every attempt. The lock is held.
func (r *race) each(f func(*branch)) {
	f(&r.first)
	if r.rare != nil {
		for _, b := range r.rare.hedges {
			f(b)
		}
	}
}

// afterAll is the end of an attempt that was withdrawn. It has mostly been cut off; an
// answer that was on its way already is as good as the leader's. The lock is held.
func (r *race) afterAll(b *branch, now time.Duration, code codes.Code) *branch {
	if b.err != nil {
		code = codes.Canceled
		r.reclaim(b, now)
	}
	r.h.record(r.begun.Add(now), now-b.started, code)
	if b.err == nil {
		return r.follow(r.core.save(b.number()), now, b.inline)
	}
	return nil
}

// retract takes back b, which was withdrawn, and which then had nowhere to go: it was never
// launched. The token is that of the copy, which of the two b is does not matter: whatever
// the servers tell, the work is done once. The lock is held.
func (r *race) retract(b *branch, now time.Duration) {
	r.core.withdrawn--
	if k := b.number(); k == r.core.number && k > 1 {
		r.core.number--
	}
	if !r.core.over {
		r.suppress(NoBackend, now)
	}
	paid := b
	if b == &r.first {
		paid = r.rare.leader
	}
	if r.h.cfg.Budget != nil {
		r.h.cfg.Budget.GiveBack(r.begun.Add(paid.started))
	}
}

// reclaim gives the token of a tied copy back when b, of which there was no need any
// more, was cancelled before its handler started: the work has been done once, not twice.
// If b is the first attempt, the copy that leads ran in its place, and it is that one's.
//
// That nothing was heard of a start is proof only if the servers tell. The news may also
// have been on its way when b was cancelled; so much the budget overlooks. The lock is held.
func (r *race) reclaim(b *branch, now time.Duration) {
	if !r.tied || r.h.cfg.Budget == nil || b.begun.Load() || !r.h.distance.tells(r.begun.Add(now).Sub(r.h.start)) {
		return
	}
	paid := b
	if b == &r.first {
		if !b.withdrawn {
			return
		}
		if paid = r.rare.leader; paid == &r.first {
			return
		}
	}
	r.h.cfg.Budget.GiveBack(r.begun.Add(paid.started))
}
