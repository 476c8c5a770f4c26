package bobtail

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/bobtail-rpc/bobtail/internal/telemetry"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// observe installs the server's telemetry beside the hook that its user has given.
func (s *Server) observe() {
	if s.withoutTelemetry {
		return
	}
	t, err := telemetry.NewServer(s.meters)
	if err != nil {
		s.log.Error("bobtail: server: some metrics are not recorded", "error", err)
	}
	s.telemetry = t
	s.serverReports = both(s.decided, s.serverReports)
}

// watch has the gauges read, once there is something to be read.
func (s *Server) watch() {
	if s.telemetry == nil {
		return
	}
	if err := telemetry.WatchServer(s.telemetry, s, (*Server).gauges); err != nil {
		s.log.Error("bobtail: server: no gauges are recorded", "error", err)
	}
}

// gauges tells what is in force now.
func (s *Server) gauges(g telemetry.ServerGauges) {
	serving := s.current.Load()
	if serving.silent {
		return
	}
	st := s.Stats()
	g.Admission(st.Limit, st.InFlight, st.Queued)
	if serving.tenants {
		g.Tenants(st.Tenants)
	}
}

// decided tells what became of a call at the door, in the tap too.
func (s *Server) decided(ctx context.Context, e shedding.ServerEvent) {
	a := telemetry.Admission{Criticality: e.Criticality.String(), Wait: e.Wait, Shadow: e.Shadow}
	var m *telemetry.ServerMethod
	if !e.Admitted {
		a.Reason = e.Reason.String()
		if s.telemetry.Counting(ctx) {
			m = s.method(e.Method, false)
		}
	}
	s.telemetry.Decided(ctx, m, a)
}

// method returns what tells of the calls of a method. Anybody can call names that are
// nobody's: what is not registered, nor in the linked descriptors, shares its series.
func (s *Server) method(name string, registered bool) *telemetry.ServerMethod {
	if m := s.telemetry.Known(name); m != nil {
		return m
	}
	return s.telemetry.Method(name, registered || recognized(name))
}

// changed tells a change of the admission's state.
func (s *Server) changed(e shedding.Event, shadow bool) {
	level := slog.LevelWarn
	if shadow {
		level = slog.LevelInfo // nobody is refused
	}
	ctx := context.Background()
	switch e.Kind {
	case shedding.OverloadBegan:
		s.telemetry.OverloadChanged(ctx, true)
		s.log.Log(ctx, level, "bobtail: server: overload began", "waiting", e.To, "shadow", shadow)
	case shedding.OverloadEnded:
		s.telemetry.OverloadChanged(ctx, false)
		s.log.Log(ctx, slog.LevelInfo, "bobtail: server: overload ended", "waiting", e.To, "shadow", shadow)
	case shedding.LimitMoved:
		if e.Probe {
			return // it is back in a moment
		}
		if highest, fell := s.limits.moved(e); fell {
			s.log.Log(ctx, level, "bobtail: server: the limit has fallen by half", "limit", e.To, "highest", highest, "shadow", shadow)
		}
	}
}

// limits is a limitFall with its lock.
type limits struct {
	mu   sync.Mutex // guards fall
	fall limitFall
}

func (l *limits) moved(e shedding.Event) (highest int, fell bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fall.moved(e.At, e.From, e.To)
}

// measures tells whether anybody takes the duration of a call.
func (s *Server) measures(ctx context.Context) bool {
	return s.telemetry.Measured(ctx) && !s.current.Load().silent
}

// measured stands between admission and the handler of a call, to see whether it is admitted:
// an error does not tell, for a handler may return the refusal of a call of its own. It is
// pooled, with its methods as values, so that it costs a call nothing.
type measured struct {
	ran    bool
	unary  grpc.UnaryHandler
	stream grpc.StreamHandler

	runUnary  grpc.UnaryHandler
	runStream grpc.StreamHandler
}

var measuredPool = sync.Pool{New: func() any {
	m := &measured{}
	m.runUnary = func(ctx context.Context, req any) (any, error) {
		m.ran = true
		return m.unary(ctx, req)
	}
	m.runStream = func(srv any, ss grpc.ServerStream) error {
		m.ran = true
		return m.stream(srv, ss)
	}
	return m
}}

// end tells of a call that has ended, if it was admitted.
func (m *measured) end(ctx context.Context, s *Server, method string, registered bool, begun time.Time, code codes.Code) {
	if m.ran {
		s.method(method, registered).Served(ctx, time.Since(begun), code)
	}
	m.ran, m.unary, m.stream = false, nil, nil
	measuredPool.Put(m)
}

// measureUnary is admitUnary for a call whose duration somebody takes.
func (s *Server) measureUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	m := measuredPool.Get().(*measured)
	m.unary = handler
	begun, code := time.Now(), codes.Unknown // of one that panics, nobody knows better
	defer func() { m.end(ctx, s, info.FullMethod, info.Server != nil, begun, code) }()
	resp, err := s.admitUnary(ctx, req, info, m.runUnary)
	code, _ = described(err)
	return resp, err
}

// measureStream is measureUnary for streams. One of the handler of unknown services has no
// server.
func (s *Server) measureStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	m := measuredPool.Get().(*measured)
	m.stream = handler
	begun, code := time.Now(), codes.Unknown
	ctx := ss.Context()
	defer func() { m.end(ctx, s, info.FullMethod, srv != nil, begun, code) }()
	err := s.admitStream(srv, ss, info, m.runStream)
	code, _ = described(err)
	return err
}
