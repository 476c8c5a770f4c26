package shedding

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/tap"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

func TestArrival(t *testing.T) {
	cap := SheddablePlus
	for _, tc := range []struct {
		name  string
		md    metadata.MD
		max   *Criticality
		class Criticality
		extra bool
	}{
		{"nothing", nil, nil, Critical, false},
		{"a class", metadata.Pairs(CriticalityKey, "critical_plus"), nil, CriticalPlus, false},
		{"unknown", metadata.Pairs(CriticalityKey, "CRITICAL_PLUS"), nil, Critical, false},
		{"garbled", metadata.Pairs(CriticalityKey, "\xff"), nil, Critical, false},
		{"empty", metadata.MD{CriticalityKey: {}}, nil, Critical, false},
		{"repeated", metadata.Pairs(CriticalityKey, "critical_plus", CriticalityKey, "sheddable", CriticalityKey, "critical"), nil, Sheddable, false},
		{"repeated and garbled", metadata.Pairs(CriticalityKey, "critical_plus", CriticalityKey, "x"), nil, Critical, false},
		{"capped", metadata.Pairs(CriticalityKey, "critical_plus"), &cap, SheddablePlus, false},
		{"capped by default", nil, &cap, SheddablePlus, false},
		{"below the cap", metadata.Pairs(CriticalityKey, "sheddable"), &cap, Sheddable, false},
		{"a retry", metadata.Pairs("grpc-previous-rpc-attempts", "1"), nil, Critical, true},
		{"a first attempt that says so", metadata.Pairs("grpc-previous-rpc-attempts", "0"), nil, Critical, false},
		{"garbled attempts", metadata.Pairs("grpc-previous-rpc-attempts", "-1", "grpc-previous-rpc-attempts", "1x"), nil, Critical, false},
		{"repeated attempts", metadata.Pairs("grpc-previous-rpc-attempts", "0", "grpc-previous-rpc-attempts", "2"), nil, Critical, true},
	} {
		s := newServer(t, ServerConfig{MaxCriticality: tc.max})
		ctx := metadata.NewIncomingContext(context.Background(), tc.md)
		for _, h := range []header{tc.md, incoming{ctx}} {
			if a := s.arrivalOf(s.config.Load(), h); a.criticality != tc.class || a.extra != tc.extra {
				t.Errorf("%s: %v, extra %v, want %v, %v", tc.name, a.criticality, a.extra, tc.class, tc.extra)
			}
		}
	}
}

// The same tenant, or the same trace, is of one cohort on all servers; others are spread over
// all, and so is what nobody is known of.
func TestCohorts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // the hour does not change
		cfg := ServerConfig{Tenants: &TenantsConfig{MetadataKey: "t"}}
		a, b := newServer(t, cfg), newServer(t, cfg)
		cohort := func(s *Server, kv ...string) uint32 {
			return s.arrivalOf(s.config.Load(), metadata.Pairs(kv...)).cohort % Cohorts
		}
		const each = 100
		kinds := map[string]func(i int) []string{
			"tenants": func(i int) []string { return []string{"t", fmt.Sprint("tenant-", i), traceKey, trace(1)} },
			"traces":  func(i int) []string { return []string{traceKey, trace(i)} },
			"nothing": func(int) []string { return nil },
		}
		for name, kv := range kinds {
			var n [Cohorts]int
			for i := range each * Cohorts {
				c := cohort(a, kv(i)...)
				if other := cohort(b, kv(i)...); c != other {
					t.Fatalf("%s %d: cohorts %d and %d", name, i, c, other)
				}
				n[c]++
			}
			for c, n := range n {
				if n < each/2 || n > each*3/2 { // 5 sigma of chance
					t.Errorf("%s: %d of %d in cohort %d", name, n, each*Cohorts, c)
				}
				if name == "nothing" && (n < each-2 || n > each+2) {
					t.Errorf("%d of %d in cohort %d, dealt out in turn", n, each*Cohorts, c)
				}
			}
		}
		if x, y := hashID("tenant", 1)%Cohorts, hashID("tenant", 2)%Cohorts; x == y {
			t.Errorf("cohort %d in both hours", x)
		}
	})
}

// Where callers are not trusted, none can choose its cohort: the same trace comes to be of
// all of them in turn. A tenant's, which they cannot choose, stays.
func TestCohortsAtTheEdge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // the hour does not change
		top := Critical
		s := newServer(t, ServerConfig{MaxCriticality: &top, Tenants: &TenantsConfig{MetadataKey: "t"}})
		ofTrace, ofTenant := map[uint32]int{}, map[uint32]int{}
		for range 10 * Cohorts {
			ofTrace[s.arrivalOf(s.config.Load(), metadata.Pairs(traceKey, trace(1))).cohort%Cohorts]++
			ofTenant[s.arrivalOf(s.config.Load(), metadata.Pairs(traceKey, trace(1), "t", "a")).cohort%Cohorts]++
		}
		for c, n := range ofTrace {
			if n < 8 || n > 12 {
				t.Errorf("%d of %d calls of a trace in cohort %d", n, 10*Cohorts, c)
			}
		}
		if len(ofTrace) != Cohorts || len(ofTenant) != 1 {
			t.Errorf("a trace is of %d cohorts, a tenant of %d; want %d and 1", len(ofTrace), len(ofTenant), Cohorts)
		}
	})
}

func trace(i int) string { return fmt.Sprintf("00-%032x-%016x-01", i, 7) }

// The class goes with the calls that a handler makes, as the cap left it, unless the
// handler says another.
func TestPropagateCriticality(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cap := Critical
		s := newServer(t, ServerConfig{MaxCriticality: &cap})
		var seen []string
		sees := func(ctx context.Context) {
			md, _ := metadata.FromOutgoingContext(PropagateCriticality(ctx))
			said, _ := metadata.FromOutgoingContext(PropagateCriticality(WithCriticality(ctx, SheddablePlus)))
			seen = append(seen, fmt.Sprint(md[CriticalityKey], said[CriticalityKey]))
		}
		client := kvpb.NewKVClient(grpctest.NewFleet(t, 1, grpctest.Handlers{
			Unary: func(ctx context.Context, _ *grpctest.Backend, _ *kvpb.Request) (*kvpb.Response, error) {
				sees(ctx)
				return &kvpb.Response{}, nil
			},
			Scan: func(_ *grpctest.Backend, _ *kvpb.Request, ss grpc.ServerStreamingServer[kvpb.Response]) error {
				sees(ss.Context())
				return nil
			},
		}, grpc.ChainUnaryInterceptor(s.UnaryServerInterceptor()), grpc.ChainStreamInterceptor(s.StreamServerInterceptor())).Dial())
		for _, tc := range []struct {
			ctx  context.Context
			want string
		}{
			{t.Context(), "[] [sheddable_plus]"},
			{WithCriticality(t.Context(), Sheddable), "[sheddable] [sheddable_plus]"},
			{WithCriticality(WithCriticality(t.Context(), Sheddable), Critical), "[critical] [sheddable_plus]"},
			{WithCriticality(t.Context(), CriticalPlus), "[critical] [sheddable_plus]"},
		} {
			seen = nil
			if _, err := client.Get(tc.ctx, &kvpb.Request{}); err != nil {
				t.Fatal(err)
			}
			ss, err := client.Scan(tc.ctx, &kvpb.Request{})
			if err != nil {
				t.Fatal(err)
			}
			_, _ = ss.Recv()
			if got := strings.Join(seen, " "); got != tc.want+" "+tc.want {
				t.Errorf("%s, want twice %s", got, tc.want)
			}
		}
	})
	if ctx := context.Background(); PropagateCriticality(ctx) != ctx {
		t.Error("another context, for nothing")
	}
}

// An exempt method is admitted whatever it claims, and passes on no more than others may.
func TestExemptPropagatesCapped(t *testing.T) {
	for _, capped := range []bool{false, true} {
		cfg := ServerConfig{Exempt: []string{"/kv.KV/*"}}
		want := []string{"critical_plus", "sheddable", ""}
		if capped {
			most := SheddablePlus
			cfg.MaxCriticality = &most
			want = []string{"sheddable_plus", "sheddable", "sheddable_plus"}
		}
		s := newServer(t, cfg)
		for i, claim := range []string{"critical_plus", "sheddable", ""} {
			ctx := context.Background()
			if claim != "" {
				ctx = metadata.NewIncomingContext(ctx, metadata.Pairs(CriticalityKey, claim))
			}
			see := func(in context.Context) {
				md, _ := metadata.FromOutgoingContext(PropagateCriticality(in))
				if got := strings.Join(md[CriticalityKey], " "); got != want[i] {
					t.Errorf("capped %v: claims %q, passes on %q, want %q", capped, claim, got, want[i])
				}
				if !capped && in != ctx {
					t.Error("another context, for nothing")
				}
			}
			_, _ = s.UnaryServerInterceptor()(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/kv.KV/Get"},
				func(ctx context.Context, _ any) (any, error) { see(ctx); return nil, nil })
			_ = s.StreamServerInterceptor()(nil, fakeStream{ctx: ctx}, &grpc.StreamServerInfo{FullMethod: "/kv.KV/Scan"},
				func(_ any, ss grpc.ServerStream) error { see(ss.Context()); return nil })
		}
	}
}

// FuzzMetadata: whatever a caller sends, nothing panics, its class is not above the cap, nor
// above the lowest that it names, and a tenant's name is not long.
func FuzzMetadata(f *testing.F) {
	f.Add("critical_plus", "sheddable", "1", "tenant", trace(1), int8(0))
	f.Add("", "\x00", "99999999999999999999", strings.Repeat("x", 100), "00-", int8(-2))
	f.Add("CRITICAL", "critical_plus ", "-1", "\xff\xfe", strings.Repeat("-", 35), int8(1))
	f.Fuzz(func(t *testing.T, class, second, attempts, tenant, trace string, top int8) {
		most := min(max(Criticality(top), Sheddable), CriticalPlus)
		s := newServer(t, ServerConfig{MaxCriticality: &most, Queue: &QueueConfig{}, Tenants: &TenantsConfig{MetadataKey: "t", PerSecond: 10, Max: 2}})
		md := metadata.MD{CriticalityKey: {class, second}, "grpc-previous-rpc-attempts": {attempts}, "t": {tenant}, traceKey: {trace}}
		a := s.arrivalOf(s.config.Load(), md)
		for _, v := range md[CriticalityKey] {
			if c, _ := ParseCriticality(v); a.criticality > c || a.criticality > most {
				t.Errorf("%v of %q at most %v", a.criticality, md[CriticalityKey], most)
			}
		}
		if len(a.tenant) > longestID {
			t.Errorf("a tenant of %d bytes", len(a.tenant))
		}
		if l := a.level(); l >= levels || l.Criticality() != a.criticality {
			t.Errorf("level %d of %v", l, a.criticality)
		}
		// All the way through, tap and interceptor, refused and not.
		unary := s.UnaryServerInterceptor()
		for _, v := range []Verdict{0, verdict(levels/2, ms)} {
			s.gate.Publish(v)
			ctx, err := s.TapHandle(context.Background(), &tap.Info{FullMethodName: class, Header: md})
			if err != nil {
				continue
			}
			ctx = PropagateCriticality(metadata.NewIncomingContext(ctx, md))
			_, _ = unary(ctx, nil, &grpc.UnaryServerInfo{FullMethod: class}, func(ctx context.Context, _ any) (any, error) {
				out, _ := metadata.FromOutgoingContext(PropagateCriticality(WithCriticality(ctx, a.criticality)))
				if len(out[CriticalityKey]) != 1 {
					t.Errorf("outgoing %v", out)
				}
				return nil, nil
			})
		}
		if st := s.Stats(); st.InFlight != 0 || st.Tenants > 2 {
			t.Errorf("%+v", st)
		}
	})
}
