package retry

import (
	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail/internal/permethod"
	"github.com/bobtail-rpc/bobtail/internal/rpc"
)

// UnaryClientInterceptor returns an interceptor that retries every unary call made
// through it by cfg: install it where all methods may be executed more than once, or
// let package bobtail choose by method. Dial with grpc.WithDisableRetry(), or grpc's own
// retries multiply with these. Latencies are learned for each method of each target.
// With a faulty cfg every call fails with INTERNAL and names the fault;
// [Config.Validate] tells it at the start.
func UnaryClientInterceptor(cfg Config) grpc.UnaryClientInterceptor {
	return rpc.Unary(retriers(cfg).Of, cfg.Validate())
}

// StreamClientInterceptor is [UnaryClientInterceptor] for streams: a server-streaming
// call is retried until its first message, see [Retrier.OpenStream]. Client- and
// bidi-streaming calls pass.
func StreamClientInterceptor(cfg Config) grpc.StreamClientInterceptor {
	return rpc.Stream(retriers(cfg).Of, cfg.Validate())
}

// retriers has a Retrier for each method of each target. A retrier takes about 64 KiB.
func retriers(cfg Config) *permethod.Map[*Retrier] {
	return permethod.New(func(string) *Retrier { return build(cfg) })
}
