package fleet

import (
	"context"
	"net"
	"time"

	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// Reports are what servers tell of their load, for policies that need it. It costs
// each call, so servers of other policies do without.
type Reports struct {
	// ORCA is a report with each answer: for weighted_round_robin.
	ORCA bool `json:"orca,omitempty"`
	// Probes is the service that bobtail_prequal asks.
	Probes bool `json:"probes,omitempty"`
}

// Or is what either reports.
func (r Reports) Or(other Reports) Reports {
	return Reports{r.ORCA || other.ORCA, r.Probes || other.Probes}
}

// newServer is the server of a backend. It is the one place, for child processes and for
// tests in virtual time, where what the servers of a policy must have is installed.
func newServer(b *Backend, r Reports, opts []grpc.ServerOption) *grpc.Server {
	if r.ORCA {
		opts = append(opts, orcaReports(newMeter(b.scenario.Workers))...)
	}
	srv := grpc.NewServer(opts...)
	kvpb.RegisterKVServer(srv, b)
	return srv
}

// Play serves a backend until ctx ends: on lis, and, each time that the scenario has had
// it down, on what again returns. An error is one of again.
func Play(ctx context.Context, b *Backend, r Reports, lis net.Listener, again func() (net.Listener, error), opts ...grpc.ServerOption) error {
	for at := time.Duration(0); ; {
		srv := newServer(b, r, opts[:len(opts):len(opts)])
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
		var err error
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
