package balancing

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/bobtail-rpc/bobtail/loadbalance"
)

const (
	servers     = 10
	slowServers = 2
	workers     = 2 // of each server
	mean        = 10 * time.Millisecond
	slowMean    = 50 * time.Millisecond
	utilisation = 0.7 // offered load as a fraction of what all servers can do
)

// meanOf is the mean service time of server i. The first two are slow.
func meanOf(i int) time.Duration {
	if i < slowServers {
		return slowMean
	}
	return mean
}

// rate is the offered load in calls per second.
func rate() float64 {
	var capacity float64
	for i := range servers {
		capacity += workers / meanOf(i).Seconds()
	}
	return utilisation * capacity
}

// luck is how much longer than the mean a call's work takes: exponential, of mean 1.
// It is the call's own, so that every policy is dealt the same.
func luck(seed, id uint64) float64 {
	return rand.New(rand.NewPCG(seed, id)).ExpFloat64()
}

// A server is two workers and the queue before them, first come, first served. A call
// whose caller has left leaves too.
type server struct {
	index int
	seed  uint64
	// slots has room for as many calls as there are workers. Who waits to send on a
	// channel is served in the order of arrival.
	slots chan struct{}
	load  report
}

func (s *server) get(ctx context.Context, id *wrapperspb.UInt64Value) (*wrapperspb.UInt64Value, error) {
	busy, err := s.work(ctx, id.Value)
	s.load.ended(ctx, time.Now(), busy, err)
	if err != nil {
		return nil, status.FromContextError(err).Err()
	}
	return wrapperspb.UInt64(uint64(s.index)), nil
}

// work returns how long it kept a worker busy.
func (s *server) work(ctx context.Context, id uint64) (time.Duration, error) {
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	defer func() { <-s.slots }()
	start := time.Now()
	err := sleep(ctx, time.Duration(luck(s.seed, id)*float64(meanOf(s.index))))
	return time.Since(start), err
}

// reportTau is over how long a server smooths the load that it reports. The weight
// that grpc computes from a report is, without errors, the rate over the utilisation:
// workers over the mean service time of these last seconds, which is that of 140 calls
// at a slow server with its fair share of 28 calls per second.
const reportTau = 5 * time.Second

// A report is what a server tells about its load with each call: calls and errors per
// second, and the busy part of its workers' time, all as moving averages. The errors
// matter: without them a server in which calls time out in the queue and soon after
// would look like one that is quick.
type report struct {
	mu    sync.Mutex // guards what follows
	last  time.Time
	calls float64 // in the last reportTau, faded
	fails float64 // likewise
	busy  float64 // seconds of work, likewise
}

func (r *report) ended(ctx context.Context, now time.Time, busy time.Duration, err error) {
	rec := orca.CallMetricsRecorderFromContext(ctx)
	if rec == nil {
		return // the client would not read it
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	w := math.Exp(-now.Sub(r.last).Seconds() / reportTau.Seconds())
	r.last = now
	r.calls = r.calls*w + 1
	r.fails *= w
	if err != nil {
		r.fails++
	}
	r.busy = r.busy*w + busy.Seconds()
	// Touching the recorder is what makes grpc send the report.
	rec.SetQPS(r.calls / reportTau.Seconds())
	rec.SetEPS(r.fails / reportTau.Seconds())
	rec.SetApplicationUtilization(r.busy / reportTau.Seconds() / workers)
}

// method answers a call's id with the index of the server.
const method = "/bobtail.peers.Index/Get"

// newFleet starts the servers, and returns a connection to all of them by the policy.
// Call it in a bubble.
func newFleet(t *testing.T, p policy, seed uint64) *grpc.ClientConn {
	t.Helper()
	var opts []grpc.ServerOption
	if p.reports {
		opts = append(opts, orca.CallMetricsServerOption(nil))
	}
	probes := p.balancer == loadbalance.PrequalName
	listeners := map[string]*bufconn.Listener{}
	var state resolver.State
	for i := range servers {
		s := &server{index: i, seed: seed, slots: make(chan struct{}, workers)}
		// A bubble must not end before its handlers have: Stop waits for them.
		opts := append([]grpc.ServerOption{grpc.WaitForHandlers(true)}, opts...)
		load := loadbalance.NewServerLoad()
		if probes {
			opts = append(opts, grpc.ChainUnaryInterceptor(load.UnaryServerInterceptor()))
		}
		srv := grpc.NewServer(opts...)
		srv.RegisterService(&service, s)
		if probes {
			load.Register(srv)
		}
		addr := fmt.Sprintf("server-%d", i)
		listeners[addr] = bufconn.Listen(256 << 10)
		go srv.Serve(listeners[addr]) //nolint:errcheck // it returns when the test stops the server
		t.Cleanup(srv.Stop)
		// Addresses, not endpoints: grpc makes these of those, but not those of these,
		// and balancer/base, on which go-zero and kratos build, reads only addresses.
		state.Addresses = append(state.Addresses, resolver.Address{Addr: addr})
	}
	r := manual.NewBuilderWithScheme("fleet")
	r.InitialState(state)
	cc, err := grpc.NewClient("fleet:///", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithResolvers(r), grpc.WithDefaultServiceConfig(p.serviceConfig()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			// One at a time: Go 1.26's race detector crashes where two timers of a bubble that
			// are due at once run at the same moment, as those of a bufconn do.
			dialing.Lock()
			defer dialing.Unlock()
			return listeners[addr].DialContext(ctx)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return cc
}

var dialing sync.Mutex

// service is written by hand, with messages that come with protobuf: see the package's
// documentation.
var service = grpc.ServiceDesc{
	ServiceName: "bobtail.peers.Index",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{
		MethodName: "Get",
		Handler: func(s any, ctx context.Context, decode func(any) error, in grpc.UnaryServerInterceptor) (any, error) {
			req := new(wrapperspb.UInt64Value)
			if err := decode(req); err != nil {
				return nil, err
			}
			handle := func(ctx context.Context, req any) (any, error) {
				return s.(*server).get(ctx, req.(*wrapperspb.UInt64Value))
			}
			if in == nil {
				return handle(ctx, req)
			}
			return in(ctx, req, &grpc.UnaryServerInfo{Server: s, FullMethod: method}, handle)
		},
	}},
}
