package loadbalance

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/balancer"
)

// parsed returns what a balancer of ours makes of a configuration.
func parsed(name, js string) (*options, error) {
	c, err := balancer.Get(name).(balancer.ConfigParser).ParseConfig([]byte(js))
	switch c := c.(type) {
	case *p2cConfig:
		return &c.options, err
	case *rendezvousConfig:
		return &c.options, err
	}
	return nil, err
}

// same reports whether two are the same, however they were written.
func (o options) same(p options) bool {
	return o.maxInFlight == p.maxInFlight && o.slowStart == p.slowStart && o.ejection == p.ejection && o.subset == p.subset && o.zone == p.zone
}

// Every key of every option takes its bounds and nothing outside, and the error names
// the key by its path.
func TestOptionBounds(t *testing.T) {
	const duration = `want a duration such as "10s"`
	for _, tc := range []struct {
		path string // "object.key"; the value is in place of %s
		with string // what else the object must hold
		good []string
		bad  map[string]string // value: error
	}{
		{"maxInFlight", "", []string{`1`, `1000000000`}, map[string]string{
			`0`: `0, want a whole number in [1, 1000000000]`, `-1`: `-1, want a whole number in [1, 1000000000]`,
			`1000000001`: `1000000001, want a whole number in [1, 1000000000]`, `1.5`: `1.5, want a whole number in [1, 1000000000]`,
			`1e2`: `1e2, want a whole number in [1, 1000000000]`, `2.0`: `2.0, want a whole number in [1, 1000000000]`,
			`"1"`: `"1", want a whole number in [1, 1000000000]`, `null`: `null, want a value or no such key`}},
		{"slowStart.window", "", []string{`"0s"`, `"3600s"`, `".5s"`, `"1.s"`, `"0.12345678901s"`}, map[string]string{
			`"-0.001s"`: `-1ms, want [0s, 1h0m0s]`, `"3600.1s"`: `1h0m0.1s, want [0s, 1h0m0s]`, `10`: `number 10, ` + duration, `"1m"`: `"1m", ` + duration, `null`: `null, want a value or no such key`}},
		{"slowStart.aggression", "", []string{`1e-300`, `100`}, map[string]string{
			`0`: `0, want a number in (0, 100]`, `-1`: `-1, want a number in (0, 100]`, `100.1`: `100.1, want a number in (0, 100]`, `1e999`: `1e999, want a number in (0, 100]`, `"1"`: `"1", want a number in (0, 100]`}},
		{"ejection.latencyFactor", "", []string{`1.0000001`, `1000`}, map[string]string{
			`1`: `1, want a number in (1, 1000]`, `1000.5`: `1000.5, want a number in (1, 1000]`, `true`: `true, want a number in (1, 1000]`}},
		{"ejection.latencyFloor", "", []string{`"0s"`, `"3600s"`}, map[string]string{
			`"-1s"`: `-1s, want [0s, 1h0m0s]`, `"3601s"`: `1h0m1s, want [0s, 1h0m0s]`}},
		{"ejection.failureRatio", "", []string{`1e-9`, `1`}, map[string]string{
			`0`: `0, want a number in (0, 1]`, `1.01`: `1.01, want a number in (0, 1]`}},
		{"ejection.minimumCalls", "", []string{`1`, `49`}, map[string]string{
			`0`: `0, want a whole number in [1, 49]`, `50`: `50, want a whole number in [1, 49]`, `2.5`: `2.5, want a whole number in [1, 49]`}},
		{"ejection.baseEjectionTime", "", []string{`"0.001s"`, `"3600s"`}, map[string]string{
			`"0s"`: `0s, want [1ms, 1h0m0s]`, `"0.0009s"`: `900µs, want [1ms, 1h0m0s]`, `"3601s"`: `1h0m1s, want [1ms, 1h0m0s]`}},
		{"ejection.maxEjectionPercent", "", []string{`0`, `0.5`, `100`}, map[string]string{
			`-1`: `-1, want a number in [0, 100]`, `100.1`: `100.1, want a number in [0, 100]`}},
		{"ejection.panicThreshold", "", []string{`0`, `100`}, map[string]string{
			`-0.1`: `-0.1, want a number in [0, 100]`, `101`: `101, want a number in [0, 100]`}},
		{"ejection.probeEvery", "", []string{`2`, `1000000000`}, map[string]string{
			`1`: `1, want a whole number in [2, 1000000000]`, `1000000001`: `1000000001, want a whole number in [2, 1000000000]`}},
		{"subset.size", "", []string{`1`, `1000000`}, map[string]string{
			`0`: `0, want a whole number in [1, 1000000]`, `1000001`: `1000001, want a whole number in [1, 1000000]`, `1.5`: `1.5, want a whole number in [1, 1000000]`}},
		{"subset.clientIndex", `"size": 1, "clientCount": 1000000000`, []string{`0`, `999999999`}, map[string]string{
			`-1`: `-1, want a whole number in [0, 1000000000]`, `1000000001`: `1000000001, want a whole number in [0, 1000000000]`}},
		{"subset.clientCount", `"size": 1, "clientIndex": 0`, []string{`1`, `1000000000`}, map[string]string{
			`0`: `0, want a whole number in [1, 1000000000]`, `1000000001`: `1000000001, want a whole number in [1, 1000000000]`}},
		{"zone.local", "", []string{`"a"`, `"\u00fc b"`}, map[string]string{
			`""`: `"", want the name of the caller's zone`, `1`: `number 1, want the name of the caller's zone`}},
		{"zone.overload", `"local": "a"`, []string{`1.0000001`, `1000`}, map[string]string{
			`1`: `1, want a number in (1, 1000]`, `1001`: `1001, want a number in (1, 1000]`}},
	} {
		object, key, nested := strings.Cut(tc.path, ".")
		write := func(v string) string {
			if !nested {
				return fmt.Sprintf(`{%q: %s}`, object, v)
			}
			with := tc.with
			if with != "" {
				with += ", "
			}
			return fmt.Sprintf(`{%q: {%s%q: %s}}`, object, with, key, v)
		}
		for _, name := range ours {
			for _, v := range tc.good {
				if _, err := parsed(name, write(v)); err != nil {
					t.Errorf("%s: %v", write(v), err)
				}
			}
			for v, want := range tc.bad {
				want = "loadbalance: " + name + ": " + tc.path + ": " + want
				if _, err := parsed(name, write(v)); err == nil || err.Error() != want {
					t.Errorf("%s:\n%v\nwant\n%s", write(v), err, want)
				}
			}
		}
	}
}

// What is wrong with an object as a whole, or between its keys.
func TestOptionObjects(t *testing.T) {
	for _, tc := range []struct {
		js   string
		errs []string
	}{
		{`{"ejection": {"latencyfactor": 4}}`, []string{`ejection.latencyfactor: unknown key, did you mean "latencyFactor"?`}},
		{`{"slowStart": {"decay": 4}}`, []string{`slowStart.decay: unknown key, want one of window, aggression`}},
		{`{"slowstart": {}}`, []string{`slowstart: unknown key, did you mean "slowStart"?`}},
		{`{"ejection": null}`, []string{`ejection: null, want a value or no such key`}},
		{`{"ejection": []}`, []string{`ejection: a list, want an object`}},
		{`{"ejection": {"latencyFactor": null}}`, []string{`ejection.latencyFactor: null, want a value or no such key`}},
		{`{"ejection": {"latencyFactor": 2, "latencyFactor": 3}}`, []string{`ejection.latencyFactor: given twice`}},
		{`{"ejection": {}, "ejection": {}}`, []string{`ejection: given twice`}},
		{`{"ejection": {"failureRatio": 2, "probeEvery": 1}, "maxInFlight": 0}`, []string{
			`maxInFlight: 0, want a whole number in [1, 1000000000]`,
			`ejection.failureRatio: 2, want a number in (0, 1]`, `ejection.probeEvery: 1, want a whole number in [2, 1000000000]`}},
		{`{"subset": {}}`, []string{`subset.size: missing, want a whole number in [1, 1000000]`}},
		{`{"subset": {"clientIndex": 0, "clientCount": 1}}`, []string{`subset.size: missing, want a whole number in [1, 1000000]`}},
		{`{"subset": {"size": 3, "clientIndex": 0}}`, []string{`subset.clientCount: missing, want how many clients there are`}},
		{`{"subset": {"size": 3, "clientCount": 7}}`, []string{`subset.clientIndex: missing, want a whole number in [0, 7)`}},
		{`{"subset": {"size": 3, "clientIndex": 7, "clientCount": 7}}`, []string{
			`subset.clientIndex: 7, want a whole number in [0, 7), below clientCount`}},
		{`{"zone": {}}`, []string{`zone.local: missing, want the name of the caller's zone`}},
		{`{"zone": {"overload": 3}}`, []string{`zone.local: missing, want the name of the caller's zone`}},
		{`{"zone": "a"}`, []string{`zone: "a", want an object`}},
	} {
		for _, name := range ours {
			prefix := "loadbalance: " + name + ": "
			want := prefix + strings.Join(tc.errs, "\n"+prefix)
			if _, err := parsed(name, tc.js); err == nil || err.Error() != want {
				t.Errorf("%s:\n%v\nwant\n%s", tc.js, err, want)
			}
		}
	}
}

// Each key sets its own field; what is left out has the default of the documentation.
func TestOptionValues(t *testing.T) {
	full := options{
		maxInFlight: 7,
		slowStart:   slowStart{window: 3 * time.Second, aggression: 2},
		ejection: ejection{latencyFactor: 4, latencyFloor: 6 * ms, failureRatio: .3, minimumCalls: 21, baseTime: 11 * time.Second,
			maxEjectionPercent: 35, panicThreshold: 51, probeEvery: 101},
		subset: subset{size: 5, index: 2, count: 9},
		zone:   zone{local: "a", overload: 3},
	}
	random := defaultOptions()
	random.subset.size = 5
	untouched := options{
		slowStart: slowStart{window: 10 * time.Second, aggression: 1},
		ejection: ejection{latencyFactor: 3, latencyFloor: 5 * ms, failureRatio: .2, minimumCalls: 20, baseTime: 10 * time.Second,
			maxEjectionPercent: 34, panicThreshold: 50, probeEvery: 100},
		zone: zone{overload: 2},
	}
	for _, tc := range []struct {
		js   string
		want options
	}{
		{`{}`, untouched},
		{`{"slowStart": {}, "ejection": {}}`, untouched},
		{`{"subset": {"size": 5}}`, random},
		{`{"maxInFlight": 7, "slowStart": {"window": "3s", "aggression": 2},
			"ejection": {"latencyFactor": 4, "latencyFloor": "0.006s", "failureRatio": 0.3, "minimumCalls": 21, "baseEjectionTime": "11s",
				"maxEjectionPercent": 35, "panicThreshold": 51, "probeEvery": 101},
			"subset": {"size": 5, "clientIndex": 2, "clientCount": 9}, "zone": {"local": "a", "overload": 3}}`, full},
	} {
		for _, name := range ours {
			if o, err := parsed(name, tc.js); err != nil || !o.same(tc.want) {
				t.Errorf("%s: %s: %+v, %v, want %+v", name, tc.js, o, err, tc.want)
			}
		}
	}
}

// A balancer that has no configuration at all has the defaults.
func TestNoConfigurationIsTheDefault(t *testing.T) {
	for _, name := range ours {
		_, b := fakeReady(t, name, 1)
		resolve(t, b, nil, 1)
		if o := shardsOf(b).policy.options; !o.same(defaultOptions()) {
			t.Errorf("%s: %+v, want the defaults", name, o)
		}
	}
}

func FuzzParseOptions(f *testing.F) {
	f.Add(`{"maxInFlight": 1e2, "slowStart": {"window": "0s", "aggression": 1e-320}}`)
	f.Add(`{"ejection": {"latencyFactor": 1.0000000000000002, "latencyFloor": "-0s", "failureRatio": 1, "minimumCalls": 49}}`)
	f.Add(`{"ejection": {"baseEjectionTime": "0.001s", "maxEjectionPercent": 100, "panicThreshold": 0, "probeEvery": 2}}`)
	f.Add(`{"subset": {"size": 3, "clientIndex": 1, "clientCount": 2}, "zone": {"local": "\u0000", "overload": 1e3}}`)
	f.Add(`{"subset": {"size": 3, "clientIndex": -1}, "zone": null, "ejection": {"x": {"y": []}}}`)
	f.Fuzz(func(t *testing.T, js string) {
		o, err := parsed(P2CName, js)
		if err != nil {
			return
		}
		if !json.Valid([]byte(js)) {
			t.Fatalf("%q is taken for JSON", js)
		}
		e := o.ejection
		for name, ok := range map[string]bool{
			"maxInFlight":        o.maxInFlight >= 0 && o.maxInFlight <= 1e9,
			"window":             o.slowStart.window >= 0 && o.slowStart.window <= time.Hour,
			"aggression":         o.slowStart.aggression > 0 && o.slowStart.aggression <= 100,
			"latencyFactor":      e.latencyFactor > 1 && e.latencyFactor <= 1000,
			"latencyFloor":       e.latencyFloor >= 0 && e.latencyFloor <= time.Hour,
			"failureRatio":       e.failureRatio > 0 && e.failureRatio <= 1,
			"minimumCalls":       e.minimumCalls >= 1 && e.minimumCalls < memory,
			"baseEjectionTime":   e.baseTime >= ms && e.baseTime <= time.Hour,
			"maxEjectionPercent": e.maxEjectionPercent >= 0 && e.maxEjectionPercent <= 100,
			"panicThreshold":     e.panicThreshold >= 0 && e.panicThreshold <= 100,
			"probeEvery":         e.probeEvery >= 2 && e.probeEvery <= 1e9,
			"subset":             o.subset.size >= 0 && o.subset.index >= 0 && o.subset.index < max(1, o.subset.count),
			"zone":               o.zone.overload > 1 && o.zone.overload <= 1000,
		} {
			if !ok {
				t.Errorf("%s: %s is out of bounds: %+v", js, name, *o)
			}
		}
		for _, age := range []time.Duration{-1, 0, 1, o.slowStart.window / 2, o.slowStart.window} {
			if x := o.slowStart.share(time.Hour, time.Hour+age); !(x >= leastShare && x <= 1) {
				t.Errorf("%s: a share of %v at %v", js, x, age)
			}
		}
	})
}
