package breaker_test

import (
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/breaker"
)

// Without gRPC: ask before the call, tell after it.
func ExampleBreaker() {
	b, err := breaker.New(breaker.Config{
		MinimumCalls:  4,
		OnStateChange: func(c breaker.Change) { fmt.Printf("%v: %s, %d of %d\n", c.To, c.Reason, c.Bad, c.Calls) },
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	call := func(do func() error) error {
		permit, err := b.Admit()
		if err != nil {
			return err
		}
		err = do()
		permit.Done(err)
		return err
	}
	for range 5 {
		err = call(func() error { return status.Error(codes.Unavailable, "down") })
		fmt.Println(errors.Is(err, breaker.ErrOpen), err)
	}
	// Output:
	// false rpc error: code = Unavailable desc = down
	// false rpc error: code = Unavailable desc = down
	// false rpc error: code = Unavailable desc = down
	// open: failures, 4 of 4
	// false rpc error: code = Unavailable desc = down
	// true rpc error: code = Unavailable desc = breaker: open
}

func ExampleThrottle() {
	now := time.Now()
	throttle, err := breaker.NewThrottle(breaker.ThrottleConfig{}, now)
	if err != nil {
		fmt.Println(err)
		return
	}
	// The server turns away nine calls of ten.
	for i := range 100 {
		if i%10 == 0 {
			throttle.Record(now, nil)
		} else {
			throttle.Record(now, status.Error(codes.ResourceExhausted, "busy"))
		}
	}
	fmt.Printf("%.2f of the calls are refused here\n", throttle.Probability(now))
	// The random number of a call is rand.Float64(); here 0.9 and 0.5.
	fmt.Println(throttle.Admit(now, 0.9))
	fmt.Println(throttle.Admit(now, 0.5))
	// Output:
	// 0.79 of the calls are refused here
	// <nil>
	// rpc error: code = Unavailable desc = breaker: throttled
}

// As interceptors, with a breaker for each method of each target.
func ExampleUnaryClientInterceptor() {
	cfg := breaker.Config{FailureRatio: 0.5, SlowCallDuration: 2 * time.Second}
	if err := cfg.Validate(); err != nil {
		fmt.Println(err)
		return
	}
	conn, err := grpc.NewClient("dns:///kv.example.com:443",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithChainUnaryInterceptor(breaker.UnaryClientInterceptor(cfg)),
		grpc.WithChainStreamInterceptor(breaker.StreamClientInterceptor(cfg)))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	fmt.Println(conn.Target())
	// Output: dns:///kv.example.com:443
}
