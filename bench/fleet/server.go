package fleet

import (
	"cmp"
	"context"
	"net"
	"time"

	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/loadbalance"
)

// Server is what the servers of a policy have beside the handler. Each costs every call,
// so servers of other policies do without.
type Server struct {
	// ORCA is a report of the load with each answer: for weighted_round_robin.
	ORCA bool `json:"orca,omitempty"`
	// Probes is the service that bobtail_prequal asks.
	Probes bool `json:"probes,omitempty"`
	// Policy is a server policy document of bobtail's; "": none.
	Policy string `json:"policy,omitempty"`
}

// With is what either has. They may share a server only if one of them has no Policy, or
// both the same.
func (s Server) With(other Server) Server {
	return Server{s.ORCA || other.ORCA, s.Probes || other.Probes, cmp.Or(s.Policy, other.Policy)}
}

// newServer is the server of a backend. It is the one place, for child processes and for
// tests in virtual time, where what the servers of a policy must have is installed. An
// error is one of its policy document.
func newServer(b *Backend, s Server, opts []grpc.ServerOption) (*grpc.Server, error) {
	if s.ORCA {
		opts = append(opts, orcaReports(newMeter(b.scenario.Workers))...)
	}
	load := loadbalance.NewServerLoad()
	if s.Probes {
		opts = append(opts, grpc.ChainUnaryInterceptor(load.UnaryServerInterceptor()))
	}
	var policy *bobtail.Server
	if s.Policy != "" {
		var err error
		if policy, err = newPolicy(s.Policy); err != nil {
			return nil, err
		}
		opts = append(opts, policy.ServerOptions()...)
	}
	srv := grpc.NewServer(opts...)
	kvpb.RegisterKVServer(srv, b)
	if policy != nil {
		policy.Register(srv)
	}
	if s.Probes {
		load.Register(srv)
	}
	return srv, nil
}

// Play serves a backend until ctx ends: on lis, and, each time that the scenario has had
// it down, on what again returns. An error is one of again, or
// of the policy that the server is to have.
func Play(ctx context.Context, b *Backend, s Server, lis net.Listener, again func() (net.Listener, error), opts ...grpc.ServerOption) error {
	for at := time.Duration(0); ; {
		srv, err := newServer(b, s, opts[:len(opts):len(opts)])
		if err != nil {
			lis.Close()
			return err
		}
		served := make(chan struct{})
		go func() {
			defer close(served)
			srv.Serve(lis) //nolint:errcheck // it returns when stopped
		}()
		w, down := b.untilDown(ctx, at)
		srv.Stop() // which closes lis: the kernel refuses who comes
		<-served
		if !down || b.sleep(ctx, w.To-time.Since(b.epoch)) != nil {
			return nil
		}
		at = w.To
		if lis, err = again(); err != nil {
			return err
		}
	}
}

// untilDown waits until the next of the moments from at on when the scenario takes the
// backend down, and returns for how long; or until ctx ends. The first call tells when
// the timeline began: before it a backend is up.
func (b *Backend) untilDown(ctx context.Context, at time.Duration) (w scenario.Span, down bool) {
	select {
	case <-b.begun:
	case <-ctx.Done():
		return w, false
	}
	at = max(at, time.Since(b.epoch))
	if w, down = b.scenario.Down(b.index, at); !down {
		<-ctx.Done()
		return w, false
	}
	return w, b.sleep(ctx, w.From-time.Since(b.epoch)) == nil
}
