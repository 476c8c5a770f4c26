// Xds lets a control plane choose the balancer of a client that is running: three
// backends, one of them slow, and three policies one after the other.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	_ "github.com/bobtail-rpc/bobtail/loadbalance" // registers the balancers
)

const (
	interval = 5 * time.Millisecond // between calls: 200 of them per second
	settle   = 30                   // calls until a policy has taken over from the last, and they have been to all backends
	measured = 120                  // calls that are counted then
	users    = 40                   // whose turn it is one after the other
)

// policies are what the control plane chooses from, by name and with configuration.
var policies = []struct{ name, config string }{
	{"round_robin", `{}`},
	{"bobtail_p2c", `{"decayTime": "5s"}`},
	{"bobtail_rendezvous", `{"header": "x-user-id", "eps": 4}`},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil && ctx.Err() == nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	// Three backends in two zones. The last one is slow.
	services := []time.Duration{2 * time.Millisecond, 2 * time.Millisecond, 30 * time.Millisecond}
	var arrived ledger
	localities := []locality{{zone: "near", weight: 1}, {zone: "far", weight: 1}}
	fmt.Printf("%d calls of %d users\n\n%-20s", measured, users, "")
	for i, service := range services {
		b, err := newBackend(func(ctx context.Context) error {
			arrived.note(ctx, i)
			select {
			case <-time.After(service):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		if err != nil {
			return err
		}
		defer b.server.Stop()
		zone := &localities[min(i, 1)]
		zone.endpoints = append(zone.endpoints, endpoint{addr: b.addr})
		fmt.Printf("%11s", fmt.Sprintf("%c (%v)", 'a'+i, service))
	}
	fmt.Printf("%23s\n", "users at one backend")

	control, err := newControlPlane()
	if err != nil {
		return err
	}
	defer control.stop()
	first, err := custom(policies[0].name, policies[0].config)
	if err != nil {
		return err
	}
	if err := control.start(newCluster(first), localities); err != nil {
		return err
	}
	builder, err := control.resolver()
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("xds:///"+service, grpc.WithResolvers(builder),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := healthpb.NewHealthClient(conn)
	if _, err := client.Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
		return err
	}

	for _, p := range policies {
		chosen, err := custom(p.name, p.config)
		if err != nil {
			return err
		}
		if err := control.setCluster(ctx, newCluster(chosen)); err != nil {
			return err
		}
		if err := load(ctx, client, settle); err != nil {
			return err
		}
		arrived.take()
		if err := load(ctx, client, measured); err != nil {
			return err
		}
		got := arrived.take()
		fmt.Printf("%-20s", p.name)
		for i := range services {
			fmt.Printf("%11d", got.at(i))
		}
		settled := 0
		for _, homes := range got.homes() {
			if homes == 1 {
				settled++
			}
		}
		fmt.Printf("%17d of %d\n", settled, users)
	}
	return nil
}

// load makes n calls, one per interval whether or not the last has returned, and
// returns when all have. A call that fails is an error.
func load(ctx context.Context, client healthpb.HealthClient, n int) error {
	failed := make(chan error, n)
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for i := range n {
		select {
		case <-tick.C:
		case err := <-failed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			ctx = metadata.AppendToOutgoingContext(ctx, userHeader, fmt.Sprintf("user-%d", i%users))
			if _, err := client.Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
				failed <- err
			}
		})
	}
	wg.Wait()
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}
