package main

import (
	"context"
	"net"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// A backend is a gRPC server on a port of loopback that the system chooses. Its
// service is gRPC's own health service, so that the example needs no proto of its own.
type backend struct {
	healthpb.UnimplementedHealthServer
	addr   string
	server *grpc.Server
	handle func(context.Context) error
}

// newBackend starts a server whose every call is answered by handle.
func newBackend(handle func(context.Context) error) (*backend, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	b := &backend{addr: listener.Addr().String(), server: grpc.NewServer(), handle: handle}
	healthpb.RegisterHealthServer(b.server, b)
	go b.server.Serve(listener)
	return b, nil
}

// Check implements the health service.
func (b *backend) Check(ctx context.Context, _ *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	if err := b.handle(ctx); err != nil {
		return nil, err
	}
	return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}, nil
}
