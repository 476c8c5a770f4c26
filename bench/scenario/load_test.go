package scenario

import (
	"math"
	"testing"
)

// What all workers can do is their number by the mean of their work.
func TestCapacity(t *testing.T) {
	constant := func(d string) string { return `"serviceTime":[{"constant":{"value":"` + d + `"}}]` }
	for _, c := range []struct {
		doc  string
		want float64
	}{
		{`"backends":1,"workers":8,` + constant("10ms"), 800},
		{`"backends":3,"workers":8,"fanout":2,` + constant("10ms"), 1200},
		{`"backends":2,"workers":1,"slow":[{"backend":1,"factor":4}],` + constant("10ms"), 125},
		{`"backends":1,"workers":1,"stragglers":{"probability":0.1,"add":"100ms"},` + constant("10ms"), 50},
		{`"backends":1,"workers":1,"serviceTime":[{"weight":9,"shift":"1ms","exponential":{"mean":"1ms"}},{"weight":1,"constant":{"value":"22ms"}}]`, 250},
		{`"backends":1,"workers":1,"serviceTime":[{"lognormal":{"median":"10ms","sigma":1}}]`, 100 * math.Exp(-0.5)},
		// Without bound: 0 says so.
		{`"backends":1,` + constant("10ms"), 0},
		{`"backends":1,"workers":1,` + constant("0s"), 0},
		{`"backends":2,"workers":1,"slow":[{"backend":1,"factor":0}],` + constant("1ms"), 0},
	} {
		sc, err := Decode([]byte(`{"name":"x","rate":1,"requests":1,"sideBySide":true,` + c.doc + `}`))
		if err != nil {
			t.Fatal(err)
		}
		if got := sc.Capacity(); math.Abs(got-c.want) > 1e-9*c.want {
			t.Errorf("%s: capacity %v, want %v", c.doc, got, c.want)
		}
	}
}

// Classes have the shares of their weights, and are independent of the service times.
func TestClass(t *testing.T) {
	if c := (&Scenario{}).Class(1, 2); c != "" {
		t.Errorf("class %q of a scenario without", c)
	}
	s := &Scenario{Criticality: map[string]float64{"critical_plus": 1, "critical": 2, "sheddable_plus": 0, "sheddable": 5}}
	const n = 100_000
	counts := map[string]float64{}
	for id := range uint64(n) {
		counts[s.Class(1, id)]++
	}
	for class, weight := range s.Criticality {
		if want := weight / 8; math.Abs(counts[class]/n-want) > 5*math.Sqrt(want*(1-want)/n) {
			t.Errorf("%s: a share of %v, want %v", class, counts[class]/n, want)
		}
	}
	if len(counts) != 3 {
		t.Errorf("classes %v, want the three that have a weight", counts)
	}
	var same int
	for id := range uint64(1000) {
		if s.Class(1, id) == s.Class(2, id) {
			same++
		}
	}
	if same > 600 {
		t.Errorf("%d of 1000 classes are the same with another seed, want about 470", same)
	}
}

// Work that is the call's is the same for all its attempts; other work is drawn anew.
func TestSameWork(t *testing.T) {
	s := &Scenario{Backends: 2, ServiceTime: []Component{{Weight: 1, Exponential: &Exponential{Mean: at(sec)}}}}
	for _, same := range []bool{true, false} {
		s.SameWork = same
		if got := s.Work(1, 5, 0, 0, 0) == s.Work(1, 5, 1, 1, 0); got != same {
			t.Errorf("sameWork %v: the second attempt takes as long as the first: %v", same, got)
		}
	}
}
