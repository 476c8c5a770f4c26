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
// An attempt counts as never sent, and is then retried whatever the method and the
// code, if it ended UNAVAILABLE and grpc opened no stream for it: then no peer was set
// and no balancer of ours has named a backend. An interceptor below that drops the call
// options it is given hides the peer, and would make a failure of grpc's own balancers
// look like that.
func (r *Retrier) InvokeUnary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
	invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	u := &unary{}
	u.begin(r, ctx, method, false)
	for {
		err := u.try(req, reply, cc, invoker, opts)
		if err == nil {
			u.succeeded()
			return u.done(opts, nil)
		}
		code := status.Code(err)
		wait, why := u.ended(end{
			err: err, code: code, trailer: u.trailer, timedOut: u.late && code == codes.DeadlineExceeded,
			unsent: code == codes.Unavailable && u.peer.Addr == nil && u.current.attempt.Endpoint() == "",
		})
		if why == "" && !u.again(wait) {
			err, why = status.FromContextError(ctx.Err()).Err(), CallEnded
		}
		if why != "" {
			u.report(why, status.Code(err))
			return u.done(opts, err)
		}
		// What the attempt that failed has set is not that of the next one, which may
		// set nothing.
		rpc.Give(opts, nil, nil, peer.Peer{})
	}
}

// unary is a unary call under way.
type unary struct {
	call
	trailer metadata.MD        // of the newest attempt: for pushback
	peer    peer.Peer          // of the newest attempt: set if a stream was opened
	late    bool               // its own time had run out when the newest attempt ended
	room    [3]grpc.CallOption // for the options of one attempt; most calls have none or one
}

// try makes the newest attempt.
func (u *unary) try(req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts []grpc.CallOption) error {
	u.trailer, u.peer = nil, peer.Peer{}
	all := append(rpc.ButOnFinish(u.room[:0], opts), grpc.Trailer(&u.trailer), grpc.Peer(&u.peer))
	if u.r.cfg.AttemptTimeout > 0 {
		limited, cancel := context.WithTimeout(u.current.Context, u.r.cfg.AttemptTimeout)
		defer cancel()
		u.current.Context = limited
	}
	err := invoker(u.current, u.attempts.Method, req, reply, cc, all...)
	u.now = u.r.now()
	// By our clock, or by the server's, which was told of the limit.
	u.late = u.r.cfg.AttemptTimeout > 0 && (u.now.Sub(u.begun) >= u.r.cfg.AttemptTimeout || u.current.Err() != nil)
	return err
}

func (u *unary) done(opts []grpc.CallOption, err error) error {
	rpc.Finish(opts, err)
	return err
}
