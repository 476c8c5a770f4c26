package loadbalance_test

import (
	"context"
	"log"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/bobtail-rpc/bobtail/loadbalance"
)

// All calls for one user go to one server, whose cache knows that user.
func ExampleWithKey() {
	conn, err := grpc.NewClient("dns:///profiles.example.com:443",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"bobtail_rendezvous": {"eps": 1}}]}`))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	ctx := loadbalance.WithKey(context.Background(), "user-42")
	// In place of your own service:
	_, err = grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		log.Print(err)
	}
}
