package balancing

import (
	"context"
	"fmt"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"
	"google.golang.org/grpc/status"
)

// BenchmarkPick is one pick and the end of its call, with as many endpoints as told,
// all ready, alone and from GOMAXPROCS goroutines. There are no servers: the real
// balancers run on connections that do nothing. One call at a time is under way in each
// goroutine, so that this is the cost of the choice and not its quality.
func BenchmarkPick(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		for _, p := range policies {
			// weighted_round_robin wants a recorder of metrics that only grpc can make.
			if !p.registered() || p.reports {
				continue
			}
			picker := readyPicker(b, p, n)
			info := balancer.PickInfo{FullMethodName: method, Ctx: context.Background()}
			one := func(b *testing.B) {
				r, err := picker.Pick(info)
				if err != nil {
					b.Error(err)
					return
				}
				if r.Done != nil { // round_robin's is nil
					r.Done(balancer.DoneInfo{BytesSent: true, BytesReceived: true})
				}
			}
			b.Run(fmt.Sprintf("endpoints=%d/mode=serial/peer=%s", n, p.name), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					one(b)
				}
			})
			b.Run(fmt.Sprintf("endpoints=%d/mode=parallel/peer=%s", n, p.name), func(b *testing.B) {
				b.ReportAllocs()
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						one(b)
					}
				})
			})
		}
	}
}

// readyPicker is the policy's picker once n endpoints are ready.
func readyPicker(tb testing.TB, p policy, n int) balancer.Picker {
	tb.Helper()
	cc := &fakeConn{}
	builder := balancer.Get(p.balancer)
	bal := builder.Build(cc, balancer.BuildOptions{})
	tb.Cleanup(bal.Close)
	var cfg serviceconfig.LoadBalancingConfig
	if parser, ok := builder.(balancer.ConfigParser); ok {
		var err error
		if cfg, err = parser.ParseConfig([]byte(p.json())); err != nil {
			tb.Fatal(err)
		}
	}
	var rs resolver.State
	for i := range n {
		a := resolver.Address{Addr: fmt.Sprintf("10.0.%d.%d:443", i/256, i%256)}
		rs.Addresses = append(rs.Addresses, a)
		rs.Endpoints = append(rs.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{a}})
	}
	if err := bal.UpdateClientConnState(balancer.ClientConnState{ResolverState: rs, BalancerConfig: cfg}); err != nil {
		tb.Fatal(err)
	}
	for _, sc := range cc.conns {
		sc.become(connectivity.Connecting)
		sc.become(connectivity.Ready)
	}
	if len(cc.conns) != n || cc.state.ConnectivityState != connectivity.Ready {
		tb.Fatalf("%s: %d connections, %v, want %d and READY", p.name, len(cc.conns), cc.state.ConnectivityState, n)
	}
	return cc.state.Picker
}

// A fakeConn is a channel whose connections are made by hand.
type fakeConn struct {
	balancer.ClientConn
	state balancer.State
	conns []*fakeSubConn
}

func (c *fakeConn) UpdateState(s balancer.State)          { c.state = s }
func (c *fakeConn) Target() string                        { return "fake:///" }
func (c *fakeConn) ResolveNow(resolver.ResolveNowOptions) {}
func (c *fakeConn) RemoveSubConn(balancer.SubConn)        {}
func (c *fakeConn) NewSubConn(as []resolver.Address, o balancer.NewSubConnOptions) (balancer.SubConn, error) {
	sc := &fakeSubConn{listen: o.StateListener}
	c.conns = append(c.conns, sc)
	return sc, nil
}

type fakeSubConn struct {
	balancer.SubConn
	listen, health func(balancer.SubConnState)
}

func (sc *fakeSubConn) Connect()                                             {}
func (sc *fakeSubConn) Shutdown()                                            {}
func (sc *fakeSubConn) UpdateAddresses([]resolver.Address)                   {}
func (sc *fakeSubConn) RegisterHealthListener(f func(balancer.SubConnState)) { sc.health = f }

func (sc *fakeSubConn) become(s connectivity.State) {
	sc.listen(balancer.SubConnState{ConnectivityState: s})
	if s == connectivity.Ready && sc.health != nil {
		sc.health(balancer.SubConnState{ConnectivityState: s})
	}
}

// GetOrBuildProducer gives what asks the endpoint for its load a server that has no such
// service.
func (sc *fakeSubConn) GetOrBuildProducer(b balancer.ProducerBuilder) (balancer.Producer, func()) {
	return b.Build(refusing{})
}

type refusing struct{}

func (refusing) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	return status.Error(codes.Unimplemented, "refusing")
}

func (refusing) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, status.Error(codes.Unimplemented, "refusing")
}
