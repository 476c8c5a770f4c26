package main

import (
	"slices"
	"testing"

	"google.golang.org/grpc/balancer"

	"github.com/bobtail-rpc/bobtail/bench/fleet"
)

// A policy is listed if its balancer is linked, and knows what its servers must report.
func TestNeeds(t *testing.T) {
	for name, n := range needs {
		linked := balancer.Get(n.balancer) != nil
		if listed := slices.Contains(policyNames(), name); listed != linked {
			t.Errorf("%s: listed %v, its balancer linked %v", name, listed, linked)
		}
		p, err := findPolicy(name)
		if linked && (err != nil || p.reports != n.reports || p.reports == fleet.Reports{}) {
			t.Errorf("%s: reports %+v, %v, want %+v", name, p.reports, err, n.reports)
		}
		if !linked && err == nil {
			t.Errorf("%s: no error, want that there is no such policy", name)
		}
	}
}

// In turns all share one fleet, which reports what any of them needs; side by side each
// has a fleet of its own, which reports what it alone needs.
func TestReportsOf(t *testing.T) {
	policies := []policy{{name: "a"}, {name: "b", reports: fleet.Reports{ORCA: true}}, {name: "c", reports: fleet.Reports{Probes: true}}}
	for _, c := range []struct {
		sideBySide bool
		want       []fleet.Reports
	}{
		{false, []fleet.Reports{{ORCA: true, Probes: true}}},
		{true, []fleet.Reports{{}, {ORCA: true}, {Probes: true}}},
	} {
		if got := reportsOf(policies, c.sideBySide); !slices.Equal(got, c.want) {
			t.Errorf("side by side %v: %+v, want %+v", c.sideBySide, got, c.want)
		}
	}
}
