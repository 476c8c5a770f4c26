package rpc

import (
	"errors"
	"io"
	"slices"

	"google.golang.org/grpc"
)

// Watch has end called when a stream ends, with nil if it succeeded, and first, if it is
// not nil, when it has brought a message. It returns the options to open the stream with,
// and what to make of the stream once it is open. end is called from several sides, and
// must count the first only; perhaps not at all if the stream does not open.
//
// grpc runs OnFinish when the call ends by itself, when its context ends and when the
// connection is closed, also if nobody receives. The stream is watched beside that because
// an interceptor below may answer with one of its own, and leave the options alone.
func Watch(desc *grpc.StreamDesc, opts []grpc.CallOption, end func(error), first func()) ([]grpc.CallOption, func(grpc.ClientStream) grpc.ClientStream) {
	// Clipped, because the list is the caller's.
	return append(slices.Clip(opts), grpc.OnFinish(end)), func(s grpc.ClientStream) grpc.ClientStream {
		return &watched{ClientStream: s, single: !desc.ServerStreams, end: end, first: first}
	}
}

type watched struct {
	grpc.ClientStream
	single bool // the server sends one message, which is the end
	end    func(error)
	first  func()
}

// RecvMsg implements grpc.ClientStream.
func (s *watched) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	switch {
	case err == io.EOF || err == nil && s.single:
		s.end(nil)
	case err != nil:
		s.end(err)
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
		s.end(err)
	}
	return err
}
