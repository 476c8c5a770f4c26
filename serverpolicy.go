package bobtail

import (
	"strings"
	"time"

	"github.com/bobtail-rpc/bobtail/internal/strictjson"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// ServerPolicy is a server's policy document, parsed and found good. The zero value is the
// empty document: a gradient limiter and nothing else, so that what finds no slot free is
// refused. A ServerPolicy does not change.
type ServerPolicy struct {
	mode mode // "" is on
	// admission lacks what a document cannot say: Shadow, which is the mode's, and Report.
	admission  shedding.ServerConfig
	loadReport bool
}

// defaultServerDocument is DefaultServerPolicy.
const defaultServerDocument = `{
  "mode": "on",
  "limiter": {"algorithm": "gradient", "initial": 20, "min": 1, "max": 1000},
  "queue": {"maxLength": 1000, "target": "0.005s", "maxWait": "0.100s"},
  "exempt": ["/grpc.health.v1.Health/*"],
  "loadReport": true
}`

// DefaultServerPolicy returns a policy that is safe for any server.
//
//   - A gradient limiter finds how many handlers may run at once, from 20 on.
//   - Up to 1000 calls wait for a slot, none for longer than 100 ms. A wait that stays
//     over 5 ms is an overload: then the least critical are refused first.
//   - Health checks are never refused.
//   - Answers carry a report of the load, for bobtail_prequal and other balancers that
//     read one.
//
// There are no quotas of tenants. A server whose handlers mostly wait, and of which many run at
// once, needs some seconds to find its limit from 20 on, and refuses calls meanwhile: give it
// "limiter": {"min": ...}, of its calls per second times their seconds.
func DefaultServerPolicy() ServerPolicy {
	p, err := ParseServerPolicy([]byte(defaultServerDocument))
	if err != nil {
		panic(err) // cannot be: a test parses it
	}
	return p
}

// ParseServerPolicy reads a server's policy document. Its error tells every fault at once,
// each with its JSON path, the value and what is wanted there; unknown, null and duplicate
// keys are faults.
func ParseServerPolicy(text []byte) (ServerPolicy, error) {
	var p ServerPolicy
	err := strictjson.Read(text, "bobtail: server policy", func(o *strictjson.Object) {
		p = (&reader{o}).serverPolicy()
		if o.Faults() > 0 {
			return
		}
		// Nothing that the readers let through: package shedding has the last word.
		if err := p.admission.Validate(); err != nil {
			o.Fault("", "%w", err)
		}
	})
	if err != nil {
		return ServerPolicy{}, err
	}
	return p, nil
}

func (r *reader) serverPolicy() ServerPolicy {
	p := ServerPolicy{mode: r.mode(modeOn)}
	if l := r.object("limiter"); l != nil {
		p.admission.Limiter = l.limiter()
	}
	if q := r.object("queue"); q != nil {
		p.admission.Queue = q.queue()
	}
	if t := r.object("tenants"); t != nil {
		p.admission.Tenants = t.tenants()
	} else if q := p.admission.Queue; q != nil && q.Shards > 1 && !r.Has("tenants") {
		r.Fault("tenants", "missing, want it beside queue.shards: it is tenants that are dealt queues")
	}
	p.admission.Exempt = r.exempt()
	if s, ok := r.text("maxCriticality"); ok {
		c, ok := shedding.ParseCriticality(s)
		if !ok {
			r.Fault("maxCriticality", "%q, want %q, %q, %q or %q", s,
				shedding.CriticalPlus, shedding.Critical, shedding.SheddablePlus, shedding.Sheddable)
		}
		p.admission.MaxCriticality = &c
	}
	p.loadReport, _ = r.Key("loadReport").Bool()
	r.End()
	return p
}

// limiter reads the object that says how many handlers run at once.
func (r *reader) limiter() (c shedding.LimiterConfig) {
	defer r.End()
	before := r.Faults()
	if s, ok := r.text("algorithm"); ok {
		switch a := shedding.Algorithm(s); a {
		case shedding.Gradient, shedding.Vegas, shedding.AIMD, shedding.Static:
			c.Algorithm = a
		default:
			r.Fault("algorithm", "%q, want %q, %q, %q or %q", s, shedding.Gradient, shedding.Vegas, shedding.AIMD, shedding.Static)
		}
	}
	for _, f := range []struct {
		key string
		to  *int
	}{{"initial", &c.Initial}, {"min", &c.Min}, {"max", &c.Max}, {"limit", &c.Limit}} {
		n, _ := r.number(f.key, "an integer in [1, 1000000]", whole(1, 1e6))
		*f.to = int(n)
	}
	if r.Faults() > before {
		return c // what follows would compare with values that are not there
	}
	if c.Algorithm == shedding.Static {
		r.Need("limit")
		for _, k := range []string{"initial", "min", "max"} {
			if r.Has(k) {
				r.Fault(k, "moves a limit, want none with algorithm %q", shedding.Static)
			}
		}
		return c
	}
	if r.Has("limit") {
		r.Fault("limit", "%d, want it with algorithm %q only", c.Limit, shedding.Static)
	}
	// The defaults of shedding.LimiterConfig.
	lo := max(c.Min, 1)
	hi := c.Max
	if hi == 0 {
		hi = max(1000, lo)
	}
	switch {
	case hi < lo:
		r.Fault("max", "%d, want at least min %d", hi, lo)
	case r.Has("initial") && (c.Initial < lo || c.Initial > hi):
		r.Fault("initial", "%d, want [min %d, max %d]", c.Initial, lo, hi)
	}
	return c
}

// queue reads the object that says who waits for a slot.
func (r *reader) queue() *shedding.QueueConfig {
	defer r.End()
	before := r.Faults()
	var c shedding.QueueConfig
	n, _ := r.number("maxLength", "an integer in [1, 100000]", whole(1, 1e5))
	c.MaxLength = int(n)
	c.Target, _ = r.duration("target", "more than 0s", above0)
	c.MaxWait, _ = r.duration("maxWait", "(0s, 60s]", func(d time.Duration) bool { return d > 0 && d <= time.Minute })
	shards, _ := r.number("shards", "an integer in [1, 256]", whole(1, 256))
	hand, _ := r.number("hand", "an integer in [1, 8]", whole(1, 8))
	c.Shards, c.Hand = int(shards), int(hand)
	switch {
	case r.Faults() > before:
	case c.Shards == 0 && c.Hand > 1:
		r.Fault("hand", "%d, want shards beside it, and at most as many", c.Hand)
	case c.Shards > 0 && c.Hand > c.Shards:
		r.Fault("hand", "%d, want at most shards %d", c.Hand, c.Shards)
	}
	switch {
	case r.Faults() > before || !r.Has("target"):
	case c.MaxWait == 0 && c.Target > 100*time.Millisecond:
		r.Fault("target", "%s, want at most the default maxWait %s", seconds(c.Target), seconds(100*time.Millisecond))
	case c.MaxWait > 0 && c.Target > c.MaxWait:
		r.Fault("target", "%s, want at most maxWait %s", seconds(c.Target), seconds(c.MaxWait))
	}
	return &c
}

// tenants reads the object that says what each tenant may ask for.
func (r *reader) tenants() *shedding.TenantsConfig {
	defer r.End()
	var c shedding.TenantsConfig
	var ok bool
	if c.MetadataKey, ok = r.text("metadataKey"); ok && !isMetadataKey(c.MetadataKey) {
		r.Fault("metadataKey", "%q, want a key of gRPC metadata such as %q: of letters, digits, '-', '_' and '.', not beginning with \"grpc-\"", c.MetadataKey, "x-tenant-id")
	}
	c.PerSecond, _ = r.number("perSecond", "[0.001, 1000000000]", func(v float64) bool { return v >= 0.001 && v <= 1e9 })
	n, _ := r.number("burst", "an integer in [1, 1000000000]", whole(1, 1e9))
	c.Burst = int(n)
	if r.Has("burst") && !r.Has("perSecond") {
		r.Fault("burst", "of what? want perSecond beside it")
	}
	n, _ = r.number("max", "an integer in [1, 1000000]", whole(1, 1e6))
	c.Max = int(n)
	r.Need("metadataKey")
	return &c
}

// isMetadataKey tells whether a client can send metadata under the key, whose case does not
// matter. Names that gRPC keeps for itself are none of a tenant's.
func isMetadataKey(s string) bool {
	s = strings.ToLower(s)
	return s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-_.") == "" && !strings.HasPrefix(s, "grpc-")
}

// exempt reads the list of what is never refused.
func (r *reader) exempt() []string {
	var names []string
	seen := map[string]bool{}
	for _, v := range r.Key("exempt").List() {
		s, ok := v.Text("a string")
		switch {
		case !ok:
		case !isMethodPattern(s):
			v.Fault("%q, want %q or %q", s, "/package.Service/Method", "/package.Service/*")
		case seen[s]:
			v.Fault("%q is in the list already", s)
		default:
			names = append(names, s)
			seen[s] = true
		}
	}
	return names
}

// isMethodPattern tells whether s is a full method name, or that of all of a service.
func isMethodPattern(s string) bool {
	rest, slash := strings.CutPrefix(s, "/")
	service, method, two := strings.Cut(rest, "/")
	return slash && two && service != "" && method != "" &&
		!strings.ContainsAny(service, "* ") && !strings.ContainsAny(method, "/ ") &&
		(method == "*" || !strings.Contains(method, "*"))
}
