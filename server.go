package bobtail

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/tap"

	"github.com/bobtail-rpc/bobtail/internal/telemetry"
	"github.com/bobtail-rpc/bobtail/loadbalance"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// Server applies a policy to the calls that a server serves. Under overload it goes on
// serving what can be served, in time, to those who matter most, and refuses the rest
// before it costs anything:
//
//	server, err := bobtail.NewServer(bobtail.DefaultServerPolicy())
//	...
//	s := grpc.NewServer(server.ServerOptions()...)
//	server.Register(s)
//
// One Server for a process is the rule, however many grpc.Servers it has: they share
// what limits them. It is safe for concurrent use, owns no goroutine and needs no Close.
type Server struct {
	options

	admission   *shedding.Server
	admitUnary  grpc.UnaryServerInterceptor
	admitStream grpc.StreamServerInterceptor
	load        *loadbalance.ServerLoad // nil: no load report
	telemetry   *telemetry.Server       // nil: without
	limits      limits

	mu sync.Mutex // serialises Update
	// current is what mode and exempt methods are read from. An atomic because every call
	// reads it.
	current atomic.Pointer[serving]
	// draining and inFlight are read by calls and by Drain. A call first counts itself and
	// then looks whether the server drains, Drain the other way round: so it waits
	// for each call that has not seen it.
	draining atomic.Bool
	inFlight atomic.Int64
}

// serving is what of a policy a call looks at before admission does.
type serving struct {
	off bool
	// silent is set in mode off: nobody is told of anything.
	silent  bool
	capped  bool // what an exempt call claims is of interest, too
	tenants bool
	exempt  map[string]bool // "/service/method", and "/service/" for all of one
}

// NewServer returns a Server with the given policy.
func NewServer(p ServerPolicy, opts ...Option) (*Server, error) {
	s := &Server{options: newOptions(opts)}
	s.observe()
	var err error
	if s.admission, err = shedding.NewServer(s.config(p)); err != nil {
		return nil, err
	}
	s.admitUnary = s.admission.UnaryServerInterceptor()
	s.admitStream = s.admission.StreamServerInterceptor()
	if p.loadReport {
		s.load = loadbalance.NewServerLoad()
	}
	s.current.Store(newServing(p))
	s.watch()
	return s, nil
}

// config is what package shedding has to know of a policy.
func (s *Server) config(p ServerPolicy) shedding.ServerConfig {
	c := p.admission
	c.Shadow = p.mode == modeShadow || p.mode == modeOff
	if p.mode != modeOff {
		c.Report = s.serverReports
		c.Changed = func(e shedding.Event) { s.changed(e, c.Shadow) }
	}
	return c
}

func newServing(p ServerPolicy) *serving {
	v := &serving{
		// What callers may claim is no load shedding, and others behind this server rely on
		// it. So with such a cap, off is a shadow that tells nothing.
		off:     p.mode == modeOff && p.admission.MaxCriticality == nil,
		silent:  p.mode == modeOff,
		capped:  p.admission.MaxCriticality != nil,
		tenants: p.admission.Tenants != nil,
		// What package shedding exempts, whatever the policy says.
		exempt: map[string]bool{
			"/grpc.health.v1.Health/":              true,
			"/bobtail.loadreport.v1.LoadReport/":   true,
			"/xds.service.orca.v3.OpenRcaService/": true,
		},
	}
	for _, name := range p.admission.Exempt {
		v.exempt[strings.TrimSuffix(name, "*")] = true
	}
	return v
}

// exempts tells whether a method is never refused and never counted.
func (v *serving) exempts(method string) bool {
	return v.exempt[method] || v.exempt[method[:strings.LastIndexByte(method, '/')+1]]
}

// ServerOptions returns what a grpc.Server needs: interceptors, which are chained to those
// of options given earlier and never replace any; and, but for [WithoutTap], a tap, which
// refuses calls before they are decoded.
//
// Of taps a grpc.Server can have one: with a second it panics when it is made. Who has
// one of his own gives the option WithoutTap, and should call [Server.TapHandle] in his
// own.
//
// Interceptors given before these see calls that are refused here, and their work is not
// under the limit; authentication belongs there. Those given after see admitted calls only.
func (s *Server) ServerOptions() []grpc.ServerOption {
	unary := []grpc.UnaryServerInterceptor{s.unary}
	stream := []grpc.StreamServerInterceptor{s.stream}
	if s.load != nil {
		// Outside of admission: a refusal tells the load as well, and a call that waits is
		// one in flight.
		unary = append([]grpc.UnaryServerInterceptor{s.load.UnaryServerInterceptor()}, unary...)
		stream = append([]grpc.StreamServerInterceptor{s.load.StreamServerInterceptor()}, stream...)
	}
	opts := []grpc.ServerOption{grpc.ChainUnaryInterceptor(unary...), grpc.ChainStreamInterceptor(stream...)}
	if !s.withoutTap {
		opts = append(opts, grpc.InTapHandle(s.TapHandle))
	}
	return opts
}

// Register registers the service that answers bobtail_prequal's probes, if the policy has
// "loadReport": true. gRPC has no server option that could do it. It is to be called before the
// server serves; without it the load is still in the trailer of each answer.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	if s.load != nil {
		s.load.Register(r)
	}
}

// TapHandle is the tap of [Server.ServerOptions], for one who has a tap of his own:
//
//	grpc.InTapHandle(func(ctx context.Context, info *tap.Info) (context.Context, error) {
//		ctx, err := server.TapHandle(ctx, info)
//		if err != nil {
//			return ctx, err
//		}
//		... // his own
//	})
//
// It reads an atomic and may return the status error of a refusal; it counts nothing that
// would have to be given back, so it does not matter what becomes of the call after it.
func (s *Server) TapHandle(ctx context.Context, info *tap.Info) (context.Context, error) {
	if s.passes() {
		return ctx, nil
	}
	return s.admission.TapHandle(ctx, info)
}

// passes tells whether calls pass without being looked at.
func (s *Server) passes() bool { return s.current.Load().off && !s.draining.Load() }

// unary is the interceptor of unary calls.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if v := s.current.Load(); v.exempts(info.FullMethod) {
		if v.capped {
			return s.admitUnary(ctx, req, info, handler)
		}
		return handler(ctx, req)
	}
	s.inFlight.Add(1)
	defer s.inFlight.Add(-1)
	if s.passes() {
		return handler(ctx, req)
	}
	if s.measures(ctx) {
		return s.measureUnary(ctx, req, info, handler)
	}
	return s.admitUnary(ctx, req, info, handler)
}

// stream is the interceptor of streams.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if v := s.current.Load(); v.exempts(info.FullMethod) {
		if v.capped {
			return s.admitStream(srv, ss, info, handler)
		}
		return handler(srv, ss)
	}
	s.inFlight.Add(1)
	defer s.inFlight.Add(-1)
	if s.passes() {
		return handler(srv, ss)
	}
	if s.measures(ss.Context()) {
		return s.measureStream(srv, ss, info, handler)
	}
	return s.admitStream(srv, ss, info, handler)
}

// Update puts another policy in force at once. Calls in flight keep what they hold, and a
// limiter of which only the bounds change keeps what it has found. With "mode": "off" it is
// the kill switch.
//
// The service that Register has registered cannot be taken away again, and interceptors not
// either: Update returns an error, and changes nothing, if p differs in loadReport.
func (s *Server) Update(p ServerPolicy) error {
	if is := s.load != nil; p.loadReport != is {
		return fmt.Errorf("bobtail: update: loadReport %v, want %v: it is fixed when a server is made", p.loadReport, is)
	}
	if err := s.update(p); err != nil {
		return err
	}
	s.log.Log(context.Background(), slog.LevelInfo, "bobtail: server: policy updated", "mode", string(cmp.Or(p.mode, modeOn)))
	return nil
}

func (s *Server) update(p ServerPolicy) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.admission.Reconfigure(s.config(p)); err != nil {
		return err
	}
	s.current.Store(newServing(p))
	return nil
}

// drainLook is how often Drain looks whether the last call has ended.
const drainLook = 10 * time.Millisecond

// Drain makes the server ready to be stopped. It has the health server of [WithHealth] tell that
// it is not serving any more, refuses new calls from then on with UNAVAILABLE and a
// pushback, whatever the mode, and waits until those that run or wait have ended. If ctx
// ends before, it returns an error that wraps ctx.Err() and tells how many are left.
// Exempt calls, such as a watch of the health, are neither refused nor waited for.
//
// A server does not come back from it. That it is refused does not send a client elsewhere:
// begin grpc's GracefulStop beside it, which tells all clients at once, or have them watch the
// health ("healthCheckConfig" in their policy, and an import of google.golang.org/grpc/health).
// A call that is on its way at that moment is refused: where none may be, wait for a round trip
// in between; and where a load balancer looks at the health every few seconds only, call the
// Shutdown of the health server first, and go on when it has seen it.
//
//	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
//	defer cancel()
//	context.AfterFunc(ctx, s.Stop) // cuts off what has not ended by then
//	stopped := make(chan struct{})
//	go func() { s.GracefulStop(); close(stopped) }() // sends clients elsewhere
//	err := server.Drain(ctx)
//	<-stopped
func (s *Server) Drain(ctx context.Context) error {
	if s.health != nil {
		s.health.Shutdown()
	}
	s.admission.Drain()
	s.draining.Store(true)
	look := time.NewTicker(drainLook)
	defer look.Stop()
	for {
		n := s.inFlight.Load()
		if n == 0 {
			return nil
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return fmt.Errorf("bobtail: drain: %d calls left: %w", n, ctx.Err())
		}
	}
}

// Stats is the state of the admission, for gauges.
func (s *Server) Stats() shedding.ServerStats { return s.admission.Stats() }
