package hedging_test

import (
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const ms = time.Millisecond

var roundRobin = grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`)

type part = grpctest.Part

// stage is a [grpctest.Stage] whose clients hedge.
type stage struct{ *grpctest.Stage }

func newStage(parts ...part) stage { return stage{grpctest.NewStage(parts...)} }

// dial connects to three backends through the interceptors of cfg.
func (s stage) dial(t *testing.T, cfg hedging.Config, opts ...grpc.DialOption) (kvpb.KVClient, *grpctest.Fleet) {
	t.Helper()
	return s.Dial(t, append([]grpc.DialOption{roundRobin,
		grpc.WithChainUnaryInterceptor(hedging.UnaryClientInterceptor(cfg)),
		grpc.WithChainStreamInterceptor(hedging.StreamClientInterceptor(cfg))}, opts...)...)
}
