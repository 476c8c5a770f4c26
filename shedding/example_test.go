package shedding_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/shedding"
)

func ExampleRateLimit() {
	limit, err := shedding.NewRateLimit(shedding.RateLimitConfig{PerSecond: 10, Burst: 2})
	if err != nil {
		fmt.Println(err)
		return
	}
	// A call that can wait for 50 ms: two go at once, the third would have its turn after
	// 100 ms, and hears so at once.
	for range 3 {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		err := limit.Wait(ctx)
		cancel()
		fmt.Println(status.Code(err), errors.Is(err, shedding.ErrRateLimited))
	}
	// Output:
	// OK false
	// OK false
	// ResourceExhausted true
}

func ExampleBulkhead() {
	bulkhead, err := shedding.NewBulkhead(2, "/kv.KV/Get")
	if err != nil {
		fmt.Println(err)
		return
	}
	call := func() error {
		if err := bulkhead.Enter(); err != nil {
			return err
		}
		defer bulkhead.Leave()
		fmt.Println("in flight:", bulkhead.InFlight())
		return nil
	}
	bulkhead.Enter() // a call that hangs
	fmt.Println(call())
	bulkhead.Enter() // and another one
	fmt.Println(call())
	// Output:
	// in flight: 2
	// <nil>
	// rpc error: code = ResourceExhausted desc = shedding: too many calls in flight: /kv.KV/Get
}

func ExampleUnaryClientInterceptor() {
	cfg := shedding.ClientConfig{PerSecond: 1000, MaxInFlight: 200}
	if err := cfg.Validate(); err != nil {
		fmt.Println(err)
		return
	}
	conn, err := grpc.NewClient("localhost:50051",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithChainUnaryInterceptor(shedding.UnaryClientInterceptor(cfg)),
		grpc.WithChainStreamInterceptor(shedding.StreamClientInterceptor(cfg)))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	fmt.Println("at most 1000 calls/s and 200 in flight of each method")
	// Output: at most 1000 calls/s and 200 in flight of each method
}
