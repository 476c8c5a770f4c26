package retry

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/rpc"
)

// InvokeUnary makes one unary call, retried. It has the form of a
// grpc.UnaryClientInterceptor.
//
// Attempts follow each other on the caller's goroutine, so they share the caller's
// reply and call options; OnFinish options run once, with the result of the call. An
// exhausted call returns the status of its last attempt as the server sent it.
//
// An attempt counts as never sent, and is then retried whatever the method and whether
// UNAVAILABLE is retryable or not, if it ended UNAVAILABLE and grpc says that it has ended the
// attempt's call without opening a stream: its OnFinish ran and its Peer was not set. Where an
// interceptor below drops the options that it is given, grpc says nothing, and that is no
// proof. Dial with grpc.WithDisableRetry(): what grpc's own retries have sent before their
// last attempt found no backend, it does not say.
func (r *Retrier) InvokeUnary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
	invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	u := &unary{}
	u.begin(r, ctx, method, false)
	for {
		err := u.try(req, reply, cc, invoker, opts)
		if err == nil {
			u.succeeded()
			return u.done(opts, nil, "")
		}
		code := status.Code(err)
		wait, why := u.ended(end{
			err: err, code: code, trailer: u.trailer, timedOut: u.late && code == codes.DeadlineExceeded,
			unsent: u.current.unsent(code),
		})
		if why == "" {
			if why = u.again(wait); why == CallEnded {
				err = status.FromContextError(ctx.Err()).Err()
			}
		}
		if why != "" {
			return u.done(opts, err, why)
		}
		// What the attempt that failed has set is not that of the next one, which may
		// set nothing.
		rpc.Give(opts, nil, nil, &peer.Peer{})
	}
}

// unary is a unary call under way.
type unary struct {
	call
	trailer metadata.MD        // of the newest attempt: for pushback
	late    bool               // its own time had run out when the newest attempt ended
	room    [4]grpc.CallOption // for the options of the first attempt; most calls have none or one
}

// try makes the newest attempt.
func (u *unary) try(req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts []grpc.CallOption) error {
	u.trailer = nil
	a := u.current
	room := u.room[:0]
	if a != &u.first {
		// An interceptor below may still be reading those of an attempt before.
		room = make([]grpc.CallOption, 0, len(opts)+3)
	}
	all := append(rpc.ButOnFinish(room, opts), grpc.Trailer(&u.trailer), grpc.Peer(&a.peer),
		grpc.OnFinish(func(error) { a.over.Store(true) }))
	limit := u.r.cfg.attemptTimeout()
	if limit > 0 {
		limited, cancel := context.WithTimeout(a.Context, limit)
		defer cancel()
		a.Context = limited
	}
	err := invoker(a, u.attempts.Method, req, reply, cc, all...)
	u.now = u.r.now()
	// By our clock, or by the server's, which was told of the limit.
	u.late = limit > 0 && (u.now.Sub(u.begun) >= limit || a.Err() != nil)
	return err
}

// done hands the result to the caller, who may panic in either place.
func (u *unary) done(opts []grpc.CallOption, err error, why Reason) error {
	defer u.report(why, status.Code(err))
	rpc.Finish(opts, err)
	return err
}
