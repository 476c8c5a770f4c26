// Package rpc has what it takes to make one call several times: its options, told
// apart by whose they are, and its messages.
package rpc

import (
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
)

// ForAttempt appends to dst the options that every attempt may be given: all but
// those that write through a pointer of the caller's, which two attempts would race
// for, and OnFinish, which is the call's. Options of types that grpc does not know
// are handed on: one that writes through a pointer cannot be told.
func ForAttempt(dst, opts []grpc.CallOption) []grpc.CallOption {
	for _, o := range opts {
		switch o.(type) {
		case grpc.HeaderCallOption, grpc.TrailerCallOption, grpc.PeerCallOption, grpc.OnFinishCallOption:
		default:
			dst = append(dst, o)
		}
	}
	return dst
}

// ButOnFinish appends to dst all options but OnFinish: for an attempt beside which
// no other runs.
func ButOnFinish(dst, opts []grpc.CallOption) []grpc.CallOption {
	for _, o := range opts {
		if _, ok := o.(grpc.OnFinishCallOption); !ok {
			dst = append(dst, o)
		}
	}
	return dst
}

// Give sets what the caller's options point at, as grpc would have; a nil peer leaves
// that alone, as grpc does if it opened no stream.
func Give(opts []grpc.CallOption, header, trailer metadata.MD, p *peer.Peer) {
	for _, o := range opts {
		switch o := o.(type) {
		case grpc.HeaderCallOption:
			*o.HeaderAddr = header
		case grpc.TrailerCallOption:
			*o.TrailerAddr = trailer
		case grpc.PeerCallOption:
			if p != nil {
				*o.PeerAddr = *p
			}
		}
	}
}

// GiveStream is [Give] from a stream that has ended.
func GiveStream(opts []grpc.CallOption, s grpc.ClientStream) {
	for _, o := range opts {
		switch o := o.(type) {
		case grpc.HeaderCallOption:
			if md, err := s.Header(); err == nil {
				*o.HeaderAddr = md
			}
		case grpc.TrailerCallOption:
			*o.TrailerAddr = s.Trailer()
		case grpc.PeerCallOption:
			if p, ok := peer.FromContext(s.Context()); ok {
				*o.PeerAddr = *p
			}
		}
	}
}

// HasOnFinish reports whether the caller wants to be told of the end of the call.
func HasOnFinish(opts []grpc.CallOption) bool {
	for _, o := range opts {
		if _, ok := o.(grpc.OnFinishCallOption); ok {
			return true
		}
	}
	return false
}

// Finish runs the caller's OnFinish options.
func Finish(opts []grpc.CallOption, err error) {
	for _, o := range opts {
		if f, ok := o.(grpc.OnFinishCallOption); ok {
			f.OnFinish(err)
		}
	}
}

// OnClosed is an option for an attempt at a stream: f runs when the connection is closed
// under it. Nobody need receive any more then, and so nothing else would tell.
func OnClosed(f func(error)) grpc.CallOption {
	return grpc.OnFinish(func(err error) {
		//lint:ignore SA1019 no other error tells that from a server's CANCELLED
		if errors.Is(err, grpc.ErrClientConnClosing) {
			f(err)
		}
	})
}

// Message returns v as a proto message that can be cloned and made anew, or nil.
func Message(v any) proto.Message {
	var m proto.Message
	switch v := v.(type) {
	case proto.Message:
		m = v
	case protoadapt.MessageV1:
		m = protoadapt.MessageV2Of(v)
	default:
		return nil
	}
	if !m.ProtoReflect().IsValid() {
		return nil // a nil pointer: whoever is called will say so
	}
	return m
}
