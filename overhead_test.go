package bobtail_test

import (
	"context"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// What a call that succeeds at once allocates more than over a bare connection, whose last
// interceptor answers in the place of the transport. The one of the link itself is in it.
func TestOverhead(t *testing.T) {
	if testenv.Race {
		t.Skip("the race detector drops at random what pools hold")
	}
	for _, tc := range []struct {
		name, method string
		policy       bobtail.Policy
		most         float64
	}{
		{"an empty policy", "/kv.KV/Get", policy(t, `{}`), 1},
		{"the default policy, hedged", "/kv.KV/Get", bobtail.DefaultPolicy(), 6},
		{"the default policy, retried", "/kv.KV/Put", bobtail.DefaultPolicy(), 3},
		{"the default policy, neither", "/kv.KV/Increment", bobtail.DefaultPolicy(), 3},
		{"every key", "/kv.KV/Get", policy(t, `{"extraLoad": {"max": 0.05}, "methodConfig": [{"name": [{}],
			"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.05s", "maxBackoff": "2s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]},
			"circuitBreaker": {"slowCallDuration": "1s"}, "adaptiveThrottling": {}, "rateLimit": {"perSecond": 1000000000, "burst": 1000000000}, "maxInFlight": 10}]}`), 4},
	} {
		c, err := bobtail.NewClient(tc.policy, bobtail.WithLogger(nil))
		if err != nil {
			t.Fatal(err)
		}
		noop := func(context.Context, string, any, any, *grpc.ClientConn, grpc.UnaryInvoker, ...grpc.CallOption) error {
			return nil
		}
		cc, err := grpc.NewClient("passthrough:///noop", append(c.DialOptions(),
			grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithChainUnaryInterceptor(noop))...)
		if err != nil {
			t.Fatal(err)
		}
		defer cc.Close()
		ctx, req, res := context.Background(), &kvpb.Request{}, &kvpb.Response{}
		n := testenv.Allocs(200, func() {
			if err := cc.Invoke(ctx, tc.method, req, res); err != nil {
				t.Fatal(err)
			}
		})
		if n > tc.most {
			t.Errorf("%s: %v allocations, want at most %v", tc.name, n, tc.most)
		}
	}
}
