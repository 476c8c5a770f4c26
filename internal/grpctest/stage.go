package grpctest

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// Part is what one attempt of a call meets at its server.
type Part struct {
	After time.Duration // how long the handler takes
	Code  codes.Code
	Push  string        // pushback in the trailer; "" is none
	Info  time.Duration // the delay of a RetryInfo in the status; 0 is none
}

// Stage serves kv.KV by parts, attempt k by Parts[k-1] (the last part serves all
// later ones too), and notes when each attempt arrived. An answer's id is the number
// of its attempt, and the message of a failure "attempt k".
type Stage struct {
	Parts []Part
	Begin time.Time

	Mu sync.Mutex // guards the rest while the stage serves
	// By the number of the attempt: when it arrived and was cancelled, since Begin,
	// what its metadata bobtail-attempt said, and the id of its request.
	Arrived   map[int]time.Duration
	Cancelled map[int]time.Duration
	Kinds     map[int]string
	IDs       map[int]uint64
	// By is the backend of each attempt.
	By map[int]string
}

// NewStage returns a stage whose clock starts now.
func NewStage(parts ...Part) *Stage {
	return &Stage{Parts: parts, Begin: time.Now(), Arrived: map[int]time.Duration{}, Cancelled: map[int]time.Duration{},
		Kinds: map[int]string{}, IDs: map[int]uint64{}, By: map[int]string{}}
}

// enter plays an attempt's part up to its answer.
func (s *Stage) enter(ctx context.Context, b *Backend, req *kvpb.Request) (k int, err error) {
	md, _ := metadata.FromIncomingContext(ctx)
	k = 1
	if v := md.Get("grpc-previous-rpc-attempts"); len(v) == 1 {
		n, err := strconv.Atoi(v[0])
		if err != nil || n < 1 {
			return 0, status.Errorf(codes.Internal, "bad metadata %v", v)
		}
		k = n + 1
	}
	s.Mu.Lock()
	s.Arrived[k] = time.Since(s.Begin)
	s.Kinds[k] = fmt.Sprint(md.Get("bobtail-attempt"))
	s.IDs[k] = req.Id
	s.By[k] = b.Name
	s.Mu.Unlock()
	p := s.Parts[min(k, len(s.Parts))-1]
	select {
	case <-time.After(p.After):
	case <-ctx.Done():
		s.Mu.Lock()
		s.Cancelled[k] = time.Since(s.Begin)
		s.Mu.Unlock()
		return k, status.FromContextError(ctx.Err()).Err()
	}
	if p.Push != "" {
		if err := grpc.SetTrailer(ctx, metadata.Pairs("grpc-retry-pushback-ms", p.Push)); err != nil {
			return k, err
		}
	}
	if p.Code == codes.OK {
		return k, nil
	}
	st := status.Newf(p.Code, "attempt %d", k)
	if p.Info > 0 {
		if st, err = st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(p.Info)}); err != nil {
			return k, err
		}
	}
	return k, st.Err()
}

// Handlers plays the stage's parts. A unary answer carries the header "served-by"; a
// stream sends three messages, 1 ms apart.
func (s *Stage) Handlers() Handlers {
	return Handlers{
		Unary: func(ctx context.Context, b *Backend, req *kvpb.Request) (*kvpb.Response, error) {
			if err := grpc.SetHeader(ctx, metadata.Pairs("served-by", b.Name)); err != nil {
				return nil, err
			}
			k, err := s.enter(ctx, b, req)
			if err != nil {
				return nil, err
			}
			return &kvpb.Response{Id: uint64(k), Backend: b.Name, Value: req.Value}, nil
		},
		Scan: func(b *Backend, req *kvpb.Request, ss grpc.ServerStreamingServer[kvpb.Response]) error {
			if err := ss.SetHeader(metadata.Pairs("served-by", b.Name)); err != nil {
				return err
			}
			k, err := s.enter(ss.Context(), b, req)
			if err != nil {
				return err
			}
			for i := range 3 {
				if err := ss.Send(&kvpb.Response{Id: uint64(k), Backend: b.Name, Value: []byte{byte(i)}}); err != nil {
					return err
				}
				time.Sleep(time.Millisecond)
			}
			return nil
		},
	}
}

// Dial connects to three backends with opts, and waits until all are ready, so that
// the stage's clock starts with the call.
func (s *Stage) Dial(t testing.TB, opts ...grpc.DialOption) (kvpb.KVClient, *Fleet) {
	t.Helper()
	f := NewFleet(t, 3, s.Handlers())
	cc := f.Dial(opts...)
	cc.Connect()
	time.Sleep(time.Second)
	s.Begin = time.Now()
	return kvpb.NewKVClient(cc), f
}

// Arrivals lists when attempts 1, 2, ... arrived; one that did not, -1.
func (s *Stage) Arrivals() []time.Duration {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	out := []time.Duration{}
	for k := 1; k <= len(s.Arrived); k++ {
		d, ok := s.Arrived[k]
		if !ok {
			d = -1
		}
		out = append(out, d)
	}
	return out
}
