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

// A policy is a name in the table and the dial options that make it so. Its state
// (budgets, breakers, what it has learned) lives in the options: clients that are to
// share none look it up each for itself.
type policy struct {
	name string
	opts []grpc.DialOption
}

// options makes a policy's dial options.
type options func() ([]grpc.DialOption, error)

// builtin lists the policies that need no file, the yardstick first.
var builtin = []struct {
	name, shows string
	options     options
}{
	{"none", "grpc's own round_robin and nothing else: the yardstick", serviceConfig(noneConfig)},
	{"p2c", "bobtail's balancer alone: the faster of two backends drawn at random", embedded("p2c")},
	{"hedge-10ms", "a second attempt elsewhere once 10 ms have passed, for at most 5% of calls", embedded("hedge-10ms")},
	{"hedge", "the same, after the time that 95% of calls need, as measured while running", embedded("hedge")},
	{"retry", "p2c, and up to 4 attempts of what is UNAVAILABLE, within 5% of extra load in any second", embedded("retry")},
	{"retry-naive", "up to 4 attempts by grpc's own retry over round_robin, with nothing that bounds the load", serviceConfig(naiveConfig)},
	{"breaker", "p2c, and a circuit breaker: calls fail here while half of them fail there", embedded("breaker")},
	{"full", "what bobtail does by default", func() ([]grpc.DialOption, error) { return install(bobtail.DefaultPolicy()) }},
}

const noneConfig = `{"loadBalancingConfig":[{"round_robin":{}}]}`

// naiveConfig has the policy of policies/retry.json in grpc-go's own hands: its jitter is
// another (x U(0.8, 1.2) instead of full), and without retryThrottling nothing bounds it.
const naiveConfig = `{
  "loadBalancingConfig": [{"round_robin": {}}],
  "methodConfig": [{
    "name": [{"service": "kv.KV", "method": "Get"}],
    "retryPolicy": {
      "maxAttempts": 4, "initialBackoff": "0.05s", "maxBackoff": "2s", "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE"]
    }
  }]
}`

//go:embed policies/*.json
var documents embed.FS

// findPolicy looks a policy up: a name of builtin, or a policy document *.json,
// which then goes by its file's name.
func findPolicy(name string) (policy, error) {
	if base, isFile := strings.CutSuffix(filepath.Base(name), ".json"); isFile {
		doc, err := os.ReadFile(name)
		if err != nil {
			return policy{}, err
		}
		return newPolicy(base, parsed(doc))
	}
	for _, p := range builtin {
		if p.name == name {
			return newPolicy(name, p.options)
		}
	}
	return policy{}, fmt.Errorf("no policy %q, want one of %s, or a policy document *.json", name, strings.Join(policyNames(), ", "))
}

func newPolicy(name string, o options) (policy, error) {
	opts, err := o()
	if err != nil {
		return policy{}, fmt.Errorf("policy %s: %w", name, err)
	}
	return policy{name, opts}, nil
}

// serviceConfig is grpc alone.
func serviceConfig(config string) options {
	return func() ([]grpc.DialOption, error) {
		return []grpc.DialOption{grpc.WithDefaultServiceConfig(config)}, nil
	}
}

// embedded is the document policies/<name>.json.
func embedded(name string) options {
	return func() ([]grpc.DialOption, error) {
		doc, err := documents.ReadFile("policies/" + name + ".json")
		if err != nil {
			return nil, err
		}
		return parsed(doc)()
	}
}

// parsed is a policy document.
func parsed(doc []byte) options {
	return func() ([]grpc.DialOption, error) {
		p, err := bobtail.ParsePolicy(doc)
		if err != nil {
			return nil, err
		}
		return install(p)
	}
}

// install installs a policy as any user of the library would.
func install(p bobtail.Policy) ([]grpc.DialOption, error) {
	c, err := bobtail.NewClient(p, bobtail.WithLogger(nil))
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
