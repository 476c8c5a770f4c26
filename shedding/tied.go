package shedding

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
)

// startTied tells the client of a tied unary call that its handler starts now: it sends
// the header, so that the client can cancel the copy that is still queued at another
// server. Call it after admission, for unary calls only, and run the handler under the
// context it returns; of a call that is not tied that is ctx itself.
//
// An error means that the client has gone in the meantime, most often because the other
// copy has started: then the handler need not run at all. It is a gRPC status.
func startTied(ctx context.Context) (context.Context, error) {
	if !attempt.IsTied(ctx) {
		return ctx, nil
	}
	if err := grpc.SendHeader(ctx, metadata.Pairs(attempt.TiedKey, "1")); err != nil {
		// If an interceptor before us has sent the header already, the call loses
		// nothing but the tie.
		return ctx, status.FromContextError(ctx.Err()).Err()
	}
	s := tiedStream{grpc.ServerTransportStreamFromContext(ctx)}
	return grpc.NewContextWithServerTransportStream(ctx, s), nil
}

// tiedStream is what a handler sees of a tied call's stream. The header is gone by the
// time that the handler runs, so what it sets there travels in the trailer; without this
// a handler that sets a header would fail, and only when its caller ties.
type tiedStream struct{ grpc.ServerTransportStream }

// SetHeader implements grpc.ServerTransportStream.
func (s tiedStream) SetHeader(md metadata.MD) error { return s.SetTrailer(md) }

// SendHeader implements grpc.ServerTransportStream.
func (s tiedStream) SendHeader(md metadata.MD) error { return s.SetTrailer(md) }
