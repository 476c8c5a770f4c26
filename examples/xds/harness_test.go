package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/grpclog"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	clusterpb "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
)

func TestMain(m *testing.M) {
	// grpc warns of every configuration that it refuses, and the control plane sends
	// one again as often as that happens.
	if os.Getenv("GRPC_GO_LOG_SEVERITY_LEVEL") == "" {
		grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	}
	goleak.VerifyTestMain(m)
}

// patience is how long a test waits for what must come. Nothing is measured by it.
const patience = 30 * time.Second

// A stage has backends whose arrivals are counted, and the context of a test.
type stage struct {
	*testing.T
	ctx      context.Context
	backends []*backend
	arrived  ledger
	// handle answers a call that has arrived at a backend, unless it is nil. It is set
	// while no calls are made.
	handle func(ctx context.Context, backend int) error
}

func newStage(t *testing.T, backends int) *stage {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	s := &stage{T: t, ctx: ctx}
	for i := range backends {
		b, err := newBackend(func(ctx context.Context) error {
			s.arrived.note(ctx, i)
			if s.handle != nil {
				return s.handle(ctx, i)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(b.server.Stop)
		s.backends = append(s.backends, b)
	}
	return s
}

// policy is a policy of the cluster, as the control plane writes it.
func (s *stage) policy(name, config string) *clusterpb.LoadBalancingPolicy_Policy {
	s.Helper()
	p, err := custom(name, config)
	if err != nil {
		s.Fatal(err)
	}
	return p
}

// zone is a locality that has the given backends, all of weight 1.
func (s *stage) zone(name string, weight uint32, backends ...int) locality {
	l := locality{zone: name, weight: weight}
	for _, i := range backends {
		l.endpoints = append(l.endpoints, endpoint{addr: s.backends[i].addr})
	}
	return l
}

// controlled starts a control plane, and returns it with a client of it.
func (s *stage) controlled(cluster *clusterpb.Cluster, localities []locality, opts ...grpc.DialOption) (*controlPlane, *client) {
	s.Helper()
	control, err := newControlPlane()
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(control.stop)
	if err := control.start(cluster, localities); err != nil {
		s.Fatal(err)
	}
	builder, err := control.resolver()
	if err != nil {
		s.Fatal(err)
	}
	return control, s.dial("xds:///"+service, append(opts, grpc.WithResolvers(builder))...)
}

// dial returns a client that is closed before the servers are.
func (s *stage) dial(target string, opts ...grpc.DialOption) *client {
	s.Helper()
	conn, err := grpc.NewClient(target, append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { conn.Close() })
	return &client{s, healthpb.NewHealthClient(conn)}
}

type client struct {
	*stage
	stub healthpb.HealthClient
}

// try makes a call for a user; "" is nobody.
func (c *client) try(user string) error {
	ctx := c.ctx
	if user != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, userHeader, user)
	}
	_, err := c.stub.Check(ctx, &healthpb.HealthCheckRequest{})
	return err
}

// call makes a call that must not fail.
func (c *client) call(user string) {
	c.Helper()
	if err := c.try(user); err != nil {
		c.Fatalf("a call of %q: %v", user, err)
	}
}

// reach makes calls of nobody until one has arrived at each of the backends, so that
// the client is connected to all.
func (c *client) reach(backends ...int) {
	c.Helper()
	c.arrived.take()
	missing := make(map[int]bool)
	for _, i := range backends {
		missing[i] = true
	}
	for len(missing) > 0 {
		c.call("")
		for a := range c.arrived.take() {
			delete(missing, a.backend)
		}
	}
}

// serve makes n calls of each of the users in turn, one after the other, and returns
// where they arrived.
func (c *client) serve(users, n int) counts {
	c.Helper()
	c.arrived.take()
	for i := range users * n {
		c.call(fmt.Sprintf("user-%d", i%users))
	}
	return c.arrived.take()
}

// settled reports whether each user's calls arrived at one backend, and not all at the same.
func settled(got counts) bool {
	all := make(map[int]bool)
	for a := range got {
		all[a.backend] = true
	}
	for _, n := range got.homes() {
		if n != 1 {
			return false
		}
	}
	return len(all) > 1
}
