package main

import (
	"embed"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	_ "google.golang.org/grpc/balancer/leastrequest" // least_request_experimental

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/bench/fleet"
)

// A policy is a name in the table, the dial options that make it so, and what its servers
// have for it. Its state
// (budgets, breakers, what it has learned) lives in the options: clients that are to
// share none look it up each for itself.
type policy struct {
	name   string
	opts   []grpc.DialOption
	server fleet.Server // what its servers must have
	remake options      // opts anew, of a client of bobtail's that has more options
}

// options makes a policy's dial options. What is given is for bobtail's client, if it has one.
type options func(...bobtail.Option) ([]grpc.DialOption, error)

type builtinPolicy struct {
	name, shows string
	options     options
}

// builtin lists the policies that need no file, the yardstick first.
var builtin = []builtinPolicy{
	{"none", "grpc's own round_robin and nothing else: the yardstick", serviceConfig(noneConfig)},
	{"round_robin", "the same by its own name", serviceConfig(noneConfig)},
	{"least_request", "grpc's own: the backend with the fewest calls in flight of 5 drawn at random", serviceConfig(leastRequest(5))},
	{"least_request_2", "the same, of 2, which is grpc's default", serviceConfig(leastRequest(2))},
	{"weighted_round_robin", "grpc's own: in turns, by what each backend reports with its answers, from 1 s on (by default 10 s)", serviceConfig(weightedConfig)},
	{"p2c", "bobtail's balancer alone: the faster of two backends drawn at random", embedded("p2c")},
	{"prequal", "bobtail's balancer by probes: the fastest of those with few calls in flight", embedded("prequal")},
	{"rendezvous", "bobtail's balancer by keys: calls of one key go to one backend, while it has room", embedded("rendezvous")},
	{"hedge-10ms", "a second attempt elsewhere once 10 ms have passed, for at most 5% of calls", embedded("hedge-10ms")},
	{"hedge", "the same, after the time that 95% of calls need, as measured while running", embedded("hedge")},
	{"retry", "p2c, and up to 4 attempts of what is UNAVAILABLE, within 5% of extra load in any second", embedded("retry")},
	{"retry-naive", "up to 4 attempts by grpc's own retry over round_robin, with nothing that bounds the load", serviceConfig(naiveConfig)},
	{"breaker", "p2c, and a circuit breaker: calls fail here while half of them fail there", embedded("breaker")},
	{"full", "what bobtail does by default", full},
	{"shed", "none+shed: bobtail's default server, under a client that does nothing", serviceConfig(noneConfig)},
	{"static", "none+static: a server that refuses what is more than 32 calls at once", serviceConfig(noneConfig)},
	{"shed+client", "full+shed: both sides of bobtail, each by its default", full},
	{"tied", "hedging with tied requests: a copy that still waits is cancelled when the other begins", embedded("tied")},
}

func full(opts ...bobtail.Option) ([]grpc.DialOption, error) {
	return install(bobtail.DefaultPolicy(), opts)
}

// servers lists what can stand after the "+" of a policy, beside server policy documents.
var servers = []struct{ name, shows string }{
	{"shed", "bobtail's default server policy"},
	{"static", "no more than 32 calls at once (four times the workers of the scenario overload), without a queue"},
	{"fifo", "one call at once, and a queue for all others: for a server of one worker"},
}

// needs lists the policies that depend on a balancer that may not be linked, or on what
// servers have.
var needs = map[string]struct {
	balancer string // "": any
	server   fleet.Server
}{
	"weighted_round_robin": {"weighted_round_robin", fleet.Server{ORCA: true}},
	"prequal":              {"bobtail_prequal", fleet.Server{Probes: true}},
	"shed":                 {"", fleet.Server{Policy: fleet.DefaultPolicy}},
	"static":               {"", fleet.Server{Policy: policyText("server/static")}},
	"shed+client":          {"", fleet.Server{Policy: fleet.DefaultPolicy}},
}

// A policy whose balancer is not linked is none.
func init() {
	builtin = slices.DeleteFunc(builtin, func(p builtinPolicy) bool {
		n := needs[p.name]
		return n.balancer != "" && balancer.Get(n.balancer) == nil
	})
}

const noneConfig = `{"loadBalancingConfig":[{"round_robin":{}}]}`

func leastRequest(choices int) string {
	return fmt.Sprintf(`{"loadBalancingConfig":[{"least_request_experimental":{"choiceCount":%d}}]}`, choices)
}

// weightedConfig has grpc's defaults but for the blackout, of 10 s, in which a backend's
// first reports are not used yet: that is longer than some runs, and than any warm-up.
const weightedConfig = `{"loadBalancingConfig":[{"weighted_round_robin":{"blackoutPeriod":"1s"}}]}`

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

//go:embed policies
var documents embed.FS

// policyText is policies/<name>.json.
func policyText(name string) string {
	doc, err := documents.ReadFile("policies/" + name + ".json")
	if err != nil {
		panic(err) // embedded: cannot fail
	}
	return string(doc)
}

// findPolicy looks a policy up: a name of builtin, or a policy document *.json, which then
// goes by its file's name. After a "+" may stand what its servers are to have: a name of
// servers, or a server policy document *.json.
func findPolicy(name string) (policy, error) {
	if p, ok, err := findBuiltin(name); ok {
		return p, err
	}
	if base, isFile := strings.CutSuffix(filepath.Base(name), ".json"); isFile {
		doc, err := os.ReadFile(name)
		if err == nil {
			return newPolicy(base, parsed(doc))
		}
		if !strings.Contains(name, "+") { // which a path may have in it
			return policy{}, err
		}
	}
	if client, server, both := cutServer(name); both {
		p, err := findPolicy(client)
		if err != nil {
			return policy{}, err
		}
		if p.server.Policy != "" {
			return policy{}, fmt.Errorf("policy %s: %s has a server policy already, want a policy of clients before the +", name, client)
		}
		label, doc, err := findServer(server)
		if err != nil {
			return policy{}, err
		}
		p.name += "+" + label
		p.server.Policy = doc
		return p, nil
	}
	return policy{}, fmt.Errorf("no policy %q, want one of %s, or a policy document *.json", name, strings.Join(policyNames(), ", "))
}

// cutServer cuts "client+server". The "+" of a path is none of its own.
func cutServer(name string) (client, server string, ok bool) {
	if client, server, ok = strings.Cut(name, ".json+"); ok {
		return client + ".json", server, true
	}
	return strings.Cut(name, "+")
}

func findBuiltin(name string) (p policy, ok bool, err error) {
	for _, b := range builtin {
		if b.name == name {
			p, err = newPolicy(name, b.options)
			p.server = needs[name].server
			return p, true, err
		}
	}
	return p, false, nil
}

// findServer returns the name in the table of a server policy, and its document.
func findServer(name string) (label, doc string, err error) {
	if name == "shed" {
		return name, fleet.DefaultPolicy, nil
	}
	var names []string
	for _, s := range servers {
		if s.name == name {
			return name, policyText("server/" + name), nil
		}
		names = append(names, s.name)
	}
	label, isFile := strings.CutSuffix(filepath.Base(name), ".json")
	if !isFile {
		return "", "", fmt.Errorf("no server policy %q, want one of %s, or a server policy document *.json", name, strings.Join(names, ", "))
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return "", "", err
	}
	if err := fleet.CheckPolicy(string(text)); err != nil {
		return "", "", fmt.Errorf("server policy %s: %w", label, err)
	}
	return label, string(text), nil
}

func newPolicy(name string, o options) (policy, error) {
	opts, err := o()
	if err != nil {
		return policy{}, fmt.Errorf("policy %s: %w", name, err)
	}
	return policy{name: name, opts: opts, remake: o}, nil
}

// serviceConfig is grpc alone.
func serviceConfig(config string) options {
	return func(...bobtail.Option) ([]grpc.DialOption, error) {
		return []grpc.DialOption{grpc.WithDefaultServiceConfig(config)}, nil
	}
}

// embedded is the document policies/<name>.json.
func embedded(name string) options {
	return func(opts ...bobtail.Option) ([]grpc.DialOption, error) {
		return parsed([]byte(policyText(name)))(opts...)
	}
}

// parsed is a policy document.
func parsed(doc []byte) options {
	return func(opts ...bobtail.Option) ([]grpc.DialOption, error) {
		p, err := bobtail.ParsePolicy(doc)
		if err != nil {
			return nil, err
		}
		return install(p, opts)
	}
}

// install installs a policy as any user of the library would.
func install(p bobtail.Policy, opts []bobtail.Option) ([]grpc.DialOption, error) {
	c, err := bobtail.NewClient(p, append(slices.Clone(opts), bobtail.WithLogger(nil))...)
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
