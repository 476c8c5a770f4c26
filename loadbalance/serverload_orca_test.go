package loadbalance

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	v3orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/orca"
	"google.golang.org/protobuf/proto"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// The report that is written by hand is the one that orca's type reads.
func TestTrailerIsAnOrcaReport(t *testing.T) {
	for _, want := range []report{{}, {rif: 3, latency: 1500 * time.Microsecond}, {rif: 1 << 39, latency: 1}} {
		var r v3orcapb.OrcaLoadReport
		if err := proto.Unmarshal([]byte(trailer(want)[loadTrailer][0]), &r); err != nil {
			t.Fatal(err)
		}
		if got, ok := reported(&r); got != want || !ok || len(r.ProtoReflect().GetUnknown()) > 0 {
			t.Errorf("%+v came out as %+v, %v", want, got, ok)
		}
	}
	if got, ok := reported((*v3orcapb.OrcaLoadReport)(nil)); ok {
		t.Errorf("no report came out as %+v", got)
	}
}

// Every call brings one report, of unary calls and of streams, whether or not orca's own
// option is there; beside it, with the metrics of both.
func TestOneReportPerCall(t *testing.T) {
	for name, own := range map[string][]grpc.ServerOption{"alone": nil, "beside orca's": {orca.CallMetricsServerOption(nil)}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := NewServerLoad()
				f := grpctest.NewFleet(t, 1, grpctest.Handlers{Unary: func(ctx context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
					if r := orca.CallMetricsRecorderFromContext(ctx); r != nil {
						r.SetRequestCost("rows", 7)
					}
					time.Sleep(5 * ms)
					return &kvpb.Response{}, nil
				}}, append(own, grpc.ChainUnaryInterceptor(l.UnaryServerInterceptor()), grpc.ChainStreamInterceptor(l.StreamServerInterceptor()))...)
				c := kvpb.NewKVClient(f.Dial())
				check := func(md metadata.MD, cost float64) {
					t.Helper()
					var r v3orcapb.OrcaLoadReport
					if n := len(md[loadTrailer]); n != 1 {
						t.Fatalf("%d reports, want one", n)
					}
					if err := proto.Unmarshal([]byte(md[loadTrailer][0]), &r); err != nil {
						t.Fatal(err)
					}
					if got, ok := reported(&r); !ok || got.rif != 0 || (got.latency-5*ms).Abs() > time.Microsecond || r.RequestCost["rows"] != cost {
						t.Errorf("report %v, want RIF 0 and 5 ms, and a cost of %v", &r, cost)
					}
				}
				var md metadata.MD
				if _, err := c.Get(t.Context(), &kvpb.Request{}, grpc.Trailer(&md)); err != nil {
					t.Fatal(err)
				}
				check(md, 7*float64(len(own)))
				s, err := c.Scan(t.Context(), &kvpb.Request{})
				for err == nil {
					_, err = s.Recv()
				}
				if n := len(s.Trailer()[loadTrailer]); n != 1 {
					t.Errorf("%d reports of a stream, want one", n)
				}
			})
		})
	}
}

// Calls tell of the load too: with one probe a second only, an endpoint that others load
// is left as soon as one call has been there.
func TestCallsAreProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startReporting(t, 3, `{"maxProbesPerSecond": 3}`, everyone, func(ctx context.Context, _ int) error { return after(ctx, 5*ms) })
		f.run(t, 3*time.Second)
		f.backends[1].load.gauge.rif.Add(100)
		calls, _ := f.run(t, 300*ms)
		if calls[1] > 2 {
			t.Errorf("the backend that others load got %d of 30 calls, want at most 2: %v", calls[1], calls)
		}
		f.backends[1].load.gauge.rif.Add(-100)
	})
}
