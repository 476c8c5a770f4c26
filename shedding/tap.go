package shedding

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/tap"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

var _ tap.ServerInHandle = (*Server)(nil).TapHandle

// tapError is a refusal that is made once for all who get the same.
type tapError struct {
	after time.Duration
	err   error
}

// TapHandle is a tap.ServerInHandle, for grpc.InTapHandle. It refuses what is below the
// cursor before anything of it is decoded, at less than 0.75 of what the interceptors'
// refusal costs. It reads one atomic word; only if that refuses anybody does it look at the
// call. It takes no lock, and owns nothing: what it lets pass, the interceptors admit. It is of no
// use without them.
//
// Its refusals have the status of the interceptors', with a google.rpc.ErrorInfo (without
// the method) and a RetryInfo, but no trailer: grpc sends none from there.
//
// With tenants it refuses only those who would be refused inside their share too: it does
// not know who is.
//
// A grpc.Server has one tap. A server that has one already calls TapHandle in it, first or
// last, and returns its context.
func (s *Server) TapHandle(ctx context.Context, info *tap.Info) (context.Context, error) {
	if s.gate.open() {
		return ctx, nil
	}
	cfg := s.config.Load()
	if cfg.Shadow || cfg.exempt(info.FullMethodName) {
		return ctx, nil
	}
	a := s.arrivalOf(cfg, info.Header)
	v, refused := s.gate.Refuse(a.level())
	if !refused {
		return context.WithValue(ctx, arrivalKey{}, a), nil
	}
	s.report(ctx, cfg, ServerEvent{
		Method: info.FullMethodName, Criticality: a.criticality, Extra: a.extra, Reason: BelowCursor, Tap: true,
	})
	return ctx, s.tapRefusal(v.RetryAfter())
}

// tapRefusal returns the error of a call that the tap refuses.
func (s *Server) tapRefusal(after time.Duration) error {
	if e := s.tapErr.Load(); e != nil && e.after == after {
		return e.err
	}
	r := &outcome.Refusal{Cause: ErrOverloaded, Code: codes.Unavailable, Reason: BelowCursor.String(), After: after}
	e := &tapError{after: after, err: r.GRPCStatus().Err()}
	s.tapErr.Store(e)
	return e.err
}

// open tells that nobody is refused.
func (g *Gate) open() bool { return !Verdict(g.verdict.Load()).Refuses(0) }
