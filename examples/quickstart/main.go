// Quickstart shows what bobtail does to a slow tail: three backends, each slow in
// one call of fifty, called with and without it.
package main

import (
	"context"
	"fmt"
	"log"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/examples/quickstart/echopb"
)

const (
	backends = 3
	calls    = 1600
	interval = 2 * time.Millisecond // between calls: 500 of them per second
)

func main() {
	// The discovery of a real client would be DNS or xDS; this one is told.
	var served atomic.Int64
	addresses := manual.NewBuilderWithScheme("demo")
	var endpoints resolver.State
	for range backends {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			log.Fatal(err)
		}
		// In an overload it refuses what cannot be served in time. Here it never has to.
		shed, err := bobtail.NewServer(bobtail.DefaultServerPolicy())
		if err != nil {
			log.Fatal(err)
		}
		server := grpc.NewServer(shed.ServerOptions()...)
		echopb.RegisterEchoServer(server, &echo{served: &served})
		go server.Serve(listener)
		defer server.Stop()
		endpoints.Endpoints = append(endpoints.Endpoints, resolver.Endpoint{
			Addresses: []resolver.Address{{Addr: listener.Addr().String()}},
		})
	}
	addresses.InitialState(endpoints)
	creds := grpc.WithTransportCredentials(insecure.NewCredentials())

	// Without: grpc's own round_robin.
	plain, err := grpc.NewClient("demo:///echo", grpc.WithResolvers(addresses), creds,
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`))
	if err != nil {
		log.Fatal(err)
	}
	defer plain.Close()

	// With: the ten lines of bobtail.
	client, err := bobtail.NewClient(bobtail.DefaultPolicy())
	if err != nil {
		log.Fatal(err)
	}
	options := append(client.DialOptions(), grpc.WithResolvers(addresses), creds)
	hedged, err := grpc.NewClient("demo:///echo", options...)
	if err != nil {
		log.Fatal(err)
	}
	defer hedged.Close()

	fmt.Printf("%d backends on loopback, each slow in one call of fifty; %d calls\n\n", backends, calls)
	fmt.Printf("%-16s %8s %8s %18s\n", "", "p50", "p99", "attempts per call")
	for _, run := range []struct {
		name string
		conn *grpc.ClientConn
	}{{"without bobtail", plain}, {"with bobtail", hedged}} {
		measure(run.conn, calls/4) // connects, and learns how long calls take
		served.Store(0)
		took := measure(run.conn, calls)
		fmt.Printf("%-16s %5.1f ms %5.1f ms %18.2f\n", run.name,
			milliseconds(took[len(took)/2]), milliseconds(took[len(took)*99/100]), float64(served.Load())/calls)
	}
}

// measure makes n calls, one per interval whether or not the last has returned,
// and returns how long they took, sorted.
func measure(conn *grpc.ClientConn, n int) []time.Duration {
	client := echopb.NewEchoClient(conn)
	took := make([]time.Duration, n)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range n {
		due := start.Add(time.Duration(i) * interval)
		time.Sleep(time.Until(due))
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			if _, err := client.Say(ctx, &echopb.EchoRequest{Text: "hello"}); err != nil {
				log.Fatal(err)
			}
			// From when the call was due, so that a late sender hides nothing.
			took[i] = time.Since(due)
		})
	}
	wg.Wait()
	slices.Sort(took)
	return took
}

func milliseconds(d time.Duration) float64 { return d.Seconds() * 1000 }

// echo answers in about 2 ms, and in one call of fifty takes 50 ms longer.
type echo struct {
	echopb.UnimplementedEchoServer
	served *atomic.Int64
}

func (e *echo) Say(ctx context.Context, request *echopb.EchoRequest) (*echopb.EchoReply, error) {
	e.served.Add(1)
	service := time.Millisecond + rand.N(2*time.Millisecond)
	if rand.N(50) == 0 {
		service += 50 * time.Millisecond
	}
	select {
	case <-time.After(service):
		return &echopb.EchoReply{Text: request.GetText()}, nil
	case <-ctx.Done(): // another backend answered first
		return nil, ctx.Err()
	}
}
