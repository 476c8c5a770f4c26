package bobtail

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bobtail-rpc/bobtail/shedding"
)

// brokenServer are documents and the exact errors that a user reads of them. They are the
// seeds of FuzzParseServerPolicy too.
var brokenServer = []struct{ name, text, want string }{
	{"no text", ``, `document: not valid JSON at byte 0: unexpected EOF`},
	{"cut off", `{"queue": {`, `document: not valid JSON at byte 11: unexpected EOF`},
	{"no object", `"on"`, `document: "on", want an object`},
	{"two documents", `{}{}`, `document: not valid JSON at byte 3: more text after the end of the document`},
	{"a client's document", `{"methodConfig": []}`, `methodConfig: unknown key, want one of mode, limiter, queue, tenants, exempt, maxCriticality, loadReport`},
	{"a misspelt key", `{"limitter": {}}`, `limitter: unknown key, did you mean "limiter"?`},
	{"a key in the wrong case", `{"loadreport": true}`, `loadreport: unknown key, did you mean "loadReport"?`},
	{"a key given twice", `{"queue": {}, "queue": {}}`, `queue: given twice`},
	{"a key within given twice", `{"queue": {"target": "1s", "target": "2s"}}`,
		"queue.target: given twice\nqueue.target: 1s, want at most the default maxWait 0.1s"},
	{"null", `{"tenants": null}`, `tenants: null, want a value or no such key`},
	{"null within", `{"limiter": {"min": null}}`, `limiter.min: null, want a value or no such key`},
	{"mode", `{"mode": "On"}`, `mode: "On", want "on", "shadow" or "off"`},
	{"mode as a truth", `{"mode": true}`, `mode: true, want a string`},

	{"limiter as a name", `{"limiter": "gradient"}`, `limiter: "gradient", want an object`},
	{"an unknown key of limiter", `{"limiter": {"algoritm": "vegas"}}`, `limiter.algoritm: unknown key, did you mean "algorithm"?`},
	{"algorithm", `{"limiter": {"algorithm": "gradient2"}}`, `limiter.algorithm: "gradient2", want "gradient", "vegas", "aimd" or "static"`},
	{"algorithm as a number", `{"limiter": {"algorithm": 2}}`, `limiter.algorithm: number 2, want a string`},
	{"initial 0", `{"limiter": {"initial": 0}}`, `limiter.initial: 0, want an integer in [1, 1000000]`},
	{"initial broken", `{"limiter": {"initial": 2.5}}`, `limiter.initial: 2.5, want an integer in [1, 1000000]`},
	{"initial below min", `{"limiter": {"initial": 5, "min": 10}}`, `limiter.initial: 5, want [min 10, max 1000]`},
	{"initial over max", `{"limiter": {"initial": 50, "max": 40}}`, `limiter.initial: 50, want [min 1, max 40]`},
	{"initial over the default max", `{"limiter": {"initial": 1001}}`, `limiter.initial: 1001, want [min 1, max 1000]`},
	{"min over max", `{"limiter": {"min": 10, "max": 9}}`, `limiter.max: 9, want at least min 10`},
	{"min", `{"limiter": {"min": -1}}`, `limiter.min: -1, want an integer in [1, 1000000]`},
	{"max", `{"limiter": {"max": 1000001}}`, `limiter.max: 1000001, want an integer in [1, 1000000]`},
	{"max as a list", `{"limiter": {"max": [1]}}`, `limiter.max: a list, want an integer in [1, 1000000]`},
	{"static without a limit", `{"limiter": {"algorithm": "static"}}`, `limiter.limit: missing`},
	{"limit of no static", `{"limiter": {"limit": 8}}`, `limiter.limit: 8, want it with algorithm "static" only`},
	{"static that moves", `{"limiter": {"algorithm": "static", "limit": 8, "initial": 8, "min": 1, "max": 9}}`,
		"limiter.initial: moves a limit, want none with algorithm \"static\"\n" +
			"limiter.min: moves a limit, want none with algorithm \"static\"\n" +
			"limiter.max: moves a limit, want none with algorithm \"static\""},
	{"limit", `{"limiter": {"algorithm": "static", "limit": 1e7}}`, `limiter.limit: 1e7, want an integer in [1, 1000000]`},

	{"queue as a truth", `{"queue": true}`, `queue: true, want an object`},
	{"maxLength", `{"queue": {"maxLength": 0}}`, `queue.maxLength: 0, want an integer in [1, 100000]`},
	{"maxLength too long", `{"queue": {"maxLength": 100001}}`, `queue.maxLength: 100001, want an integer in [1, 100000]`},
	{"target", `{"queue": {"target": "0s"}}`, `queue.target: "0s", want more than 0s`},
	{"target of Go", `{"queue": {"target": "5ms"}}`, `queue.target: "5ms", want a duration in seconds such as "0.250s"`},
	{"target as a number", `{"queue": {"target": 0.005}}`, `queue.target: number 0.005, want a duration in seconds such as "0.250s"`},
	{"target over maxWait", `{"queue": {"target": "0.2s", "maxWait": "0.1s"}}`, `queue.target: 0.2s, want at most maxWait 0.1s`},
	{"target over the default maxWait", `{"queue": {"target": "0.2s"}}`, `queue.target: 0.2s, want at most the default maxWait 0.1s`},
	{"maxWait", `{"queue": {"maxWait": "60.000000001s"}}`, `queue.maxWait: "60.000000001s", want (0s, 60s]`},
	{"maxWait negative", `{"queue": {"maxWait": "-1s"}}`, `queue.maxWait: "-1s", want (0s, 60s]`},
	{"shards", `{"queue": {"shards": 257}, "tenants": {"metadataKey": "t"}}`, `queue.shards: 257, want an integer in [1, 256]`},
	{"hand", `{"queue": {"shards": 64, "hand": 9}, "tenants": {"metadataKey": "t"}}`, `queue.hand: 9, want an integer in [1, 8]`},
	{"a hand of more than there are", `{"queue": {"shards": 4, "hand": 5}, "tenants": {"metadataKey": "t"}}`, `queue.hand: 5, want at most shards 4`},
	{"a hand of no shards", `{"queue": {"hand": 2}}`, `queue.hand: 2, want shards beside it, and at most as many`},
	{"an unknown key of queue", `{"queue": {"lifo": true}}`, `queue.lifo: unknown key, want one of maxLength, target, maxWait, shards, hand`},

	{"tenants of nothing", `{"tenants": {}}`, `tenants.metadataKey: missing`},
	{"burst without a rate", `{"tenants": {"metadataKey": "t", "burst": 5}}`, `tenants.burst: of what? want perSecond beside it`},
	{"metadataKey empty", `{"tenants": {"metadataKey": "", "perSecond": 1}}`,
		`tenants.metadataKey: "", want a key of gRPC metadata such as "x-tenant-id": of letters, digits, '-', '_' and '.', not beginning with "grpc-"`},
	{"metadataKey of other letters", `{"tenants": {"metadataKey": "x-mieter-ä", "perSecond": 1}}`,
		`tenants.metadataKey: "x-mieter-ä", want a key of gRPC metadata such as "x-tenant-id": of letters, digits, '-', '_' and '.', not beginning with "grpc-"`},
	{"metadataKey of gRPC", `{"tenants": {"metadataKey": "grpc-timeout", "perSecond": 1}}`,
		`tenants.metadataKey: "grpc-timeout", want a key of gRPC metadata such as "x-tenant-id": of letters, digits, '-', '_' and '.', not beginning with "grpc-"`},
	{"metadataKey of HTTP/2", `{"tenants": {"metadataKey": ":path", "perSecond": 1}}`,
		`tenants.metadataKey: ":path", want a key of gRPC metadata such as "x-tenant-id": of letters, digits, '-', '_' and '.', not beginning with "grpc-"`},
	{"perSecond", `{"tenants": {"metadataKey": "t", "perSecond": 0}}`, `tenants.perSecond: 0, want [0.001, 1000000000]`},
	{"perSecond endless", `{"tenants": {"metadataKey": "t", "perSecond": "Inf"}}`, `tenants.perSecond: Inf, want [0.001, 1000000000]`},
	{"perSecond too low", `{"tenants": {"metadataKey": "t", "perSecond": 0.0009}}`, `tenants.perSecond: 0.0009, want [0.001, 1000000000]`},
	{"shards without tenants", `{"queue": {"shards": 64}}`, `tenants: missing, want it beside queue.shards: it is tenants that are dealt queues`},
	{"burst", `{"tenants": {"metadataKey": "t", "perSecond": 1, "burst": 0}}`, `tenants.burst: 0, want an integer in [1, 1000000000]`},
	{"max tenants", `{"tenants": {"metadataKey": "t", "perSecond": 1, "max": 1.5}}`, `tenants.max: 1.5, want an integer in [1, 1000000]`},
	{"an unknown key of tenants", `{"tenants": {"metadataKey": "t", "perSecond": 1, "per_second": 1}}`, `tenants.per_second: unknown key, did you mean "perSecond"?`},

	{"exempt as a name", `{"exempt": "/kv.KV/*"}`, `exempt: "/kv.KV/*", want a list`},
	{"exempt of numbers", `{"exempt": [1, null]}`, "exempt[0]: number 1, want a string\nexempt[1]: null, want a string"},
	{"exempt without a slash", `{"exempt": ["kv.KV/Get"]}`, `exempt[0]: "kv.KV/Get", want "/package.Service/Method" or "/package.Service/*"`},
	{"exempt service without methods", `{"exempt": ["/kv.KV"]}`, `exempt[0]: "/kv.KV", want "/package.Service/Method" or "/package.Service/*"`},
	{"exempt with nothing after the slash", `{"exempt": ["/kv.KV/"]}`, `exempt[0]: "/kv.KV/", want "/package.Service/Method" or "/package.Service/*"`},
	{"exempt everything", `{"exempt": ["/*/*"]}`, `exempt[0]: "/*/*", want "/package.Service/Method" or "/package.Service/*"`},
	{"exempt by a pattern", `{"exempt": ["/kv.KV/Get*"]}`, `exempt[0]: "/kv.KV/Get*", want "/package.Service/Method" or "/package.Service/*"`},
	{"exempt too deep", `{"exempt": ["/kv.KV/Get/x"]}`, `exempt[0]: "/kv.KV/Get/x", want "/package.Service/Method" or "/package.Service/*"`},
	{"exempt twice", `{"exempt": ["/a/b", "/a/b"]}`, `exempt[1]: "/a/b" is in the list already`},

	{"maxCriticality", `{"maxCriticality": "high"}`, `maxCriticality: "high", want "critical_plus", "critical", "sheddable_plus" or "sheddable"`},
	{"maxCriticality as a number", `{"maxCriticality": 1}`, `maxCriticality: number 1, want a string`},
	{"loadReport", `{"loadReport": "yes"}`, `loadReport: "yes", want true or false`},
	{"a format in a key", `{"%s%d": 1}`, `%s%d: unknown key, want one of mode, limiter, queue, tenants, exempt, maxCriticality, loadReport`},
	{"many faults at once", `{"mode": "no", "limiter": {"min": 0, "algorithm": "x"}, "queue": {"maxLength": -1, "x": 1}, "exempt": [""], "queu": {}}`,
		"mode: \"no\", want \"on\", \"shadow\" or \"off\"\n" +
			"limiter.algorithm: \"x\", want \"gradient\", \"vegas\", \"aimd\" or \"static\"\n" +
			"limiter.min: 0, want an integer in [1, 1000000]\n" +
			"queue.maxLength: -1, want an integer in [1, 100000]\n" +
			"queue.x: unknown key, want one of maxLength, target, maxWait, shards, hand\n" +
			"exempt[0]: \"\", want \"/package.Service/Method\" or \"/package.Service/*\"\n" +
			"queu: unknown key, did you mean \"queue\"?"},
}

func TestBrokenServerPolicies(t *testing.T) {
	for _, tc := range brokenServer {
		t.Run(tc.name, func(t *testing.T) {
			p, err := ParseServerPolicy([]byte(tc.text))
			const prefix = "bobtail: server policy: "
			want := prefix + strings.ReplaceAll(tc.want, "\n", "\n"+prefix)
			if err == nil || err.Error() != want {
				t.Errorf("%s\n got: %v\nwant: %s", tc.text, err, want)
			}
			if !cmp.Equal(p, ServerPolicy{}, cmp.AllowUnexported(ServerPolicy{})) {
				t.Error("a policy beside the error")
			}
		})
	}
}

// goodServer is a document with every key.
const goodServer = `{
  "mode": "shadow",
  "limiter": {"algorithm": "vegas", "initial": "30", "min": 2, "max": 500},
  "queue": {"maxLength": 200, "target": "0.004s", "maxWait": "0.05s"},
  "tenants": {"metadataKey": "x-tenant-id", "perSecond": 100.5, "burst": 50, "max": 10000},
  "exempt": ["/grpc.health.v1.Health/*", "/kv.KV/Put"],
  "maxCriticality": "sheddable_plus",
  "loadReport": true
}`

func TestParseServerPolicy(t *testing.T) {
	highest := shedding.SheddablePlus
	for _, tc := range []struct {
		text string
		want ServerPolicy
	}{
		{goodServer, ServerPolicy{
			mode: modeShadow,
			admission: shedding.ServerConfig{
				Limiter:        shedding.LimiterConfig{Algorithm: shedding.Vegas, Initial: 30, Min: 2, Max: 500},
				Queue:          &shedding.QueueConfig{MaxLength: 200, Target: 4 * time.Millisecond, MaxWait: 50 * time.Millisecond},
				Tenants:        &shedding.TenantsConfig{MetadataKey: "x-tenant-id", PerSecond: 100.5, Burst: 50, Max: 10000},
				Exempt:         []string{"/grpc.health.v1.Health/*", "/kv.KV/Put"},
				MaxCriticality: &highest,
			},
			loadReport: true,
		}},
		{`{}`, ServerPolicy{mode: modeOn}},
		{`{"queue": {}, "limiter": {"min": 2000}, "mode": "off"}`, ServerPolicy{mode: modeOff, admission: shedding.ServerConfig{
			Limiter: shedding.LimiterConfig{Min: 2000}, Queue: &shedding.QueueConfig{},
		}}},
		{`{"limiter": {"algorithm": "static", "limit": 1000000}, "tenants": {"metadataKey": "user-bin", "perSecond": "0.5"}}`,
			ServerPolicy{mode: modeOn, admission: shedding.ServerConfig{
				Limiter: shedding.LimiterConfig{Algorithm: shedding.Static, Limit: 1000000},
				Tenants: &shedding.TenantsConfig{MetadataKey: "user-bin", PerSecond: 0.5},
			}}},
		{`{"tenants": {"metadataKey": "X-Tenant"}}`, ServerPolicy{mode: modeOn, admission: shedding.ServerConfig{
			Tenants: &shedding.TenantsConfig{MetadataKey: "X-Tenant"},
		}}},
		{`{"queue": {"maxWait": "0.001s"}}`, ServerPolicy{mode: modeOn, admission: shedding.ServerConfig{
			Queue: &shedding.QueueConfig{MaxWait: time.Millisecond},
		}}},
		// What the documentation of DefaultServerPolicy says.
		{defaultServerDocument, ServerPolicy{mode: modeOn, loadReport: true, admission: shedding.ServerConfig{
			Limiter: shedding.LimiterConfig{Algorithm: shedding.Gradient, Initial: 20, Min: 1, Max: 1000},
			Queue:   &shedding.QueueConfig{MaxLength: 1000, Target: 5 * time.Millisecond, MaxWait: 100 * time.Millisecond},
			Exempt:  []string{"/grpc.health.v1.Health/*"},
		}}},
	} {
		p, err := ParseServerPolicy([]byte(tc.text))
		if err != nil {
			t.Errorf("%s: %v", tc.text, err)
			continue
		}
		if d := cmp.Diff(tc.want, p, cmp.AllowUnexported(ServerPolicy{})); d != "" {
			t.Errorf("%s (-want +got)\n%s", tc.text, d)
		}
	}
}

// The document that the documentation shows, whatever else it says, has every key and no
// fault.
func TestDocumentedServerPolicy(t *testing.T) {
	text, err := os.ReadFile("docs/serverpolicy.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "```json\n")
	shown, _, _ := strings.Cut(rest, "```")
	p, err := ParseServerPolicy([]byte(shown))
	if err != nil {
		t.Fatal(err)
	}
	if a := p.admission; a.Queue == nil || a.Tenants == nil || a.Exempt == nil || a.MaxCriticality == nil || !p.loadReport {
		t.Errorf("it leaves keys out: %+v", p)
	}
	if d := cmp.Diff(DefaultServerPolicy().admission.Queue, p.admission.Queue); d != "" {
		t.Errorf("it says that the default were another (-default +shown)\n%s", d)
	}
}

func FuzzParseServerPolicy(f *testing.F) {
	f.Add([]byte(goodServer))
	f.Add([]byte(defaultServerDocument))
	for _, tc := range brokenServer {
		f.Add([]byte(tc.text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := ParseServerPolicy(text)
		if err != nil {
			for _, line := range strings.Split(err.Error(), "\nbobtail: ") {
				if line == "" {
					t.Errorf("an empty fault in %q", err)
				}
			}
			return
		}
		// What is accepted can be used.
		s, err := NewServer(p, WithLogger(nil))
		if err != nil {
			t.Fatalf("NewServer: %v", err)
		}
		s.ServerOptions()
		if err := s.Update(p); err != nil {
			t.Errorf("a policy cannot replace itself: %v", err)
		}
		s.current.Load().exempts("")
	})
}
