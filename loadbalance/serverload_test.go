package loadbalance

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/loadbalance/loadpb"
)

// metered is what orca's report type has in common with a fake of the tests.
type metered map[string]float64

func (m metered) GetNamedMetrics() map[string]float64 { return m }

// Which ends of requests say how long they take, and that each is counted out.
func TestServerLoadCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewServerLoad()
		serve := l.UnaryServerInterceptor()
		call := func(method string, took time.Duration, err error) {
			during := int64(1)
			if uncounted(method) {
				during = 0
			}
			_, got := serve(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: method}, func(context.Context, any) (any, error) {
				if n := l.gauge.rif.Load(); n != during {
					t.Errorf("%s: RIF %d while it is served, want %d", method, n, during)
				}
				time.Sleep(took)
				return nil, err
			})
			if got != err {
				t.Errorf("%s: error %v, want %v", method, got, err)
			}
		}
		for _, step := range []struct {
			name   string
			method string
			took   time.Duration
			err    error
			want   time.Duration
		}{
			{"a fast failure is no latency", "/kv.KV/Get", ms, status.Error(codes.Unavailable, ""), 0},
			{"an answer", "/kv.KV/Get", 10 * ms, nil, 10 * ms},
			{"an application's error is an answer", "/kv.KV/Get", 12 * ms, status.Error(codes.NotFound, ""), 12 * ms},
			{"a plain error is a failure", "/kv.KV/Get", ms, errors.New("no"), 12 * ms},
			{"a slow failure shows that it takes longer", "/kv.KV/Get", 100 * ms, status.Error(codes.DeadlineExceeded, ""), 12 * ms},
			{"and another", "/kv.KV/Get", 200 * ms, status.Error(codes.Canceled, ""), 100 * ms},
			{"a health check", "/grpc.health.v1.Health/Check", 500 * ms, nil, 100 * ms},
			{"a probe", loadpb.LoadReport_Get_FullMethodName, 500 * ms, nil, 100 * ms},
			{"ORCA", "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics", 500 * ms, nil, 100 * ms},
		} {
			call(step.method, step.took, step.err)
			res, err := reporter{load: l}.Get(t.Context(), nil)
			if err != nil || res.RequestsInFlight != 0 || (time.Duration(res.LatencyNs)-step.want).Abs() > 10*time.Microsecond {
				t.Errorf("%s: %v, %v, want RIF 0 and %v", step.name, res, err, step.want)
			}
		}
		func() {
			defer func() {
				if recover() == nil {
					t.Error("the panic is gone")
				}
			}()
			_, _ = serve(t.Context(), nil, &grpc.UnaryServerInfo{}, func(context.Context, any) (any, error) { panic("handler") })
		}()
		if n := l.gauge.rif.Load(); n != 0 {
			t.Errorf("RIF %d after a panic, want 0", n)
		}
	})
}

// aStream is a stream that keeps its trailer.
type aStream struct {
	grpc.ServerStream
	ctx     context.Context
	trailer metadata.MD
}

func (s *aStream) Context() context.Context      { return s.ctx }
func (s *aStream) SetTrailer(md metadata.MD)     { s.trailer = metadata.Join(s.trailer, md) }
func (s *aStream) count(l *ServerLoad) (n int64) { return l.gauge.rif.Load() }

// A stream is in flight while it is open, and reports at its end.
func TestServerLoadStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewServerLoad()
		s := &aStream{ctx: t.Context()}
		err := l.StreamServerInterceptor()(nil, s, &grpc.StreamServerInfo{FullMethod: "/kv.KV/Scan"}, func(any, grpc.ServerStream) error {
			if n := s.count(l); n != 1 {
				t.Errorf("RIF %d while it is open, want 1", n)
			}
			time.Sleep(20 * ms)
			return nil
		})
		if n := s.count(l); err != nil || n != 0 || len(s.trailer[loadTrailer]) != 1 {
			t.Errorf("RIF %d, trailer %q, %v", n, s.trailer, err)
		}
		s = &aStream{ctx: t.Context()}
		_ = l.StreamServerInterceptor()(nil, s, &grpc.StreamServerInfo{FullMethod: "/grpc.health.v1.Health/Watch"}, func(any, grpc.ServerStream) error {
			if n := s.count(l); n != 0 {
				t.Errorf("RIF %d while health is watched, want 0", n)
			}
			return nil
		})
		if s.trailer != nil {
			t.Errorf("a health check reports %q", s.trailer)
		}
		func() {
			defer func() { _ = recover() }()
			_ = l.StreamServerInterceptor()(nil, s, &grpc.StreamServerInfo{}, func(any, grpc.ServerStream) error { panic("handler") })
		}()
		if n := s.count(l); n != 0 {
			t.Errorf("RIF %d after a panic, want 0", n)
		}
	})
}

// What of a report is believed.
func TestReported(t *testing.T) {
	nan := 0.0
	nan /= nan
	for _, tc := range []struct {
		load any
		want report
		ok   bool
	}{
		{nil, report{}, false},
		{"a string", report{}, false},
		{metered(nil), report{}, false},
		{metered{"latency": 1}, report{}, false},
		{metered{latencyMetric: 1}, report{}, false},
		{metered{rifMetric: 3}, report{rif: 3}, true},
		{metered{rifMetric: 3, latencyMetric: 1.5}, report{rif: 3, latency: 1500 * time.Microsecond}, true},
		{metered{rifMetric: -1}, report{}, false},
		{metered{rifMetric: nan}, report{}, false},
		{metered{rifMetric: 1e300}, report{}, false},
		{metered{rifMetric: 3, latencyMetric: -1}, report{}, false},
		{metered{rifMetric: 3, latencyMetric: nan}, report{}, false},
	} {
		if got, ok := reported(tc.load); got != tc.want || ok != tc.ok {
			t.Errorf("%v: %+v, %v, want %+v, %v", tc.load, got, ok, tc.want, tc.ok)
		}
	}
}

// What the interceptor adds to a call: beside nothing, and with the trailer that a
// transport would take.
func BenchmarkServerLoad(b *testing.B) {
	l := NewServerLoad()
	serve := l.UnaryServerInterceptor()
	handler := func(context.Context, any) (any, error) { return nil, nil }
	info := &grpc.UnaryServerInfo{FullMethod: "/kv.KV/Get"}
	b.Run("count", func(b *testing.B) {
		b.ReportAllocs()
		for range b.N {
			r := l.begin()
			r.end(nil)
		}
	})
	b.Run("interceptor", func(b *testing.B) {
		b.ReportAllocs()
		ctx := grpc.NewContextWithServerTransportStream(context.Background(), &aTransport{})
		for range b.N {
			_, _ = serve(ctx, nil, info, handler)
		}
	})
	b.Run("interceptor/parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			ctx := grpc.NewContextWithServerTransportStream(context.Background(), &aTransport{})
			for pb.Next() {
				_, _ = serve(ctx, nil, info, handler)
			}
		})
	})
}

type aTransport struct{ grpc.ServerTransportStream }

func (*aTransport) SetTrailer(metadata.MD) error { return nil }
