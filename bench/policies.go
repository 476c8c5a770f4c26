package main

import (
	"embed"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail"
)

// A policy is a name in the table and the dial options that make it so.
type policy struct {
	name string
	opts []grpc.DialOption
}

// builtin lists the policies that need no file, the yardstick first.
var builtin = []struct{ name, shows string }{
	{"none", "grpc's own round_robin and nothing else: the yardstick"},
	{"p2c", "bobtail's balancer alone: the faster of two backends drawn at random"},
	{"hedge-10ms", "a second attempt elsewhere once 10 ms have passed, for at most 5% of calls"},
	{"hedge", "the same, after the time that 95% of calls need, as measured while running"},
}

//go:embed policies/*.json
var documents embed.FS

// findPolicy looks a policy up: a name of builtin, or a policy document *.json,
// which then goes by its file's name.
func findPolicy(name string) (policy, error) {
	var doc []byte
	var err error
	switch base, isFile := strings.CutSuffix(filepath.Base(name), ".json"); {
	case isFile:
		doc, err = os.ReadFile(name)
		name = base
	case name == "none":
		return policy{name, []grpc.DialOption{
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`),
		}}, nil
	default:
		if !known(name) {
			return policy{}, fmt.Errorf("no policy %q, want one of %s, or a policy document *.json", name, strings.Join(policyNames(), ", "))
		}
		doc, err = documents.ReadFile("policies/" + name + ".json")
	}
	if err != nil {
		return policy{}, err
	}
	opts, err := dialOptions(doc)
	if err != nil {
		return policy{}, fmt.Errorf("policy %s: %w", name, err)
	}
	return policy{name, opts}, nil
}

// dialOptions installs a policy document as any user of the library would.
func dialOptions(doc []byte) ([]grpc.DialOption, error) {
	p, err := bobtail.ParsePolicy(doc)
	if err != nil {
		return nil, err
	}
	c, err := bobtail.NewClient(p)
	if err != nil {
		return nil, err
	}
	return c.DialOptions(), nil
}

func policyNames() []string {
	var names []string
	for _, p := range builtin {
		names = append(names, p.name)
	}
	return names
}

func known(name string) bool {
	for _, p := range builtin {
		if p.name == name {
			return true
		}
	}
	return false
}
