package main

import (
	"fmt"
	"net"
	"strconv"

	typedstructpb "github.com/cncf/xds/go/xds/type/v3"
	clusterpb "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corepb "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointpb "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerpb "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routepb "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerpb "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	managerpb "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	localitypb "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/wrr_locality/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// service is the name of everything here: the listener (which is what clients dial,
// as xds:///demo), its route, the cluster, and the cluster's endpoints.
const service = "demo"

// viaADS says that a resource comes over the stream that named it.
var viaADS = &corepb.ConfigSource{
	ConfigSourceSpecifier: &corepb.ConfigSource_Ads{Ads: &corepb.AggregatedConfigSource{}},
	ResourceApiVersion:    corepb.ApiVersion_V3,
}

// custom is a policy that a client knows by the name under which it registered it, with
// its configuration in JSON. This is how xDS chooses a balancer of package
// loadbalance, or any other that is none of Envoy's.
func custom(name, js string) (*clusterpb.LoadBalancingPolicy_Policy, error) {
	config := new(structpb.Struct)
	if err := protojson.Unmarshal([]byte(js), config); err != nil {
		return nil, fmt.Errorf("configuration of %s: %w", name, err)
	}
	return extension(name, &typedstructpb.TypedStruct{
		// Only what follows the last slash counts.
		TypeUrl: "type.googleapis.com/" + name,
		Value:   config,
	})
}

// perLocality is Envoy's wrr_locality: it draws one of the localities by their weights,
// and asks the first policy that the client knows for one of the endpoints in it.
func perLocality(policies ...*clusterpb.LoadBalancingPolicy_Policy) (*clusterpb.LoadBalancingPolicy_Policy, error) {
	return extension("envoy.load_balancing_policies.wrr_locality", &localitypb.WrrLocality{
		EndpointPickingPolicy: &clusterpb.LoadBalancingPolicy{Policies: policies},
	})
}

func extension(name string, config proto.Message) (*clusterpb.LoadBalancingPolicy_Policy, error) {
	packed, err := anypb.New(config)
	if err != nil {
		return nil, err
	}
	return &clusterpb.LoadBalancingPolicy_Policy{
		TypedExtensionConfig: &corepb.TypedExtensionConfig{Name: name, TypedConfig: packed},
	}, nil
}

// newCluster balances by the first of the policies that the client knows.
func newCluster(policies ...*clusterpb.LoadBalancingPolicy_Policy) *clusterpb.Cluster {
	return &clusterpb.Cluster{
		Name:                 service,
		ClusterDiscoveryType: &clusterpb.Cluster_Type{Type: clusterpb.Cluster_EDS},
		EdsClusterConfig:     &clusterpb.Cluster_EdsClusterConfig{EdsConfig: viaADS},
		LoadBalancingPolicy:  &clusterpb.LoadBalancingPolicy{Policies: policies},
	}
}

// A locality is some of the endpoints, say those of one zone.
type locality struct {
	zone string
	// weight, at least 1: gRPC leaves out localities that have none.
	weight uint32
	// priority, 0 for those that are to be used while they can be. Without gaps.
	priority  uint32
	endpoints []endpoint
}

// An endpoint is one server.
type endpoint struct {
	addr string
	// weight among those of its locality; 0 is 1.
	weight uint32
}

func newAssignment(localities []locality) (*endpointpb.ClusterLoadAssignment, error) {
	a := &endpointpb.ClusterLoadAssignment{ClusterName: service}
	for _, l := range localities {
		group := &endpointpb.LocalityLbEndpoints{
			Locality:            &corepb.Locality{Zone: l.zone},
			LoadBalancingWeight: wrapperspb.UInt32(l.weight),
			Priority:            l.priority,
		}
		for _, e := range l.endpoints {
			host, port, err := net.SplitHostPort(e.addr)
			if err != nil {
				return nil, err
			}
			number, err := strconv.ParseUint(port, 10, 16)
			if err != nil {
				return nil, err
			}
			group.LbEndpoints = append(group.LbEndpoints, &endpointpb.LbEndpoint{
				HostIdentifier: &endpointpb.LbEndpoint_Endpoint{Endpoint: &endpointpb.Endpoint{
					Address: &corepb.Address{Address: &corepb.Address_SocketAddress{SocketAddress: &corepb.SocketAddress{
						Address:       host,
						PortSpecifier: &corepb.SocketAddress_PortValue{PortValue: uint32(number)},
					}}},
				}},
				LoadBalancingWeight: wrapperspb.UInt32(max(1, e.weight)),
			})
		}
		a.Endpoints = append(a.Endpoints, group)
	}
	return a, nil
}

// newListener leads from the name that clients dial to the route.
func newListener() (*listenerpb.Listener, error) {
	router, err := anypb.New(&routerpb.Router{})
	if err != nil {
		return nil, err
	}
	manager, err := anypb.New(&managerpb.HttpConnectionManager{
		RouteSpecifier: &managerpb.HttpConnectionManager_Rds{Rds: &managerpb.Rds{
			ConfigSource:    viaADS,
			RouteConfigName: service,
		}},
		HttpFilters: []*managerpb.HttpFilter{{
			Name:       "router",
			ConfigType: &managerpb.HttpFilter_TypedConfig{TypedConfig: router},
		}},
	})
	if err != nil {
		return nil, err
	}
	return &listenerpb.Listener{Name: service, ApiListener: &listenerpb.ApiListener{ApiListener: manager}}, nil
}

// newRoute leads every call to the cluster.
func newRoute() *routepb.RouteConfiguration {
	return &routepb.RouteConfiguration{
		Name: service,
		VirtualHosts: []*routepb.VirtualHost{{
			Name:    service,
			Domains: []string{service},
			Routes: []*routepb.Route{{
				Match: &routepb.RouteMatch{PathSpecifier: &routepb.RouteMatch_Prefix{Prefix: "/"}},
				Action: &routepb.Route_Route{Route: &routepb.RouteAction{
					ClusterSpecifier: &routepb.RouteAction_Cluster{Cluster: service},
				}},
			}},
		}},
	}
}
