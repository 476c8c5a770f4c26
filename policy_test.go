package bobtail

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"

	"github.com/bobtail-rpc/bobtail/breaker"
	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/retry"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// broken are documents and the exact errors that a user reads of them. They are
// the seeds of FuzzParsePolicy too.
var broken = []struct{ name, text, want string }{
	{"no text", ``, `document: not valid JSON at byte 0: unexpected EOF`},
	{"cut off", `{"mode": "on"`, `document: not valid JSON at byte 13: unexpected EOF`},
	{"no object", `[]`, `document: a list, want an object`},
	{"two documents", `{} {}`, `document: not valid JSON at byte 4: more text after the end of the document`},
	{"nested too deep", strings.Repeat(`{"a":`, 70) + `1` + strings.Repeat(`}`, 70),
		`document: not valid JSON at byte 324: nested more than 64 deep`},
	{"a misspelt key", `{"extraload": {}}`, `extraload: unknown key, did you mean "extraLoad"?`},
	{"an unknown key", `{"methodConfig": [{"colour": 1}]}`,
		`methodConfig[0].colour: unknown key, want one of name, timeout, idempotent, mode, hedgingPolicy, retryPolicy, circuitBreaker, adaptiveThrottling, rateLimit, maxInFlight, waitForReady, maxRequestMessageBytes, maxResponseMessageBytes`},
	{"a key given twice", `{"mode": "on", "mode": "off"}`, `mode: given twice`},
	{"null", `{"mode": null}`, `mode: null, want a value or no such key`},
	{"mode", `{"mode": "of"}`, `mode: "of", want "on", "shadow" or "off"`},
	{"mode of an entry", `{"methodConfig": [{"mode": 1}]}`, `methodConfig[0].mode: number 1, want a string`},
	{"no such balancer", `{"loadBalancingConfig": [{"bobtail_p3c": {}}]}`,
		`loadBalancingConfig: no balancer of it is registered, want for instance "bobtail_p2c"`},
	{"balancers as an object", `{"loadBalancingConfig": {"bobtail_p2c": {}}}`,
		`loadBalancingConfig: an object, want a list`},
	{"a balancer without a name", `{"loadBalancingConfig": [{}, {"round_robin": {}}]}`,
		`loadBalancingConfig[0]: want an object with one key, the name of a balancer`},
	{"extraLoad without max", `{"extraLoad": {}}`, `extraLoad.max: missing`},
	{"extraLoad max", `{"extraLoad": {"max": 1.5}}`, `extraLoad.max: 1.5, want [0.000001, 1]`},
	{"extraLoad max zero", `{"extraLoad": {"max": 0}}`, `extraLoad.max: 0, want [0.000001, 1]`},
	{"extraLoad minPerSecond", `{"extraLoad": {"max": 1, "minPerSecond": -1}}`, `extraLoad.minPerSecond: -1, want [0, 1000000]`},
	{"extraLoad window", `{"extraLoad": {"max": 1, "window": "0s"}}`, `extraLoad.window: "0s", want [0.010s, 3600s]`},
	{"a number that is none", `{"extraLoad": {"max": "a lot"}}`, `extraLoad.max: a lot, want [0.000001, 1]`},
	{"a number that is a list", `{"extraLoad": {"max": [1]}}`, `extraLoad.max: a list, want [0.000001, 1]`},
	{"throttling", `{"retryThrottling": {"maxTokens": 1001, "tokenRatio": 0}}`,
		"retryThrottling.maxTokens: 1001, want (0, 1000]\nretryThrottling.tokenRatio: 0, want at least 0.001"},
	{"throttling without a ratio", `{"retryThrottling": {"maxTokens": 10}}`, `retryThrottling.tokenRatio: missing`},
	{"a method without a service", `{"methodConfig": [{"name": [{"method": "Get"}]}]}`,
		`methodConfig[0].name[0].method: "Get" without a service`},
	{"a service with a slash", `{"methodConfig": [{"name": [{"service": "/kv.KV"}]}]}`,
		`methodConfig[0].name[0]: "/kv.KV/", want names without a slash`},
	{"a name given twice", `{"methodConfig": [{"name": [{"service": "a"}]}, {"name": [{"service": "a"}]}]}`,
		`methodConfig[1].name[0]: "a/" has an entry already`},
	{"two defaults", `{"methodConfig": [{"name": [{}, {}]}]}`, `methodConfig[0].name[1]: "" has an entry already`},
	{"timeout", `{"methodConfig": [{"timeout": "0s"}]}`, `methodConfig[0].timeout: "0s", want more than 0s`},
	{"a duration without a unit", `{"methodConfig": [{"timeout": "1"}]}`,
		`methodConfig[0].timeout: "1", want a duration in seconds such as "0.250s"`},
	{"a duration of Go", `{"methodConfig": [{"timeout": "250ms"}]}`,
		`methodConfig[0].timeout: "250ms", want a duration in seconds such as "0.250s"`},
	{"a duration as a number", `{"methodConfig": [{"timeout": 1}]}`,
		`methodConfig[0].timeout: number 1, want a duration in seconds such as "0.250s"`},
	{"a duration too long", `{"methodConfig": [{"timeout": "9223372036s"}]}`,
		`methodConfig[0].timeout: "9223372036s", want at most 9223372035s`},
	{"a duration too fine", `{"methodConfig": [{"timeout": "0.0000000001s"}]}`,
		`methodConfig[0].timeout: "0.0000000001s", want a duration in seconds such as "0.250s"`},
	{"maxAttempts missing", `{"methodConfig": [{"hedgingPolicy": {}}]}`, `methodConfig[0].hedgingPolicy.maxAttempts: missing`},
	{"maxAttempts", `{"methodConfig": [{"hedgingPolicy": {"maxAttempts": 1}}]}`,
		`methodConfig[0].hedgingPolicy.maxAttempts: 1, want an integer of at least 2`},
	{"maxAttempts broken", `{"methodConfig": [{"hedgingPolicy": {"maxAttempts": 2.5}}]}`,
		`methodConfig[0].hedgingPolicy.maxAttempts: 2.5, want an integer of at least 2`},
	{"hedgingDelay", `{"methodConfig": [{"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "-0.1s"}}]}`,
		`methodConfig[0].hedgingPolicy.hedgingDelay: "-0.1s", want at least 0s`},
	{"OK among the codes", `{"methodConfig": [{"hedgingPolicy": {"maxAttempts": 2, "nonFatalStatusCodes": ["UNAVAILABLE", "ok"]}}]}`,
		`methodConfig[0].hedgingPolicy.nonFatalStatusCodes[1]: OK, want a code of a failure`},
	{"no such code", `{"methodConfig": [{"hedgingPolicy": {"maxAttempts": 2, "nonFatalStatusCodes": ["BROKEN", 17, true]}}]}`,
		"methodConfig[0].hedgingPolicy.nonFatalStatusCodes[0]: \"BROKEN\", want a gRPC status code\n" +
			"methodConfig[0].hedgingPolicy.nonFatalStatusCodes[1]: 17, want a gRPC status code, 1 to 16\n" +
			"methodConfig[0].hedgingPolicy.nonFatalStatusCodes[2]: true, want a gRPC status code"},
	{"hedgingPercentile", `{"methodConfig": [{"hedgingPolicy": {"maxAttempts": 2, "hedgingPercentile": 100}}]}`,
		`methodConfig[0].hedgingPolicy.hedgingPercentile: 100, want (0, 100)`},
	{"bounds without a percentile", `{"methodConfig": [{"hedgingPolicy": {"maxAttempts": 2, "minHedgingDelay": "1s", "maxHedgingDelay": "2s"}}]}`,
		"methodConfig[0].hedgingPolicy.minHedgingDelay: bounds an adaptive delay, want hedgingPercentile beside it\n" +
			"methodConfig[0].hedgingPolicy.maxHedgingDelay: bounds an adaptive delay, want hedgingPercentile beside it"},
	{"bounds crossed", `{"methodConfig": [{"hedgingPolicy": {"maxAttempts": 2, "hedgingPercentile": 95, "minHedgingDelay": "0.2s", "maxHedgingDelay": "0.1s"}}]}`,
		`methodConfig[0].hedgingPolicy.maxHedgingDelay: 0.1s, want at least minHedgingDelay 0.2s`},
	{"a cap below the default floor", `{"methodConfig": [{"hedgingPolicy": {"maxAttempts": 2, "hedgingPercentile": 95, "maxHedgingDelay": "0.0005s"}}]}`,
		`methodConfig[0].hedgingPolicy.maxHedgingDelay: 0.0005s, want at least the default minHedgingDelay 0.001s`},
	{"retry beside hedging", `{"methodConfig": [{"hedgingPolicy": {"maxAttempts": 2}, "retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`,
		`methodConfig[0]: retryPolicy and hedgingPolicy together, want one of them`},
	{"a retryPolicy of nothing", `{"methodConfig": [{"retryPolicy": {}}]}`,
		"methodConfig[0].retryPolicy.maxAttempts: missing\n" +
			"methodConfig[0].retryPolicy.initialBackoff: missing\n" +
			"methodConfig[0].retryPolicy.maxBackoff: missing\n" +
			"methodConfig[0].retryPolicy.backoffMultiplier: missing\n" +
			"methodConfig[0].retryPolicy.retryableStatusCodes: missing"},
	{"retry maxAttempts", `{"methodConfig": [{"retryPolicy": {"maxAttempts": 1, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`,
		`methodConfig[0].retryPolicy.maxAttempts: 1, want an integer of at least 2`},
	{"retry initialBackoff", `{"methodConfig": [{"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`,
		`methodConfig[0].retryPolicy.initialBackoff: "0s", want more than 0s`},
	{"retry maxBackoff", `{"methodConfig": [{"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.1s", "maxBackoff": "-1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`,
		`methodConfig[0].retryPolicy.maxBackoff: "-1s", want more than 0s`},
	{"retry backoffMultiplier", `{"methodConfig": [{"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 0, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`,
		`methodConfig[0].retryPolicy.backoffMultiplier: 0, want more than 0`},
	{"no retryable code", `{"methodConfig": [{"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": []}}]}`,
		`methodConfig[0].retryPolicy.retryableStatusCodes: empty, want at least one code, or perAttemptTimeout beside it`},
	{"OK is retryable", `{"methodConfig": [{"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["OK"]}}]}`,
		`methodConfig[0].retryPolicy.retryableStatusCodes[0]: OK, want a code of a failure`},
	{"jitter", `{"methodConfig": [{"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"], "jitter": "fulll"}}]}`,
		`methodConfig[0].retryPolicy.jitter: "fulll", want "full", "equal", "decorrelated" or "grpc"`},
	{"perAttemptTimeout", `{"methodConfig": [{"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"], "perAttemptTimeout": "0s"}}]}`,
		`methodConfig[0].retryPolicy.perAttemptTimeout: "0s", want more than 0s`},
	{"perAttemptTimeout under both its names", `{"methodConfig": [{"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"], "perAttemptTimeout": "1s", "perAttemptRecvTimeout": "1s"}}]}`,
		`methodConfig[0].retryPolicy.perAttemptRecvTimeout: another name of perAttemptTimeout, want one of them`},
	{"a misspelt key of retryPolicy", `{"methodConfig": [{"retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"], "maxAttemps": 3}}]}`,
		`methodConfig[0].retryPolicy.maxAttemps: unknown key, did you mean "maxAttempts"?`},
	{"failureRatio", `{"methodConfig": [{"circuitBreaker": {"failureRatio": 50}}]}`,
		`methodConfig[0].circuitBreaker.failureRatio: 50, want (0, 1]`},
	{"minimumCalls", `{"methodConfig": [{"circuitBreaker": {"minimumCalls": 0}}]}`,
		`methodConfig[0].circuitBreaker.minimumCalls: 0, want an integer in [1, 1000000]`},
	{"window of a breaker", `{"methodConfig": [{"circuitBreaker": {"window": "0.01s"}}]}`,
		`methodConfig[0].circuitBreaker.window: "0.01s", want [0.1s, 3600s]`},
	{"openFor", `{"methodConfig": [{"circuitBreaker": {"openFor": "2h"}}]}`,
		`methodConfig[0].circuitBreaker.openFor: "2h", want a duration in seconds such as "0.250s"`},
	{"openFor too short", `{"methodConfig": [{"circuitBreaker": {"openFor": "0s"}}]}`,
		`methodConfig[0].circuitBreaker.openFor: "0s", want [0.01s, 3600s]`},
	{"slowCallRatio of nothing", `{"methodConfig": [{"circuitBreaker": {"slowCallRatio": 0.5}}]}`,
		`methodConfig[0].circuitBreaker.slowCallRatio: of calls slower than what? want slowCallDuration beside it`},
	{"slowCallDuration", `{"methodConfig": [{"circuitBreaker": {"slowCallDuration": "0s", "slowCallRatio": 2}}]}`,
		"methodConfig[0].circuitBreaker.slowCallDuration: \"0s\", want more than 0s\n" +
			"methodConfig[0].circuitBreaker.slowCallRatio: 2, want (0, 1]"},
	{"a breaker that is a number", `{"methodConfig": [{"circuitBreaker": 5}]}`,
		`methodConfig[0].circuitBreaker: number 5, want an object`},
	{"k", `{"methodConfig": [{"adaptiveThrottling": {"k": 1}}]}`,
		`methodConfig[0].adaptiveThrottling.k: 1, want [1.1, 100]`},
	{"window of a throttle", `{"methodConfig": [{"adaptiveThrottling": {"window": "0.5s"}}]}`,
		`methodConfig[0].adaptiveThrottling.window: "0.5s", want [1s, 3600s]`},
	{"a rate limit without a rate", `{"methodConfig": [{"rateLimit": {"burst": 5}}]}`,
		`methodConfig[0].rateLimit.perSecond: missing`},
	{"perSecond and burst", `{"methodConfig": [{"rateLimit": {"perSecond": 0, "burst": 1.5}}]}`,
		"methodConfig[0].rateLimit.perSecond: 0, want (0, 1000000000]\n" +
			"methodConfig[0].rateLimit.burst: 1.5, want an integer in [1, 1000000000]"},
	{"maxInFlight", `{"methodConfig": [{"maxInFlight": 0}]}`,
		`methodConfig[0].maxInFlight: 0, want an integer in [1, 1000000]`},
	{"maxInFlight as an object", `{"methodConfig": [{"maxInFlight": {}}]}`,
		`methodConfig[0].maxInFlight: an object, want an integer in [1, 1000000]`},
	{"a tie delay of nothing", `{"methodConfig": [{"hedgingPolicy": {"maxAttempts": 2, "tied": false, "tieDelay": "0.002s"}}]}`,
		`methodConfig[0].hedgingPolicy.tieDelay: of what? want "tied": true beside it`},
	{"no tie delay", `{"methodConfig": [{"hedgingPolicy": {"maxAttempts": 2, "tied": true, "tieDelay": "0s"}}]}`,
		`methodConfig[0].hedgingPolicy.tieDelay: "0s", want more than 0s`},
	{"what grpc is handed", `{"methodConfig": [{"waitForReady": "yes", "maxRequestMessageBytes": -1}]}`,
		"methodConfig[0].waitForReady: \"yes\", want true or false\nmethodConfig[0].maxRequestMessageBytes: -1, want an integer in [0, 2^53]"},
	{"a format in a key", `{"a%d%s": 1}`, `a%d%s: unknown key, want one of loadBalancingPolicy, loadBalancingConfig, retryThrottling, extraLoad, mode, healthCheckConfig, methodConfig`},
	{"finer than a budget counts", `{"extraLoad": {"max": 0.05, "minPerSecond": 0.0000001}}`,
		`extraLoad: retry: budget minPerSecond 1e-07, want 0 or at least 0.000001`},
	{"finer than a throttle counts", `{"retryThrottling": {"maxTokens": 0.0005, "tokenRatio": 0.1}}`,
		`retryThrottling: retry: throttle maxTokens 0.0005, want at least 0.001`},
	{"loadBalancingPolicy", `{"loadBalancingPolicy": "rond_robin"}`,
		`loadBalancingPolicy: "rond_robin" is no registered balancer, want for instance "bobtail_p2c"`},
	{"healthCheckConfig", `{"healthCheckConfig": {"serviceNam": "kv"}}`,
		`healthCheckConfig.serviceNam: unknown key, did you mean "serviceName"?`},
	{"many faults at once", `{"mod": 1, "extraLoad": {"max": 2}, "methodConfig": [{"timeout": "x"}, 7]}`,
		"extraLoad.max: 2, want [0.000001, 1]\nmethodConfig[0].timeout: \"x\", want a duration in seconds such as \"0.250s\"\n" +
			"methodConfig[1]: number 7, want an object\nmod: unknown key, did you mean \"mode\"?"},
}

func TestBrokenPolicies(t *testing.T) {
	for _, tc := range broken {
		t.Run(tc.name, func(t *testing.T) {
			_, err := ParsePolicy([]byte(tc.text))
			want := "bobtail: policy: " + strings.ReplaceAll(tc.want, "\n", "\nbobtail: policy: ")
			if err == nil || err.Error() != want {
				t.Errorf("%s\n got: %v\nwant: %s", tc.text, err, want)
			}
		})
	}
}

// good is a document with every key that this version obeys.
const good = `{
  "loadBalancingConfig": [{"no_such_balancer": {}}, {"bobtail_p2c": {}}],
  "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
  "extraLoad": {"max": 0.05, "minPerSecond": "2", "window": "5s"},
  "healthCheckConfig": {"serviceName": "kv"},
  "mode": "shadow",
  "methodConfig": [{
    "name": [{"service": "kv.KV", "method": "Get"}, {"service": "kv.KV", "method": "Scan"}],
    "timeout": ".25s",
    "idempotent": true,
    "mode": "on",
    "hedgingPolicy": {
      "maxAttempts": 9, "hedgingDelay": "0.010s", "nonFatalStatusCodes": ["unavailable", 10],
      "hedgingPercentile": 95, "minHedgingDelay": "0.002s", "maxHedgingDelay": "0.100s",
      "tied": true, "tieDelay": "0.0015s"
    },
    "waitForReady": true,
    "maxRequestMessageBytes": "4096"
  }, {
    "name": [{"service": "kv.KV"}],
    "timeout": "1s",
    "retryPolicy": {
      "maxAttempts": 4, "initialBackoff": "0.05s", "maxBackoff": "2s", "backoffMultiplier": 1.5,
      "retryableStatusCodes": ["UNAVAILABLE"], "jitter": "equal", "perAttemptTimeout": "0.1s"
    },
    "circuitBreaker": {"failureRatio": 0.25, "minimumCalls": 10, "window": "20s", "openFor": "3s",
                       "slowCallDuration": "1s", "slowCallRatio": 0.75},
    "adaptiveThrottling": {"k": 1.5, "window": "60s"},
    "rateLimit": {"perSecond": 1000, "burst": 100},
    "maxInFlight": 200
  }, {
    "name": [{}],
    "circuitBreaker": {}
  }]
}`

func TestParsePolicy(t *testing.T) {
	p, err := ParsePolicy([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	want := Policy{
		entries: []entry{{
			timeout: 250 * time.Millisecond, idempotent: true, mode: modeOn,
			hedging: &hedging.Config{
				MaxAttempts: 5, Delay: 10 * time.Millisecond, Percentile: 95,
				MinDelay: 2 * time.Millisecond, MaxDelay: 100 * time.Millisecond,
				Tied: true, TieDelay: 1500 * time.Microsecond,
				NonFatalCodes: []codes.Code{codes.Unavailable, codes.Aborted},
			},
		}, {
			timeout: time.Second, mode: modeShadow,
			retry: &retry.Config{
				MaxAttempts:    4,
				Backoff:        retry.Backoff{Initial: 50 * time.Millisecond, Max: 2 * time.Second, Multiplier: 1.5, Jitter: retry.EqualJitter},
				RetryableCodes: []codes.Code{codes.Unavailable}, AttemptTimeout: 100 * time.Millisecond,
			},
			breaker: &breaker.Config{FailureRatio: 0.25, MinimumCalls: 10, Window: 20 * time.Second, OpenFor: 3 * time.Second,
				SlowCallDuration: time.Second, SlowCallRatio: 0.75},
			throttling:  &breaker.ThrottleConfig{K: 1.5, Window: time.Minute},
			rate:        &shedding.RateLimitConfig{PerSecond: 1000, Burst: 100},
			maxInFlight: 200,
		}, {mode: modeShadow, breaker: &breaker.Config{}}},
		names:       map[string]int{"/kv.KV/Get": 0, "/kv.KV/Scan": 0, "/kv.KV/": 1, "": 2},
		throttle:    &retry.ThrottleConfig{MaxTokens: 100, TokenRatio: 0.1},
		extraLoad:   &retry.BudgetConfig{Max: 0.05, MinPerSecond: 2, Window: 5 * time.Second},
		balancing:   `[{"no_such_balancer":{}},{"bobtail_p2c":{}}]`,
		ownBalancer: true,
		passed: `{"healthCheckConfig":{"serviceName":"kv"},"methodConfig":[{"maxRequestMessageBytes":4096,` +
			`"name":[{"service":"kv.KV","method":"Get"},{"service":"kv.KV","method":"Scan"}],"waitForReady":true},` +
			`{"name":[{"service":"kv.KV"}]},{"name":[{}]}]}`,
	}
	if d := cmp.Diff(want, p, cmp.AllowUnexported(Policy{}, entry{})); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

func TestLookup(t *testing.T) {
	p, err := ParsePolicy([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		method string
		entry  int
		named  bool
	}{{"/kv.KV/Get", 0, true}, {"/kv.KV/Put", 1, false}, {"/other.S/M", 2, false}, {"/kv.KVX/Get", 2, false}, {"", 2, false}, {"odd", 2, false}, {"/kv.KV/", 1, false}} {
		e, named := p.lookup(tc.method)
		if e != &p.entries[tc.entry] || named != tc.named {
			t.Errorf("%q: another entry, or named %v", tc.method, named)
		}
	}
	var empty Policy
	if e, _ := empty.lookup("/kv.KV/Get"); e != nil {
		t.Error("the empty policy has an entry")
	}
}

// The empty document, the zero value and a document of grpc's own all make a
// service config that grpc accepts, with our balancer unless they say otherwise.
func TestServiceConfig(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{`{}`, `{"loadBalancingConfig":[{"bobtail_p2c":{}}]}`},
		{`{"loadBalancingPolicy": "round_robin"}`, `{"loadBalancingPolicy":"round_robin"}`},
		{`{"loadBalancingPolicy": "ROUND_ROBIN"}`, `{"loadBalancingPolicy":"round_robin"}`},
		{`{"loadBalancingConfig": [{"round_robin": {}}]}`, `{"loadBalancingConfig":[{"round_robin":{}}]}`},
		{`{"methodConfig": [{"name": [{}], "timeout": "1s", "waitForReady": false}]}`,
			`{"loadBalancingConfig":[{"bobtail_p2c":{}}],"methodConfig":[{"name":[{}],"waitForReady":false}]}`},
	} {
		p, err := ParsePolicy([]byte(tc.text))
		if err != nil {
			t.Fatal(err)
		}
		if got := p.serviceConfig(); got != tc.want {
			t.Errorf("%s\n got %s\nwant %s", tc.text, got, tc.want)
		}
	}
	if got := (&Policy{}).serviceConfig(); got != `{"loadBalancingConfig":[{"bobtail_p2c":{}}]}` {
		t.Errorf("zero value: %s", got)
	}
}

// The example of a grpc-java service config, which must work here unchanged.
func TestForeignServiceConfig(t *testing.T) {
	_, err := ParsePolicy([]byte(`{
	  "loadBalancingConfig": [{"round_robin": {}}],
	  "methodConfig": [{
	    "name": [{"service": "helloworld.Greeter", "method": "SayHello"}],
	    "hedgingPolicy": {"maxAttempts": 3.0, "hedgingDelay": "0.2s", "nonFatalStatusCodes": ["UNAVAILABLE", "INTERNAL", 10]}
	  }, {
	    "name": [{"service": "helloworld.Greeter"}, {"service": "grpc.examples.echo.Echo"}],
	    "retryPolicy": {"maxAttempts": 5.0, "initialBackoff": "0.5s", "maxBackoff": "30s", "backoffMultiplier": 2.0,
	      "retryableStatusCodes": ["UNAVAILABLE", 4, 14.0], "perAttemptRecvTimeout": "1s"},
	    "waitForReady": true
	  }],
	  "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1}
	}`))
	if err != nil {
		t.Error(err)
	}
}

func FuzzParsePolicy(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte(defaultDocument))
	for _, tc := range broken {
		f.Add([]byte(tc.text))
	}
	docs, _ := filepath.Glob("bench/policies/*.json")
	for _, name := range docs {
		text, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := ParsePolicy(text)
		if err != nil {
			for _, line := range strings.Split(err.Error(), "\nbobtail: ") {
				if line == "" {
					t.Errorf("an empty fault in %q", err)
				}
			}
			return
		}
		// What is accepted can be used.
		if !json.Valid([]byte(p.serviceConfig())) {
			t.Errorf("the service config is no JSON: %s", p.serviceConfig())
		}
		c, err := NewClient(p, WithLogger(nil))
		if err != nil {
			t.Fatalf("NewClient: %v", err)
		}
		for path := range p.names {
			c.method(nil, path)
			c.method(nil, path+"Method")
		}
		if err := c.Update(p); err != nil {
			t.Errorf("a policy cannot replace itself: %v", err)
		}
	})
}
