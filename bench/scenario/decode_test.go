package scenario

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestNamed(t *testing.T) {
	names := Names()
	if names[0] != Default || len(names) != 4 {
		t.Errorf("scenarios %v, want four, %s first", names, Default)
	}
	for _, name := range names {
		s, err := Named(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if s.Name != name || s.Description == "" || len(s.Policies) == 0 || s.Policies[0] != "none" {
			t.Errorf("%s: name %q, description %q, policies %v", name, s.Name, s.Description, s.Policies)
		}
	}
	if _, err := Named("nonesuch"); err == nil || !strings.Contains(err.Error(), "stragglers") {
		t.Errorf("Named(nonesuch) = %v, want an error that lists the names", err)
	}
}

// Every fault is reported, each where it stands.
func TestDecodeFaults(t *testing.T) {
	valid := func(more string) string {
		return `{"name":"x","backends":2,"rate":10,"requests":5,"serviceTime":[{"constant":{"value":"1ms"}}]` + more + `}`
	}
	if _, err := Decode([]byte(valid(""))); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		doc  string
		want []string
	}{
		{``, []string{"not JSON"}},
		{`{`, []string{"not JSON"}},
		{valid("") + `{}`, []string{"something follows"}},
		{strings.Repeat("[", 100), []string{"nested"}},
		{`[]`, []string{"$: an array, want an object"}},
		{`{}`, []string{"$.name: missing", "$.backends: missing", "$.rate: missing", "$.requests: missing", "$.serviceTime: missing"}},
		{valid(`,"rat":1,"fanuot":2`), []string{"$.rat: unknown key", "$.fanuot: unknown key"}},
		{valid(`,"rate":20`), []string{"$.rate: given twice"}},
		{valid(`,"fanout":0`), []string{"$.fanout: 0, want 1 to 1000"}},
		{valid(`,"fanout":1.5`), []string{"$.fanout: 1.5, want a whole number"}},
		{valid(`,"fanout":"1"`), []string{"$.fanout: a string, want a number"}},
		{valid(`,"timeout":5`), []string{"$.timeout: a number, want a duration"}},
		{valid(`,"timeout":"5 parsecs"`), []string{`$.timeout: "5 parsecs"`}},
		{valid(`,"timeout":"0s"`), []string{`$.timeout: "0s", want a duration from 1ms to 1h`}},
		{valid(`,"arrivals":"bursts"`), []string{`$.arrivals: "bursts"`}},
		{valid(`,"policies":[1]`), []string{"$.policies[0]: a number, want a string"}},
		{valid(`,"slow":[{"backend":2,"factor":-1}]`), []string{"$.slow[0].backend: 2, want 0 to 1", "$.slow[0].factor: -1, want 0 to 1000"}},
		{valid(`,"slow":{}`), []string{"$.slow: an object, want an array"}},
		{valid(`,"stragglers":{"probability":1.1,"ad":"1ms"}`), []string{
			"$.stragglers.probability: 1.1", "$.stragglers.ad: unknown key, want one of probability, add", "$.stragglers.add: missing"}},
		{valid(`,"stalls":{"meanInterval":"1s","min":"3s","max":"2s","backends":[7]}`), []string{
			"$.stalls.min: 3s, want at most max, 2s", "$.stalls.max: 2s, want at most half of meanInterval, 500ms", "$.stalls.backends[0]: 7"}},
		{`{"name":"x","backends":1,"rate":1,"requests":1,"serviceTime":[{},{"weight":0,"constant":{"value":"1ms"}},{"lognormal":{"median":"2ms"},"exponential":{"mean":"-1s"}}]}`,
			[]string{"$.serviceTime[0]: 0 distributions", "$.serviceTime[1].weight: 0", "$.serviceTime[2].lognormal.sigma: missing",
				"$.serviceTime[2].exponential.mean", "$.serviceTime[2]: 2 distributions"}},
	} {
		_, err := Decode([]byte(c.doc))
		if err == nil {
			t.Errorf("%.80s: no error, want %q", c.doc, c.want)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%.80s: %v, want %q in it", c.doc, err, want)
			}
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, name := range Names() {
		doc, err := embedded.ReadFile("scenarios/" + name + ".json")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(doc)
	}
	doc, err := os.ReadFile("testdata/stalls.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(doc)
	f.Fuzz(func(t *testing.T, doc []byte) {
		s, err := Decode(doc)
		if err != nil {
			return
		}
		// What was accepted can be used,
		if d := s.Service(1, 2, 3, s.Backends-1, 4); d < 0 {
			t.Errorf("service time %v", d)
		}
		// and written and read again: this is how it reaches the backends.
		again, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		s2, err := Decode(again)
		if err != nil {
			t.Fatalf("%v, of %s", err, again)
		}
		if diff := cmp.Diff(s, s2); diff != "" {
			t.Errorf("read, written and read (-first +second):\n%s", diff)
		}
	})
}
