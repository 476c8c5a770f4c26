package report

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// What is kept does not depend on the order in which requests end, and is what sorting all
// of them gives.
func TestSlowest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var all []Traced
		for i, ms := range rapid.SliceOfN(rapid.IntRange(0, 9), 0, 30).Draw(t, "ms") { // many are equal
			all = append(all, Traced{Ms: float64(ms), Request: uint64(i)})
		}
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "order"), 0))
		rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		var s Slowest
		for _, one := range all {
			s.Add(one)
		}
		slices.SortFunc(all, func(a, b Traced) int {
			if a.Ms != b.Ms {
				return int(b.Ms - a.Ms)
			}
			return int(a.Request) - int(b.Request)
		})
		if diff := cmp.Diff(all[:min(len(all), 5)], s.List()); len(all) > 0 && diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
	})
}

// Everything traced, and nothing of it delivered.
func TestNoneDelivered(t *testing.T) {
	r := &Report{Scenario: named(t, "stragglers"), TraceRatio: 1, Policies: []Policy{{Name: "none"}}}
	var out bytes.Buffer
	if err := r.Table(&out); err != nil {
		t.Fatal(err)
	}
	if want := "traced, each one\nnone has reached the receiver\n"; !strings.Contains(out.String(), want) {
		t.Errorf("no %q in\n%s", want, out.String())
	}
}
