// Package grpctest runs fleets of real gRPC servers in memory.
//
// A whole client and server, over bufconn, work inside a testing/synctest
// bubble: a story that takes minutes of virtual time is told in milliseconds,
// and comes out the same every time. Dial, serve and close inside the bubble;
// [NewFleet] and [Fleet.Dial] register their ends with t.Cleanup, which the
// bubble runs before it returns.
package grpctest

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/test/bufconn"

	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// UnaryFunc serves the unary methods of kv.KV at backend b.
type UnaryFunc func(ctx context.Context, b *Backend, req *kvpb.Request) (*kvpb.Response, error)

// ScanFunc serves kv.KV/Scan, the server-streaming method, at backend b.
type ScanFunc func(b *Backend, req *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error

// Handlers are the parts of kv.KV that a test plays. A nil Unary echoes the
// request's id; a nil Scan sends three messages. Load and Sync always echo.
type Handlers struct {
	Unary UnaryFunc
	Scan  ScanFunc
}

// Backend is one server of a fleet.
type Backend struct {
	kvpb.UnimplementedKVServer
	// Index is the backend's place in the fleet, from 0.
	Index int
	// Name is its address, "backend-0" and so on.
	Name string

	// Started and Ended count handlers; Cancelled those whose context had ended
	// by the time they returned.
	Started, Ended, Cancelled atomic.Int64

	h Handlers
	// Atomic because Stop and Start, which a handler too may call, replace them under
	// dialing clients.
	srv atomic.Pointer[grpc.Server]
	lis atomic.Pointer[bufconn.Listener]
}

// Fleet is n backends that serve kv.KV.
type Fleet struct {
	t        testing.TB
	Backends []*Backend
	opts     []grpc.ServerOption

	mu        sync.Mutex // guards resolvers
	resolvers []*manual.Resolver
}

// NewFleet starts n backends and stops them when the test ends.
func NewFleet(t testing.TB, n int, h Handlers, opts ...grpc.ServerOption) *Fleet {
	t.Helper()
	f := &Fleet{t: t, opts: opts}
	for i := range n {
		b := &Backend{Index: i, Name: fmt.Sprintf("backend-%d", i), h: h}
		f.Backends = append(f.Backends, b)
		f.Start(i)
	}
	t.Cleanup(func() {
		for i := range f.Backends {
			f.Stop(i)
		}
	})
	return f
}

// Start serves backend i, afresh if it has been stopped.
func (f *Fleet) Start(i int) {
	b := f.Backends[i]
	lis := bufconn.Listen(256 << 10)
	// A bubble must not end before its handlers have: Stop waits for them.
	srv := grpc.NewServer(append([]grpc.ServerOption{grpc.WaitForHandlers(true)}, f.opts...)...)
	kvpb.RegisterKVServer(srv, b)
	b.lis.Store(lis)
	b.srv.Store(srv)
	go srv.Serve(lis) //nolint:errcheck // it returns when the test stops the server
}

// Stop breaks backend i off: its connections close and new ones are refused.
func (f *Fleet) Stop(i int) {
	if srv := f.Backends[i].srv.Swap(nil); srv != nil {
		srv.Stop()
	}
}

// Dial connects to all backends of the fleet and
// closes the connection when the test ends.
func (f *Fleet) Dial(opts ...grpc.DialOption) *grpc.ClientConn {
	f.t.Helper()
	r := manual.NewBuilderWithScheme("fleet")
	r.InitialState(f.state(nil))
	f.mu.Lock()
	f.resolvers = append(f.resolvers, r)
	f.mu.Unlock()
	opts = append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithResolvers(r),
		grpc.WithContextDialer(f.dial),
	}, opts...)
	cc, err := grpc.NewClient("fleet:///kv", opts...)
	if err != nil {
		f.t.Fatalf("grpctest: dial: %v", err)
	}
	f.t.Cleanup(func() { cc.Close() })
	return cc
}

// Resolve tells every connection of the fleet that its endpoints are now those
// of the backends named by index.
func (f *Fleet) Resolve(indexes ...int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.resolvers {
		r.UpdateState(f.state(indexes))
	}
}

func (f *Fleet) state(indexes []int) resolver.State {
	if indexes == nil {
		for i := range f.Backends {
			indexes = append(indexes, i)
		}
	}
	var st resolver.State
	for _, i := range indexes {
		st.Endpoints = append(st.Endpoints, resolver.Endpoint{
			Addresses: []resolver.Address{{Addr: f.Backends[i].Name}},
		})
	}
	return st
}

func (f *Fleet) dial(ctx context.Context, addr string) (net.Conn, error) {
	for _, b := range f.Backends {
		if b.Name == addr {
			return Dial(ctx, b.lis.Load())
		}
	}
	return nil, fmt.Errorf("grpctest: no backend %q", addr)
}

// Total sums a counter over the fleet.
func (f *Fleet) Total(counter func(*Backend) int64) int64 {
	var n int64
	for _, b := range f.Backends {
		n += counter(b)
	}
	return n
}

func (b *Backend) track(ctx context.Context) func() {
	b.Started.Add(1)
	return func() {
		if ctx.Err() != nil {
			b.Cancelled.Add(1)
		}
		b.Ended.Add(1)
	}
}

func (b *Backend) unary(ctx context.Context, req *kvpb.Request) (*kvpb.Response, error) {
	defer b.track(ctx)()
	if b.h.Unary == nil {
		return &kvpb.Response{Id: req.Id, Backend: b.Name}, nil
	}
	return b.h.Unary(ctx, b, req)
}

// Get implements kvpb.KVServer.
func (b *Backend) Get(ctx context.Context, req *kvpb.Request) (*kvpb.Response, error) {
	return b.unary(ctx, req)
}

// Put implements kvpb.KVServer.
func (b *Backend) Put(ctx context.Context, req *kvpb.Request) (*kvpb.Response, error) {
	return b.unary(ctx, req)
}

// Increment implements kvpb.KVServer.
func (b *Backend) Increment(ctx context.Context, req *kvpb.Request) (*kvpb.Response, error) {
	return b.unary(ctx, req)
}

// Scan implements kvpb.KVServer.
func (b *Backend) Scan(req *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
	defer b.track(s.Context())()
	if b.h.Scan != nil {
		return b.h.Scan(b, req, s)
	}
	for range 3 {
		if err := s.Send(&kvpb.Response{Id: req.Id, Backend: b.Name}); err != nil {
			return err
		}
	}
	return nil
}

// Load implements kvpb.KVServer.
func (b *Backend) Load(s grpc.ClientStreamingServer[kvpb.Request, kvpb.Response]) error {
	defer b.track(s.Context())()
	var n uint64
	for {
		_, err := s.Recv()
		if err == io.EOF {
			return s.SendAndClose(&kvpb.Response{Id: n, Backend: b.Name})
		}
		if err != nil {
			return err
		}
		n++
	}
}

// Sync implements kvpb.KVServer.
func (b *Backend) Sync(s grpc.BidiStreamingServer[kvpb.Request, kvpb.Response]) error {
	defer b.track(s.Context())()
	for {
		req, err := s.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.Send(&kvpb.Response{Id: req.Id, Backend: b.Name}); err != nil {
			return err
		}
	}
}
