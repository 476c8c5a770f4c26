package rpc

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Caller makes the calls of a method.
type Caller interface {
	InvokeUnary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
		invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error
	OpenStream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string,
		streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error)
}

// Unary returns an interceptor that leaves each call to the caller of its method. With a
// fault, which is one of the configuration, it makes no call: each fails with INTERNAL.
func Unary[C Caller](of func(cc *grpc.ClientConn, method string) C, fault error) grpc.UnaryClientInterceptor {
	if fault != nil {
		fault = status.Error(codes.Internal, fault.Error())
	}
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
		invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if fault != nil {
			Finish(opts, fault)
			return fault
		}
		return of(cc, method).InvokeUnary(ctx, method, req, reply, cc, invoker, opts...)
	}
}

// Stream is [Unary] for server-streaming calls. Client- and bidi-streaming ones pass.
func Stream[C Caller](of func(cc *grpc.ClientConn, method string) C, fault error) grpc.StreamClientInterceptor {
	if fault != nil {
		fault = status.Error(codes.Internal, fault.Error())
	}
	return func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string,
		streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		if desc.ClientStreams || !desc.ServerStreams {
			return streamer(ctx, desc, cc, method, opts...)
		}
		if fault != nil {
			Finish(opts, fault)
			return nil, fault
		}
		return of(cc, method).OpenStream(ctx, desc, cc, method, streamer, opts...)
	}
}
