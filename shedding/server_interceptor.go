package shedding

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// permit is a call on its way through the server. It is its goroutine's, but for what is the
// server's.
type permit struct {
	server *Server
	cfg    *serverConfig
	method *median
	event  ServerEvent

	entered bool            // it may have a slot or a place in the queue
	settled chan Settlement // how its wait ends; nil: it does not wait
	ticket  Ticket
	arrived time.Time // in the queue
	started time.Time // its handler

	finished bool // the handler has returned
	stream   bool
	fed      bool // a stream of which the client sends messages: its time is the client's too
	lasting  *time.Timer

	// The rest is guarded by the server's mu.
	tenant *tenant // whose token it has
	waits  bool    // in the queue
	holds  bool    // a slot, which Done gives back
	lasts  bool    // a stream for whose sake the limit is raised
}

// UnaryServerInterceptor returns an interceptor that admits unary calls. It should stand
// outside of all that costs something, and inside of what measures all calls, as a load
// report does. A call has its slot from before its handler begins until it has returned or
// panicked; one that waits leaves when its context ends.
func (s *Server) UnaryServerInterceptor() grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
		cfg := s.config.Load()
		if cfg.exempt(info.FullMethod) {
			return handler(cfg.exemptContext(ctx), req)
		}
		p := &permit{server: s, cfg: cfg}
		defer func() { p.end(ctx, err) }() // also after a panic, be it of a hook while it is admitted
		in, err := p.admit(ctx, info.FullMethod)
		if err != nil {
			return nil, err
		}
		if in, err = startTied(in); err != nil {
			return nil, err
		}
		resp, err = handler(in, req)
		p.finished = true
		return resp, err
	}
}

// StreamServerInterceptor is UnaryServerInterceptor for streams. A stream has its slot until
// its handler has returned. The time of one of which the client sends the messages
// is not measured, for it is the client's as much as the server's.
//
// A stream that has been open for a second has its slot beside the limit, which is raised
// by one for as long as it lasts, and its time is not measured either: streams that live for
// long, and do little, would else take all slots from those who need them. So a server lets
// in about as many of them every second as its limit says, and any number in the end.
func (s *Server) StreamServerInterceptor() grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
		cfg, ctx := s.config.Load(), ss.Context()
		if cfg.exempt(info.FullMethod) {
			return handler(srv, withContext(ss, ctx, cfg.exemptContext(ctx)))
		}
		p := &permit{server: s, cfg: cfg, stream: true, fed: info.IsClientStream}
		defer func() { p.end(ctx, err) }()
		in, err := p.admit(ctx, info.FullMethod)
		if err != nil {
			return err
		}
		if p.entered {
			p.lasting = time.AfterFunc(lastingAfter, p.last)
		}
		err = handler(srv, withContext(ss, ctx, in))
		p.finished = true
		return err
	}
}

// serverStream is a stream with another context.
type serverStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (s serverStream) Context() context.Context { return s.ctx }

// withContext returns ss with the context to, if that is another than its own.
func withContext(ss grpc.ServerStream, own, to context.Context) grpc.ServerStream {
	if to == own {
		return ss
	}
	return serverStream{ss, to}
}

// admit waits until the call may run. The context is the handler's. An error is what the
// call is refused with. The permit is to be ended whatever it returns, and if it panics, which
// it does if a hook does.
func (p *permit) admit(ctx context.Context, method string) (context.Context, error) {
	s := p.server
	a, ok := ctx.Value(arrivalKey{}).(*arrival)
	if !ok {
		a = s.arrivalOf(p.cfg, incoming{ctx})
	}
	p.method = s.methods.Of(nil, method)
	p.event = ServerEvent{Method: method, Criticality: a.criticality, Extra: a.extra}
	if s.draining.Load() {
		p.refused(ctx, Draining)
		return ctx, refusal(ctx, method, Draining, drainPushback)
	}
	d := s.arrive(ctx, p, a)
	if d.Verb == Queued && !p.cfg.Shadow {
		var err error
		if d, err = p.wait(ctx); err != nil {
			return ctx, err
		}
	}
	switch d.Verb {
	case Admitted:
		p.admitted(ctx)
	case Refused:
		p.refused(ctx, d.Reason)
		if !p.cfg.Shadow {
			return ctx, refusal(ctx, method, d.Reason, d.RetryAfter)
		}
	} // one that is queued in shadow tells at its end what became of it
	p.started = time.Now()
	return classified(ctx, a.claimed, a.criticality), nil
}

// arrive asks the core.
func (s *Server) arrive(ctx context.Context, p *permit, a *arrival) Decision {
	r := Request{Criticality: a.criticality, Extra: a.extra, Cohort: a.cohort, Owner: p}
	r.Deadline, _ = ctx.Deadline()
	now := s.lock()
	defer func() { s.unlock(now) }()
	p.cfg = s.config.Load() // as of now: whoever waits in spite of shadow, nobody would let in
	if q := p.cfg.Queue; q != nil && q.Shards > 1 {
		r.Flow = uint64(hashID(a.tenant, s.shuffle))
	}
	if s.tenants != nil {
		e, ok, over, wait := s.tenants.take(now, a.tenant, s.core.flow.capacity)
		if !ok {
			return Decision{Reason: TenantQuota, RetryAfter: wait}
		}
		p.tenant = e
		if over {
			// Dealt out, because the cursor can take away a part of what is over only if it is
			// not all of one cohort.
			r.Extra, r.Cohort = true, s.deal()
		}
	}
	r.Median = p.method.at(now.Sub(s.born))
	d := s.core.Arrive(now, r)
	switch d.Verb {
	case Admitted:
		p.entered, p.holds = true, true
	case Queued:
		p.ticket, p.settled, p.arrived = d.Ticket, make(chan Settlement, 1), now
		p.entered, p.waits = true, true
	case Refused:
		if p.tenant != nil {
			p.tenant.giveBack(now)
		}
		if d.RetryAfter == 0 {
			d.RetryAfter = s.core.Verdict().RetryAfter()
		}
	}
	return d
}

// wait waits for the end of the wait. The error is that of the context, if the client
// has gone.
func (p *permit) wait(ctx context.Context) (Decision, error) {
	var d Decision
	select {
	case st := <-p.settled:
		d, p.event.Wait = st.Decision, st.Wait
		p.entered = d.Verb == Admitted
	case <-ctx.Done():
		if waited := p.vacate(0, Ignored); !waited {
			p.event.Wait = (<-p.settled).Wait
		}
	}
	err := ctx.Err()
	if deadline, ok := ctx.Deadline(); ok && err == nil && !time.Now().Before(deadline) {
		err = context.DeadlineExceeded // the core's timer was quicker than the context's
	}
	if err != nil {
		if p.entered {
			p.vacate(0, Ignored)
		}
		p.refused(ctx, ClientGone)
		return Decision{}, status.FromContextError(err).Err()
	}
	return d, nil
}

// vacate gives back what the call has: its slot, or its place in the queue, and then it tells
// that it had waited until now. Otherwise it is not ok, and a wait that there was has been
// settled.
func (p *permit) vacate(ran time.Duration, r Result) (waited bool) {
	p.entered = false
	if p.lasting != nil {
		p.lasting.Stop()
	}
	s := p.server
	now := s.lock()
	defer s.unlock(now)
	if p.waits {
		if waited = s.core.Leave(now, p.ticket); waited {
			p.event.Wait = now.Sub(p.arrived)
		} else {
			s.deliver(now) // it was settled by the same call
		}
		p.waits = false
	}
	// In this order, or another would be let in for each of the two.
	if p.lasts {
		p.lasts = false
		s.core.Lasting(now, -1)
	}
	if p.holds {
		p.holds = false
		s.core.Done(now, ran, r)
	}
	return waited
}

// lastingAfter is how long a stream is a call like others. Most that are not meant to last
// have ended by then, and what clients wait for, they seldom wait for longer.
const lastingAfter = time.Second

// last tells that a stream has been open for long. One that has ended in the meantime holds
// no slot any more.
func (p *permit) last() {
	s := p.server
	now := s.lock()
	if p.holds {
		p.lasts = true
		s.core.Lasting(now, 1)
	}
	s.unlock(now)
}

// end ends a call whose handler has returned, or has panicked, or was never called.
func (p *permit) end(ctx context.Context, err error) {
	now := time.Now()
	ran := now.Sub(p.started)
	r := Ignored
	if p.finished {
		r = p.result(ctx, err, now, ran)
	}
	if !p.entered {
		return
	}
	waited := p.vacate(ran, r)
	if p.settled == nil || !p.cfg.Shadow {
		return
	}
	// What became of a call that would have waited while its handler ran.
	switch {
	case waited && ctx.Err() != nil:
		p.refused(ctx, ClientGone)
	case waited:
		p.admitted(ctx)
	default:
		st := <-p.settled
		if p.event.Wait = st.Wait; st.Verb == Admitted {
			p.admitted(ctx)
		} else {
			p.refused(ctx, st.Reason)
		}
	}
}

// lateBy is how long before its deadline a call may be cancelled for the deadline's sake:
// the client's timer began to run earlier than the server's, by the way of the request.
const lateBy = 2 * time.Millisecond

// result is what the end of the handler says about the server.
func (p *permit) result(ctx context.Context, err error, now time.Time, ran time.Duration) Result {
	if p.stream && ran >= lastingAfter {
		return Ignored // it ends when somebody has had enough of it, which may be its deadline
	}
	since := now.Sub(p.server.born)
	median := p.method.at(since)
	if deadline, ok := ctx.Deadline(); ok && ctx.Err() != nil && now.Add(lateBy).After(deadline) ||
		errors.Is(ctx.Err(), context.DeadlineExceeded) {
		if ran > median && !p.fed {
			p.method.record(since, ran) // it would have taken longer; which side of the median is all that counts
		}
		if p.fed {
			return UntimedDrop
		}
		return Dropped
	}
	code := outcome.CodeOf(err)
	switch {
	case ctx.Err() != nil || code == codes.Canceled:
		return Ignored
	case p.fed:
		if outcome.OfCode(code) == outcome.Success {
			return Untimed
		}
		return Ignored
	case outcome.OfCode(code) == outcome.Success:
		p.method.record(since, ran)
		return Served
	case ran < median || median == 0:
		return Ignored // it failed at once
	case code == codes.DeadlineExceeded || code == codes.ResourceExhausted:
		return Dropped
	}
	p.method.record(since, ran)
	return Served
}

func (p *permit) admitted(ctx context.Context) {
	p.event.Admitted = true
	p.server.report(ctx, p.cfg, p.event)
}

func (p *permit) refused(ctx context.Context, why Reason) {
	p.event.Reason = why
	p.server.report(ctx, p.cfg, p.event)
}
