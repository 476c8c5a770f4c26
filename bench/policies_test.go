package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/balancer"

	"github.com/bobtail-rpc/bobtail/bench/fleet"
)

// A policy is listed if its balancer is linked, and knows what its servers must report.
func TestNeeds(t *testing.T) {
	for name, n := range needs {
		linked := n.balancer == "" || balancer.Get(n.balancer) != nil
		if listed := slices.Contains(policyNames(), name); listed != linked {
			t.Errorf("%s: listed %v, its balancer linked %v", name, listed, linked)
		}
		p, err := findPolicy(name)
		if linked && (err != nil || p.server != n.server || p.server == fleet.Server{}) {
			t.Errorf("%s: server %+v, %v, want %+v", name, p.server, err, n.server)
		}
		if !linked && err == nil {
			t.Errorf("%s: no error, want that there is no such policy", name)
		}
	}
}

// In turns all share one fleet, which reports what any of them needs; side by side each
// has a fleet of its own, which reports what it alone needs.
func TestServersOf(t *testing.T) {
	policies := []policy{{name: "a"}, {name: "b", server: fleet.Server{ORCA: true}}, {name: "c", server: fleet.Server{Probes: true}}}
	for _, c := range []struct {
		sideBySide bool
		want       []fleet.Server
	}{
		{false, []fleet.Server{{ORCA: true, Probes: true}}},
		{true, []fleet.Server{{}, {ORCA: true}, {Probes: true}}},
	} {
		if got := serversOf(policies, c.sideBySide); !slices.Equal(got, c.want) {
			t.Errorf("side by side %v: %+v, want %+v", c.sideBySide, got, c.want)
		}
	}
}

// After the "+" stands what the servers are to have.
func TestServerPolicies(t *testing.T) {
	dir := t.TempDir()
	write := func(name, doc string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(doc), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const limit = `{"limiter":{"algorithm":"static","limit":3}}`
	mine, client := write("mine.json", limit), write("c++.json", noneConfig)
	bad := write("bad.json", `{"limiter":{"algorithm":"none"}}`)
	for _, c := range []struct{ name, label, server string }{
		{"shed", "shed", fleet.DefaultPolicy},
		{"shed+client", "shed+client", fleet.DefaultPolicy},
		{"retry+shed", "retry+shed", fleet.DefaultPolicy},
		{"static", "static", policyText("server/static")},
		{"none+static", "none+static", policyText("server/static")},
		{"none+" + mine, "none+mine", limit},
		{client, "c++", ""},
		{client + "+" + mine, "c+++mine", limit},
	} {
		p, err := findPolicy(c.name)
		if err != nil || p.name != c.label || p.server.Policy != c.server || len(p.opts) == 0 {
			t.Errorf("%s: %q with server policy %q, %v, want %q with %q", c.name, p.name, p.server.Policy, err, c.label, c.server)
		}
	}
	if p, err := findPolicy("prequal+shed"); err != nil || !p.server.Probes || p.server.Policy == "" {
		t.Errorf("prequal+shed: %+v, %v, want probes and a policy", p.server, err)
	}
	for name, want := range map[string]string{
		"none+nonesuch":      `no server policy "nonesuch", want one of shed, static, fifo, or a server policy document *.json`,
		"none+nonesuch.json": "nonesuch.json",
		"nonesuch+shed":      `no policy "nonesuch"`,
		"none+" + bad:        "server policy bad: ",
		"shed+shed":          "shed has a server policy already",
	} {
		if _, err := findPolicy(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	for _, s := range servers {
		_, doc, err := findServer(s.name)
		if err != nil {
			t.Error(err)
		} else if err := fleet.CheckPolicy(doc); err != nil {
			t.Errorf("%s: %v", s.name, err)
		}
	}
}
