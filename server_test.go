package bobtail_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/grpc/test/bufconn"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/loadbalance/loadpb"
	"github.com/bobtail-rpc/bobtail/shedding"
)

func serverPolicy(t *testing.T, text string) bobtail.ServerPolicy {
	t.Helper()
	p, err := bobtail.ParseServerPolicy([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func newServer(t *testing.T, text string, opts ...bobtail.Option) *bobtail.Server {
	t.Helper()
	s, err := bobtail.NewServer(serverPolicy(t, text), append([]bobtail.Option{bobtail.WithLogger(nil)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// one is a policy that runs one handler at a time, and lets nobody wait.
const one = `{"limiter": {"algorithm": "static", "limit": 1}}`

// slow serves every call in 100 ms.
var slow = grpctest.Handlers{
	Unary: func(_ context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
		time.Sleep(100 * ms)
		return &kvpb.Response{Id: req.Id, Backend: b.Name}, nil
	},
	Scan: func(_ *grpctest.Backend, req *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
		time.Sleep(100 * ms)
		return s.Send(&kvpb.Response{Id: req.Id})
	},
}

// bare dials a fleet without any policy, and waits until it is ready.
func bare(f *grpctest.Fleet, opts ...grpc.DialOption) *grpc.ClientConn {
	cc := f.Dial(opts...)
	cc.Connect()
	time.Sleep(time.Second)
	return cc
}

// together makes n calls at once and counts how they end: "OK" or the code and the reason.
func together(ctx context.Context, n int, call func(context.Context) error) map[string]int {
	ends := make(chan error, n)
	for range n {
		go func() { ends <- call(ctx) }()
	}
	all := map[string]int{}
	for range n {
		all[told(<-ends)]++
	}
	return all
}

// told is the code of an error and the reason in its ErrorInfo.
func told(err error) string {
	s := status.Code(err).String()
	for _, d := range status.Convert(err).Details() {
		if i, ok := d.(*errdetails.ErrorInfo); ok {
			s += " " + i.GetDomain() + " " + i.GetReason()
		}
	}
	return s
}

func getFrom(kv kvpb.KVClient) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := kv.Get(ctx, &kvpb.Request{})
		return err
	}
}

func scanFrom(kv kvpb.KVClient) func(context.Context) error {
	return func(ctx context.Context) error {
		s, err := kv.Scan(ctx, &kvpb.Request{})
		if err == nil {
			_, err = s.Recv()
		}
		return err
	}
}

// One handler at a time: on refuses the others, shadow and off none, and only the first two
// tell of it. Update changes between them while connections live.
func TestServerModes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var reports atomic.Int64
		server := newServer(t, one, bobtail.WithServerReports(func(context.Context, shedding.ServerEvent) { reports.Add(1) }))
		f := grpctest.NewFleet(t, 1, slow, server.ServerOptions()...)
		kv := kvpb.NewKVClient(bare(f))
		refusing := map[string]int{"OK": 1, "Unavailable bobtail OVERLOADED": 4}
		for _, tc := range []struct {
			mode    string
			want    map[string]int
			reports bool
		}{
			{`"mode": "on", `, refusing, true},
			{`"mode": "shadow", `, map[string]int{"OK": 5}, true},
			{`"mode": "off", `, map[string]int{"OK": 5}, false},
			{``, refusing, true},
		} {
			if err := server.Update(serverPolicy(t, "{"+tc.mode+one[1:])); err != nil {
				t.Fatal(err)
			}
			for name, call := range map[string]func(context.Context) error{"unary": getFrom(kv), "stream": scanFrom(kv)} {
				reports.Store(0)
				before := server.Stats()
				if got := together(t.Context(), 5, call); fmt.Sprint(got) != fmt.Sprint(tc.want) {
					t.Errorf("{%s...}, %s: %v, want %v", tc.mode, name, got, tc.want)
				}
				if told := reports.Load() > 0; told != tc.reports {
					t.Errorf("{%s...}, %s: %d reports", tc.mode, name, reports.Load())
				}
				after := server.Stats()
				if seen := after.Admitted+after.Refused > before.Admitted+before.Refused; seen != tc.reports {
					t.Errorf("{%s...}, %s: before %+v, after %+v", tc.mode, name, before, after)
				}
			}
		}
	})
}

// What the policy exempts is never refused, and takes no slot from others.
func TestServerExempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newServer(t, `{"exempt": ["/kv.KV/Put"], `+one[1:])
		f := grpctest.NewFleet(t, 1, slow, server.ServerOptions()...)
		kv := kvpb.NewKVClient(bare(f))
		put := func(ctx context.Context) error { _, err := kv.Put(ctx, &kvpb.Request{}); return err }
		done := make(chan map[string]int)
		go func() { done <- together(t.Context(), 20, put) }()
		time.Sleep(50 * ms)
		if got := together(t.Context(), 2, getFrom(kv)); got["OK"] != 1 {
			t.Errorf("beside 20 exempt calls: %v, want one of two served", got)
		}
		if got := <-done; got["OK"] != 20 {
			t.Errorf("exempt: %v, want all served", got)
		}
		if err := server.Update(serverPolicy(t, one)); err != nil {
			t.Fatal(err)
		}
		if got := together(t.Context(), 2, put); got["OK"] != 1 {
			t.Errorf("not exempt any more: %v, want one of two served", got)
		}
	})
}

// What an edge lets callers claim holds for exempt methods, too: the calls that these make
// are not exempt.
func TestServerExemptIsCapped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newServer(t, `{"exempt": ["/kv.KV/*"], "maxCriticality": "sheddable"}`)
		var unary, stream shedding.Criticality
		of := func(ctx context.Context) shedding.Criticality {
			return shedding.OutgoingCriticality(shedding.PropagateCriticality(ctx))
		}
		opts := append(server.ServerOptions(),
			grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
				unary = of(ctx)
				return handler(ctx, req)
			}),
			grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
				stream = of(ss.Context())
				return handler(srv, ss)
			}))
		kv := kvpb.NewKVClient(bare(grpctest.NewFleet(t, 1, slow, opts...)))
		ctx := shedding.WithCriticality(t.Context(), shedding.CriticalPlus)
		if err := getFrom(kv)(ctx); err != nil {
			t.Fatal(err)
		}
		s, err := kv.Scan(ctx, &kvpb.Request{})
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = s.Recv()
		}
		if unary != shedding.Sheddable || stream != shedding.Sheddable {
			t.Errorf("the calls of exempt methods are %v and %v, want sheddable", unary, stream)
		}
	})
}

// Options add to those of the user's: his interceptors run, before ours or after as they
// were given, and ours refuse before his later ones see a call.
func TestServerOptionsAdd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var before, after atomic.Int64
		counting := func(n *atomic.Int64) grpc.UnaryServerInterceptor {
			return func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
				n.Add(1)
				return handler(ctx, req)
			}
		}
		server := newServer(t, one, bobtail.WithoutTap())
		opts := append([]grpc.ServerOption{grpc.UnaryInterceptor(counting(&before))}, server.ServerOptions()...)
		opts = append(opts, grpc.ChainUnaryInterceptor(counting(&after)))
		kv := kvpb.NewKVClient(bare(grpctest.NewFleet(t, 1, slow, opts...)))
		if got := together(t.Context(), 5, getFrom(kv)); got["OK"] != 1 {
			t.Errorf("%v, want one of five served", got)
		}
		if before.Load() != 5 || after.Load() != 1 {
			t.Errorf("%d calls before and %d after, want 5 and 1", before.Load(), after.Load())
		}
	})
}

// A server has one tap. One who has his own calls ours in it; one who does not know that
// is told by grpc.
func TestServerTap(t *testing.T) {
	for _, withTap := range []bool{true, false} {
		var opts []bobtail.Option
		if !withTap {
			opts = append(opts, bobtail.WithoutTap())
		}
		server := newServer(t, `{}`, opts...)
		own := grpc.InTapHandle(func(ctx context.Context, _ *tap.Info) (context.Context, error) { return ctx, nil })
		panicked := func() (p any) {
			defer func() { p = recover() }()
			grpc.NewServer(append(server.ServerOptions(), own)...).Stop()
			return nil
		}()
		if (panicked != nil) != withTap {
			t.Errorf("with our tap %v: beside another grpc says %v", withTap, panicked)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		server := newServer(t, one, bobtail.WithoutTap())
		var seen, refused atomic.Int64
		own := grpc.InTapHandle(func(ctx context.Context, info *tap.Info) (context.Context, error) {
			seen.Add(1)
			ctx, err := server.TapHandle(ctx, info)
			if err != nil {
				refused.Add(1)
			}
			return ctx, err
		})
		f := grpctest.NewFleet(t, 1, slow, append(server.ServerOptions(), own)...)
		kv := kvpb.NewKVClient(bare(f))
		if err := getFrom(kv)(t.Context()); err != nil || seen.Load() != 1 {
			t.Errorf("%v, seen by the user's tap %d times, want once", err, seen.Load())
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := server.Drain(ctx); err != nil {
			t.Fatal(err) // nothing is left, so the context does not matter
		}
		if err := getFrom(kv)(t.Context()); status.Code(err) != codes.Unavailable {
			t.Errorf("of a server that drains: %v, want UNAVAILABLE", err)
		}
	})
}

// The load report is in the trailer of answers and refusals, and the service behind it is
// there, if the policy says so and not otherwise.
func TestServerLoadReport(t *testing.T) {
	for _, on := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			server := newServer(t, fmt.Sprintf(`{"loadReport": %v, %s`, on, one[1:]), bobtail.WithoutTap())
			srv := grpc.NewServer(append(server.ServerOptions(), grpc.WaitForHandlers(true))...)
			server.Register(srv)
			health := health.NewServer()
			healthpb.RegisterHealthServer(srv, health)
			cc := serve(t, srv)
			_, err := loadpb.NewLoadReportClient(cc).Get(t.Context(), &loadpb.GetRequest{})
			if got := status.Code(err); on && got != codes.OK || !on && got != codes.Unimplemented {
				t.Errorf("loadReport %v: a probe gets %v", on, err)
			}
			f := grpctest.NewFleet(t, 1, slow, server.ServerOptions()...)
			kv := kvpb.NewKVClient(bare(f))
			ends := together(t.Context(), 3, func(ctx context.Context) error {
				var trailer metadata.MD
				_, err := kv.Get(ctx, &kvpb.Request{}, grpc.Trailer(&trailer))
				if told := len(trailer.Get("endpoint-load-metrics-bin")) == 1; told != on {
					t.Errorf("loadReport %v: %v with trailer %v", on, err, trailer)
				}
				return err
			})
			if ends["OK"] != 1 {
				t.Errorf("%v, want one of three served", ends)
			}
			err = server.Update(serverPolicy(t, fmt.Sprintf(`{"loadReport": %v}`, !on)))
			if want := fmt.Sprintf("bobtail: update: loadReport %v, want %v: it is fixed when a server is made", !on, on); err == nil || err.Error() != want {
				t.Errorf("update: %v, want %s", err, want)
			}
			if got := together(t.Context(), 3, getFrom(kv)); got["OK"] != 1 {
				t.Errorf("a refused update changes something: %v, want one of three served", got)
			}
		})
	}
}

// serve dials a server over bufconn, and stops it when the test ends.
func serve(t *testing.T, srv *grpc.Server) *grpc.ClientConn {
	t.Helper()
	lis := bufconn.Listen(64 << 10)
	go srv.Serve(lis) //nolint:errcheck // it returns when the test stops the server
	cc, err := grpc.NewClient("passthrough:///server", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return grpctest.Dial(ctx, lis) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close(); srv.Stop() })
	return cc
}

// A rolling restart: who watches the health learns at once, those in flight are served to
// their end, new calls are told to come again, and when Drain returns nothing is left
// but the watch.
func TestServerDrain(t *testing.T) {
	for _, mode := range []string{"on", "shadow", "off"} {
		synctest.Test(t, func(t *testing.T) {
			healthy := health.NewServer()
			server := newServer(t, fmt.Sprintf(`{"mode": %q, "limiter": {"algorithm": "static", "limit": 2}, "queue": {"target": "1s", "maxWait": "2s"}}`, mode),
				bobtail.WithHealth(healthy), bobtail.WithoutTap())
			srv := grpc.NewServer(append(server.ServerOptions(), grpc.WaitForHandlers(true))...)
			kvpb.RegisterKVServer(srv, slowKV{})
			healthpb.RegisterHealthServer(srv, healthy)
			cc := serve(t, srv)
			kv, checks := kvpb.NewKVClient(cc), healthpb.NewHealthClient(cc)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			watch, err := checks.Watch(ctx, &healthpb.HealthCheckRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if r, err := watch.Recv(); err != nil || r.Status != healthpb.HealthCheckResponse_SERVING {
				t.Fatalf("health %v, %v, want SERVING", r, err)
			}
			// Two run and two wait, in mode on.
			running := make(chan map[string]int)
			go func() { running <- together(t.Context(), 4, getFrom(kv)) }()
			time.Sleep(50 * ms)
			begin := time.Now()
			drained := make(chan error)
			go func() { drained <- server.Drain(context.Background()) }()
			time.Sleep(ms)
			if r, err := watch.Recv(); err != nil || r.Status != healthpb.HealthCheckResponse_NOT_SERVING {
				t.Errorf("mode %s: health %v, %v, want NOT_SERVING", mode, r, err)
			}
			var trailer metadata.MD
			_, err = kv.Get(t.Context(), &kvpb.Request{}, grpc.Trailer(&trailer))
			if push := trailer.Get("grpc-retry-pushback-ms"); status.Code(err) != codes.Unavailable || len(push) != 1 {
				t.Errorf("mode %s: a new call: %v with pushback %v, want UNAVAILABLE and one", mode, err, push)
			}
			if err := <-drained; err != nil {
				t.Errorf("mode %s: drain: %v", mode, err)
			}
			// They have 50 ms left, and in mode on another 100 ms for those who wait.
			want := 50 * ms
			if mode == "on" {
				want = 150 * ms
			}
			if took := time.Since(begin); took < want || took > want+20*ms {
				t.Errorf("mode %s: drain takes %v, want %v", mode, took, want)
			}
			if got := <-running; got["OK"] != 4 {
				t.Errorf("mode %s: in flight when it began: %v, want all served", mode, got)
			}
			// Who looks at the health now is answered.
			if r, err := checks.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil || r.Status != healthpb.HealthCheckResponse_NOT_SERVING {
				t.Errorf("mode %s: health %v, %v, want NOT_SERVING", mode, r, err)
			}
			cancel()
			srv.GracefulStop()
		})
	}
}

// A rolling restart under load, by a method of which nothing is known, so that nothing is
// tried again: no call fails. Three servers are drained and stopped in turn, and come back.
// Clients that watch the health are told by it, all others by GracefulStop.
func TestServerRollingRestart(t *testing.T) {
	t.Run("health", func(t *testing.T) { rollingRestart(t, `{"healthCheckConfig": {"serviceName": ""}}`, true) })
	t.Run("GracefulStop", func(t *testing.T) { rollingRestart(t, `{}`, false) })
}

func rollingRestart(t *testing.T, clients string, byHealth bool) {
	synctest.Test(t, func(t *testing.T) {
		type backend struct {
			lis     atomic.Pointer[bufconn.Listener]
			health  *health.Server
			server  *bobtail.Server
			srv     *grpc.Server
			handled atomic.Int64
		}
		backends := map[string]*backend{"a": {}, "b": {}, "c": {}}
		start := func(b *backend) {
			b.health = health.NewServer()
			b.server = newServer(t, `{"queue": {}}`, bobtail.WithHealth(b.health))
			b.srv = grpc.NewServer(append(b.server.ServerOptions(), grpc.WaitForHandlers(true))...)
			kvpb.RegisterKVServer(b.srv, slowKV{n: &b.handled})
			healthpb.RegisterHealthServer(b.srv, b.health)
			lis := bufconn.Listen(64 << 10)
			b.lis.Store(lis)
			go b.srv.Serve(lis) //nolint:errcheck // it returns when the test stops the server
		}
		addresses := manual.NewBuilderWithScheme("restart")
		var st resolver.State
		for name, b := range backends {
			start(b)
			st.Endpoints = append(st.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: name}}})
		}
		addresses.InitialState(st)
		c, err := bobtail.NewClient(policy(t, clients), bobtail.WithLogger(nil))
		if err != nil {
			t.Fatal(err)
		}
		cc, err := grpc.NewClient("restart:///kv", append(c.DialOptions(), grpc.WithResolvers(addresses),
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, name string) (net.Conn, error) {
				return grpctest.Dial(ctx, backends[name].lis.Load())
			}))...)
		if err != nil {
			t.Fatal(err)
		}
		cc.Connect()
		time.Sleep(time.Second)
		kv := kvpb.NewKVClient(cc)
		var calls sync.WaitGroup
		var failed atomic.Int64
		stop := make(chan struct{})
		calls.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(5 * ms):
				}
				calls.Go(func() {
					if _, err := kv.Increment(t.Context(), &kvpb.Request{}); err != nil {
						failed.Add(1)
						t.Log(err)
					}
				})
			}
		})
		for name, b := range backends {
			time.Sleep(5 * time.Second)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			context.AfterFunc(ctx, b.srv.Stop)
			begin := time.Now()
			stopped := make(chan struct{})
			stop := func() {
				b.srv.GracefulStop()
				close(stopped)
			}
			if byHealth {
				b.health.Shutdown()
			} else {
				go stop()
			}
			time.Sleep(100 * ms) // for calls that are on their way
			if err := b.server.Drain(ctx); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if byHealth {
				stop()
			}
			<-stopped
			if took := time.Since(begin); took > time.Second {
				t.Errorf("%s is stopped after %v, want about as long as a call takes", name, took)
			}
			cancel()
			b.handled.Store(0)
			start(b)
		}
		time.Sleep(5 * time.Second)
		close(stop)
		calls.Wait()
		for name, b := range backends {
			if n := b.handled.Load(); n < 20 {
				t.Errorf("%s has served %d calls since it is back", name, n)
			}
		}
		if n := failed.Load(); n > 0 {
			t.Errorf("%d calls have failed, want none", n)
		}
		cc.Close()
		for _, b := range backends {
			b.srv.Stop()
		}
	})
}

// slowKV serves Get in 100 ms, and Increment in 20.
type slowKV struct {
	kvpb.UnimplementedKVServer
	n *atomic.Int64 // of calls of Increment
}

func (s slowKV) Increment(context.Context, *kvpb.Request) (*kvpb.Response, error) {
	s.n.Add(1)
	time.Sleep(20 * ms)
	return &kvpb.Response{}, nil
}

func (slowKV) Get(context.Context, *kvpb.Request) (*kvpb.Response, error) {
	time.Sleep(100 * ms)
	return &kvpb.Response{}, nil
}

// A handler that does not come to its end does not keep the server from being stopped.
func TestServerDrainGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newServer(t, `{}`)
		f := grpctest.NewFleet(t, 1, slow, server.ServerOptions()...)
		kv := kvpb.NewKVClient(bare(f))
		done := make(chan map[string]int)
		go func() { done <- together(t.Context(), 3, getFrom(kv)) }()
		time.Sleep(50 * ms)
		ctx, cancel := context.WithTimeout(t.Context(), 25*ms)
		defer cancel()
		err := server.Drain(ctx)
		if want := "bobtail: drain: 3 calls left: context deadline exceeded"; !errors.Is(err, context.DeadlineExceeded) || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
		<-done
		// Once more, now that all have ended.
		if err := server.Drain(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// A call's class goes with it through two hops, unless a service on the way knows better;
// and what an edge does not believe goes no further.
func TestCriticalityTwoHops(t *testing.T) {
	for _, tc := range []struct {
		name  string
		claim []string // of the user
		cap   string   // of the edge
		own   string   // of the middle, for the calls it makes
		want  string   // at the bottom
	}{
		{"claimed", []string{"sheddable"}, ``, "", "[sheddable]"},
		{"the highest", []string{"critical_plus"}, ``, "", "[critical_plus]"},
		{"none claimed", nil, ``, "", "[]"},
		{"the middle knows better", []string{"critical_plus"}, ``, "sheddable_plus", "[sheddable_plus]"},
		{"more than the edge believes", []string{"critical_plus"}, `"maxCriticality": "sheddable_plus", `, "", "[sheddable_plus]"},
		{"no more than it believes", []string{"sheddable"}, `"maxCriticality": "sheddable_plus", `, "", "[sheddable]"},
		{"none claimed from who believes little", nil, `"maxCriticality": "sheddable_plus", `, "", "[sheddable_plus]"},
		{"more than the edge believes, though it does not shed", []string{"critical_plus"}, `"mode": "off", "maxCriticality": "sheddable_plus", `, "", "[sheddable_plus]"},
		{"repeated", []string{"critical_plus", "sheddable"}, ``, "", "[sheddable]"},
	} {
		synctest.Test(t, func(t *testing.T) {
			got := make(chan string, 1)
			bottom := grpctest.NewFleet(t, 1, grpctest.Handlers{
				Unary: func(ctx context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
					got <- fmt.Sprint(metadata.ValueFromIncomingContext(ctx, shedding.CriticalityKey))
					return &kvpb.Response{}, nil
				},
				Scan: func(_ *grpctest.Backend, req *kvpb.Request, s grpc.ServerStreamingServer[kvpb.Response]) error {
					got <- fmt.Sprint(metadata.ValueFromIncomingContext(s.Context(), shedding.CriticalityKey))
					return s.Send(&kvpb.Response{})
				},
			}, newServer(t, `{}`).ServerOptions()...)
			below, _ := client(t, bottom, policy(t, `{}`))
			middle := grpctest.NewFleet(t, 1, grpctest.Handlers{
				Unary: func(ctx context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
					if c, ok := shedding.ParseCriticality(tc.own); ok {
						ctx = shedding.WithCriticality(ctx, c)
					}
					if req.Key == "scan" {
						return &kvpb.Response{}, scanFrom(below)(ctx)
					}
					return below.Get(ctx, req)
				},
			}, newServer(t, `{}`).ServerOptions()...)
			between, _ := client(t, middle, policy(t, `{}`))
			edge := grpctest.NewFleet(t, 1, grpctest.Handlers{
				Unary: func(ctx context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
					return between.Get(ctx, req)
				},
			}, newServer(t, "{"+tc.cap+`"queue": {}}`).ServerOptions()...)
			user := kvpb.NewKVClient(bare(edge))
			ctx := t.Context()
			for _, c := range tc.claim {
				ctx = metadata.AppendToOutgoingContext(ctx, shedding.CriticalityKey, c)
			}
			for _, key := range []string{"", "scan"} {
				if _, err := user.Get(ctx, &kvpb.Request{Key: key}); err != nil {
					t.Fatal(err)
				}
				if g := <-got; g != tc.want {
					t.Errorf("%s %s: at the bottom %s, want %s", tc.name, key, g, tc.want)
				}
			}
		})
	}
}

// refusals notes when attempts of Get arrive at a server, and what the refused ones are told.
type refusals struct {
	mu       sync.Mutex // guards the rest; nothing within waits
	arrivals []time.Time
	pushed   []time.Duration // the RetryInfo of each
}

// see is an interceptor before ours.
func (r *refusals) see(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	now := time.Now()
	res, err := handler(ctx, req)
	if info.FullMethod != kvpb.KV_Get_FullMethodName {
		return res, err
	}
	after := time.Duration(0)
	for _, d := range status.Convert(err).Details() {
		if i, ok := d.(*errdetails.RetryInfo); ok {
			after = i.GetRetryDelay().AsDuration()
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.arrivals, r.pushed = append(r.arrivals, now), append(r.pushed, after)
	return res, err
}

// An overloaded server says when to come again, and attempts come no earlier, by retry as
// by hedging, and not at all without a token of the budget.
func TestClientObeysPushback(t *testing.T) {
	const retries = `"retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.001s", "maxBackoff": "0.001s", "backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE"]}`
	const hedges = `"hedgingPolicy": {"maxAttempts": 5, "hedgingDelay": "10s", "nonFatalStatusCodes": ["UNAVAILABLE"]}`
	const throttled = `"retryThrottling": {"maxTokens": 1, "tokenRatio": 0.1}, `
	const broke = `"extraLoad": {"max": 0.000001}, `
	for _, tc := range []struct {
		name, top, entry string
		more             bool // attempts after the first are sent
	}{
		{"retry", ``, retries, true},
		{"hedge", ``, hedges, true},
		{"retry without a budget", broke, retries, false},
		{"hedge without a budget", broke, hedges, false},
		{"retry that is throttled", throttled, retries, false},
		{"hedge that is throttled", throttled, hedges, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			var seen refusals
			server := newServer(t, one, bobtail.WithoutTap())
			f := grpctest.NewFleet(t, 1, slow, append([]grpc.ServerOption{grpc.ChainUnaryInterceptor(seen.see)}, server.ServerOptions()...)...)
			cc := bare(f)
			kv, _ := client(t, f, policy(t, fmt.Sprintf(`{%s"methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}], %s}]}`, tc.top, tc.entry)))
			busy := make(chan error)
			keepBusy := func() {
				go func() {
					_, err := kvpb.NewKVClient(cc).Put(t.Context(), &kvpb.Request{})
					busy <- err
				}()
				time.Sleep(ms) // it has begun, and runs for 99 ms more
			}
			if tc.top == broke {
				keepBusy()
				_ = getFrom(kv)(t.Context()) // spends the one token that there is
				if err := <-busy; err != nil {
					t.Fatal(err)
				}
				seen.arrivals, seen.pushed = nil, nil
			}
			keepBusy()
			err := getFrom(kv)(t.Context())
			if tc.more != (err == nil) {
				t.Errorf("%s: %v", tc.name, err)
			}
			if err := <-busy; err != nil {
				t.Fatal(err)
			}
			if got := len(seen.arrivals) > 1; got != tc.more {
				t.Errorf("%s: %d attempts", tc.name, len(seen.arrivals))
			}
			for i := range len(seen.arrivals) - 1 {
				gap, after := seen.arrivals[i+1].Sub(seen.arrivals[i]), seen.pushed[i]
				// The pushback is the RetryInfo in whole milliseconds.
				if after <= 0 || gap < after || gap > after+ms {
					t.Errorf("%s: attempt %d comes after %v, asked for %v", tc.name, i+2, gap, after)
				}
			}
			t.Logf("%s: asked for %v", tc.name, seen.pushed)
		})
	}
}

// A server under three times the load that it can bear refuses most calls. The client's
// breaker does not open for that, or it would refuse those that could be served; its
// throttle sees it.
func TestOverloadIsNotTheBreakers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newServer(t, one)
		f := grpctest.NewFleet(t, 1, slow, server.ServerOptions()...)
		var by sync.Map
		kv, _ := client(t, f, policy(t, `{"methodConfig": [{"name": [{}], "circuitBreaker": {"failureRatio": 0.2}, "adaptiveThrottling": {"k": 1.1}}]}`),
			bobtail.WithRefusalReports(func(_ context.Context, r bobtail.Refusal) {
				n, _ := by.LoadOrStore(r.Reason, new(atomic.Int64))
				n.(*atomic.Int64).Add(1)
			}))
		done := make(chan error, 300)
		for range 300 {
			time.Sleep(33 * ms)
			go func() { done <- getFrom(kv)(t.Context()) }()
		}
		served := 0
		for range 300 {
			if <-done == nil {
				served++
			}
		}
		if _, opened := by.Load("BREAKER_OPEN"); opened {
			t.Error("the breaker has opened")
		}
		if _, throttled := by.Load("THROTTLED"); !throttled {
			t.Error("nothing was throttled")
		}
		if served < 45 { // of 99 that there is room for; the throttle lets 1.1 times what is accepted go
			t.Errorf("%d calls served", served)
		}
	})
}
