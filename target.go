package bobtail

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/bobtail-rpc/bobtail/breaker"
	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/telemetry"
	"github.com/bobtail-rpc/bobtail/retry"
	"github.com/bobtail-rpc/bobtail/shedding"
)

const (
	// maxTargets and maxMethods bound what a Client remembers. Targets beyond
	// share the state of one; methods beyond are called as if no policy but the
	// timeout applied. A method that is hedged or retried takes about 64 KiB.
	maxTargets = 1000
	maxMethods = 1000
)

// target is what is kept for one server name.
type target struct {
	// table is replaced when the policy changes or a method is first called. An
	// atomic because every call reads it.
	table atomic.Pointer[table]

	name  string // cc.Target(), or "" of those beyond the bound
	label string // cc.CanonicalTarget(), for telemetry; "other" of those

	mu       sync.Mutex // guards the rest and serialises the writers of table
	kept     map[string]*kept
	budget   *retry.Budget
	budgetOf retry.BudgetConfig
	throttle *retry.Throttle
	throtOf  retry.ThrottleConfig
}

// table is what one policy means for the methods that have been called.
type table struct {
	policy  *Policy
	methods map[string]*method
}

// kept is what one method has learned, and outlives the policy that it was learned
// under: what another policy leaves unchanged goes on where it was.
type kept struct {
	hedger  *hedging.Hedger
	retrier *retry.Retrier

	breaker    *breaker.Breaker
	breakerOf  *breaker.Config
	throttle   *throttles
	throttleOf breaker.ThrottleConfig
	rate       *shedding.RateLimit
	rateOf     shedding.RateLimitConfig
	bulkhead   *shedding.Bulkhead
	shadow     atomic.Bool // as of the policy in force
}

// method is what the policy in force does to the calls of one method of one
// target. It does not change.
type method struct {
	timeout  time.Duration
	guard    *guard          // nil: nothing may refuse a call
	hedger   *hedging.Hedger // nil: not hedged
	retrier  *retry.Retrier  // nil: not retried
	budget   *retry.Budget   // nil: no extraLoad
	throttle *retry.Throttle // nil: no retryThrottling
	// counts says which failures of a call that makes one attempt count for throttling;
	// nil: none, for no code is retryable.
	counts func(codes.Code) bool

	telemetry *telemetry.Method // nil: nobody is told
	tied      bool              // its hedges are tied copies
}

func (c *Client) target(cc *grpc.ClientConn) *target {
	name, label := "", "other"
	if cc != nil {
		name = cc.Target()
	}
	if t := (*c.targets.Load())[name]; t != nil {
		return t
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	old := *c.targets.Load()
	if len(old) >= maxTargets {
		name = "" // shared; no connection has an empty target
	} else if cc != nil {
		label = cc.CanonicalTarget()
	}
	if t := old[name]; t != nil {
		return t
	}
	t := &target{name: name, label: label, kept: map[string]*kept{}}
	t.table.Store(&table{})
	grown := maps.Clone(old)
	grown[name] = t
	c.targets.Store(&grown)
	return t
}

// method returns what is to be done with a call, by two reads of immutable maps.
func (c *Client) method(cc *grpc.ClientConn, name string) *method {
	t := c.target(cc)
	p := c.current.Load()
	tab := t.table.Load()
	if tab.policy == p {
		if m := tab.methods[name]; m != nil {
			return m
		}
	}
	return c.learn(t, name)
}

// learn works out what the policy means for a method, the first time that it is
// called under that policy.
func (c *Client) learn(t *target, name string) *method {
	t.mu.Lock()
	p := c.current.Load()
	tab := t.table.Load()
	if tab.policy != p {
		if err := t.fund(p); err != nil {
			t.mu.Unlock()
			// The document was checked against the same bounds, so this is a bug of
			// ours: no extra attempts rather than unbounded ones.
			c.log.Log(context.Background(), slog.LevelError, "bobtail: the policy is not in force", "target", t.name, "error", err)
			return &method{}
		}
		tab = &table{policy: p}
		t.table.Store(tab)
	}
	m := tab.methods[name]
	skipped := false
	if m == nil {
		room := len(tab.methods) < maxMethods
		m, skipped = t.compile(c, p, name, room)
		if room {
			grown := make(map[string]*method, len(tab.methods)+1)
			maps.Copy(grown, tab.methods)
			grown[name] = m
			t.table.Store(&table{policy: p, methods: grown})
		}
	}
	t.mu.Unlock()
	if skipped {
		c.once(name, "bobtail: not hedged: the policy does not name the method in full, and nothing says that it is safe to send twice",
			"method", name)
	}
	return m
}

// fund makes the budget and the throttle that p wants. It keeps those that p does
// not change, and also while p has none: a policy that is switched off and on again
// goes on where it was.
func (t *target) fund(p *Policy) error {
	if p.extraLoad != nil && (t.budget == nil || t.budgetOf != *p.extraLoad) {
		b, err := retry.NewBudget(*p.extraLoad, time.Now())
		if err != nil {
			return err
		}
		t.budget, t.budgetOf = b, *p.extraLoad
	}
	if p.throttle != nil && (t.throttle == nil || t.throtOf != *p.throttle) {
		h, err := retry.NewThrottle(*p.throttle)
		if err != nil {
			return err
		}
		t.throttle, t.throtOf = h, *p.throttle
	}
	return nil
}

// compile returns what p means for a method; skipped is set if it would be hedged
// but for want of consent. Beyond the bound on methods there is no room for what would
// have to be learned.
func (t *target) compile(c *Client, p *Policy, name string, room bool) (m *method, skipped bool) {
	m = &method{}
	if p.extraLoad != nil {
		m.budget = t.budget
	}
	if p.throttle != nil {
		m.throttle = t.throttle
	}
	e, named := p.lookup(name)
	m.telemetry = c.telemetry.Method(t.label, name, e != nil && named || recognized(name))
	if e == nil {
		return m, false
	}
	m.timeout = e.timeout
	if e.mode == modeOff || !room {
		return m, false
	}
	k := t.kept[name]
	if k == nil {
		k = &kept{}
		for old := range t.kept {
			if len(t.kept) < maxMethods {
				break
			}
			// One that the policy in force has not met yet, whichever: there is room for
			// those that it has.
			if _, met := t.table.Load().methods[old]; !met {
				delete(t.kept, old)
			}
		}
		t.kept[name] = k
	}
	hedge, retries, skipped := e.extra(name, named)
	errs := errors.Join(k.guard(c, t.name, m, e, name), k.hedge(c, m, hedge, e.mode), k.retry(c, m, retries, e.mode))
	if errs != nil {
		// The document was checked against the same bounds, so this is a bug of
		// ours; the caller's call must not pay for it.
		c.log.Log(context.Background(), slog.LevelError, "bobtail: part of the policy is not in force", "target", t.name, "method", name, "error", errs)
	}
	return m, skipped
}

// extra returns how the entry makes extra attempts for a method, if it does; skipped is
// set if it would hedge but for want of consent.
func (e *entry) extra(name string, named bool) (hedge *hedging.Config, retries *retry.Config, skipped bool) {
	if !e.byLevel {
		if e.hedging != nil && !e.consents(name, named) {
			return nil, nil, true
		}
		return e.hedging, e.retry, false
	}
	switch idempotency(name) {
	case descriptorpb.MethodOptions_NO_SIDE_EFFECTS:
		return e.hedging, nil, false
	case descriptorpb.MethodOptions_IDEMPOTENT:
		return nil, e.retry, false
	}
	unsent := *e.retry
	unsent.UnsentOnly = true
	return nil, &unsent, false
}

func (k *kept) hedge(c *Client, m *method, of *hedging.Config, in mode) (err error) {
	if of == nil {
		return nil
	}
	cfg := *of
	cfg.Shadow = in == modeShadow
	cfg.Report = c.hedgeReports
	// An interface that holds a nil pointer is not nil: leave it unset.
	if m.budget != nil {
		cfg.Budget = m.budget
	}
	if m.throttle != nil {
		cfg.Throttle = m.throttle
	}
	if k.hedger != nil {
		m.hedger, err = k.hedger.With(cfg)
	} else {
		m.hedger, err = hedging.New(cfg)
	}
	if err == nil {
		k.hedger = m.hedger
		m.tied = cfg.Tied
	}
	return err
}

func (k *kept) retry(c *Client, m *method, of *retry.Config, in mode) (err error) {
	if of == nil {
		return nil
	}
	cfg := *of
	cfg.Shadow = in == modeShadow
	cfg.Report = c.retryReports
	cfg.Budget, cfg.Throttle = m.budget, m.throttle
	if k.retrier != nil {
		m.retrier, err = k.retrier.With(cfg)
	} else {
		m.retrier, err = retry.New(cfg)
	}
	if err == nil {
		k.retrier = m.retrier
	}
	return err
}

// consents reports whether somebody who knows the method has said that it may be
// executed more than once: the author of an entry that names it in full, or says
// "idempotent", or the author of its proto.
func (e *entry) consents(method string, named bool) bool {
	return named || e.idempotent || idempotency(method) != descriptorpb.MethodOptions_IDEMPOTENCY_UNKNOWN
}

// idempotency looks a "/service/method" up among the linked descriptors.
func idempotency(method string) descriptorpb.MethodOptions_IdempotencyLevel {
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(descriptorName(method))
	if err != nil {
		return descriptorpb.MethodOptions_IDEMPOTENCY_UNKNOWN
	}
	o, ok := d.Options().(*descriptorpb.MethodOptions)
	if !ok {
		return descriptorpb.MethodOptions_IDEMPOTENCY_UNKNOWN
	}
	return o.GetIdempotencyLevel()
}

// descriptorName is what the descriptor of a "/service/method" is called, "" if it is no such name.
func descriptorName(method string) protoreflect.FullName {
	name, ok := strings.CutPrefix(method, "/")
	if !ok {
		return ""
	}
	return protoreflect.FullName(strings.ReplaceAll(name, "/", "."))
}
