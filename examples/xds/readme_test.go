package main

import (
	"os"
	"regexp"
	"testing"

	clusterpb "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	roundrobinpb "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/round_robin/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/testing/protocmp"
	"sigs.k8s.io/yaml"
)

// The clusters of the README are those that this example makes.
func TestREADME(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	s := &stage{T: t}
	fallback, err := extension("envoy.load_balancing_policies.round_robin", &roundrobinpb.RoundRobin{})
	if err != nil {
		t.Fatal(err)
	}
	p2c := s.policy("bobtail_p2c", `{"decayTime": "5s"}`)
	want := []*clusterpb.Cluster{
		newCluster(p2c, fallback),
		newCluster(s.policy("bobtail_rendezvous", `{"header": "x-user-id", "eps": 1}`)),
		newCluster(s.below(p2c)),
	}
	blocks := regexp.MustCompile("(?s)```(?:yaml|json)\n(.*?)```").FindAllSubmatch(text, -1)
	if len(blocks) != len(want) {
		t.Fatalf("%d clusters, want %d", len(blocks), len(want))
	}
	for i, block := range blocks {
		js, err := yaml.YAMLToJSON(block[1]) // JSON is YAML
		if err != nil {
			t.Errorf("cluster %d: %v", i, err)
			continue
		}
		got := new(clusterpb.Cluster)
		if err := protojson.Unmarshal(js, got); err != nil {
			t.Errorf("cluster %d: %v", i, err)
			continue
		}
		if diff := cmp.Diff(want[i], got, protocmp.Transform()); diff != "" {
			t.Errorf("cluster %d (-want +got):\n%s", i, diff)
		}
	}
}
