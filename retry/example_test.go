package retry_test

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/retry"
)

func ExampleBudget() {
	now := time.Now()
	budget, err := retry.NewBudget(retry.BudgetConfig{Max: 0.05, Window: 10 * time.Second}, now)
	if err != nil {
		fmt.Println(err)
		return
	}
	// 5 calls/s for 10 s: 50 first attempts pay for 2.5 extra ones, and 1 is free.
	for range 50 {
		now = now.Add(200 * time.Millisecond)
		budget.Deposit(now)
	}
	// Then a backend stalls, and every call would like to be hedged.
	var hedged []string
	for range 10 {
		if budget.TryWithdraw(now) {
			hedged = append(hedged, "hedge")
		} else {
			hedged = append(hedged, "wait")
		}
	}
	fmt.Println(strings.Join(hedged, " "))
	// Output: hedge hedge hedge wait wait wait wait wait wait wait
}

// Without gRPC: any function is retried, its errors' codes by package status.
func ExampleDo() {
	r, err := retry.New(retry.Config{
		MaxAttempts:    3,
		Backoff:        retry.Backoff{Initial: time.Millisecond, Max: time.Second, Multiplier: 2},
		RetryableCodes: []codes.Code{codes.Unavailable},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	answer, err := retry.Do(context.Background(), r, func(ctx context.Context) (string, error) {
		if n := retry.AttemptNumber(ctx); n < 3 {
			return "", status.Errorf(codes.Unavailable, "attempt %d", n)
		}
		return "third time lucky", nil
	})
	fmt.Println(answer, err)
	// Output: third time lucky <nil>
}

// As an interceptor for methods that may all be executed more than once. Budget and
// Throttle bound what an outage costs; one of each serves all methods of a target.
func ExampleUnaryClientInterceptor() {
	budget, err := retry.NewBudget(retry.BudgetConfig{Max: 0.1}, time.Now())
	if err != nil {
		fmt.Println(err)
		return
	}
	cfg := retry.Config{
		MaxAttempts:    3,
		Backoff:        retry.Backoff{Initial: 50 * time.Millisecond, Max: 2 * time.Second, Multiplier: 2},
		RetryableCodes: []codes.Code{codes.Unavailable},
		AttemptTimeout: 250 * time.Millisecond,
		Budget:         budget,
	}
	if err := cfg.Validate(); err != nil {
		fmt.Println(err)
		return
	}
	conn, err := grpc.NewClient("dns:///kv.example.com:443",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDisableRetry(),
		grpc.WithChainUnaryInterceptor(retry.UnaryClientInterceptor(cfg)),
		grpc.WithChainStreamInterceptor(retry.StreamClientInterceptor(cfg)))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	fmt.Println(conn.Target())
	// Output: dns:///kv.example.com:443
}
