package retry

import (
	"context"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const ms = time.Millisecond

type part = grpctest.Part

// over dials three backends that play parts, through a Retrier of cfg whose random
// numbers are all u.
func over(t *testing.T, cfg Config, u float64, parts []part, opts ...grpc.DialOption) (*grpctest.Stage, kvpb.KVClient, *grpctest.Fleet) {
	t.Helper()
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	r := build(cfg)
	r.random = func() float64 { return u }
	s := grpctest.NewStage(parts...)
	kv, f := s.Dial(t, append([]grpc.DialOption{
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"bobtail_p2c":{}}]}`), grpc.WithDisableRetry(),
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, inv grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return r.InvokeUnary(ctx, method, req, reply, cc, inv, opts...)
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, st grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return r.OpenStream(ctx, desc, cc, method, st, opts...)
		}),
	}, opts...)...)
	return s, kv, f
}

// call makes one call and returns which attempt answered.
func makeCall(ctx context.Context, c kvpb.KVClient, kind string, opts ...grpc.CallOption) (uint64, error) {
	if kind == "unary" {
		res, err := c.Get(ctx, &kvpb.Request{Id: 7}, opts...)
		return res.GetId(), err
	}
	s, err := c.Scan(ctx, &kvpb.Request{Id: 7}, opts...)
	if err != nil {
		return 0, err
	}
	res, err := s.Recv()
	return res.GetId(), err
}

var kinds = []string{"unary", "server streaming"}

// doubling is 10 ms, 20 ms, 40 ms, at most 100 ms, with the jitter of A6: with u 0.5
// exactly that.
var doubling = Backoff{Initial: 10 * ms, Max: 100 * ms, Multiplier: 2, Jitter: GRPCJitter}

var unavailable = []codes.Code{codes.Unavailable}
