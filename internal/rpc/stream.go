package rpc

import (
	"context"
	"errors"
	"io"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// Watch has end called when a stream ends, with nil if it succeeded, and first, if it is
// not nil, when it has brought a message. It returns the options to open the stream with,
// and what to make of the stream once it is open. end is called from several sides, and
// must count the first only; perhaps not at all if the stream does not open.
//
// grpc runs OnFinish when the call ends by itself, when its context ends and when the
// connection is closed, also if nobody receives. The stream and its context ctx are watched
// beside that because an interceptor below may keep the options to itself.
func Watch(ctx context.Context, desc *grpc.StreamDesc, opts []grpc.CallOption, end func(error), first func()) ([]grpc.CallOption, func(grpc.ClientStream) grpc.ClientStream) {
	// Clipped, because the list is the caller's.
	return append(slices.Clip(opts), grpc.OnFinish(end)), func(s grpc.ClientStream) grpc.ClientStream {
		w := &watched{ClientStream: s, single: !desc.ServerStreams, end: end, first: first}
		w.unwatch = context.AfterFunc(ctx, func() { end(status.FromContextError(ctx.Err()).Err()) })
		return w
	}
}

type watched struct {
	grpc.ClientStream
	single bool // the server sends one message, which is the end
	end    func(error)
	first  func()
	// unwatch ends the watch over the context.
	unwatch func() bool
}

func (s *watched) over(err error) {
	s.unwatch()
	s.end(err)
}

// RecvMsg implements grpc.ClientStream.
func (s *watched) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	switch {
	case err == io.EOF || err == nil && s.single:
		s.over(nil)
	case err != nil:
		s.over(err)
	case s.first != nil:
		s.first()
		s.first = nil // RecvMsg is not called concurrently
	}
	return err
}

// SendMsg implements grpc.ClientStream.
func (s *watched) SendMsg(m any) error {
	err := s.ClientStream.SendMsg(m)
	// EOF says only that RecvMsg has the status.
	if err != nil && !errors.Is(err, io.EOF) {
		s.over(err)
	}
	return err
}
