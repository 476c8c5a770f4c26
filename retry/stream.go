package retry

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
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/bobtail-rpc/bobtail/internal/rpc"
)

// OpenStream makes one server-streaming call, retried until its first message. It has
// the form of a grpc.StreamClientInterceptor; a call whose client streams passes
// through.
//
// A failure is met, and the wait for the next attempt spent, in the call that meets
// it: here, in RecvMsg, or in Header. What the caller has been given, a header or a
// message, commits the stream. The request is cloned when it is sent, since the caller
// has it back before an attempt can fail; one that is no proto message is not retried.
// AttemptTimeout counts while a stream is being opened, and while its first message is
// being received: an answer that nobody has asked for yet is not late.
func (r *Retrier) OpenStream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string,
	streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	if desc.ClientStreams || !desc.ServerStreams {
		return streamer(ctx, desc, cc, method, opts...)
	}
	s := &stream{desc: desc, cc: cc, streamer: streamer, opts: opts, phase: make(chan struct{}, 1)}
	// Clipped, like every list that interceptors below may append to: attempts must not
	// write into each other's.
	s.each = slices.Clip(rpc.ForAttempt(make([]grpc.CallOption, 0, len(opts)), opts))
	s.begin(r, ctx, method, true)
	if rpc.HasOnFinish(opts) {
		// The caller may end the call by its context and never receive.
		s.unwatch = context.AfterFunc(ctx, func() { s.onFinish(status.FromContextError(ctx.Err()).Err()) })
	}
	if late, err := s.open(); err != nil {
		if err := s.mend(err, late); err != nil {
			return nil, s.finish(err)
		}
	}
	return s, nil
}

// stream is the grpc.ClientStream that the caller holds.
type stream struct {
	desc     *grpc.StreamDesc
	cc       *grpc.ClientConn
	streamer grpc.Streamer
	opts     []grpc.CallOption // the caller's
	each     []grpc.CallOption // those that every attempt is given
	given    sync.Once         // the caller's options have been set
	finished sync.Once         // the caller's OnFinish has run
	unwatch  func() bool

	// phase holds a token that lets one of RecvMsg and Header, which may be called
	// concurrently, take the stream to its first message while the other waits. It guards
	// what follows. A channel, because a goroutine that waits for a mutex stops the clock of
	// a testing/synctest bubble, and the other may be waiting for its backoff.
	phase chan struct{}
	call
	committed bool
	wanted    bool        // somebody receives
	result    error       // of the call that has failed before it was committed
	timer     *time.Timer // of the newest attempt; nil while it has no timeout

	mu     sync.Mutex // guards the rest: SendMsg may run beside RecvMsg
	live   grpc.ClientStream
	cancel context.CancelFunc // of the newest attempt's context
	req    proto.Message      // a clone; nil if it was no proto message
	sent   bool
	closed bool // CloseSend was called
}

// open opens the newest attempt's stream, and sends on it what the caller has sent. It
// reports whether it failed because its time ran out. The caller holds phase, or the
// stream alone.
func (s *stream) open() (late bool, err error) {
	a := s.current
	ctx, cancel := context.WithCancel(a.Context)
	a.Context = ctx
	s.mu.Lock()
	s.cancel = cancel
	s.mu.Unlock()
	s.arm()
	live, err := s.streamer(a, s.desc, s.cc, s.attempts.Method, append(slices.Clip(s.each),
		grpc.Peer(&a.peer), grpc.OnFinish(func(error) { a.over.Store(true) }), rpc.OnClosed(s.closedUnder))...)
	if err != nil {
		live = unopened{ctx: s.ctx}
	}
	s.mu.Lock()
	s.live = live
	req, sent, closed := s.req, s.sent, s.closed
	s.mu.Unlock()
	if err == nil && sent {
		if serr := live.SendMsg(req); serr != nil && !errors.Is(serr, io.EOF) {
			err = serr
		}
	}
	if err == nil && closed {
		err = live.CloseSend()
	}
	if err == nil && s.wanted {
		return false, nil
	}
	_, late = s.verdict(err)
	if err == nil && late {
		err = status.FromContextError(context.Canceled).Err() // the stream is cut off already
	}
	return late, err
}

// told returns err as the caller is to see it: a CANCELLED of a stream that our timer has
// cut off is its deadline, if that has passed as well.
func (s *stream) told(err error) error {
	if s.ctx.Err() != nil && status.Code(err) == codes.Canceled {
		return status.FromContextError(s.ctx.Err()).Err()
	}
	return err
}

// verdict stops the newest attempt's timer, and says of what came of opening it or of its
// first receive whether that commits the stream, or is that its time ran out. A message
// that comes together with the timeout is as good as none, since the CANCELLED of a stream
// that is cut off follows it; unless that is the end of the call too. An answer of the
// server's is that, even then.
func (s *stream) verdict(err error) (commit, timedOut bool) {
	late := s.expired() && s.ctx.Err() == nil
	switch {
	case err == io.EOF:
		return true, false
	case err == nil:
		return !late, late
	}
	return false, late && status.Code(err) == codes.Canceled
}

// closedUnder ends the call because its connection was closed: nobody need receive any
// more.
func (s *stream) closedUnder(err error) {
	s.mu.Lock()
	cancel := s.cancel
	s.mu.Unlock()
	cancel()
	if s.unwatch != nil {
		s.unwatch()
	}
	s.onFinish(err)
}

// arm starts the newest attempt's timer.
func (s *stream) arm() {
	if d := s.r.cfg.attemptTimeout(); d > 0 {
		s.mu.Lock()
		cancel := s.cancel
		s.mu.Unlock()
		s.timer = time.AfterFunc(d, cancel)
	}
}

// expired stops the newest attempt's timer and reports whether that was too late.
func (s *stream) expired() bool {
	late := s.timer != nil && !s.timer.Stop()
	s.timer = nil
	return late
}

// mend takes the failure of the newest attempt and goes on to the next, until one
// opens: then it returns nil. Else it returns the call's error.
func (s *stream) mend(err error, timedOut bool) error {
	for {
		s.now = s.r.now()
		err = s.told(err)
		if timedOut {
			// grpc says CANCELLED, since it was we who ended it.
			err = status.Errorf(codes.DeadlineExceeded, "retry: attempt %d brought no message within %v", s.number, s.r.cfg.AttemptTimeout)
		}
		s.mu.Lock()
		s.cancel()
		_, never := s.live.(unopened)
		var trailer metadata.MD
		if !timedOut { // else the stream may not have ended yet
			trailer = s.live.Trailer()
		}
		single := s.sent && s.req == nil
		s.mu.Unlock()
		code := status.Code(err)
		wait, why := s.ended(end{
			err: err, code: code, trailer: trailer, timedOut: timedOut, single: single,
			unsent: never && !timedOut && s.current.unsent(code),
		})
		if why == "" {
			if why = s.again(wait); why == CallEnded {
				err = status.FromContextError(s.ctx.Err()).Err()
			}
		}
		if why != "" {
			s.report(why, status.Code(err))
			return err
		}
		if timedOut, err = s.open(); err == nil {
			return nil
		}
	}
}

// newest returns the stream of the newest attempt.
func (s *stream) newest() grpc.ClientStream {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live
}

// SendMsg sends the one request.
func (s *stream) SendMsg(m any) error {
	var clone proto.Message
	if p := rpc.Message(m); p != nil {
		clone = proto.Clone(p)
	}
	s.mu.Lock()
	s.req, s.sent = clone, true
	live := s.live
	s.mu.Unlock()
	err := live.SendMsg(m)
	if errors.Is(err, io.EOF) {
		return nil // the stream has failed: receiving from it tells how, and a retry may mend it
	}
	if err != nil {
		return s.finish(err) // by grpc's contract the end of the stream
	}
	return nil
}

// CloseSend implements grpc.ClientStream.
func (s *stream) CloseSend() error {
	s.mu.Lock()
	s.closed = true
	live := s.live
	s.mu.Unlock()
	return live.CloseSend()
}

// Context implements grpc.ClientStream.
func (s *stream) Context() context.Context { return s.newest().Context() }

// Trailer implements grpc.ClientStream.
func (s *stream) Trailer() metadata.MD { return s.newest().Trailer() }

// RecvMsg receives the next message, at first that of the first attempt that has one.
func (s *stream) RecvMsg(m any) error {
	if begun, err := s.receiveFirst(m); begun {
		return s.end(err)
	}
	return s.end(s.newest().RecvMsg(m))
}

// end ends the call if err does.
func (s *stream) end(err error) error {
	if err != nil {
		return s.finish(s.told(err))
	}
	return nil
}

// receiveFirst takes the stream to its first message, or to its end, unless that has
// been done; then it returns false, or the error that the call has ended with.
func (s *stream) receiveFirst(m any) (bool, error) {
	s.phase <- struct{}{}
	defer func() { <-s.phase }()
	if s.committed || s.result != nil {
		return s.result != nil, s.result
	}
	s.receiving()
	for {
		err := s.newest().RecvMsg(m)
		commit, timedOut := s.verdict(err)
		if commit {
			s.commit()
			return true, err
		}
		if s.result = s.mend(err, timedOut); s.result != nil {
			return true, s.result
		}
	}
}

// Header returns the header of the first attempt that has one.
func (s *stream) Header() (metadata.MD, error) {
	s.phase <- struct{}{}
	defer func() { <-s.phase }()
	if !s.committed && s.result == nil {
		s.receiving()
	}
	for !s.committed && s.result == nil {
		live := s.newest()
		md, err := live.Header()
		if err != nil || md == nil {
			// The stream has ended without a header, and so without a message.
			// Receiving tells how.
			err = live.RecvMsg(new(emptypb.Empty))
		}
		if commit, timedOut := s.verdict(err); commit {
			s.commit()
		} else {
			s.result = s.mend(err, timedOut) // for RecvMsg to tell, as grpc has it
		}
	}
	return s.newest().Header()
}

// receiving notes that the caller receives from now on. An answer that came while
// nobody was receiving was quicker than it seems.
func (s *stream) receiving() {
	s.wanted = true
	s.unmeasured = s.r.now().Sub(s.begun) > time.Millisecond
	s.arm()
}

// commit stays with the newest attempt. The caller holds phase.
func (s *stream) commit() {
	s.committed = true
	s.now = s.r.now()
	s.succeeded()
	s.report("", codes.OK)
}

// finish ends the call on the caller's side: it sets the caller's options from the
// newest attempt, lets go of its context and runs OnFinish. It returns err.
func (s *stream) finish(err error) error {
	s.mu.Lock()
	live, cancel := s.live, s.cancel
	s.mu.Unlock()
	// First, because a stream of an interceptor below may have failed to send and live on:
	// its header would be waited for.
	cancel()
	// Once: SendMsg and RecvMsg may both meet the end, at the same time.
	s.given.Do(func() {
		if _, never := live.(unopened); never {
			// Its context is the caller's, whose peer, inside a server, is another's.
			rpc.Give(s.opts, nil, nil, nil)
		} else {
			rpc.GiveStream(s.opts, live)
		}
	})
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

// unopened is the stream of an attempt for which grpc opened none.
type unopened struct {
	grpc.ClientStream
	ctx context.Context
}

func (unopened) Header() (metadata.MD, error) { return nil, nil }
func (unopened) Trailer() metadata.MD         { return nil }
func (unopened) SendMsg(any) error            { return io.EOF }
func (unopened) CloseSend() error             { return nil }
func (u unopened) Context() context.Context   { return u.ctx }
