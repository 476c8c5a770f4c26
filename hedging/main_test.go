package hedging_test

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const ms = time.Millisecond

var roundRobin = grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`)

// part is what one attempt of a call meets at its server.
type part struct {
	after time.Duration // how long the handler takes
	code  codes.Code
	push  string // pushback in the trailer; "" is none
}

// stage serves kv.KV by parts, attempt k by parts[k-1] (the last part serves all
// later ones too), and notes when each attempt arrived.
type stage struct {
	parts []part
	begin time.Time

	mu        sync.Mutex // guards the rest
	arrived   map[int]time.Duration
	cancelled map[int]time.Duration
	kinds     map[int]string
	ids       map[int]uint64
}

func newStage(parts ...part) *stage {
	return &stage{parts: parts, begin: time.Now(), arrived: map[int]time.Duration{},
		cancelled: map[int]time.Duration{}, kinds: map[int]string{}, ids: map[int]uint64{}}
}

// enter plays an attempt's part up to its answer.
func (s *stage) enter(ctx context.Context, req *kvpb.Request) (k int, err error) {
	md, _ := metadata.FromIncomingContext(ctx)
	k = 1
	if v := md.Get("grpc-previous-rpc-attempts"); len(v) == 1 {
		n, err := strconv.Atoi(v[0])
		if err != nil || n < 1 {
			return 0, status.Errorf(codes.Internal, "bad metadata %v", v)
		}
		k = n + 1
	}
	s.mu.Lock()
	s.arrived[k] = time.Since(s.begin)
	s.kinds[k] = fmt.Sprint(md.Get("bobtail-attempt"))
	s.ids[k] = req.Id
	s.mu.Unlock()
	p := s.parts[min(k, len(s.parts))-1]
	select {
	case <-time.After(p.after):
	case <-ctx.Done():
		s.mu.Lock()
		s.cancelled[k] = time.Since(s.begin)
		s.mu.Unlock()
		return k, status.FromContextError(ctx.Err()).Err()
	}
	if p.push != "" {
		if err := grpc.SetTrailer(ctx, metadata.Pairs("grpc-retry-pushback-ms", p.push)); err != nil {
			return k, err
		}
	}
	if p.code != codes.OK {
		return k, status.Errorf(p.code, "attempt %d", k)
	}
	return k, nil
}

func (s *stage) handlers() grpctest.Handlers {
	return grpctest.Handlers{
		Unary: func(ctx context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
			if err := grpc.SetHeader(ctx, metadata.Pairs("served-by", b.Name)); err != nil {
				return nil, err
			}
			k, err := s.enter(ctx, req)
			if err != nil {
				return nil, err
			}
			return &kvpb.Response{Id: uint64(k), Backend: b.Name, Value: req.Value}, nil
		},
		Scan: func(b *grpctest.Backend, req *kvpb.Request, ss grpc.ServerStreamingServer[kvpb.Response]) error {
			if err := ss.SetHeader(metadata.Pairs("served-by", b.Name)); err != nil {
				return err
			}
			k, err := s.enter(ss.Context(), req)
			if err != nil {
				return err
			}
			for i := range 3 {
				if err := ss.Send(&kvpb.Response{Id: uint64(k), Backend: b.Name, Value: []byte{byte(i)}}); err != nil {
					return err
				}
				time.Sleep(ms)
			}
			return nil
		},
	}
}

// dial connects to three backends through the interceptors of cfg, and waits
// until all are ready, so that the stage's clock starts with the call.
func (s *stage) dial(t *testing.T, cfg hedging.Config, opts ...grpc.DialOption) (kvpb.KVClient, *grpctest.Fleet) {
	t.Helper()
	f := s.fleet(t)
	cc := f.Dial(append([]grpc.DialOption{roundRobin,
		grpc.WithChainUnaryInterceptor(hedging.UnaryClientInterceptor(cfg)),
		grpc.WithChainStreamInterceptor(hedging.StreamClientInterceptor(cfg))}, opts...)...)
	cc.Connect()
	time.Sleep(time.Second)
	s.begin = time.Now()
	return kvpb.NewKVClient(cc), f
}

// arrivals lists when attempts 1, 2, ... arrived.
func (s *stage) arrivals() []time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []time.Duration{}
	for k := 1; k <= len(s.arrived); k++ {
		d, ok := s.arrived[k]
		if !ok {
			d = -1
		}
		out = append(out, d)
	}
	return out
}

func (s *stage) fleet(t *testing.T) *grpctest.Fleet { return grpctest.NewFleet(t, 3, s.handlers()) }
