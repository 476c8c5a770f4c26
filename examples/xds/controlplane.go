package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"

	clusterpb "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	discoverypb "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	xdsresource "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	xdsserver "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/xds"
)

// node is what the one client calls itself.
const node = "example"

// A controlPlane is an xDS server on loopback that knows one service, and serves one
// client. Its methods are for one goroutine.
type controlPlane struct {
	addr     string
	server   *grpc.Server
	stopped  context.CancelFunc
	cache    cache.SnapshotCache
	snapshot *cache.Snapshot
	versions int

	mu       sync.Mutex // guards what follows
	sent     map[string]response
	verdicts map[string]verdict
	changed  chan struct{} // closed at the next verdict
}

// A response is the last one of its type.
type response struct{ nonce, version string }

// A verdict is what the client said of a version: nothing, or why it will not have it.
type verdict struct {
	version string
	nack    error
}

func newControlPlane() (*controlPlane, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &controlPlane{
		addr:     listener.Addr().String(),
		server:   grpc.NewServer(),
		stopped:  cancel,
		cache:    cache.NewSnapshotCache(true, cache.IDHash{}, nil),
		snapshot: new(cache.Snapshot),
		sent:     make(map[string]response),
		verdicts: make(map[string]verdict),
		changed:  make(chan struct{}),
	}
	discoverypb.RegisterAggregatedDiscoveryServiceServer(c.server, xdsserver.NewServer(ctx, c.cache, xdsserver.CallbackFuncs{
		StreamResponseFunc: c.onResponse,
		StreamRequestFunc:  c.onRequest,
	}))
	go c.server.Serve(listener)
	return c, nil
}

func (c *controlPlane) stop() {
	c.stopped()
	c.server.Stop()
}

// start publishes the service for the first time.
func (c *controlPlane) start(cluster *clusterpb.Cluster, localities []locality) error {
	listener, err := newListener()
	if err != nil {
		return err
	}
	assignment, err := newAssignment(localities)
	if err != nil {
		return err
	}
	c.put(types.Listener, listener)
	c.put(types.Route, newRoute())
	c.put(types.Cluster, cluster)
	c.put(types.Endpoint, assignment)
	return c.cache.SetSnapshot(context.Background(), node, c.snapshot)
}

// setCluster publishes another cluster, and waits until the client has accepted it, or
// gives the client's reason not to.
func (c *controlPlane) setCluster(ctx context.Context, cluster *clusterpb.Cluster) error {
	return c.set(ctx, types.Cluster, xdsresource.ClusterType, cluster)
}

// setEndpoints publishes other endpoints, likewise.
func (c *controlPlane) setEndpoints(ctx context.Context, localities []locality) error {
	assignment, err := newAssignment(localities)
	if err != nil {
		return err
	}
	return c.set(ctx, types.Endpoint, xdsresource.EndpointType, assignment)
}

func (c *controlPlane) set(ctx context.Context, kind types.ResponseType, typeURL string, r types.Resource) error {
	version := c.put(kind, r)
	if err := c.cache.SetSnapshot(ctx, node, c.snapshot); err != nil {
		return err
	}
	for {
		c.mu.Lock()
		v, changed := c.verdicts[typeURL], c.changed
		c.mu.Unlock()
		if v.version == version {
			return v.nack
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("no verdict on version %s of %s: %w", version, typeURL, ctx.Err())
		}
	}
}

// put makes the next snapshot differ in one resource, and returns its version. A type
// has a version of its own, so that the client is sent what has changed and no more.
func (c *controlPlane) put(kind types.ResponseType, r types.Resource) (version string) {
	c.versions++
	version = strconv.Itoa(c.versions)
	next := &cache.Snapshot{Resources: c.snapshot.Resources} // a copy: the cache reads the last one
	next.Resources[kind] = cache.NewResources(version, []types.Resource{r})
	c.snapshot = next
	return version
}

// onResponse is called before a response is sent.
func (c *controlPlane) onResponse(_ context.Context, _ int64, _ *discoverypb.DiscoveryRequest, r *discoverypb.DiscoveryResponse) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sent[r.GetTypeUrl()] = response{r.GetNonce(), r.GetVersionInfo()}
}

// onRequest is called for each request, which is a verdict on the last response, too.
func (c *controlPlane) onRequest(_ int64, r *discoverypb.DiscoveryRequest) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	last, ok := c.sent[r.GetTypeUrl()]
	if !ok || last.nonce != r.GetResponseNonce() {
		return nil
	}
	v := verdict{version: last.version}
	if d := r.GetErrorDetail(); d != nil {
		v.nack = errors.New(d.GetMessage())
	}
	c.verdicts[r.GetTypeUrl()] = v
	close(c.changed)
	c.changed = make(chan struct{})
	return nil
}

// resolver leads clients that dial xds:///demo here. It is a stand-in: a client that is
// not in the same process reads this configuration from the file that the environment
// variable GRPC_XDS_BOOTSTRAP names, and needs nothing but the import of package xds.
func (c *controlPlane) resolver() (resolver.Builder, error) {
	return xds.NewXDSResolverWithConfigForTesting(fmt.Appendf(nil, `{
		"xds_servers": [{
			"server_uri": %q,
			"channel_creds": [{"type": "insecure"}],
			"server_features": ["xds_v3"]
		}],
		"node": {"id": %q}
	}`, "passthrough:///"+c.addr, node))
}
