package loadbalance

import (
	"context"
	"encoding/binary"
	"math"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
	"github.com/bobtail-rpc/bobtail/loadbalance/loadpb"
)

const (
	// loadTrailer carries an xds.data.orca.v3.OrcaLoadReport (gRFC A51).
	loadTrailer = "endpoint-load-metrics-bin"
	// rifMetric and latencyMetric are the named metrics of ours in it. Their names are a contract
	// with clients of other versions.
	rifMetric     = "bobtail.rif"
	latencyMetric = "bobtail.latency_ms"
)

// A ServerLoad is how loaded a server is: its requests in flight (RIF), and the latency to
// expect at that RIF. It is the server's part of bobtail_prequal: its interceptors count,
// and report in the trailer of each call; what Register adds answers probes.
//
// The latency is the median of recent requests that arrived at about the present RIF. A
// unary request that ends by itself gives its time; the length of a stream is none. One that
// failed or was cancelled only shows that it would have taken longer: it counts if it took
// longer than the median, where that makes no difference, and not otherwise, so that fast
// failures are no fast answers.
//
// Probes, health checks and ORCA's streams of load reports are not counted. Its
// memory is bounded, 20 KiB. All methods are safe for concurrent use; a request takes no lock.
//
// One ServerLoad for a process is the rule, as it is the process that is loaded however many
// grpc.Servers it has: [UnaryServerInterceptor], [StreamServerInterceptor] and
// [RegisterLoadReport] share one. Those of [NewServerLoad] are for processes whose servers do not
// share what limits them, and for tests.
type ServerLoad struct {
	gauge gauge
	start time.Time
}

// NewServerLoad returns a ServerLoad that has seen nothing yet.
func NewServerLoad() *ServerLoad {
	l := &ServerLoad{start: time.Now()}
	l.gauge.last.Store(math.MinInt64 / 2) // never
	return l
}

var process = NewServerLoad()

// UnaryServerInterceptor counts and reports unary calls in the ServerLoad of the process.
func UnaryServerInterceptor() grpc.UnaryServerInterceptor { return process.UnaryServerInterceptor() }

// StreamServerInterceptor counts and reports streams in the ServerLoad of the process.
func StreamServerInterceptor() grpc.StreamServerInterceptor {
	return process.StreamServerInterceptor()
}

// RegisterLoadReport registers the service that answers probes, bobtail.loadreport.v1.LoadReport,
// for the ServerLoad of the process. It is to be called before the server serves.
func RegisterLoadReport(s grpc.ServiceRegistrar) { process.Register(s) }

// Register registers the service that answers probes. Interceptors that ask for credentials,
// limit or shed should let it pass: a server that answers no probe gets its calls as by
// bobtail_p2c, and so does its whole fleet.
func (l *ServerLoad) Register(s grpc.ServiceRegistrar) {
	loadpb.RegisterLoadReportServer(s, reporter{load: l})
}

// UnaryServerInterceptor returns an interceptor that counts a call from its arrival until its
// handler has returned or panicked, and reports in its trailer. It should be the first
// of a chain, but for orca.CallMetricsServerOption: after that its metrics go into that
// option's report. Two reports in one trailer would be none.
func (l *ServerLoad) UnaryServerInterceptor() grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		if uncounted(info.FullMethod) {
			return handler(ctx, req)
		}
		r := l.begin()
		defer r.release()
		res, err := handler(ctx, req)
		if load := r.end(err); !recordLoad(ctx, load) {
			// It fails only where there is no transport, as in a test of the handler.
			_ = grpc.SetTrailer(ctx, trailer(load))
		}
		return res, err
	}
}

// StreamServerInterceptor is UnaryServerInterceptor for streams. A stream is a request in flight
// as long as it is open, and reports at its end.
func (l *ServerLoad) StreamServerInterceptor() grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		if uncounted(info.FullMethod) {
			return handler(srv, ss)
		}
		r := l.begin()
		defer r.release()
		err := handler(srv, ss)
		if load := r.endStream(); !recordLoad(ss.Context(), load) {
			ss.SetTrailer(trailer(load))
		}
		return err
	}
}

// uncounted reports whether calls of a method are no load.
func uncounted(method string) bool {
	return method == loadpb.LoadReport_Get_FullMethodName ||
		strings.HasPrefix(method, "/grpc.health.v1.Health/") ||
		strings.HasPrefix(method, "/xds.service.orca.v3.OpenRcaService/")
}

// A serving is one request in flight.
type serving struct {
	load  *ServerLoad
	at    time.Duration
	met   int64
	ended bool
}

func (l *ServerLoad) now() time.Duration { return time.Since(l.start) }

func (l *ServerLoad) begin() serving { return serving{load: l, at: l.now(), met: l.gauge.begin()} }

// release counts the request out if end has not: its handler has panicked.
func (r *serving) release() {
	if !r.ended {
		r.load.gauge.release()
	}
}

// end counts the request out, and returns the load without it.
func (r *serving) end(err error) report {
	r.ended = true
	g := &r.load.gauge
	g.release()
	now := r.load.now()
	took := now - r.at
	done := outcome.Of(err) == outcome.Success
	if done {
		g.record(now, took, r.met)
	}
	load := g.load(now)
	if !done && load.latency > 0 && took > load.latency {
		g.record(now, took, r.met)
	}
	return load
}

// endStream is end for a stream, whose length is no latency.
func (r *serving) endStream() report {
	r.ended = true
	r.load.gauge.release()
	return r.load.gauge.load(r.load.now())
}

// trailer makes a load report. It is written by hand, as it is the same each time but for two
// numbers, which the generated type wants in a map.
func trailer(load report) metadata.MD {
	var buf [96]byte
	b := appendMetric(buf[:0], rifMetric, float64(load.rif))
	if load.latency > 0 {
		b = appendMetric(b, latencyMetric, inMillis(load.latency))
	}
	return metadata.MD{loadTrailer: []string{string(b)}}
}

func inMillis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// appendMetric appends an entry of named_metrics, field 8 and a map<string, double>.
func appendMetric(b []byte, name string, value float64) []byte {
	b = protowire.AppendTag(b, 8, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(1+1+len(name)+1+8))
	b = protowire.AppendTag(b, 1, protowire.BytesType)
	b = protowire.AppendString(b, name)
	b = protowire.AppendTag(b, 2, protowire.Fixed64Type)
	return binary.LittleEndian.AppendUint64(b, math.Float64bits(value))
}

// reported reads the report that a call has brought; false if there is none of ours.
func reported(load any) (report, bool) {
	// The type of grpc's package orca, which parses it if linked.
	m, ok := load.(interface{ GetNamedMetrics() map[string]float64 })
	if !ok {
		return report{}, false
	}
	named := m.GetNamedMetrics()
	rif, ok := named[rifMetric]
	ms := named[latencyMetric]
	// NaN and nonsense are not to be believed.
	if !ok || !(rif >= 0 && rif < 1<<40) || !(ms >= 0 && ms < 1e12) {
		return report{}, false
	}
	return report{rif: int64(rif), latency: time.Duration(ms * float64(time.Millisecond))}, true
}

// reporter answers probes.
type reporter struct {
	loadpb.UnimplementedLoadReportServer
	load *ServerLoad
}

// Get implements loadpb.LoadReportServer.
func (r reporter) Get(context.Context, *loadpb.GetRequest) (*loadpb.GetResponse, error) {
	now := r.load.now()
	load := r.load.gauge.load(now)
	return &loadpb.GetResponse{
		RequestsInFlight: load.rif,
		LatencyNs:        int64(load.latency),
		Invites:          r.load.gauge.invite(now),
	}, nil
}
