package shedding

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/bobtail-rpc/bobtail/internal/permethod"
)

// ServerConfig says what a server does when more is asked of it than it can do. The zero
// value is a gradient limiter without a queue: most servers want `Queue: &QueueConfig{}`.
type ServerConfig struct {
	// Shadow decides about every call, counts and reports it, and refuses nothing and
	// lets nobody wait. What the limiter finds is then only a hint: it does not see the
	// calls that it would have refused.
	Shadow bool

	// Limiter says how many handlers run at once.
	Limiter LimiterConfig

	// Queue says who waits when so many run. Nil: nobody; what is beyond the limit is
	// refused whatever its class.
	Queue *QueueConfig

	// Tenants says what each tenant may ask for. Nil: there are none.
	Tenants *TenantsConfig

	// Exempt are full names of methods, "/pkg.Service/Method", or "/pkg.Service/*" for all
	// of a service, that are never refused, never wait and are not counted. Health checks
	// and load reports always are.
	Exempt []string

	// MaxCriticality is the highest class that a caller may claim: what claims more, or
	// does not claim and would have it by default, has this one. For the edge, where
	// callers are not trusted: neither are their traces, so that a call without a tenant is of
	// no cohort of its own, and servers do not agree on who is refused. It holds for what
	// exempt methods pass on as well. Nil: no cap.
	MaxCriticality *Criticality

	// Report is told of each call that is admitted or refused, on the goroutine of the
	// call, or of its connection if the tap refuses it, where all other calls of the
	// connection wait for it: it must be quick. It is called under no lock of ours. If it
	// panics, that is the call's panic, and its slot is given back; on the goroutine of the
	// connection nobody can recover it, and it ends the process. May be nil.
	Report func(context.Context, ServerEvent)

	// Changed is told when the limit or the cursor has moved, and when an overload has
	// begun or ended, on the goroutine of some call or timer; under no lock of ours, so that two
	// may come in the wrong order: see [Event].At. A panic is as one of Report; on the
	// goroutine of a timer it ends the process. May be nil.
	Changed func(Event)
}

// ServerEvent is what became of a call at the door.
type ServerEvent struct {
	Method      string // the full name
	Criticality Criticality
	Extra       bool // a hedge or a retry
	Admitted    bool
	Reason      Reason // of one that was not
	// Wait is how long it was in the queue. In shadow its handler runs in the meantime; one
	// that has ended while the call would still wait is Admitted, with its wait so far.
	Wait   time.Duration
	Tap    bool // refused before it was decoded
	Shadow bool // not obeyed
}

// Validate reports every fault of the configuration, joined.
func (c ServerConfig) Validate() error {
	errs := []error{c.admission().Validate()}
	if c.Tenants != nil {
		errs = append(errs, c.Tenants.Validate())
	} else if c.Queue != nil && c.Queue.Shards > 1 {
		errs = append(errs, fmt.Errorf("shedding: queue shards %d without tenants, want both: it is tenants that are dealt queues", c.Queue.Shards))
	}
	for i, name := range c.Exempt {
		service, method, ok := splitMethod(name)
		if !ok || service == "" || method == "" || strings.Contains(service, "*") || method != "*" && strings.Contains(method, "*") {
			errs = append(errs, fmt.Errorf(`shedding: exempt[%d] %q, want "/pkg.Service/Method" or "/pkg.Service/*"`, i, name))
		}
	}
	if m := c.MaxCriticality; m != nil && (*m < Sheddable || *m > CriticalPlus) {
		errs = append(errs, fmt.Errorf("shedding: maxCriticality %d, want [%d (%v), %d (%v)]", *m, Sheddable, Sheddable, CriticalPlus, CriticalPlus))
	}
	return errors.Join(errs...)
}

func (c ServerConfig) admission() AdmissionConfig {
	return AdmissionConfig{Limiter: c.Limiter, Queue: c.Queue}
}

// splitMethod cuts "/pkg.Service/Method".
func splitMethod(name string) (service, method string, ok bool) {
	if !strings.HasPrefix(name, "/") {
		return "", "", false
	}
	return strings.Cut(name[1:], "/")
}

// alwaysExempt are services that tell of the server's state, which matters most in an
// overload.
var alwaysExempt = []string{
	"/grpc.health.v1.Health/*",
	"/bobtail.loadreport.v1.LoadReport/*",
	"/xds.service.orca.v3.OpenRcaService/*",
}

// serverConfig is a ServerConfig made for reading. It is not written to.
type serverConfig struct {
	ServerConfig
	services map[string]bool // exempt as a whole
	methods  map[string]bool // exempt, by full name
	tenant   string          // the key of its metadata; "": there are no tenants
}

func newServerConfig(c ServerConfig) *serverConfig {
	s := &serverConfig{ServerConfig: c, services: map[string]bool{}, methods: map[string]bool{}}
	for _, names := range [][]string{alwaysExempt, c.Exempt} {
		for _, name := range names {
			if service, all := strings.CutSuffix(name, "/*"); all {
				s.services[service] = true
			} else {
				s.methods[name] = true
			}
		}
	}
	if c.Tenants != nil {
		s.tenant = strings.ToLower(c.Tenants.MetadataKey)
	}
	return s
}

func (c *serverConfig) exempt(method string) bool {
	if i := strings.LastIndexByte(method, '/'); i > 0 && c.services[method[:i]] {
		return true
	}
	return c.methods[method]
}

// Server admits the calls of a grpc.Server, or of several in one process that share what
// limits them: an [Admission] with its clock, timer and lock. Its interceptors own the permits,
// [Server.TapHandle] is a short cut for what they would refuse.
//
// A Server is made by [NewServer], is safe for concurrent use, owns no goroutine and needs no
// Close: it has one timer, which runs while calls wait and while there is an overload.
type Server struct {
	config   atomic.Pointer[serverConfig] // read by every call
	draining atomic.Bool                  // likewise
	gate     Gate
	born     time.Time     // the zero of the medians' time
	dealt    atomic.Uint32 // see deal
	shuffle  uint32        // a seed: nobody is to choose a name that is dealt the hand of another
	tapErr   atomic.Pointer[tapError]
	methods  *permethod.Map[*median]
	admitted atomic.Int64
	refused  [reasons]atomic.Int64

	mu      sync.Mutex // guards the rest; nothing that waits or calls out is done under it
	core    *Admission
	tenants *tenants // nil: none
	timer   *time.Timer
	armed   time.Time // when it fires; zero: it does not
}

// NewServer returns a server that has seen nothing yet. All faults of cfg are reported
// together.
func NewServer(cfg ServerConfig) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Server{born: time.Now(), shuffle: rand.Uint32(), methods: permethod.New(func(string) *median { return &median{} })}
	s.core, _ = NewAdmission(cfg.admission())
	if cfg.Tenants != nil {
		s.tenants = newTenants(*cfg.Tenants)
	}
	s.config.Store(newServerConfig(cfg))
	return s, nil
}

// Reconfigure changes the configuration. Handlers run on with their permits, and those who
// wait go on waiting, see [Admission.Reconfigure]; in shadow nobody waits, so they run now.
// Tenants keep what they have used as long as their key is the same.
func (s *Server) Reconfigure(cfg ServerConfig) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	now := s.lock()
	if cfg.Shadow && !s.config.Load().Shadow {
		s.letIn(now)
	}
	switch err := s.core.Reconfigure(now, cfg.admission()); {
	case err != nil:
		s.mu.Unlock()
		return err
	case cfg.Tenants == nil:
		s.tenants = nil
	case s.tenants == nil || !strings.EqualFold(s.tenants.cfg.MetadataKey, cfg.Tenants.MetadataKey):
		s.tenants = newTenants(*cfg.Tenants)
	default:
		s.tenants.reconfigure(now, *cfg.Tenants)
	}
	s.config.Store(newServerConfig(cfg))
	s.unlock(now)
	return nil
}

// letIn lets in all who wait, without a slot. The lock is held.
func (s *Server) letIn(now time.Time) {
	if s.core.queue == nil {
		return
	}
	for {
		w, ok := s.core.queue.Pop()
		if !ok {
			return
		}
		p := w.Owner.(*permit)
		p.waits = false
		p.settled <- Settlement{Decision: Decision{Verb: Admitted}, Level: w.Level, Wait: now.Sub(w.Arrived)}
	}
}

// Drain refuses all calls that come from now on with UNAVAILABLE and a pushback, but for
// those of exempt methods. Those that run or wait are served. The health service is the
// caller's to turn.
func (s *Server) Drain() { s.draining.Store(true) }

// ServerStats is the state of a [Server], for gauges.
type ServerStats struct {
	Stats
	Draining bool
	Tenants  int     // that are live
	Share    float64 // calls/s that each of them may have in an overload; 0: not known
	Admitted int64   // since the start
	Refused  int64   // likewise; those whose clients left the queue included
}

// Stats returns the state now.
func (s *Server) Stats() ServerStats {
	st := ServerStats{Draining: s.draining.Load(), Admitted: s.admitted.Load()}
	for i := range s.refused {
		st.Refused += s.refused[i].Load()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Stats = s.core.Stats()
	if s.tenants != nil {
		st.Tenants, st.Share = s.tenants.len(), s.tenants.share
	}
	return st
}

// lock locks mu and returns the time: read under it, so that it does not go back.
func (s *Server) lock() time.Time {
	s.mu.Lock()
	now := time.Now()
	if s.core.queue != nil && !s.core.flow.due().After(now) {
		// What the tap has refused belongs to the window that ends now.
		s.gate.Report(s.core)
	}
	return now
}

// deliver tells those whose waits have ended. The lock is held.
func (s *Server) deliver(now time.Time) {
	for _, st := range s.core.Settled() {
		p := st.Owner.(*permit)
		p.waits, p.holds = false, st.Verb == Admitted
		if st.Verb == Refused && p.tenant != nil {
			p.tenant.giveBack(now)
		}
		p.settled <- st // it has room for one, and gets one
	}
}

// unlock makes known what has changed, and unlocks mu. It may panic after that, if Changed
// does: what is to be done about a permit is done before.
func (s *Server) unlock(now time.Time) {
	s.deliver(now)
	s.gate.Publish(s.core.Verdict())
	// One timer that fires too early now and then costs less than one that is set anew on
	// every call.
	if wake := s.core.NextWake(); !wake.IsZero() && (s.armed.IsZero() || wake.Before(s.armed)) {
		s.armed = wake
		if s.timer == nil {
			s.timer = time.AfterFunc(wake.Sub(now), s.tick)
		} else {
			s.timer.Reset(wake.Sub(now))
		}
	}
	var events []Event
	changed := s.config.Load().Changed
	if e := s.core.Events(); len(e) > 0 && changed != nil {
		events = append(events, e...) // the slice is the core's
	}
	s.mu.Unlock()
	for _, e := range events {
		changed(e)
	}
}

func (s *Server) tick() {
	now := s.lock()
	s.armed = time.Time{}
	s.gate.Report(s.core)
	s.core.Tick(now)
	s.unlock(now)
}

func (s *Server) report(ctx context.Context, cfg *serverConfig, e ServerEvent) {
	if e.Admitted {
		s.admitted.Add(1)
	} else {
		s.refused[e.Reason].Add(1)
	}
	if cfg.Report != nil {
		e.Shadow = cfg.Shadow
		cfg.Report(ctx, e)
	}
}
