package hedging

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/bobtail-rpc/bobtail/internal/rpc"
)

// OpenStream makes one server-streaming call, hedged until its first message. It
// has the form of a grpc.StreamClientInterceptor; a call whose client streams
// passes through.
//
// The first attempt is opened and sent at once, as it would be without hedging.
// The race begins with the first RecvMsg, since before it nobody knows whether an
// answer is there: the delay counts from then, the first attempt receives into
// the caller's message and hedges into their own, and whichever has a message, or
// the end of an empty stream, first goes on alone. Header, called before RecvMsg,
// races the attempts to their headers instead.
//
// The caller gets its request back before the race begins, so unlike a unary call
// a streaming call clones it in any case.
func (h *Hedger) OpenStream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string,
	streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	if desc.ClientStreams || !desc.ServerStreams {
		return streamer(ctx, desc, cc, method, opts...)
	}
	s := &stream{desc: desc, cc: cc, streamer: streamer, opts: opts, start: make(chan struct{}, 1)}
	s.race.h, s.race.ctx, s.race.op = h, ctx, s
	s.attempts.Method = method
	s.hedgeOpts = forHedge(opts, rpc.OnClosed(s.onFinish))
	s.first.own = &own{}
	s.first.attempt.Streaming = true
	now := h.now()
	h.deposit(now)
	s.begin(now)
	// The stream outlives this call, and so do the caller's header, trailer and
	// peer options: done sets them from the stream that won. This attempt goes
	// with the caller's own WaitForReady; clipped, like every list of options that an
	// interceptor below may append to: attempts must not write into each other's.
	first := slices.Clip(s.hedgeOpts[:len(s.hedgeOpts)-1])
	cs, err := streamer(&s.first, desc, cc, method, first...)
	if err != nil {
		if h.class(status.Code(err)) != nonFatal {
			s.first.cancel()
			s.done(err)
			return nil, err
		}
		s.first.err = err // one more of the failures that a sibling may make good
	}
	s.first.stream = cs
	if rpc.HasOnFinish(opts) {
		// The caller may end the call by its context and never receive.
		s.unwatch = context.AfterFunc(ctx, func() { s.onFinish(status.FromContextError(ctx.Err()).Err()) })
	}
	return s, nil
}

// stream is the grpc.ClientStream that the caller holds.
type stream struct {
	race
	desc     *grpc.StreamDesc
	cc       *grpc.ClientConn
	streamer grpc.Streamer
	opts     []grpc.CallOption
	// hedgeOpts are opts without what writes through a pointer, and end with
	// WaitForReady(false).
	hedgeOpts []grpc.CallOption
	finished  sync.Once
	unwatch   func() bool

	req proto.Message // a clone; nil if the request is no proto message

	// start holds a token that lets one of RecvMsg and Header, which may be called
	// concurrently, run the race while the other waits. It guards raced, into and ended.
	// A channel, because a goroutine that waits for a mutex stops the clock of a
	// testing/synctest bubble, and the race takes time.
	start chan struct{}
	raced bool
	into  any                      // what the first attempt receives into; nil in a race to the headers
	kind  protoreflect.MessageType // of into
	ended error                    // the end of the winner's stream, if the race met it
}

// SendMsg sends the one request.
func (s *stream) SendMsg(m any) error {
	if p := rpc.Message(m); p != nil {
		clone := proto.Clone(p)
		s.mu.Lock()
		s.req = clone
		s.mu.Unlock()
	}
	if s.first.stream == nil {
		return nil
	}
	err := s.first.stream.SendMsg(m)
	if errors.Is(err, io.EOF) {
		return nil // the stream has failed: receiving from it tells how, and a hedge may mend it
	}
	if err != nil {
		return s.done(err) // by grpc's contract the end of the stream
	}
	return nil
}

// CloseSend implements grpc.ClientStream.
func (s *stream) CloseSend() error {
	if s.first.stream == nil {
		return nil
	}
	return s.first.stream.CloseSend()
}

// Context implements grpc.ClientStream.
func (s *stream) Context() context.Context {
	if w := s.winner(); w != nil && w.stream != nil {
		return w.stream.Context()
	}
	return s.ctx
}

// RecvMsg receives the next message of the stream that won, racing for the first.
func (s *stream) RecvMsg(m any) error {
	raced, ended := s.raceOnce(m)
	switch {
	case ended != nil:
		return s.done(ended)
	case raced:
		if w := s.winner(); !w.inline {
			move(rpc.Message(m), w.reply.(proto.Message))
		}
		return nil
	}
	if err := s.winner().stream.RecvMsg(m); err != nil {
		return s.done(err)
	}
	return nil
}

// raceOnce runs the race, to the first message or to the headers if into is nil, unless
// it has been run. It reports whether it did, and how the call has ended, if it met
// the end.
func (s *stream) raceOnce(into any) (raced bool, ended error) {
	s.start <- struct{}{}
	defer func() { <-s.start }()
	if s.raced {
		return false, s.ended
	}
	// What remains for a caller that recovers a panic of the race and asks again.
	s.ended = status.Error(codes.Internal, "hedging: an attempt panicked")
	switch w := s.compete(into); {
	case w == nil:
		s.ended = status.FromContextError(s.ctx.Err()).Err()
	default:
		s.ended = w.err
	}
	return true, s.ended
}

// Header returns the header of the stream that won, racing for it if RecvMsg has
// not yet been called.
func (s *stream) Header() (metadata.MD, error) {
	s.raceOnce(nil) // how it ended is for RecvMsg to tell, as grpc has it
	w := s.winner()
	if w == nil || w.stream == nil {
		return nil, nil
	}
	return w.stream.Header()
}

// Trailer implements grpc.ClientStream.
func (s *stream) Trailer() metadata.MD {
	if w := s.winner(); w != nil && w.stream != nil {
		return w.stream.Trailer()
	}
	return nil
}

// winner is the attempt that decided the race, nil before that and if none did.
func (s *stream) winner() *branch {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.decided
}

// compete runs the race, to the first message, or to the headers if into is nil.
// The caller holds the token of s.start.
func (s *stream) compete(into any) *branch {
	s.raced, s.into = true, into
	now := time.Now()
	// An answer that came while nobody was receiving was quicker than it seems.
	s.first.unmeasured = now.Sub(s.begun) > time.Millisecond
	out := rpc.Message(into)
	if out != nil {
		s.kind = kindOf(out)
	}
	s.mu.Lock()
	s.single = s.req == nil || into != nil && out == nil
	s.mu.Unlock()
	s.run(now)
	s.report()
	w := s.winner()
	if w != nil && w.panicked != nil {
		w.cancel()
		panic(w.panicked)
	}
	return w
}

func (s *stream) prepare(b *branch) {
	b.req = s.req
	if b.inline {
		b.reply = s.into
	} else if s.into != nil {
		b.reply = s.kind.New().Interface()
	}
}

func (s *stream) try(b *branch) error {
	if b == &s.first {
		if b.err != nil {
			return b.err // it could not even be opened
		}
		b.reply = s.into
	} else {
		b.overGRPC = true
		cs, err := s.streamer(b, s.desc, s.cc, s.attempts.Method, slices.Clip(s.hedgeOpts)...)
		if err != nil {
			return err
		}
		b.stream = cs
		if err := cs.SendMsg(b.req); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if err := cs.CloseSend(); err != nil {
			return err
		}
	}
	var err error
	if b.reply != nil {
		err = b.stream.RecvMsg(b.reply)
	} else if md, herr := b.stream.Header(); herr != nil || md == nil {
		// The stream has ended without a header; there is no message to decode.
		err = b.stream.RecvMsg(new(emptypb.Empty))
	}
	if err != nil {
		b.trailer = b.stream.Trailer()
	}
	return err
}

// code takes the end of an empty stream for the success that it is.
func (s *stream) code(err error) codes.Code {
	if err == io.EOF {
		return codes.OK
	}
	return status.Code(err)
}

// done ends the call on the caller's side: it sets the caller's options from the
// stream that won, lets go of the contexts and runs OnFinish. It returns err.
func (s *stream) done(err error) error {
	if w := s.winner(); w != nil {
		if w.stream != nil {
			rpc.GiveStream(s.opts, w.stream)
		}
		w.cancel()
	}
	s.first.cancel()
	if s.unwatch != nil {
		s.unwatch()
	}
	if err == io.EOF {
		s.onFinish(nil)
	} else {
		s.onFinish(err)
	}
	return err
}

// onFinish runs the caller's OnFinish options, once.
func (s *stream) onFinish(err error) {
	s.finished.Do(func() { rpc.Finish(s.opts, err) })
}
