package scenario

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
)

func TestNamed(t *testing.T) {
	names := Names()
	if names[0] != Default || len(names) != 15 {
		t.Errorf("scenarios %v, want 15, %s first", names, Default)
	}
	for _, name := range names {
		s, err := Named(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if s.Name != name || s.Description == "" || len(s.Policies) == 0 || !strings.HasPrefix(s.Policies[0], "none") {
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
		{``, []string{"document: not valid JSON at byte 0: unexpected EOF"}},
		{`{`, []string{"document: not valid JSON at byte 1: unexpected EOF"}},
		{valid("") + `{}`, []string{fmt.Sprintf("document: not valid JSON at byte %d: more text after the end of the document", len(valid(""))+1)}},
		{strings.Repeat("[", 100), []string{"document: not valid JSON at byte 65: nested more than 64 deep"}},
		{`[]`, []string{"document: a list, want an object"}},
		{`{}`, []string{"name: missing", "backends: missing", "rate: missing", "requests: missing", "serviceTime: missing"}},
		{valid(`,"rat":1,"fanuot":2`), []string{`rat: unknown key, did you mean "rate"?`, `fanuot: unknown key, did you mean "fanout"?`}},
		{valid(`,"rate":20`), []string{"rate: given twice"}},
		{valid(`,"fanout":0`), []string{"fanout: 0, want 1 to 1000"}},
		{valid(`,"fanout":1.5`), []string{"fanout: 1.5, want a whole number"}},
		{valid(`,"fanout":"1"`), []string{`fanout: "1", want 1 to 1000`}},
		{valid(`,"timeout":5`), []string{"timeout: number 5, want a duration from 1ms to 1h"}},
		{valid(`,"timeout":"5 parsecs"`), []string{`timeout: "5 parsecs"`}},
		{valid(`,"timeout":"0s"`), []string{`timeout: "0s", want a duration from 1ms to 1h`}},
		{valid(`,"arrivals":"bursts"`), []string{`arrivals: "bursts"`}},
		{valid(`,"policies":[1]`), []string{"policies[0]: number 1, want a string"}},
		{valid(`,"slow":[{"backend":2,"factor":-1}]`), []string{"slow[0].backend: 2, want 0 to 1", "slow[0].factor: -1, want 0 to 1000"}},
		{valid(`,"slow":{}`), []string{"slow: an object, want a list"}},
		{valid(`,"stragglers":{"probability":1.1,"ad":"1ms"}`), []string{
			"stragglers.probability: 1.1", `stragglers.ad: unknown key, did you mean "add"?`, "stragglers.add: missing"}},
		{valid(`,"stalls":{"meanInterval":"1s","min":"3s","max":"2s","backends":[7]}`), []string{
			"stalls.min: 3s, want at most max, 2s", "stalls.max: 2s, want at most half of meanInterval, 500ms", "stalls.backends[0]: 7"}},
		{valid(`,"stalls":{"meanInterval":"1s","min":"1ms","max":"2ms","backends":[0.5]}`), []string{"stalls.backends[0]: 0.5, want a whole number"}},
		{`{"name":"x","backends":1,"rate":1,"requests":1,"serviceTime":[{},{"weight":0,"constant":{"value":"1ms"}},{"lognormal":{"median":"2ms"},"exponential":{"mean":"-1s"}}]}`,
			[]string{"serviceTime[0]: 0 distributions", "serviceTime[1].weight: 0", "serviceTime[2].lognormal.sigma: missing",
				"serviceTime[2].exponential.mean", "serviceTime[2]: 2 distributions"}},
	} {
		_, err := Decode([]byte(c.doc))
		if err == nil {
			t.Errorf("%.80s: no error, want %q", c.doc, c.want)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), "scenario: "+want) {
				t.Errorf("%.80s: %v, want %q in it", c.doc, err, want)
			}
		}
	}
}

// The faults of faults, word for word.
func TestDecodeFaultsOfFaults(t *testing.T) {
	doc := func(more string) string {
		return `{"name":"x","backends":2,"rate":10,"requests":5,"serviceTime":[{"constant":{"value":"1ms"}}],` + more + `}`
	}
	for _, c := range []struct{ doc, want string }{
		{`"faults":{}`, `faults: an object, want a list`},
		{`"faults":["error"]`, `faults[0]: "error", want an object`},
		{`"faults":[{}]`, `faults[0].kind: "", want "error", "blackhole", "stall", "slow" or "down"`},
		{`"faults":[{"kind":"fire"}]`, `faults[0].kind: "fire", want "error", "blackhole", "stall", "slow" or "down"`},
		{`"faults":[{"kind":"error","form":"1s"}]`, `faults[0].form: unknown key, did you mean "from"?`},
		{`"faults":[{"kind":"error","when":"1s"}]`, `faults[0].when: unknown key, want one of kind, from, for, every, backends, code, probability, factor, add`},
		{`"colour":1`, `colour: unknown key, want one of name, description, backends, fanout, rate, arrivals, requests, timeout, policies, serviceTime, stragglers, slow, stalls, criticality, keys, sideBySide, sameWork, workers, serveAbandoned, serverTimeout, loads, faults`},
		{`"faults":[{"kind":"fire","form":"1s"}]`, "faults[0].kind: \"fire\", want \"error\", \"blackhole\", \"stall\", \"slow\" or \"down\"\nfaults[0].form: unknown key, did you mean \"from\"?"},
		{`"timeout":null`, `timeout: null, want a value or no such key`},
		{`"sideBySide":true,"workers":null`, `workers: null, want a value or no such key`},
		{`"policies":[null]`, `policies[0]: null, want a string`},
		{`"faults":[{"kind":"error","from":"-1s"}]`, `faults[0].from: "-1s", want a duration from 0s to 1h0m0s`},
		{`"faults":[{"kind":"error","for":"0s"}]`, `faults[0].for: "0s", want a duration from 1ms to 1h0m0s`},
		{`"faults":[{"kind":"error","for":"1s","every":"1ms"}]`, "faults[0].every: \"1ms\", want a duration from 10ms to 1h0m0s\nfaults[0].every: 10ms, want at least from + for, 1s"},
		{`"faults":[{"kind":"error","every":"1s"}]`, `faults[0].every: 1s, want for with it: what comes back must have ended`},
		{`"faults":[{"kind":"error","from":"10s","for":"5s","every":"14s"}]`, `faults[0].every: 14s, want at least from + for, 15s`},
		{`"faults":[{"kind":"error","backends":[2,0.5]}]`, "faults[0].backends[0]: 2, want 0 to 1\nfaults[0].backends[1]: 0.5, want a whole number"},
		{`"faults":[{"kind":"error","code":"OK"}]`, `faults[0].code: "OK", want the name of a failure, such as "UNAVAILABLE"`},
		{`"faults":[{"kind":"error","code":"unavailable"}]`, `faults[0].code: "unavailable", want the name of a failure, such as "UNAVAILABLE"`},
		{`"faults":[{"kind":"error","probability":0}]`, `faults[0].probability: 0, want 1e-06 to 1`},
		{`"faults":[{"kind":"error","probability":1.1}]`, `faults[0].probability: 1.1, want 1e-06 to 1`},
		{`"faults":[{"kind":"blackhole","code":"INTERNAL","probability":1}]`, "faults[0].code: no key of kind \"blackhole\", only of \"error\"\nfaults[0].probability: no key of kind \"blackhole\", only of \"error\""},
		{`"faults":[{"kind":"error","factor":2,"add":"1s"}]`, "faults[0].factor: no key of kind \"error\", only of \"slow\"\nfaults[0].add: no key of kind \"error\", only of \"slow\""},
		{`"faults":[{"kind":"slow"}]`, `faults[0]: a slow fault that takes no longer, want factor or add`},
		{`"faults":[{"kind":"slow","factor":1001,"add":"-1s"}]`, "faults[0].factor: 1001, want 0 to 1000\nfaults[0].add: \"-1s\", want a duration from 0s to 1h0m0s"},
		{`"faults":[{"kind":"down"}]`, `faults[0].for: missing: what never comes back is no backend`},
		{`"faults":[{"kind":"stall"}]`, `faults[0].for: missing: what never serves is a blackhole`},
		{`"faults":[{"kind":"stall","for":"8s","every":"10s","backends":[1]}]`, `faults: backend 1 stands still for up to 80% of its time, want at most 75%`},
		// Each leaves time to work, all together need not.
		{`"faults":[{"kind":"stall","for":"5s","every":"10s"},{"kind":"stall","from":"5s","for":"5s","every":"10s"}]`, `faults: backend 0 stands still for up to 100% of its time, want at most 75%`},
		{`"stalls":{"meanInterval":"1s","min":"0s","max":"500ms"},"faults":[{"kind":"stall","for":"3s","every":"10s"}]`, `faults: backend 0 stands still for up to 80% of its time, want at most 75%`},

		{`"keys":[]`, `keys: a list, want an object`},
		{`"keys":{"count":0,"exponent":-1,"hot":2}`, "keys.count: 0, want 1 to 1e+09\nkeys.exponent: -1, want 0 to 10\nkeys.hot: 2, want 0 to 1"},
		{`"keys":{"cuont":9}`, "keys.count: missing\nkeys.cuont: unknown key, did you mean \"count\"?"},
		{`"sideBySide":true,"workers":1,"loads":[0,101,1,1]`, "loads[0]: 0, want 0.01 to 100\nloads[1]: 101, want 0.01 to 100\nloads[1]: 0.01, want more than the 0.01 before it\nloads[3]: 1, want more than the 1 before it"},
		{`"loads":[1,2]`, `loads: [1 2], want workers with it: where all are served at once, nothing is the capacity`},
		{`"criticality":[]`, `criticality: a list, want an object`},
		{`"criticality":{"criticle":1}`, "criticality: no class has a weight, want one of sheddable, sheddable_plus, critical, critical_plus\ncriticality.criticle: unknown key, did you mean \"critical\"?"},
		{`"criticality":{"critical":-1,"sheddable":1}`, `criticality.critical: -1, want 0 to 1e+09`},
		{`"criticality":{"critical":0}`, `criticality: no class has a weight, want one of sheddable, sheddable_plus, critical, critical_plus`},
		{`"sideBySide":"yes"`, `sideBySide: "yes", want true or false`},
		{`"sideBySide":true,"workers":0`, `workers: 0, want 1 to 1000`},
		{`"sideBySide":true,"workers":1.5`, `workers: 1.5, want a whole number`},
		{`"faults":[{"kind":"error","from":"1s"}]`, `faults: some begin or end, want "sideBySide": true with them: between a policy's turns its budgets and breakers would recover`},
		{`"workers":3`, `workers: 3, want "sideBySide": true with it: a queue outlasts a policy's turn`},
		{`"serveAbandoned":true`, `serveAbandoned: true, want workers with it: nothing waits where all are served at once`},
		{`"serverTimeout":"0s"`, `serverTimeout: "0s", want a duration from 1ms to 1h0m0s`},
		{`"sideBySide":true,"workers":1,"serverTimeout":"1s"`, `serverTimeout: 1s, want "serveAbandoned": true with workers: the work goes on`},
	} {
		if strings.HasPrefix(c.doc, `"faults"`) && !strings.Contains(c.want, "sideBySide") || strings.HasPrefix(c.doc, `"stalls"`) {
			c.doc = `"sideBySide":true,` + c.doc // which is a fault of its own, below
		}
		_, err := Decode([]byte(doc(c.doc)))
		if want := "scenario: " + strings.ReplaceAll(c.want, "\n", "\nscenario: "); err == nil || err.Error() != want {
			t.Errorf("%s:\n%v, want\n%s", c.doc, err, want)
		}
	}
}

// What a document leaves out, and what it says.
func TestDecodeFault(t *testing.T) {
	sc, err := Decode([]byte(`{"name":"x","backends":2,"rate":10,"requests":5,"serviceTime":[{"constant":{"value":"1ms"}}],
		"sideBySide":true,"workers":3,"serveAbandoned":true,"serverTimeout":"1s","faults":[
		{"kind":"error"},
		{"kind":"error","from":"1s","for":"2s","every":"3s","backends":[1],"code":"RESOURCE_EXHAUSTED","probability":0.5},
		{"kind":"blackhole","from":"0s"},
		{"kind":"stall","for":"1s"},
		{"kind":"slow","add":"100ms"},
		{"kind":"slow","factor":0.5},
		{"kind":"down","for":"1s"}],
		"keys":{"count":9},"loads":[0.5,2],"criticality":{"critical":3,"sheddable":1}}`))
	if err != nil {
		t.Fatal(err)
	}
	want := []Fault{
		{Kind: Error, Code: Code(codes.Unavailable), Probability: 1},
		{Kind: Error, From: at(sec), For: at(2 * sec), Every: at(3 * sec), Backends: []int{1}, Code: Code(codes.ResourceExhausted), Probability: 0.5},
		{Kind: Blackhole},
		{Kind: Stall, For: at(sec)},
		{Kind: Slowed, Factor: 1, Add: at(sec / 10)},
		{Kind: Slowed, Factor: 0.5},
		{Kind: Down, For: at(sec)},
	}
	if diff := cmp.Diff(want, sc.Faults); diff != "" {
		t.Errorf("faults (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]float64{"critical": 3, "sheddable": 1}, sc.Criticality); diff != "" || !slices.Equal(sc.Loads, []float64{0.5, 2}) {
		t.Errorf("loads %v, classes (-want +got):\n%s", sc.Loads, diff)
	}
	if !sc.SideBySide || sc.Workers != 3 || !sc.ServeAbandoned || sc.ServerTimeout != at(sec) || *sc.Keys != (Keys{Count: 9, Exponent: 1}) {
		t.Errorf("%+v", sc)
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
		s.Fault(1, 2, 3, s.Backends-1, 4)
		s.Key(1, 2)
		s.Down(s.Backends-1, 4)
		for _, w := range s.FaultSpans(time.Minute) {
			if w.From < 0 || w.To <= w.From {
				t.Errorf("a fault in %v", w)
			}
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
