package loadbalance

import (
	"context"

	"google.golang.org/grpc/orca" // linked, it also fills balancer.DoneInfo.ServerLoad
)

// recordLoad puts the load into the report that orca.CallMetricsServerOption sends for this
// call; false if it sends none.
func recordLoad(ctx context.Context, load report) bool {
	r := orca.CallMetricsRecorderFromContext(ctx)
	if r == nil {
		return false
	}
	r.SetNamedMetric(rifMetric, float64(load.rif))
	if load.latency > 0 {
		r.SetNamedMetric(latencyMetric, inMillis(load.latency))
	}
	return true
}
