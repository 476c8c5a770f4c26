package peers

import (
	"context"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/failsafe-go/failsafe-go"
	"github.com/failsafe-go/failsafe-go/failsafegrpc"
	"github.com/failsafe-go/failsafe-go/hedgepolicy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	root "github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// What a call that is not hedged pays for being armed: the hedging delay is far
// beyond what the call takes.

const never = time.Minute

func bare(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, inv grpc.UnaryInvoker, o ...grpc.CallOption) error {
	return inv(ctx, m, req, reply, cc, o...)
}

func failsafeHedging() grpc.UnaryClientInterceptor {
	return failsafegrpc.NewUnaryClientInterceptorWithExecutor(failsafe.With(
		hedgepolicy.NewBuilderWithDelay[any](never).Build()))
}

// variant is one way to make the same call. turns lets variants take turns in short
// blocks, so that the machine's moods fall on all alike, and reports for each what a
// call allocates and how long it takes beside the first one: the base.
type variant struct {
	name   string
	call   func() error
	took   []time.Duration // of each block
	allocs uint64
}

func turns(b *testing.B, block int, base string, variants ...*variant) {
	b.Helper()
	for _, v := range variants {
		for range 10 * block {
			if err := v.call(); err != nil {
				b.Fatal(err)
			}
		}
	}
	rounds := 0
	b.ResetTimer()
	for b.Loop() {
		for i := range variants {
			v := variants[(i+rounds)%len(variants)]
			before := mallocs()
			begin := time.Now()
			for range block {
				if err := v.call(); err != nil {
					b.Fatal(err)
				}
			}
			v.took = append(v.took, time.Since(begin))
			v.allocs += mallocs() - before
		}
		rounds++
	}
	b.StopTimer()
	median := func(v *variant) float64 {
		slices.Sort(v.took)
		return float64(v.took[len(v.took)/2])
	}
	per := 0.0
	for _, v := range variants {
		if v.name == base {
			per = median(v)
		}
	}
	for _, v := range variants {
		b.ReportMetric(float64(v.allocs)/float64(rounds*block), v.name+"-allocs/call")
		if v.name != base {
			b.ReportMetric(median(v)/per, v.name+"/"+base)
		}
	}
	b.ReportMetric(0, "ns/op") // a round of all of them is no figure
}

// BenchmarkUnhedgedNoop: over an invoker that does nothing.
func BenchmarkUnhedgedNoop(b *testing.B) {
	noop := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return nil }
	ctx, req, res := context.Background(), &kvpb.Request{}, &kvpb.Response{}
	through := func(name string, in grpc.UnaryClientInterceptor) *variant {
		return &variant{name: name, call: func() error { return in(ctx, "/kv.KV/Get", req, res, nil, noop) }}
	}
	turns(b, 500, "failsafe",
		through("bare", bare),
		through("bobtail", hedging.UnaryClientInterceptor(hedging.Config{MaxAttempts: 2, Percentile: 95, Delay: never, MaxDelay: never})),
		through("failsafe", failsafeHedging()))
}

type echo struct{ kvpb.UnimplementedKVServer }

func (echo) Get(_ context.Context, r *kvpb.Request) (*kvpb.Response, error) {
	return &kvpb.Response{Id: r.Id}, nil
}

// BenchmarkUnhedgedLoopback: over a real call on loopback TCP, through all of the
// client's dial options.
func BenchmarkUnhedgedLoopback(b *testing.B) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	srv := grpc.NewServer()
	kvpb.RegisterKVServer(srv, echo{})
	go srv.Serve(lis)
	b.Cleanup(srv.Stop)

	policy, err := root.ParsePolicy([]byte(`{
		"loadBalancingConfig": [{"pick_first": {}}],
		"extraLoad": {"max": 0.05},
		"methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}],
			"hedgingPolicy": {"maxAttempts": 2, "hedgingPercentile": 95, "minHedgingDelay": "60s"}}]}`))
	if err != nil {
		b.Fatal(err)
	}
	client, err := root.NewClient(policy, root.WithLogger(nil))
	if err != nil {
		b.Fatal(err)
	}
	ctx, req := context.Background(), &kvpb.Request{Id: 1}
	dial := func(name string, opts ...grpc.DialOption) *variant {
		cc, err := grpc.NewClient(lis.Addr().String(), append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { cc.Close() })
		kv := kvpb.NewKVClient(cc)
		return &variant{name: name, call: func() error {
			_, err := kv.Get(ctx, req)
			return err
		}}
	}
	turns(b, 50, "bare",
		dial("bare"),
		dial("bobtail", client.DialOptions()...),
		dial("failsafe", grpc.WithChainUnaryInterceptor(failsafeHedging())))
}
