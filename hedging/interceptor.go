package hedging

import (
	"time"

	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail/internal/latency"
	"github.com/bobtail-rpc/bobtail/internal/permethod"
	"github.com/bobtail-rpc/bobtail/internal/rpc"
)

// UnaryClientInterceptor returns an interceptor that hedges every unary call made
// through it by cfg: install it where all methods are safe to execute more than
// once, or let package bobtail choose by method. Latencies are learned for each
// method of each target. With a faulty cfg every call fails with INTERNAL and
// names the fault; [Config.Validate] tells it at the start.
func UnaryClientInterceptor(cfg Config) grpc.UnaryClientInterceptor {
	return rpc.Unary(hedgers(cfg).Of, cfg.Validate())
}

// StreamClientInterceptor is [UnaryClientInterceptor] for streams: a
// server-streaming call is raced to its first message, see [Hedger.OpenStream].
// Client- and bidi-streaming calls pass.
func StreamClientInterceptor(cfg Config) grpc.StreamClientInterceptor {
	return rpc.Stream(hedgers(cfg).Of, cfg.Validate())
}

// hedgers has a Hedger for each method of each target. A hedger takes about 64 KiB.
func hedgers(cfg Config) *permethod.Map[*Hedger] {
	return permethod.New(func(string) *Hedger {
		now := time.Now()
		return build(cfg, latency.New(Window, now), &distance{}, now)
	})
}
