package bobtail

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/serviceconfig"

	"github.com/bobtail-rpc/bobtail/breaker"
	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/strictjson"
	"github.com/bobtail-rpc/bobtail/loadbalance"
	"github.com/bobtail-rpc/bobtail/retry"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// Policy is a client's policy document, parsed and found good: a gRPC service
// config with keys of our own beside the standard ones. The zero value is the
// empty document: balancing by bobtail_p2c and nothing else. A Policy does not
// change.
type Policy struct {
	entries []entry
	// names leads to the entry of a "/service/method", a "/service/" or, by "",
	// of everything else.
	names map[string]int

	throttle  *retry.ThrottleConfig
	extraLoad *retry.BudgetConfig

	// What grpc itself is handed, and therefore cannot change once connected.
	balancing   string // loadBalancingConfig as JSON
	passed      string // the rest of the service config as JSON
	ownBalancer bool
	// named is set when the older key loadBalancingPolicy chooses the balancer.
	named bool
}

// entry is one element of methodConfig.
type entry struct {
	timeout    time.Duration // 0: none
	idempotent bool
	mode       mode
	hedging    *hedging.Config
	retry      *retry.Config
	// byLevel chooses between the two by the method's idempotency_level, where a
	// document would have to say: NO_SIDE_EFFECTS is hedged, IDEMPOTENT retried, and of
	// methods of which nothing is known only those attempts that were never sent.
	// DefaultPolicy sets it.
	byLevel bool

	breaker     *breaker.Config
	throttling  *breaker.ThrottleConfig
	rate        *shedding.RateLimitConfig
	maxInFlight int // 0: no bound
}

type mode string

const (
	modeOn     mode = "on"
	modeShadow mode = "shadow"
	modeOff    mode = "off"
)

// defaultDocument is DefaultPolicy, but for what defaultRetry adds.
const defaultDocument = `{
  "loadBalancingConfig": [{"bobtail_p2c": {}}],
  "extraLoad": {"max": 0.05, "minPerSecond": 1, "window": "10s"},
  "methodConfig": [{
    "name": [{}],
    "hedgingPolicy": {
      "maxAttempts": 2, "hedgingPercentile": 95,
      "nonFatalStatusCodes": ["UNAVAILABLE"]
    },
    "adaptiveThrottling": {"k": 2, "window": "120s"}
  }]
}`

// defaultRetry stands beside the hedging of defaultDocument, which in a document would
// be a fault: which of the two a method gets, its idempotency_level says. The backoff
// is that of the AWS SDKs' standard mode but for its cap: a caller who waits for more
// than 2 s has gone.
var defaultRetry = retry.Config{
	MaxAttempts:    3,
	Backoff:        retry.Backoff{Initial: 50 * time.Millisecond, Max: 2 * time.Second, Multiplier: 2},
	RetryableCodes: []codes.Code{codes.Unavailable},
}

// DefaultPolicy returns a policy that is safe for any service.
//
//   - Methods whose proto option idempotency_level is NO_SIDE_EFFECTS are hedged at the
//     95th percentile of their latency, by 2 attempts.
//   - IDEMPOTENT ones are retried after UNAVAILABLE, up to 3 attempts, with a backoff
//     of full jitter from 50 ms to 2 s.
//   - All others are tried again only if an attempt provably never reached a server.
//   - Extra attempts of all kinds together are at most 5% of the calls (and 1 per
//     second, so that a quiet client can hedge too).
//   - Adaptive throttling refuses calls while a server fails more than half of a
//     method's, over two minutes.
//   - Backends are chosen by bobtail_p2c.
func DefaultPolicy() Policy {
	p, err := ParsePolicy([]byte(defaultDocument))
	if err != nil {
		panic(err) // cannot be: a test parses it
	}
	for i := range p.entries {
		p.entries[i].retry = &defaultRetry
		p.entries[i].byLevel = true
	}
	return p
}

// ParsePolicy reads a policy document. Its error tells every fault at once, each
// with its JSON path, the value and what is wanted there; unknown, null and
// duplicate keys are faults.
func ParsePolicy(text []byte) (Policy, error) {
	p := Policy{names: map[string]int{}}
	err := strictjson.Read(text, "bobtail: policy", func(o *strictjson.Object) { p.read(&reader{o}) })
	if err != nil {
		return Policy{}, err
	}
	return p, nil
}

func (p *Policy) read(r *reader) {
	passed := map[string]json.RawMessage{}
	p.readBalancing(r, passed)
	if t := r.object("retryThrottling"); t != nil {
		p.throttle = t.throttling()
	}
	if e := r.object("extraLoad"); e != nil {
		p.extraLoad = e.extraLoad()
	}
	m := r.mode(modeOn)
	if h := r.object("healthCheckConfig"); h != nil {
		if name, ok := h.text("serviceName"); ok {
			passed["healthCheckConfig"] = mustJSON(map[string]string{"serviceName": name})
		}
		h.End()
	}
	var methods []map[string]json.RawMessage
	hands := false
	for _, v := range r.Key("methodConfig").List() {
		if handed := p.entry(readerOf(v), m); handed != nil {
			methods = append(methods, handed)
			hands = hands || len(handed) > 1
		}
	}
	r.End()
	if hands {
		// All of them: an entry that hands nothing down still shadows a broader
		// one that does.
		passed["methodConfig"] = mustJSON(methods)
	}
	if len(passed) > 0 {
		p.passed = string(mustJSON(passed))
	}
}

// readBalancing reads which policy chooses backends.
func (p *Policy) readBalancing(r *reader, passed map[string]json.RawMessage) {
	old, named := r.text("loadBalancingPolicy")
	if named {
		// Of the proto enum that came before the name: "ROUND_ROBIN".
		if lower := strings.ToLower(old); balancer.Get(old) == nil && balancer.Get(lower) != nil {
			old = lower
		}
		if balancer.Get(old) == nil {
			r.Fault("loadBalancingPolicy", "%q is no registered balancer, want for instance %q", old, loadbalance.P2CName)
		}
		passed["loadBalancingPolicy"] = mustJSON(old)
		p.named = true
	}
	l := r.Key("loadBalancingConfig")
	choices := l.List()
	if choices == nil {
		p.ownBalancer = !p.named || strings.HasPrefix(old, "bobtail_")
		return
	}
	p.balancing = string(l.JSON())
	chosen := ""
	for _, c := range choices {
		name, config, ok := c.Only()
		if !ok {
			c.Fault("want an object with one key, the name of a balancer")
			continue
		}
		b := balancer.Get(name)
		if b == nil || chosen != "" {
			continue // grpc takes the first that it knows
		}
		chosen = name
		if parser, ok := b.(balancer.ConfigParser); ok {
			if _, err := parseBalancer(parser, config.JSON()); err != nil {
				config.Fault("%w", err)
			}
		}
	}
	if chosen == "" {
		l.Fault("no balancer of it is registered, want for instance %q", loadbalance.P2CName)
	}
	p.ownBalancer = strings.HasPrefix(chosen, "bobtail_")
}

// parseBalancer shields the caller from a balancer whose parser panics.
func parseBalancer(p balancer.ConfigParser, text json.RawMessage) (cfg serviceconfig.LoadBalancingConfig, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("its parser panicked: %v", v)
		}
	}()
	return p.ParseConfig(text)
}

func (r *reader) mode(absent mode) mode {
	s, ok := r.text("mode")
	if !ok {
		return absent
	}
	switch m := mode(s); m {
	case modeOn, modeShadow, modeOff:
		return m
	}
	r.Fault("mode", "%q, want %q, %q or %q", s, modeOn, modeShadow, modeOff)
	return absent
}

// entry reads one element of methodConfig and returns what grpc is to have of it:
// its names and the keys handed down, nil if it has no name.
func (p *Policy) entry(r *reader, above mode) map[string]json.RawMessage {
	var e entry
	names := r.Key("name")
	named := names.List()
	for _, n := range named {
		p.name(readerOf(n))
	}
	e.timeout, _ = r.duration("timeout", "more than 0s", above0)
	e.idempotent, _ = r.Key("idempotent").Bool()
	e.mode = r.mode(above)
	if r.Has("hedgingPolicy") && r.Has("retryPolicy") {
		r.Fault("", "retryPolicy and hedgingPolicy together, want one of them")
	}
	if h := r.object("hedgingPolicy"); h != nil {
		e.hedging = h.hedging()
	}
	if t := r.object("retryPolicy"); t != nil {
		e.retry = t.retrying()
	}
	if b := r.object("circuitBreaker"); b != nil {
		e.breaker = b.breaking()
	}
	if t := r.object("adaptiveThrottling"); t != nil {
		e.throttling = t.adaptive()
	}
	if l := r.object("rateLimit"); l != nil {
		e.rate = l.limiting()
	}
	n, _ := r.number("maxInFlight", "an integer in [1, 1000000]", whole(1, 1e6))
	e.maxInFlight = int(n)

	handed := map[string]json.RawMessage{}
	if wait, ok := r.Key("waitForReady").Bool(); ok {
		handed["waitForReady"] = mustJSON(wait)
	}
	for _, k := range []string{"maxRequestMessageBytes", "maxResponseMessageBytes"} {
		v, ok := r.number(k, "an integer in [0, 2^53]", func(v float64) bool {
			return v >= 0 && v == math.Trunc(v) && v <= 1<<53
		})
		if ok {
			handed[k] = mustJSON(int64(v)) // grpc-go does not read numbers in strings
		}
	}
	r.End()
	p.entries = append(p.entries, e)
	if len(named) == 0 {
		return nil // it applies to nothing, as in gRPC
	}
	handed["name"] = names.JSON()
	return handed
}

func (p *Policy) name(r *reader) {
	service, _ := r.text("service")
	method, _ := r.text("method")
	r.End()
	path := ""
	switch {
	case service == "" && method != "":
		r.Fault("method", "%q without a service", method)
		return
	case strings.Contains(service, "/") || strings.Contains(method, "/"):
		r.Fault("", "%q, want names without a slash", service+"/"+method)
		return
	case service != "":
		path = "/" + service + "/" + method
	}
	if _, dup := p.names[path]; dup {
		r.Fault("", "%q has an entry already", strings.TrimPrefix(path, "/"))
		return
	}
	p.names[path] = len(p.entries)
}

// ties reports whether the policy ties the calls of any method. The mode is not looked
// at: it may be switched later.
func (p *Policy) ties() bool {
	return slices.ContainsFunc(p.entries, func(e entry) bool { return e.hedging != nil && e.hedging.Tied })
}

func mustJSON(v any) json.RawMessage {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // cannot be: maps, lists and valid raw JSON
	}
	return text
}

// balancer returns the loadBalancingConfig in force: the document's, or ours; "" if
// the document names a loadBalancingPolicy, the older key.
func (p *Policy) balancer() string {
	switch {
	case p.balancing != "":
		return p.balancing
	case p.named:
		return ""
	}
	return `[{"` + loadbalance.P2CName + `":{}}]`
}

// serviceConfig is the part of the document that grpc itself obeys.
func (p *Policy) serviceConfig() string {
	all := map[string]json.RawMessage{}
	if p.passed != "" {
		if err := json.Unmarshal([]byte(p.passed), &all); err != nil {
			panic(err) // cannot be: we wrote it
		}
	}
	if b := p.balancer(); b != "" {
		all["loadBalancingConfig"] = json.RawMessage(b)
	}
	return string(mustJSON(all))
}

// lookup returns the entry of a full method name, "/service/method", and whether
// the entry names the method in full; nil if none matches. The longest name
// matches (gRFC A2, service config).
func (p *Policy) lookup(method string) (e *entry, named bool) {
	service := method[:strings.LastIndexByte(method, '/')+1]
	if i, ok := p.names[method]; ok && method != service {
		return &p.entries[i], true
	}
	if i, ok := p.names[service]; ok {
		return &p.entries[i], false
	}
	if i, ok := p.names[""]; ok {
		return &p.entries[i], false
	}
	return nil, false
}
