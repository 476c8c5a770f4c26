package fleet

import (
	"context"
	"time"

	"google.golang.org/grpc"
	_ "google.golang.org/grpc/balancer/weightedroundrobin" // whom the reports are for
	"google.golang.org/grpc/orca"
)

// orcaReports makes a server report its load in the trailer of each call (gRFC A51).
func orcaReports(m *meter) []grpc.ServerOption {
	start := time.Now()
	return []grpc.ServerOption{
		orca.CallMetricsServerOption(nil),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			m.begin(time.Since(start))
			res, err := handler(ctx, req)
			how := answered
			switch {
			case ctx.Err() != nil:
				how = left
			case err != nil:
				how = failed
			}
			l := m.end(time.Since(start), how)
			// The option sends nothing for a call that has not touched its recorder: a
			// provider of metrics alone would report to nobody.
			r := orca.CallMetricsRecorderFromContext(ctx)
			r.SetApplicationUtilization(l.utilization)
			r.SetQPS(l.qps)
			r.SetEPS(l.eps)
			return res, err
		}),
	}
}
