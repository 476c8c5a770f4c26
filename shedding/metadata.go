package shedding

import (
	"context"
	"crypto/sha256"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
)

// CriticalityKey is the metadata that carries the class of a request by its name, see
// [ParseCriticality]. A missing, unknown or garbled one is [Critical]; of several the
// lowest counts.
const CriticalityKey = "bobtail-criticality"

// traceKey is W3C Trace Context's: what belongs to one page, or one user's action, has one
// trace.
const traceKey = "traceparent"

// WithCriticality returns a context whose outgoing calls are of the class. It replaces one
// that was set before.
func WithCriticality(ctx context.Context, c Criticality) context.Context {
	md, _ := metadata.FromOutgoingContext(ctx) // a copy
	if md == nil {
		md = metadata.MD{}
	}
	md.Set(CriticalityKey, c.String())
	return metadata.NewOutgoingContext(ctx, md)
}

// OutgoingCriticality returns the class of the calls that are made under ctx.
func OutgoingCriticality(ctx context.Context) Criticality {
	md, _ := metadata.FromOutgoingContext(ctx)
	return parseCriticality(md.Get(CriticalityKey))
}

// PropagateCriticality returns a context whose outgoing calls have the class of the
// incoming call that ctx belongs to, as the server's MaxCriticality left it; ctx itself if
// the caller has set one, or the incoming call had none.
func PropagateCriticality(ctx context.Context) context.Context {
	c, ok := ctx.Value(cappedKey{}).(Criticality)
	if !ok {
		values := metadata.ValueFromIncomingContext(ctx, CriticalityKey)
		if len(values) == 0 {
			return ctx
		}
		c = parseCriticality(values)
	}
	if md, _ := metadata.FromOutgoingContext(ctx); len(md.Get(CriticalityKey)) > 0 {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, CriticalityKey, c.String())
}

// cappedKey is of a context value: the class of an incoming call that has another than
// its metadata say.
type cappedKey struct{}

// parseCriticality is the lowest of the classes.
func parseCriticality(values []string) Criticality {
	if len(values) == 0 {
		return Critical
	}
	c := CriticalPlus
	for _, v := range values {
		parsed, _ := ParseCriticality(v)
		c = min(c, parsed)
	}
	return c
}

// header is where metadata are read from: metadata.MD in the tap, incoming behind it.
type header interface{ Get(key string) []string }

// incoming is the metadata of an incoming call, without a copy of all.
type incoming struct{ context.Context }

func (in incoming) Get(key string) []string { return metadata.ValueFromIncomingContext(in, key) }

// arrival is what the metadata say of a call.
type arrival struct {
	claimed     Criticality // by the metadata alone
	criticality Criticality
	extra       bool
	cohort      uint32
	tenant      string
}

func (a *arrival) level() Level { return LevelOf(a.criticality, a.extra, a.cohort) }

// arrivalKey is of a context value: the arrival that the tap has read, for the call to have
// the same cohort behind it.
type arrivalKey struct{}

// arrivalOf reads the metadata of a call.
func (s *Server) arrivalOf(cfg *serverConfig, h header) *arrival {
	a := &arrival{claimed: parseCriticality(h.Get(CriticalityKey)), extra: isExtra(h)}
	a.criticality = a.claimed
	if m := cfg.MaxCriticality; m != nil {
		a.criticality = min(a.criticality, *m)
	}
	if cfg.tenant != "" {
		a.tenant = tenantID(h.Get(cfg.tenant))
	}
	a.cohort = s.cohortOf(cfg, a.tenant, h)
	return a
}

// classified returns a context from which [PropagateCriticality] takes the class that an
// incoming call has, which claims another one.
func classified(ctx context.Context, claimed, is Criticality) context.Context {
	if claimed == is {
		return ctx
	}
	return context.WithValue(ctx, cappedKey{}, is)
}

// exemptContext is the context of an exempt method's handler: it is admitted whatever it
// claims, but the calls that it makes are not.
func (c *serverConfig) exemptContext(ctx context.Context) context.Context {
	if c.MaxCriticality == nil {
		return ctx
	}
	claimed := parseCriticality(incoming{ctx}.Get(CriticalityKey))
	return classified(ctx, claimed, min(claimed, *c.MaxCriticality))
}

// isExtra tells a hedge or a retry, ours or of any client that follows gRFC A6 ("Exposed
// Retry Metadata").
func isExtra(h header) bool {
	for _, v := range h.Get(attempt.PreviousAttempts) {
		if n, err := strconv.Atoi(v); err == nil && n >= 1 {
			return true
		}
	}
	return false
}

// cohortOf is a hash of the tenant; without one, of the trace, so that a page's calls
// are served all or none. Servers agree on it for an hour, so that all those whom a page
// needs refuse the same pages.
//
// Calls of which nothing is known are dealt out in turn, by the golden ratio (Knuth, The
// Art of Computer Programming, 6.4), which spreads any run of them evenly over the cohorts:
// there are no users to be told apart, and what the cursor cuts off can be refused in the
// tap.
//
// So are those of callers who are not trusted, which is where there is a MaxCriticality:
// the hash is no secret, and one in 64 traces is of the highest cohort. A seed that is one
// would not do: whoever has been served once in an overload can use that trace again.
func (s *Server) cohortOf(cfg *serverConfig, tenant string, h header) uint32 {
	id := tenant
	if id == "" && cfg.MaxCriticality == nil {
		if v := h.Get(traceKey); len(v) > 0 && len(v[0]) >= 35 {
			id = v[0][3:35] // version, trace, parent, flags
		}
	}
	if id == "" {
		return s.deal()
	}
	return hashID(id, uint32(time.Now().Unix()/3600))
}

// deal returns the cohorts in turn.
func (s *Server) deal() uint32 { return s.dealt.Add(0x9E3779B9) >> 26 }

// hashID is FNV-1a with a seed, its bits then mixed as in MurmurHash3: cohorts are the
// remainder, and FNV's low bits depend on the input's low bits only.
func hashID(id string, seed uint32) uint32 {
	h := uint32(2166136261) ^ seed*0x85EBCA6B
	for i := range len(id) {
		h = (h ^ uint32(id[i])) * 16777619
	}
	h ^= h >> 16
	h *= 0x85EBCA6B
	h ^= h >> 13
	h *= 0xC2B2AE35
	return h ^ h>>16
}

// longestID is the longest name of a tenant that is kept as it is.
const longestID = 64

// tenantID is the name of a tenant, in a bounded length. One who sends several names is
// nobody: whichever of them counted, it might be the one that no proxy has looked at.
func tenantID(values []string) string {
	if len(values) != 1 {
		return ""
	}
	if id := values[0]; len(id) <= longestID {
		return strings.Clone(id) // not a piece of something large
	}
	// A hash of which nobody finds two names, and that is the same on all servers.
	sum := sha256.Sum256([]byte(values[0]))
	return "sha256:" + string(sum[:])
}
