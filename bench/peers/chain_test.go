package peers

import (
	"context"
	"testing"
	"time"

	"github.com/failsafe-go/failsafe-go"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/failsafegrpc"
	"github.com/failsafe-go/failsafe-go/hedgepolicy"
	"github.com/failsafe-go/failsafe-go/retrypolicy"
	grpcretry "github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/retry"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	root "github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/breaker"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/retry"
)

// What a call pays that nothing is done for: it succeeds at once, over a connection whose
// last interceptor answers in the place of the transport.

func noopTransport(context.Context, string, any, any, *grpc.ClientConn, grpc.UnaryInvoker, ...grpc.CallOption) error {
	return nil
}

// overNoop is a variant that calls method through the dial options of one library.
func overNoop(b *testing.B, name, method string, opts ...grpc.DialOption) *variant {
	b.Helper()
	cc, err := grpc.NewClient("passthrough:///noop", append(opts,
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithChainUnaryInterceptor(noopTransport))...)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cc.Close() })
	ctx, req, res := context.Background(), &kvpb.Request{}, &kvpb.Response{}
	return &variant{name: name, call: func() error { return cc.Invoke(ctx, method, req, res) }}
}

func through(in grpc.UnaryClientInterceptor) grpc.DialOption {
	return grpc.WithChainUnaryInterceptor(in)
}

// ofPolicy are the dial options of a policy.
func ofPolicy(b *testing.B, p root.Policy) []grpc.DialOption {
	b.Helper()
	c, err := root.NewClient(p, root.WithLogger(nil))
	if err != nil {
		b.Fatal(err)
	}
	return c.DialOptions()
}

func parsed(b *testing.B, text string) root.Policy {
	b.Helper()
	p, err := root.ParsePolicy([]byte(text))
	if err != nil {
		b.Fatal(err)
	}
	return p
}

const (
	get = "/kv.KV/Get" // hedged by the default policy
	put = "/kv.KV/Put" // retried by it
)

// retrying is a retryPolicy like those of the peers below.
const retrying = `"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.05s", "maxBackoff": "2s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}`

func failsafeRetry() retrypolicy.RetryPolicy[any] {
	return retrypolicy.NewBuilder[any]().WithMaxAttempts(3).WithBackoff(50*time.Millisecond, 2*time.Second).Build()
}

func failsafeBreaker() circuitbreaker.CircuitBreaker[any] {
	return circuitbreaker.NewBuilder[any]().WithFailureRateThreshold(0.5, 20, 10*time.Second).Build()
}

// BenchmarkChain is the whole client chain, un-hedged and not retried, beside
// failsafe-go's retry, breaker and hedge in one, which is the base of the ratios.
func BenchmarkChain(b *testing.B) {
	everything := parsed(b, `{"extraLoad": {"max": 0.05}, "methodConfig": [{"name": [{}], `+retrying+`,
		"circuitBreaker": {"slowCallDuration": "1s"}, "adaptiveThrottling": {}, "rateLimit": {"perSecond": 1000000000, "burst": 1000000000}, "maxInFlight": 1000}]}`)
	turns(b, 500, "failsafe-retry+breaker+hedge",
		overNoop(b, "bare", get),
		overNoop(b, "bobtail-default-hedged", get, ofPolicy(b, root.DefaultPolicy())...),
		overNoop(b, "bobtail-default-retried", put, ofPolicy(b, root.DefaultPolicy())...),
		overNoop(b, "bobtail-all-keys", get, ofPolicy(b, everything)...),
		overNoop(b, "bobtail-nothing", get, ofPolicy(b, parsed(b, `{}`))...),
		overNoop(b, "failsafe-retry+breaker+hedge", get, through(failsafegrpc.NewUnaryClientInterceptorWithExecutor(
			failsafe.With(failsafeRetry(), failsafeBreaker(), hedgepolicy.NewBuilderWithDelay[any](never).Build())))),
		overNoop(b, "failsafe-retry+breaker", get, through(failsafegrpc.NewUnaryClientInterceptorWithExecutor(
			failsafe.With(failsafeRetry(), failsafeBreaker())))))
}

// BenchmarkRetry: retries alone.
func BenchmarkRetry(b *testing.B) {
	cfg := retry.Config{MaxAttempts: 3, Backoff: retry.Backoff{Initial: 50 * time.Millisecond, Max: 2 * time.Second, Multiplier: 2},
		RetryableCodes: []codes.Code{codes.Unavailable}}
	turns(b, 500, "middleware",
		overNoop(b, "bare", get),
		overNoop(b, "bobtail", get, through(retry.UnaryClientInterceptor(cfg))),
		overNoop(b, "middleware", get, through(grpcretry.UnaryClientInterceptor(
			grpcretry.WithMax(3), grpcretry.WithCodes(codes.Unavailable), grpcretry.WithBackoff(grpcretry.BackoffExponentialWithJitter(50*time.Millisecond, 0.5))))),
		overNoop(b, "failsafe", get, through(failsafegrpc.NewUnaryClientInterceptorWithExecutor(failsafe.With(failsafeRetry())))))
}

// BenchmarkAdmission: breaker and throttle alone.
func BenchmarkAdmission(b *testing.B) {
	turns(b, 500, "failsafe-breaker",
		overNoop(b, "bare", get),
		overNoop(b, "bobtail-breaker", get, through(breaker.UnaryClientInterceptor(breaker.Config{}))),
		overNoop(b, "bobtail-throttle", get, through(breaker.ThrottleUnaryClientInterceptor(breaker.ThrottleConfig{}))),
		overNoop(b, "failsafe-breaker", get, through(failsafegrpc.NewUnaryClientInterceptorWithExecutor(failsafe.With(failsafeBreaker())))))
}
