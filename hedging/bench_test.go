package hedging_test

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// BenchmarkUnhedged is what a call that is quick enough pays for being armed.
// bench/peers has it beside the peers.
func BenchmarkUnhedged(b *testing.B) {
	noop := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return nil }
	chain := func(cfg hedging.Config) grpc.UnaryClientInterceptor { return hedging.UnaryClientInterceptor(cfg) }
	for _, bc := range []struct {
		name string
		in   grpc.UnaryClientInterceptor
	}{
		{"bare", func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, inv grpc.UnaryInvoker, o ...grpc.CallOption) error {
			return inv(ctx, m, req, reply, cc, o...)
		}},
		{"fixed", chain(hedging.Config{MaxAttempts: 2, Delay: time.Second})},
		{"adaptive", chain(hedging.Config{MaxAttempts: 2, Percentile: 95, Delay: time.Second})},
	} {
		b.Run(bc.name, func(b *testing.B) {
			b.ReportAllocs()
			ctx, req, res := context.Background(), &kvpb.Request{}, &kvpb.Response{}
			for b.Loop() {
				if err := bc.in(ctx, get, req, res, nil, noop); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
