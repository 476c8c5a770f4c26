package hedging

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/rpc"
)

// InvokeUnary makes one unary call, hedged. It has the form of a
// grpc.UnaryClientInterceptor.
//
// The first attempt goes straight into the caller's reply and call options, on
// the caller's goroutine. A hedge has a clone of the request, and a reply, header,
// trailer and peer of its own, which become the caller's only if it wins; so the
// caller may use the request again as soon as InvokeUnary returns. OnFinish
// options run once, with the result of the call. A call whose request or reply is
// no proto message is not hedged.
//
// InvokeUnary returns when the first attempt has returned, which follows its
// cancellation at once unless an interceptor or credentials below ignore their
// context. Call options of types unknown to grpc itself are handed to every
// attempt as they are: one that writes through a pointer would race.
func (h *Hedger) InvokeUnary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
	invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	now := h.now()
	h.deposit(now)
	out := rpc.Message(reply)
	if out == nil || !isMessage(req) {
		return invoker(ctx, method, req, reply, cc, opts...)
	}
	u := &unary{req: req, reply: reply, kind: kindOf(out), cc: cc, invoker: invoker, opts: opts}
	u.race.h, u.race.ctx, u.race.op = h, ctx, u
	u.attempts.Method = method
	if h.ties() {
		u.tied, u.ctx = true, attempt.Tied(ctx)
	}
	u.begin(now)
	u.run(now)
	return u.finish()
}

// unary is the operation of a unary call.
type unary struct {
	race
	req, reply any
	kind       protoreflect.MessageType // of reply
	cc         *grpc.ClientConn
	invoker    grpc.UnaryInvoker
	opts       []grpc.CallOption  // the caller's
	room       [2]grpc.CallOption // for the first attempt's options; most calls have none or one
}

// forFirst returns the first attempt's call options: the caller's but for OnFinish,
// and a trailer.
func (u *unary) forFirst() []grpc.CallOption {
	return append(rpc.ButOnFinish(u.room[:0], u.opts), grpc.Trailer(&u.first.trailer))
}

// forHedge returns opts for an attempt other than the first: what writes through a
// pointer of the caller's is left out, and the attempt does not wait for a
// backend to become ready.
func forHedge(opts []grpc.CallOption, own ...grpc.CallOption) []grpc.CallOption {
	all := rpc.ForAttempt(make([]grpc.CallOption, 0, len(opts)+len(own)+1), opts)
	return append(append(all, own...), grpc.WaitForReady(false))
}

func (u *unary) prepare(b *branch) {
	if b.inline {
		// Nothing else reads the caller's request or writes its reply now.
		b.req, b.reply = u.req, u.reply
		return
	}
	b.req, b.reply = proto.Clone(rpc.Message(u.req)), u.kind.New().Interface()
}

func (u *unary) try(b *branch) error {
	if b == &u.first {
		return u.invoker(b, u.attempts.Method, u.req, u.reply, u.cc, u.forFirst()...)
	}
	b.overGRPC = true
	opts := forHedge(u.opts, grpc.Header(&b.header), grpc.Trailer(&b.trailer), grpc.Peer(&b.peer))
	return u.invoker(b, u.attempts.Method, b.req, b.reply, u.cc, opts...)
}

func (u *unary) code(err error) codes.Code { return status.Code(err) }

// finish hands the result to the caller.
func (u *unary) finish() error {
	u.report()
	w := u.decided
	if w == nil {
		return u.done(status.FromContextError(u.ctx.Err()).Err())
	}
	w.cancel()
	if w != &u.first {
		if w.panicked != nil {
			panic(w.panicked)
		}
		p := &w.peer
		if p.Addr == nil {
			p = nil // that of the first attempt stays, so that nobody takes the call for unsent
		}
		rpc.Give(u.opts, w.header, w.trailer, p)
		if w.err == nil && !w.inline {
			move(rpc.Message(u.reply), w.reply.(proto.Message))
		}
	}
	return u.done(w.err)
}

func (u *unary) done(err error) error {
	rpc.Finish(u.opts, err)
	return err
}
