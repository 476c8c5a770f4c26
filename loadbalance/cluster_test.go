package loadbalance

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/serviceconfig"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/test/bufconn"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// balancers are the names of this package's balancers.
func balancers() []string {
	names := slices.Clone(ours)
	if !slices.Contains(names, PrequalName) {
		names = append(names, PrequalName)
	}
	return names
}

// getFunc serves kv.KV/Get at the server of an index.
type getFunc func(ctx context.Context, index int, req *kvpb.Request) (*kvpb.Response, error)

// A cluster is a fleet with what a deployment does to it: servers stop gracefully, and
// the resolver tells the service config too. One goroutine at a time changes it.
type cluster struct {
	t       *testing.T
	servers []*server
	opts    []grpc.ServerOption
	get     getFunc
	dns     *manual.Resolver
	spy     *spy
	config  string // the service config in force
	cc      *grpc.ClientConn
}

type server struct {
	kvpb.UnimplementedKVServer
	index int
	name  string
	get   getFunc
	grpc  *grpc.Server
	// Atomic because clients dial while the server is replaced.
	listener atomic.Pointer[bufconn.Listener]
	conns    atomic.Int64 // connections accepted so far
	calls    atomic.Int64 // handlers begun so far
}

func (s *server) Get(ctx context.Context, req *kvpb.Request) (*kvpb.Response, error) {
	s.calls.Add(1)
	return s.get(ctx, s.index, req)
}

// HandleConn counts connections. The rest of stats.Handler does nothing.
func (s *server) HandleConn(_ context.Context, c stats.ConnStats) {
	if _, ok := c.(*stats.ConnBegin); ok {
		s.conns.Add(1)
	}
}
func (*server) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (*server) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (*server) HandleRPC(context.Context, stats.RPCStats)                         {}

// newCluster starts n servers. Call dial in the same bubble.
func newCluster(t *testing.T, n int, get getFunc, opts ...grpc.ServerOption) *cluster {
	c := &cluster{t: t, get: get, opts: opts}
	for i := range n {
		c.servers = append(c.servers, &server{index: i, name: fmt.Sprintf("backend-%d", i), get: get})
		c.start(i)
	}
	t.Cleanup(func() {
		for _, s := range c.servers {
			s.grpc.Stop()
		}
	})
	return c
}

// start serves at index, beside a server that is there already and about to go.
func (c *cluster) start(i int) {
	s := c.servers[i]
	listener := bufconn.Listen(64 << 10)
	g := grpc.NewServer(append([]grpc.ServerOption{grpc.WaitForHandlers(true), grpc.StatsHandler(s)}, c.opts...)...)
	kvpb.RegisterKVServer(g, s)
	s.listener.Store(listener)
	s.grpc = g
	go g.Serve(listener) //nolint:errcheck // it returns when the test stops the server
}

// blink makes the endpoint go READY, IDLE and READY: the server says GOAWAY, as it does
// at its MaxConnectionAge, and takes new connections at once. What is in flight goes on.
func (c *cluster) blink(i int) {
	old := c.servers[i].grpc
	c.start(i)
	go old.GracefulStop()
}

// dial connects to the servers of the indexes by the balancer of a name with a
// configuration.
func (c *cluster) dial(name, config string, indexes []int, opts ...grpc.DialOption) kvpb.KVClient {
	c.watch(&spy{}, name, config)
	return c.connect(indexes, opts...)
}

// watch registers the balancer of a name as that of the cluster, seen by a spy.
func (c *cluster) watch(s *spy, name, config string) {
	s.Builder, s.name = balancer.Get(name), name+"_"+c.t.Name()
	balancer.Register(s)
	c.spy = s
	c.configure(config)
}

// connect is dial after watch.
func (c *cluster) connect(indexes []int, opts ...grpc.DialOption) kvpb.KVClient {
	c.dns = manual.NewBuilderWithScheme("cluster")
	c.dns.InitialState(resolver.State{Endpoints: c.endpoints(indexes)})
	cc, err := grpc.NewClient("cluster:///kv", append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithResolvers(c.dns),
		grpc.WithDefaultServiceConfig(c.config),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			for _, s := range c.servers {
				if s.name == addr {
					return grpctest.Dial(ctx, s.listener.Load())
				}
			}
			return nil, fmt.Errorf("no server %q", addr)
		}),
	}, opts...)...)
	if err != nil {
		c.t.Fatal(err)
	}
	c.cc = cc
	c.t.Cleanup(func() { cc.Close() })
	return kvpb.NewKVClient(cc)
}

// configure makes a configuration of the balancer part of what the resolver says.
func (c *cluster) configure(config string) {
	c.config = fmt.Sprintf(`{"loadBalancingConfig":[{%q:%s}]}`, c.spy.name, config)
}

// resolve tells the client its endpoints, in this order, and the service config.
func (c *cluster) resolve(indexes ...int) {
	c.dns.UpdateState(resolver.State{
		Endpoints:     c.endpoints(indexes),
		ServiceConfig: c.dns.CC().ParseServiceConfig(c.config),
	})
}

func (c *cluster) endpoints(indexes []int) (es []resolver.Endpoint) {
	for _, i := range indexes {
		es = append(es, resolver.Endpoint{Addresses: []resolver.Address{{Addr: c.servers[i].name}}})
	}
	return es
}

// A spy is a balancer of ours, registered under a name of the test's, and what goes in
// and out of it.
type spy struct {
	balancer.Builder
	name string
	// inner is the machinery of the balancer that was built last; nil until an endpoint
	// was ready. Atomic, like the rest, because gRPC's goroutines write it.
	inner   atomic.Pointer[shards]
	updates atomic.Int64 // how often it was given a resolver's state or a configuration
	// changed, if not nil, is told the state of each connection when it changes.
	changed func(addr string, s connectivity.State)
}

func (s *spy) Name() string { return s.name }

func (s *spy) ParseConfig(js json.RawMessage) (serviceconfig.LoadBalancingConfig, error) {
	return s.Builder.(balancer.ConfigParser).ParseConfig(js)
}

func (s *spy) Build(cc balancer.ClientConn, o balancer.BuildOptions) balancer.Balancer {
	return &spied{s.Builder.Build(&spyConn{cc, s}, o), s}
}

type spied struct {
	balancer.Balancer
	spy *spy
}

func (b *spied) UpdateClientConnState(s balancer.ClientConnState) error {
	b.spy.updates.Add(1)
	return b.Balancer.UpdateClientConnState(s)
}

type spyConn struct {
	balancer.ClientConn
	spy *spy
}

func (c *spyConn) UpdateState(s balancer.State) {
	if p, ok := s.Picker.(*picker); ok {
		c.spy.inner.Store(p.b)
	}
	c.ClientConn.UpdateState(s)
}

func (c *spyConn) NewSubConn(as []resolver.Address, o balancer.NewSubConnOptions) (balancer.SubConn, error) {
	if listen := o.StateListener; c.spy.changed != nil {
		o.StateListener = func(s balancer.SubConnState) {
			c.spy.changed(as[0].Addr, s.ConnectivityState)
			listen(s)
		}
	}
	//lint:ignore SA1019 what is deprecated is to name several addresses; pick_first names one
	return c.ClientConn.NewSubConn(as, o)
}

// indexes returns 0 to n-1.
func indexes(n int) (is []int) {
	for i := range n {
		is = append(is, i)
	}
	return is
}
