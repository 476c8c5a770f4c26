package shedding_test

import (
	"fmt"

	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail/shedding"
)

// A server that finds out by itself how much it can do, lets the rest wait for a moment, and
// then refuses it, the least important first. What callers claim is capped.
func ExampleServer() {
	most := shedding.Critical
	s, err := shedding.NewServer(shedding.ServerConfig{
		Queue:          &shedding.QueueConfig{},
		MaxCriticality: &most,
		Exempt:         []string{"/kv.KV/Watch"},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	server := grpc.NewServer(
		grpc.ChainUnaryInterceptor(s.UnaryServerInterceptor()),
		grpc.ChainStreamInterceptor(s.StreamServerInterceptor()),
		grpc.InTapHandle(s.TapHandle),
	)
	defer server.Stop()
	fmt.Println("limit", s.Stats().Limit)
	// Output: limit 20
}
