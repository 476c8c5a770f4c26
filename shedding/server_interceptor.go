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

// permit is a call on its way through the server. It is its goroutine's, but for settled and
// tenant.
type permit struct {
	server *Server
	cfg    *serverConfig
	method *median
	tenant *tenant // whose token it has; read under the server's mu
	event  ServerEvent

	settled chan Settlement // how its wait ends; nil: it does not wait
	ticket  Ticket
	holds   bool // a slot, which Done gives back
	started time.Time

	finished bool // the handler has returned
	stream   bool // of which the client sends messages: its time is the client's too
}

// UnaryServerInterceptor returns an interceptor that admits unary calls. It should stand
// outside of all that costs something, and inside of what measures all calls, as a load
// report does. A call has its slot from before its handler begins until it has returned or
// panicked; one that waits leaves when its context ends.
func (s *Server) UnaryServerInterceptor() grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
		cfg := s.config.Load()
		if cfg.exempt(info.FullMethod) {
			return handler(ctx, req)
		}
		ctx, p, err := s.admit(ctx, cfg, info.FullMethod)
		if err != nil {
			return nil, err
		}
		defer func() { p.end(ctx, err) }() // also after a panic
		tied, err := startTied(ctx)
		if err != nil {
			return nil, err
		}
		resp, err = handler(tied, req)
		p.finished = true
		return resp, err
	}
}

// StreamServerInterceptor is UnaryServerInterceptor for streams. A stream has its slot until
// its handler has returned. The time of one of which the client sends the messages
// is not measured, for it is the client's as much as the server's.
func (s *Server) StreamServerInterceptor() grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
		cfg := s.config.Load()
		if cfg.exempt(info.FullMethod) {
			return handler(srv, ss)
		}
		ctx, p, err := s.admit(ss.Context(), cfg, info.FullMethod)
		if err != nil {
			return err
		}
		p.stream = info.IsClientStream
		defer func() { p.end(ctx, err) }()
		if ctx != ss.Context() {
			ss = serverStream{ss, ctx}
		}
		err = handler(srv, ss)
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

// admit waits until the call may run. The permit is to be ended, the context is the
// handler's. An error is what the call is refused with.
func (s *Server) admit(ctx context.Context, cfg *serverConfig, method string) (context.Context, *permit, error) {
	a, ok := ctx.Value(arrivalKey{}).(*arrival)
	if !ok {
		a = s.arrivalOf(cfg, incoming{ctx})
	}
	p := &permit{server: s, cfg: cfg, method: s.methods.Of(nil, method)}
	p.event = ServerEvent{Method: method, Criticality: a.criticality, Extra: a.extra}
	if s.draining.Load() {
		p.refused(ctx, Draining)
		return ctx, nil, refusal(ctx, method, Draining, drainPushback)
	}
	d := s.arrive(ctx, p, a)
	if cfg.Shadow && d.Verb != Admitted {
		if d.Verb == Refused {
			p.refused(ctx, d.Reason)
		}
		d.Verb = Admitted // one that is queued tells at its end what became of it
	} else if d.Verb == Queued {
		var err error
		if d, err = p.wait(ctx); err != nil {
			return ctx, nil, err
		}
	}
	if d.Verb == Refused {
		p.refused(ctx, d.Reason)
		return ctx, nil, refusal(ctx, method, d.Reason, d.RetryAfter)
	}
	if p.holds {
		p.admitted(ctx)
	}
	if a.criticality != a.claimed {
		ctx = context.WithValue(ctx, cappedKey{}, a.criticality)
	}
	p.started = time.Now()
	return ctx, p, nil
}

// arrive asks the core.
func (s *Server) arrive(ctx context.Context, p *permit, a *arrival) Decision {
	r := Request{Criticality: a.criticality, Extra: a.extra, Cohort: a.cohort, Owner: p}
	r.Deadline, _ = ctx.Deadline()
	now := s.lock()
	defer func() { s.unlock(now) }()
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
	r.Median = p.method.at(now)
	d := s.core.Arrive(now, r)
	switch d.Verb {
	case Admitted:
		p.holds = true
	case Queued:
		p.ticket, p.settled = d.Ticket, make(chan Settlement, 1)
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
	var st Settlement
	select {
	case st = <-p.settled:
	case <-ctx.Done():
		if !p.leave() {
			st = <-p.settled // it was settled before
		}
	}
	p.event.Wait = st.Wait
	p.holds = st.Verb == Admitted
	err := ctx.Err()
	if deadline, ok := ctx.Deadline(); ok && err == nil && !time.Now().Before(deadline) {
		err = context.DeadlineExceeded // the core's timer was quicker than the context's
	}
	if err != nil {
		if p.holds {
			p.release(0, Ignored)
		}
		p.refused(ctx, ClientGone)
		return Decision{}, status.FromContextError(err).Err()
	}
	return st.Decision, nil
}

// leave takes the call out of the queue. It is false when the wait has been settled.
func (p *permit) leave() bool {
	now := p.server.lock()
	defer p.server.unlock(now)
	return p.server.core.Leave(now, p.ticket)
}

// release gives the slot back.
func (p *permit) release(ran time.Duration, r Result) {
	p.holds = false
	now := p.server.lock()
	p.server.core.Done(now, ran, r)
	p.server.unlock(now)
}

// end ends a call whose handler has returned, or has panicked.
func (p *permit) end(ctx context.Context, err error) {
	now := time.Now()
	ran := now.Sub(p.started)
	if p.settled != nil && p.cfg.Shadow {
		p.endShadow(ctx)
	}
	r := p.result(ctx, err, now, ran)
	if p.holds {
		p.release(ran, r)
	}
}

// endShadow tells what became of a call that would have waited while its handler ran.
func (p *permit) endShadow(ctx context.Context) {
	var st Settlement
	select {
	case st = <-p.settled:
	default:
		if p.leave() {
			p.refused(ctx, ClientGone)
			return
		}
		st = <-p.settled
	}
	p.event.Wait = st.Wait
	if p.holds = st.Verb == Admitted; p.holds {
		p.admitted(ctx)
	} else {
		p.refused(ctx, st.Reason)
	}
}

// lateBy is how long before its deadline a call may be cancelled for the deadline's sake:
// the client's timer began to run earlier than the server's, by the way of the request.
const lateBy = 2 * time.Millisecond

// result is what the end of the handler says about the server.
func (p *permit) result(ctx context.Context, err error, now time.Time, ran time.Duration) Result {
	if !p.finished || p.stream {
		return Ignored
	}
	median := p.method.at(now)
	if deadline, ok := ctx.Deadline(); ok && ctx.Err() != nil && now.Add(lateBy).After(deadline) ||
		errors.Is(ctx.Err(), context.DeadlineExceeded) {
		if ran > median {
			p.method.record(now, ran) // it would have taken longer; which side of the median is all that counts
		}
		return Dropped
	}
	switch code := outcome.CodeOf(err); {
	case ctx.Err() != nil || code == codes.Canceled:
		return Ignored
	case outcome.OfCode(code) == outcome.Success:
		p.method.record(now, ran)
		return Served
	case ran < median || median == 0:
		return Ignored // it failed at once
	case code == codes.DeadlineExceeded || code == codes.ResourceExhausted:
		return Dropped
	}
	p.method.record(now, ran)
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
