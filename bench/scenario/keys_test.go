package scenario

import (
	"math"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// Keys have the shares that the law says: an integral, here summed up in small steps.
func TestKeyShares(t *testing.T) {
	for _, k := range []Keys{
		{Count: 1000, Exponent: 1, Hot: 0.3},
		{Count: 1000, Exponent: 1 + 1e-9},
		{Count: 50, Exponent: 0},
		{Count: 50, Exponent: 0.5, Hot: 0.9},
		{Count: 50, Exponent: 1.2},
		{Count: 1, Exponent: 2},
		{Count: 3, Exponent: 1},
		{Count: 100, Exponent: 10},
	} {
		s := &Scenario{Keys: &k}
		const n = 100_000
		counts := map[string]float64{}
		for id := range uint64(n) {
			counts[s.Key(1, id)]++
		}
		mass := make([]float64, k.Count)
		var sum float64
		for i := range mass {
			const steps = 200
			for j := range steps {
				mass[i] += math.Pow(float64(i+1)+(float64(j)+0.5)/steps, -k.Exponent) / steps
			}
			sum += mass[i]
		}
		check := func(key string, want float64) {
			if got := counts[key] / n; math.Abs(got-want) > 5*math.Sqrt(want*(1-want)/n)+1e-4 {
				t.Errorf("%+v: a share of %.4f for %s, want %.4f", k, got, key, want)
			}
			delete(counts, key)
		}
		check(HotKey, k.Hot)
		for i, m := range mass {
			check("key-"+strconv.Itoa(i), (1-k.Hot)*m/sum)
		}
		if len(counts) > 0 {
			t.Errorf("%+v: keys %v, want none", k, counts)
		}
	}
}

// Whatever the law, a key is one of Count, and depends on seed and call alone.
func TestKeyBounds(t *testing.T) {
	if key := new(Scenario).Key(1, 2); key != "" {
		t.Errorf("key %q in a scenario without keys", key)
	}
	rapid.Check(t, func(t *rapid.T) {
		k := &Keys{
			Count:    rapid.IntRange(1, maxKeys).Draw(t, "count"),
			Exponent: rapid.Float64Range(0, maxExponent).Draw(t, "exponent"),
		}
		u := rapid.Float64Range(0, 1).Draw(t, "u")
		if rank := k.rank(u); rank < 0 || rank >= k.Count {
			t.Errorf("rank %d of %d", rank, k.Count)
		}
		if u < 1 && k.rank(u) > k.rank(math.Nextafter(u+1e-3, 2)) {
			t.Errorf("rank %d at %v, less a little later", k.rank(u), u)
		}
		s := &Scenario{Keys: k}
		seed, id := rapid.Uint64().Draw(t, "seed"), rapid.Uint64().Draw(t, "id")
		if a, b := s.Key(seed, id), s.Key(seed, id); a != b || !strings.HasPrefix(a, "key-") {
			t.Errorf("keys %q and %q of one call", a, b)
		}
	})
}
