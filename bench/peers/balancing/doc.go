// Package balancing measures bobtail's balancers beside grpc's own, go-zero's and
// kratos's. It holds tests only:
//
//	go test -tags gozero -run TestBalancers -v .
//	go test -tags gozero -run xxx -bench Pick .
//
// Without the tag go-zero's balancer is left out. It is a module of its own because go-zero,
// when linked, needs much, starts goroutines, handles signals and registers a file kv.proto of
// etcd's, which protobuf takes for the kv.proto of this module's tests: neither
// internal/grpctest nor bench/load can be linked beside it.
package balancing
