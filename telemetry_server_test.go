package bobtail_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	grpccodes "google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// spanned makes the span of each call, as otelgrpc would, outside of what is given.
func (s *sink) spanned(opts ...grpc.ServerOption) []grpc.ServerOption {
	tracer := s.tp.Tracer("of others")
	start := func(ctx context.Context, method string) (context.Context, trace.Span) {
		return tracer.Start(ctx, method[1:], trace.WithSpanKind(trace.SpanKindServer))
	}
	return append([]grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			ctx, span := start(ctx, info.FullMethod)
			defer span.End()
			return handler(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			ctx, span := start(ss.Context(), info.FullMethod)
			defer span.End()
			return handler(srv, under{ss, ctx})
		}),
	}, opts...)
}

type under struct {
	grpc.ServerStream
	ctx context.Context
}

func (u under) Context() context.Context { return u.ctx }

// What a server tells of calls that come a millisecond apart and take 10 ms each, while one
// handler runs at a time.
func TestServerTelemetryStories(t *testing.T) {
	const static, queue = `"limiter": {"algorithm": "static", "limit": 1}`, `, "queue": {"target": "0.1s", "maxWait": "0.1s"}`
	critical := func(class string) func(context.Context) context.Context {
		return func(ctx context.Context) context.Context {
			return metadata.AppendToOutgoingContext(ctx, shedding.CriticalityKey, class)
		}
	}
	for _, st := range []struct {
		name, policy string
		calls        int
		stream       bool
		with         func(context.Context) context.Context
		serve        func(context.Context) error
	}{
		{name: "server admitted", policy: "{" + static + "}", calls: 1},
		{name: "server refused", policy: "{" + static + "}", calls: 2, with: critical("sheddable")},
		{name: "server queued", policy: "{" + static + queue + "}", calls: 3, with: critical("critical_plus")},
		{name: "server queued stream", policy: "{" + static + queue + "}", calls: 2, stream: true},
		{name: "server shadow", policy: `{"mode": "shadow", ` + static + "}", calls: 2},
		{name: "server shadow queue", policy: `{"mode": "shadow", ` + static + queue + "}", calls: 2},
		{name: "server off", policy: `{"mode": "off", ` + static + "}", calls: 2},
		// What callers may claim is capped in mode off too, and that tells nothing either.
		{name: "server off capped", policy: `{"mode": "off", "maxCriticality": "critical", ` + static + "}", calls: 2},
		{name: "server tenants", policy: "{" + static + `, "tenants": {"metadataKey": "x-tenant", "perSecond": 1, "burst": 1}}`, calls: 2,
			with: func(ctx context.Context) context.Context {
				return metadata.AppendToOutgoingContext(ctx, "x-tenant", "acme")
			}},
		{name: "server exempt", policy: `{"exempt": ["/kv.KV/*"], ` + static + "}", calls: 2},
		// A handler that returns a refusal of its own, as of a call that it has made, was
		// admitted all the same.
		{name: "server failed", policy: "{" + static + "}", calls: 1, serve: func(context.Context) error {
			return &outcome.Refusal{Cause: errors.New("shedding: overloaded"), Code: grpccodes.Unavailable, Reason: "OVERLOADED"}
		}},
	} {
		t.Run(st.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSink()
				server := newServer(t, st.policy, s.options()...)
				serve := func(ctx context.Context) error {
					if st.serve != nil {
						return st.serve(ctx)
					}
					return after(ctx, 10*ms)
				}
				f := grpctest.NewFleet(t, 1, handler(func(ctx context.Context, _ int) error { return serve(ctx) }), s.spanned(server.ServerOptions()...)...)
				kv := kvpb.NewKVClient(bare(f))
				call := getFrom(kv)
				if st.stream {
					call = scanFrom(kv)
				}
				ctx, cancel := context.WithCancel(t.Context())
				if st.with != nil {
					ctx = st.with(ctx)
				}
				var wg sync.WaitGroup
				for range st.calls {
					wg.Go(func() { _ = call(ctx) }) // how it ends is told
					time.Sleep(ms)
				}
				running := gaugesOf(s.points(t))
				wg.Wait()
				cancel()
				synctest.Wait()
				golden(t, st.name, s.tree()+"\n"+s.points(t)+"\nwhile they run:\n"+running)
			})
		})
	}
}

// gaugesOf picks the gauges of a server.
func gaugesOf(points string) string {
	var b strings.Builder
	for line := range strings.Lines(points) {
		for _, name := range []string{"limit", "in_flight", "queue.length", "tenants"} {
			if strings.HasPrefix(line, "bobtail.server."+name+" ") {
				b.WriteString(line)
			}
		}
	}
	return b.String()
}

// overload drives a server that can do 100 calls/s with 400 for a second, three quarters of them
// sheddable; and then with a few.
func overload(t *testing.T, kv kvpb.KVClient) {
	t.Helper()
	var wg sync.WaitGroup
	for i := range 400 {
		ctx := t.Context()
		if i%4 > 0 {
			ctx = metadata.AppendToOutgoingContext(ctx, shedding.CriticalityKey, "sheddable")
		}
		wg.Go(func() { _, _ = kv.Get(ctx, &kvpb.Request{}) })
		time.Sleep(2500 * time.Microsecond)
	}
	wg.Wait()
	for range 200 {
		_, _ = kv.Get(t.Context(), &kvpb.Request{})
		time.Sleep(20 * ms)
	}
}

// An overload is told when it begins and when it ends, in a metric and in the log; what the
// tap refuses is counted, without a span.
func TestServerOverloadTelemetry(t *testing.T) {
	for _, mode := range []string{"on", "shadow", "off"} {
		synctest.Test(t, func(t *testing.T) {
			s := newSink()
			var log bytes.Buffer
			var reports, taps atomic.Int64
			server := newServer(t, `{"mode": "`+mode+`", "limiter": {"algorithm": "static", "limit": 1}, "queue": {}}`, append(s.options(),
				bobtail.WithLogger(slog.New(slog.NewTextHandler(&log, nil))),
				bobtail.WithServerReports(func(_ context.Context, e shedding.ServerEvent) {
					reports.Add(1)
					if e.Tap {
						taps.Add(1)
					}
				}))...)
			f := grpctest.NewFleet(t, 1, handler(func(ctx context.Context, _ int) error { return after(ctx, 10*ms) }), s.spanned(server.ServerOptions()...)...)
			overload(t, kvpb.NewKVClient(bare(f)))
			synctest.Wait()
			points := s.points(t)
			began, ended := strings.Count(points, "overload.transitions [{transition}] bobtail.state=began: "), strings.Count(points, "overload.transitions [{transition}] bobtail.state=ended: ")
			logged := strings.Count(log.String(), `msg="bobtail: server: overload began" waiting=`)
			switch {
			case mode == "off" && (points != "\n" || log.Len() > 0 || reports.Load() > 0):
				t.Errorf("off: %d reports, log %s, metrics %s", reports.Load(), log.String(), points)
			case mode == "on" && (began != 1 || ended != 1 || logged != 1 || strings.Count(log.String(), "overload ended") != 1):
				t.Errorf("%s: log %s, metrics %s", mode, log.String(), points)
			case mode == "on" && taps.Load() == 0:
				t.Error("the tap refuses nobody")
			case mode == "shadow" && taps.Load() > 0:
				t.Error("in mode shadow the tap refuses")
			}
			if mode == "off" {
				return
			}
			// Every call is told as one that was served or as one that was refused.
			const calls = 600
			var served, refused int64
			for line := range strings.Lines(points) {
				var n int64
				switch name, value, _ := strings.Cut(line, ": "); {
				case strings.HasPrefix(name, "bobtail.server.call.duration"):
					fmt.Sscanf(value, "count %d", &n)
					served += n
				case strings.HasPrefix(name, "bobtail.server.refusals"):
					fmt.Sscan(value, &n)
					refused += n
					if shadow := fmt.Sprintf("bobtail.shadow=%v", mode == "shadow"); !strings.Contains(name, shadow) {
						t.Errorf("%s, want %s", name, shadow)
					}
				}
			}
			if reports.Load() != calls || mode == "on" && (refused == 0 || served+refused != calls) || mode == "shadow" && served != calls {
				t.Errorf("%s: %d calls told, %d served, %d refused, want %d in all", mode, reports.Load(), served, refused, calls)
			}
			if n := int64(len(s.spans.GetSpans())); n != calls-taps.Load() {
				t.Errorf("%s: %d spans, want those of %d calls less %d that the tap refused", mode, n, calls, taps.Load())
			}
		})
	}
}

// A handler that panics, below an interceptor that recovers, has been served, nobody knows how.
func TestServerTelemetryPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSink()
		server := newServer(t, one, s.options()...)
		recovered := grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (_ any, err error) {
			defer func() {
				if recover() != nil {
					err = status.Error(grpccodes.Internal, "panic")
				}
			}()
			return handler(ctx, req)
		})
		f := grpctest.NewFleet(t, 1, handler(func(context.Context, int) error { panic("handler") }), append([]grpc.ServerOption{recovered}, server.ServerOptions()...)...)
		if err := getFrom(kvpb.NewKVClient(bare(f)))(t.Context()); status.Code(err) != grpccodes.Internal {
			t.Fatal(err)
		}
		if p := s.points(t); !strings.Contains(p, "bobtail.server.call.duration [s] grpc.method=kv.KV/Get grpc.status=UNKNOWN: count 1,") ||
			!strings.Contains(p, "bobtail.server.in_flight [{call}] : 0\n") {
			t.Errorf("metrics\n%s", p)
		}
	})
}

// A fall of the limit, and an Update, are told in the log; nobody is told anything without
// telemetry.
func TestServerLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSink()
		var log bytes.Buffer
		server := newServer(t, `{"limiter": {"algorithm": "aimd", "initial": 64}}`, append(s.options(), bobtail.WithoutTelemetry(),
			bobtail.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))...)
		var slow atomic.Bool
		var n atomic.Int64
		f := grpctest.NewFleet(t, 1, handler(func(ctx context.Context, _ int) error {
			if slow.Load() && n.Add(1)%2 == 0 {
				_ = after(ctx, 50*ms)
				return status.Error(grpccodes.DeadlineExceeded, "of a call that it made")
			}
			return after(ctx, 10*ms)
		}), s.spanned(server.ServerOptions()...)...)
		kv := kvpb.NewKVClient(bare(f))
		for range 50 { // it learns how long a call takes
			_ = getFrom(kv)(t.Context())
		}
		slow.Store(true)
		for range 300 {
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() { _ = getFrom(kv)(t.Context()) })
			}
			wg.Wait()
		}
		if n := strings.Count(log.String(), `level=WARN msg="bobtail: server: the limit has fallen by half" limit=`); n != 1 {
			t.Errorf("a fall is told %d times, want once; the limit is %d; log:\n%s", n, server.Stats().Limit, log.String())
		}
		if err := server.Update(serverPolicy(t, `{"mode": "shadow"}`)); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(log.String(), `level=INFO msg="bobtail: server: policy updated" mode=shadow`) {
			t.Errorf("an update is not told:\n%s", log.String())
		}
		if p := s.points(t); p != "\n" {
			t.Errorf("metrics without telemetry:\n%s", p)
		}
		for _, sp := range s.spans.GetSpans() {
			if len(sp.Attributes) > 0 {
				t.Fatalf("a span is annotated without telemetry: %v", sp.Attributes)
			}
		}
	})
}

// Attempts are counted by endpoint if one asks for it, hedged or not, over our balancer and
// over grpc's.
func TestEndpointMetrics(t *testing.T) {
	for _, tc := range []struct {
		name, policy string
		opts         []bobtail.Option
		unary        string // what is counted of two calls of each kind
		stream       string
	}{
		{"not asked for", `{}`, nil, "", ""},
		{"plain", `{}`, []bobtail.Option{bobtail.WithEndpointMetrics()}, "won 2 ", "won 2 "},
		{"round robin", `{"loadBalancingConfig": [{"round_robin": {}}]}`, []bobtail.Option{bobtail.WithEndpointMetrics()}, "won 2 ", ""},
		{"hedged", `{"methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}, {"service": "kv.KV", "method": "Scan"}], ` + hedgeAt10 + `}]}`,
			[]bobtail.Option{bobtail.WithEndpointMetrics()}, "superseded 2 won 2 ", "superseded 2 won 2 "},
	} {
		for kind, want := range map[string]string{"Get": tc.unary, "Scan": tc.stream} {
			t.Run(tc.name+" "+kind, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := newSink()
					f := grpctest.NewFleet(t, 3, handler(func(ctx context.Context, k int) error {
						if tc.name == "hedged" && k == 1 {
							return after(ctx, time.Hour)
						}
						return after(ctx, ms)
					}))
					kv, _ := client(t, f, policy(t, tc.policy), append(s.options(), tc.opts...)...)
					for range 2 {
						var err error
						if kind == "Get" {
							_, err = kv.Get(t.Context(), &kvpb.Request{})
						} else {
							var str grpc.ServerStreamingClient[kvpb.Response]
							for str, err = kv.Scan(t.Context(), &kvpb.Request{}); err == nil; {
								_, err = str.Recv()
							}
						}
						if err != nil && err != io.EOF {
							t.Fatal(err)
						}
						synctest.Wait()
					}
					var got string
					for _, outcome := range []string{"failed", "refused", "superseded", "won"} {
						total := 0
						for line := range strings.Lines(s.points(t)) {
							name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
							if strings.HasPrefix(name, "bobtail.client.endpoint.attempts [{attempt}] bobtail.attempt.outcome="+outcome+" bobtail.endpoint=b") && strings.HasSuffix(name, "grpc.target=fleet:///kv") {
								var n int
								fmt.Sscan(value, &n)
								total += n
							}
						}
						if total > 0 {
							got += fmt.Sprint(outcome, " ", total, " ")
						}
					}
					if got != want {
						t.Errorf("counted %q, want %q:\n%s", got, want, s.points(t))
					}
				})
			})
		}
	}
}

// The attempt that is made for a call to be counted by its endpoint is one that a balancer
// takes for what it is: the length of a stream is no latency.
func TestEndpointMetricsAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := bobtail.NewClient(policy(t, `{}`), append(newSink().options(), bobtail.WithEndpointMetrics())...)
		if err != nil {
			t.Fatal(err)
		}
		var seen []*attempt.Attempt
		cc := grpctest.NewFleet(t, 1, grpctest.Handlers{}).Dial(append(c.DialOptions(),
			grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				seen = append(seen, attempt.FromContext(ctx))
				return invoker(ctx, method, req, reply, cc, opts...)
			}),
			grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
				seen = append(seen, attempt.FromContext(ctx))
				return streamer(ctx, desc, cc, method, opts...)
			}))...)
		kv := kvpb.NewKVClient(cc)
		if err := errors.Join(getFrom(kv)(t.Context()), scanFrom(kv)(t.Context())); err != nil {
			t.Fatal(err)
		}
		for i, method := range []string{"/kv.KV/Get", "/kv.KV/Scan"} {
			if a := seen[i]; a == nil || a.Number != 1 || a.Kind != attempt.First || a.Streaming != (i == 1) || !a.Of(method) || a.Of("/kv.KV/Put") || a.Endpoint() != "backend-0" {
				t.Errorf("%s is made as %+v", method, a)
			}
		}
	})
}

// What hedging makes of the 99th percentile is estimated, in mode shadow too: 2% of the calls
// take a second, whoever serves them; the others 10 ms.
func TestHedgingP99(t *testing.T) {
	for _, tc := range []struct {
		mode    string
		max     string // of extraLoad
		shorter bool
	}{{"on", "0.1", true}, {"shadow", "0.1", true}, {"shadow", "0.002", false}} { // the last has too little for 2%
		mode := tc.mode
		synctest.Test(t, func(t *testing.T) {
			s := newSink()
			var n atomic.Int64
			f := grpctest.NewFleet(t, 3, handler(func(ctx context.Context, _ int) error {
				if n.Add(1)%50 == 0 {
					return after(ctx, time.Second)
				}
				return after(ctx, 10*ms)
			}))
			kv, _ := client(t, f, policy(t, `{"extraLoad": {"max": `+tc.max+`}, "mode": "`+mode+`", "methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}],
				"hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.020s"}}]}`), s.options()...)
			p99 := func(hedged bool) (v float64, ok bool) {
				for line := range strings.Lines(s.points(t)) {
					if name, value, _ := strings.Cut(line, ": "); name == fmt.Sprintf("bobtail.client.hedging.p99 [s] bobtail.hedged=%v grpc.method=kv.KV/Get grpc.target=fleet:///kv", hedged) {
						_, err := fmt.Sscan(value, &v)
						return v, err == nil
					}
				}
				return 0, false
			}
			if v, ok := p99(false); ok {
				t.Errorf("mode %s: %v before the first call, want none", mode, v)
			}
			for range 2000 {
				if err := getFrom(kv)(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			unhedged, ok := p99(false)
			hedged, ok2 := p99(true)
			if mode == "on" && !ok && !ok2 {
				return // hedged calls are cut off before their second, so that it is not known
			}
			if !ok || !ok2 || mode == "shadow" && unhedged < 0.9 || tc.shorter != (hedged < 0.1) {
				t.Errorf("mode %s, extraLoad %s: p99 %v (%v), hedged %v (%v); want a second, and less than 100 ms if it is affordable", mode, tc.max, unhedged, ok, hedged, ok2)
			}
		})
	}
}
