package bobtail

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/serviceconfig"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/loadbalance"
	"github.com/bobtail-rpc/bobtail/retry"
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
	// readOnly limits hedging to methods without side effects, where a document
	// would accept idempotent ones too. DefaultPolicy sets it.
	readOnly bool
}

type mode string

const (
	modeOn     mode = "on"
	modeShadow mode = "shadow"
	modeOff    mode = "off"
)

// defaultDocument is DefaultPolicy, but for readOnly.
const defaultDocument = `{
  "loadBalancingConfig": [{"bobtail_p2c": {}}],
  "extraLoad": {"max": 0.05, "minPerSecond": 1, "window": "10s"},
  "methodConfig": [{
    "name": [{}],
    "hedgingPolicy": {
      "maxAttempts": 2, "hedgingPercentile": 95,
      "nonFatalStatusCodes": ["UNAVAILABLE"]
    }
  }]
}`

// DefaultPolicy returns a policy that is safe for any service. Methods whose
// proto option idempotency_level is NO_SIDE_EFFECTS are hedged at the 95th
// percentile of their latency, by 2 attempts, within 5% of extra load (and 1 per
// second, so that a quiet client can hedge too); all other methods make one
// attempt. Backends are chosen by bobtail_p2c.
func DefaultPolicy() Policy {
	p, err := ParsePolicy([]byte(defaultDocument))
	if err != nil {
		panic(err) // cannot be: a test parses it
	}
	for i := range p.entries {
		p.entries[i].readOnly = true
	}
	return p
}

// ParsePolicy reads a policy document. Its error tells every fault at once, each
// with its JSON path, the value and what is wanted there; unknown, null and
// duplicate keys are faults. Keys of the design that this version does not build
// yet are faults that wrap [ErrNotSupported].
func ParsePolicy(text []byte) (Policy, error) {
	d := &document{what: "policy"}
	p := Policy{names: map[string]int{}}
	if root := d.parse(text); root != nil {
		d.policy(&p, &reader{d: d, o: root})
	}
	if err := errors.Join(d.faults...); err != nil {
		return Policy{}, err
	}
	return p, nil
}

func (d *document) policy(p *Policy, r *reader) {
	passed := map[string]json.RawMessage{}
	d.balancing(p, r, passed)
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
		h.end()
	}
	var methods []map[string]json.RawMessage
	hands := false
	l, _ := r.list("methodConfig")
	for i, n := range l {
		e := d.reader(fmt.Sprintf("methodConfig[%d]", i), n)
		if handed := p.entry(e, m); handed != nil {
			methods = append(methods, handed)
			hands = hands || len(handed) > 1
		}
	}
	r.end()
	if hands {
		// All of them: an entry that hands nothing down still shadows a broader
		// one that does.
		passed["methodConfig"] = mustJSON(methods)
	}
	if len(passed) > 0 {
		p.passed = string(mustJSON(passed))
	}
}

// balancing reads which policy chooses backends.
func (d *document) balancing(p *Policy, r *reader, passed map[string]json.RawMessage) {
	old, named := r.text("loadBalancingPolicy")
	if named {
		if balancer.Get(old) == nil {
			r.fault("loadBalancingPolicy", "%q is no registered balancer, want for instance %q", old, loadbalance.P2CName)
		}
		passed["loadBalancingPolicy"] = mustJSON(old)
		p.named = true
	}
	l, ok := r.list("loadBalancingConfig")
	if !ok {
		p.ownBalancer = !p.named || strings.HasPrefix(old, "bobtail_")
		return
	}
	p.balancing = string(encode(l))
	chosen := ""
	for i, n := range l {
		at := fmt.Sprintf("loadBalancingConfig[%d]", i)
		o, ok := n.(*object)
		if !ok || len(o.keys) != 1 {
			d.fault(at, "want an object with one key, the name of a balancer")
			continue
		}
		name := o.keys[0]
		b := balancer.Get(name)
		if b == nil || chosen != "" {
			continue // grpc takes the first that it knows
		}
		chosen = name
		if parser, ok := b.(balancer.ConfigParser); ok {
			if _, err := parseBalancer(parser, encode(o.fields[name])); err != nil {
				d.fault(at+"."+name, "%w", err)
			}
		}
	}
	if chosen == "" {
		d.fault("loadBalancingConfig", "no balancer of it is registered, want for instance %q", loadbalance.P2CName)
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
	r.fault("mode", "%q, want %q, %q or %q", s, modeOn, modeShadow, modeOff)
	return absent
}

func (r *reader) throttling() *retry.ThrottleConfig {
	defer r.end()
	var c retry.ThrottleConfig
	var ok1, ok2 bool
	c.MaxTokens, ok1 = r.number("maxTokens", "(0, 1000]", func(v float64) bool { return v > 0 && v <= 1000 })
	c.TokenRatio, ok2 = r.number("tokenRatio", "at least 0.001", func(v float64) bool { return v >= 0.001 })
	r.need("maxTokens", "tokenRatio")
	if !ok1 || !ok2 {
		return nil
	}
	if _, err := retry.NewThrottle(c); err != nil {
		r.fault("", "%w", err) // finer than it can count
		return nil
	}
	return &c
}

func (r *reader) extraLoad() *retry.BudgetConfig {
	defer r.end()
	var c retry.BudgetConfig
	var ok bool
	c.Max, ok = r.number("max", "[0.000001, 1]", func(v float64) bool { return v >= 1e-6 && v <= 1 })
	c.MinPerSecond, _ = r.number("minPerSecond", "[0, 1000000]", func(v float64) bool { return v >= 0 && v <= 1e6 })
	c.Window, _ = r.duration("window", "[0.010s, 3600s]", func(d time.Duration) bool {
		return d >= 10*time.Millisecond && d <= time.Hour
	})
	r.need("max")
	if !ok {
		return nil
	}
	if _, err := retry.NewBudget(c, time.Time{}); err != nil {
		r.fault("", "%w", err) // finer than it can count
		return nil
	}
	return &c
}

// need records required keys that are missing.
func (r *reader) need(keys ...string) {
	for _, k := range keys {
		if !r.has(k) {
			r.fault(k, "missing")
		}
	}
}

// entry reads one element of methodConfig and returns what grpc is to have of it:
// its names and the keys handed down, nil if it has no name.
func (p *Policy) entry(r *reader, above mode) map[string]json.RawMessage {
	var e entry
	names, _ := r.list("name")
	for i, n := range names {
		p.name(r.d.reader(fmt.Sprintf("%s.name[%d]", r.path, i), n))
	}
	e.timeout, _ = r.duration("timeout", "more than 0s", above0)
	e.idempotent, _ = r.boolean("idempotent")
	e.mode = r.mode(above)
	if r.has("hedgingPolicy") && r.has("retryPolicy") {
		r.fault("", "retryPolicy and hedgingPolicy together, want one of them")
	}
	if h := r.object("hedgingPolicy"); h != nil {
		e.hedging = h.hedging()
	}
	r.notYet("retryPolicy", "circuitBreaker", "adaptiveThrottling", "rateLimit", "maxInFlight")

	handed := map[string]json.RawMessage{}
	if _, ok := r.boolean("waitForReady"); ok {
		handed["waitForReady"], _ = r.pass("waitForReady")
	}
	for _, k := range []string{"maxRequestMessageBytes", "maxResponseMessageBytes"} {
		v, ok := r.number(k, "an integer in [0, 2^53]", func(v float64) bool {
			return v >= 0 && v == math.Trunc(v) && v <= 1<<53
		})
		if ok {
			handed[k] = mustJSON(int64(v)) // grpc-go does not read numbers in strings
		}
	}
	r.end()
	p.entries = append(p.entries, e)
	if len(names) == 0 {
		return nil // it applies to nothing, as in gRPC
	}
	handed["name"] = encode(names)
	return handed
}

func (p *Policy) name(r *reader) {
	service, _ := r.text("service")
	method, _ := r.text("method")
	r.end()
	path := ""
	switch {
	case service == "" && method != "":
		r.fault("method", "%q without a service", method)
		return
	case strings.Contains(service, "/") || strings.Contains(method, "/"):
		r.fault("", "%q, want names without a slash", service+"/"+method)
		return
	case service != "":
		path = "/" + service + "/" + method
	}
	if _, dup := p.names[path]; dup {
		r.fault("", "%q has an entry already", strings.TrimPrefix(path, "/"))
		return
	}
	p.names[path] = len(p.entries)
}

func (r *reader) hedging() *hedging.Config {
	defer r.end()
	before := len(r.d.faults)
	var c hedging.Config
	n, _ := r.number("maxAttempts", "an integer of at least 2", func(v float64) bool {
		return v >= 2 && v == math.Trunc(v)
	})
	r.need("maxAttempts")
	c.MaxAttempts = int(min(n, hedging.MaxAttemptsCap))
	c.Delay, _ = r.duration("hedgingDelay", "at least 0s", atLeast0)
	c.NonFatalCodes = r.codes("nonFatalStatusCodes")
	c.Percentile, _ = r.number("hedgingPercentile", "(0, 100)", func(v float64) bool { return v > 0 && v < 100 })
	var hasMin, hasMax bool
	c.MinDelay, hasMin = r.duration("minHedgingDelay", "more than 0s", above0)
	c.MaxDelay, hasMax = r.duration("maxHedgingDelay", "more than 0s", above0)
	if !r.has("hedgingPercentile") {
		if hasMin {
			r.fault("minHedgingDelay", "bounds an adaptive delay, want hedgingPercentile beside it")
		}
		if hasMax {
			r.fault("maxHedgingDelay", "bounds an adaptive delay, want hedgingPercentile beside it")
		}
	}
	if floor := max(c.MinDelay, 0); hasMax && floor == 0 && c.MaxDelay < hedging.DefaultMinDelay {
		r.fault("maxHedgingDelay", "%v, want at least the default minHedgingDelay %v", c.MaxDelay, hedging.DefaultMinDelay)
	} else if hasMax && c.MaxDelay < floor {
		r.fault("maxHedgingDelay", "%v, want at least minHedgingDelay %v", c.MaxDelay, floor)
	}
	if tied, ok := r.boolean("tied"); ok && tied {
		r.fault("tied", "%w", ErrNotSupported)
	}
	r.notYet("tieDelay")
	if len(r.d.faults) > before {
		return nil
	}
	return &c
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
