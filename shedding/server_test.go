package shedding

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

func newServer(t testing.TB, cfg ServerConfig) *Server {
	t.Helper()
	s, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// staticServer runs so many handlers at once, and lets one wait.
func staticServer(limit, queue int) ServerConfig {
	return ServerConfig{Limiter: LimiterConfig{Algorithm: Static, Limit: limit}, Queue: &QueueConfig{MaxLength: queue}}
}

// dial dials kv.KV behind s, by handlers that take as long as the id of their request
// says, in milliseconds, or until their context ends.
func dial(t testing.TB, s *Server, outside ...grpc.UnaryServerInterceptor) (kvpb.KVClient, *grpctest.Fleet) {
	t.Helper()
	f := grpctest.NewFleet(t, 1, grpctest.Handlers{
		Unary: func(ctx context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
			return &kvpb.Response{}, sleep(ctx, req)
		},
		Scan: func(_ *grpctest.Backend, req *kvpb.Request, ss grpc.ServerStreamingServer[kvpb.Response]) error {
			if err := ss.Send(&kvpb.Response{}); err != nil {
				return err
			}
			return sleep(ss.Context(), req)
		},
	}, grpc.ChainUnaryInterceptor(append(outside, s.UnaryServerInterceptor())...),
		grpc.ChainStreamInterceptor(s.StreamServerInterceptor()), grpc.InTapHandle(s.TapHandle))
	client := kvpb.NewKVClient(f.Dial())
	return client, f
}

func sleep(ctx context.Context, req *kvpb.Request) error {
	select {
	case <-time.After(time.Duration(req.Id) * time.Millisecond):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// checkServerRefusal holds what a refusal is at the client's side.
func checkServerRefusal(t *testing.T, err error, trailer metadata.MD, code codes.Code, reason string) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("%v, want %v", err, code)
	}
	var info *errdetails.ErrorInfo
	for _, d := range status.Convert(err).Details() {
		if i, ok := d.(*errdetails.ErrorInfo); ok {
			info = i
		}
	}
	if info.GetDomain() != "bobtail" || info.GetReason() != reason {
		t.Errorf("%v: %v, want reason %s", err, info, reason)
	}
	after, ok := outcome.RetryDelay(err)
	if !ok || after <= 0 {
		t.Errorf("%v: RetryInfo %v", err, after)
	}
	push := outcome.ReadPushback(trailer)
	if !push.Given || push.Stop || push.Delay < after || push.Delay > after+time.Millisecond {
		t.Errorf("%v: pushback %+v, want %v, rounded up", err, push, after)
	}
}

func TestServerConfigValidate(t *testing.T) {
	bad := Criticality(7)
	err := ServerConfig{
		Limiter:        LimiterConfig{Algorithm: "magic"},
		Queue:          &QueueConfig{MaxLength: -1},
		Tenants:        &TenantsConfig{MetadataKey: "grpc-tenant", PerSecond: -1, Burst: -2, Max: -3},
		Exempt:         []string{"kv.KV/Get", "/kv.KV", "/kv.KV/G*", "/*/Get", "/kv.KV/*", "/kv.KV/Get"},
		MaxCriticality: &bad,
	}.Validate()
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"algorithm", "maxLength", "metadataKey", "perSecond -1", "burst -2", "max -3", "exempt[0]", "exempt[1]", "exempt[2]", "exempt[3]", "maxCriticality 7"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nwant it to name %s", err, want)
		}
	}
	if strings.Contains(err.Error(), "exempt[4]") || strings.Contains(err.Error(), "exempt[5]") {
		t.Errorf("%v: a fault that is none", err)
	}
	if _, err := NewServer(ServerConfig{MaxCriticality: &bad}); err == nil {
		t.Error("NewServer took it")
	}
	if err := (ServerConfig{}).Validate(); err != nil {
		t.Error(err)
	}
	if err := (TenantsConfig{MetadataKey: "X-Tenant", Burst: 5}).Validate(); err == nil || !strings.Contains(err.Error(), "without perSecond") {
		t.Errorf("burst without perSecond: %v", err)
	}
}

// One runs, one waits, all others are refused at once; the one that waits runs when its
// turn comes. Health checks are always served.
func TestServerRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var events []ServerEvent
		cfg := staticServer(1, 1)
		cfg.Report = func(_ context.Context, e ServerEvent) {
			mu.Lock()
			defer mu.Unlock()
			events = append(events, e)
		}
		s := newServer(t, cfg)
		client, _ := dial(t, s)
		begin := time.Now()
		var wg sync.WaitGroup
		for i, want := range []time.Duration{50 * ms, 100 * ms} {
			wg.Go(func() {
				if _, err := client.Get(t.Context(), &kvpb.Request{Id: 50}); err != nil || time.Since(begin) != want {
					t.Errorf("call %d: %v after %v, want %v", i, err, time.Since(begin), want)
				}
			})
			synctest.Wait()
		}
		if st := s.Stats(); st.InFlight != 1 || st.Queued != 1 {
			t.Errorf("%+v, want one that runs and one that waits", st)
		}
		var trailer metadata.MD
		_, err := client.Get(t.Context(), &kvpb.Request{Id: 50}, grpc.Trailer(&trailer))
		checkServerRefusal(t, err, trailer, codes.Unavailable, "OVERLOADED")
		stream, err := client.Scan(t.Context(), &kvpb.Request{})
		if err == nil {
			_, err = stream.Recv()
			trailer = stream.Trailer()
		}
		checkServerRefusal(t, err, trailer, codes.Unavailable, "OVERLOADED")
		wg.Wait()
		mu.Lock()
		defer mu.Unlock()
		get := ServerEvent{Method: kvpb.KV_Get_FullMethodName}
		first, full, waited := get, get, get
		first.Admitted = true
		full.Reason = QueueFull
		waited.Admitted, waited.Wait = true, 50*ms
		scan := full
		scan.Method = kvpb.KV_Scan_FullMethodName
		if want := []ServerEvent{first, full, scan, waited}; !slices.Equal(events, want) {
			t.Errorf("events %+v\nwant %+v", events, want)
		}
		if st := s.Stats(); st.Admitted != 2 || st.Refused != 2 || st.InFlight != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// Whoever waits too long is told so; whoever cannot be done by its deadline too, before it
// has waited; and who leaves the queue leaves no trace.
func TestServerQueueEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, staticServer(1, 10))
		client, f := dial(t, s)
		// The median of Get is 50 ms.
		for range medianFew {
			if _, err := client.Get(t.Context(), &kvpb.Request{Id: 50}); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*ms)
		defer cancel()
		var trailer metadata.MD
		begin := time.Now()
		_, err := client.Get(ctx, &kvpb.Request{Id: 50}, grpc.Trailer(&trailer))
		checkServerRefusal(t, err, trailer, codes.DeadlineExceeded, "DEADLINE_HOPELESS")
		if took := time.Since(begin); took > 0 {
			t.Errorf("hopeless after %v", took)
		}

		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := client.Put(t.Context(), &kvpb.Request{Id: 500}); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		started := f.Backends[0].Started.Load()
		gone, leave := context.WithCancel(t.Context())
		wg.Go(func() {
			if _, err := client.Put(gone, &kvpb.Request{Id: 1}); status.Code(err) != codes.Canceled {
				t.Error(err)
			}
		})
		wg.Go(func() {
			var trailer metadata.MD
			begin := time.Now()
			_, err := client.Put(t.Context(), &kvpb.Request{Id: 1}, grpc.Trailer(&trailer))
			checkServerRefusal(t, err, trailer, codes.Unavailable, "QUEUE_TIMEOUT")
			if took := time.Since(begin); took != 100*ms {
				t.Errorf("waited %v, want 100 ms", took)
			}
		})
		synctest.Wait()
		if st := s.Stats(); st.Queued != 2 {
			t.Errorf("%d wait, want 2", st.Queued)
		}
		leave()
		synctest.Wait()
		if st := s.Stats(); st.Queued != 1 {
			t.Errorf("%d wait after one has left, want 1", st.Queued)
		}
		wg.Wait()
		if n := f.Backends[0].Started.Load(); n != started {
			t.Errorf("%d handlers of those who had left or waited too long ran", n-started)
		}
		if st := s.Stats(); st.InFlight != 0 || st.Queued != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// A median that no deadline is long enough for is forgotten, and the method lives again.
func TestServerHopelessHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, _ := dial(t, newServer(t, staticServer(1, 10)))
		for range medianFew {
			if _, err := client.Get(t.Context(), &kvpb.Request{Id: 200}); err != nil {
				t.Fatal(err)
			}
		}
		get := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 100*ms)
			defer cancel()
			_, err := client.Get(ctx, &kvpb.Request{Id: 1})
			return err
		}
		if err := get(); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("%v, want it hopeless", err)
		}
		time.Sleep(medianAge + ms)
		if err := get(); err != nil {
			t.Error(err)
		}
	})
}

// Exempt calls run whatever the limit, and nobody counts them.
func TestServerExempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := staticServer(1, 1)
		cfg.Exempt = []string{"/kv.KV/Put"}
		s := newServer(t, cfg)
		s.gate.Publish(verdict(levels, time.Second)) // the tap refuses all
		client, f := dial(t, s)
		if _, err := client.Put(t.Context(), &kvpb.Request{}); err != nil {
			t.Error(err)
		}
		// Nobody serves health here: to be asked is enough.
		health := healthpb.NewHealthClient(f.Dial())
		if _, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{}); status.Code(err) != codes.Unimplemented {
			t.Errorf("health: %v", err)
		}
		_, err := client.Get(t.Context(), &kvpb.Request{})
		if after, ok := outcome.RetryDelay(err); status.Code(err) != codes.Unavailable || !ok || after != time.Second {
			t.Errorf("Get: %v, want the tap's refusal", err)
		}
		if st := s.Stats(); st.Admitted != 0 || st.Refused != 1 {
			t.Errorf("%+v", st)
		}
	})
}

// In shadow all is decided and told, and all are served at once.
func TestServerShadow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := staticServer(1, 1)
		cfg.Shadow = true
		var mu sync.Mutex
		told := map[Reason]int{}
		cfg.Report = func(_ context.Context, e ServerEvent) {
			mu.Lock()
			defer mu.Unlock()
			told[e.Reason]++
			if !e.Shadow || e.Admitted != (e.Reason == NotRefused) {
				t.Errorf("%+v", e)
			}
		}
		s := newServer(t, cfg)
		s.gate.Publish(verdict(levels, time.Second))
		client, _ := dial(t, s)
		var wg sync.WaitGroup
		begin := time.Now()
		for range 5 {
			wg.Go(func() {
				if _, err := client.Get(t.Context(), &kvpb.Request{Id: 200}); err != nil || time.Since(begin) != 200*ms {
					t.Errorf("%v after %v", err, time.Since(begin))
				}
			})
		}
		wg.Wait()
		mu.Lock()
		defer mu.Unlock()
		if told[NotRefused] != 1 || told[QueueFull] != 3 || told[QueueTimeout] != 1 {
			t.Errorf("told %v", told)
		}
		if st := s.Stats(); st.InFlight != 0 || st.Queued != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// A server that drains refuses what is new, and serves what it has.
func TestServerDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, staticServer(1, 1))
		client, _ := dial(t, s)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				if _, err := client.Get(t.Context(), &kvpb.Request{Id: 50}); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		s.Drain()
		var trailer metadata.MD
		_, err := client.Get(t.Context(), &kvpb.Request{}, grpc.Trailer(&trailer))
		checkServerRefusal(t, err, trailer, codes.Unavailable, "DRAINING")
		wg.Wait()
		if st := s.Stats(); !st.Draining || st.Admitted != 2 || st.Refused != 1 {
			t.Errorf("%+v", st)
		}
	})
}

// A new configuration holds from the next call; permits and quotas live on.
func TestServerReconfigure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := staticServer(1, 5)
		s := newServer(t, cfg)
		client, _ := dial(t, s)
		var wg sync.WaitGroup
		begin := time.Now()
		for range 3 {
			wg.Go(func() {
				if _, err := client.Get(t.Context(), &kvpb.Request{Id: 50}); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if err := s.Reconfigure(ServerConfig{Limiter: LimiterConfig{Algorithm: Static}}); err == nil {
			t.Error("it took a faulty one")
		}
		cfg.Limiter.Limit = 3
		cfg.Tenants = &TenantsConfig{MetadataKey: "x-tenant", PerSecond: 3, Burst: 1}
		if err := s.Reconfigure(cfg); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		if took := time.Since(begin); took != 50*ms {
			t.Errorf("three took %v, want 50 ms: the limit has risen to three", took)
		}
		if _, err := client.Get(t.Context(), &kvpb.Request{}); err != nil {
			t.Error(err)
		}
		var trailer metadata.MD
		_, err := client.Get(t.Context(), &kvpb.Request{}, grpc.Trailer(&trailer))
		checkServerRefusal(t, err, trailer, codes.ResourceExhausted, "TENANT_QUOTA")
		if d, _ := outcome.RetryDelay(err); d != time.Second/3+1 {
			t.Errorf("RetryInfo %v, want 1/3 s: when there is a token again", d)
		}
		time.Sleep(200 * ms)
		cfg.Tenants = &TenantsConfig{MetadataKey: "x-tenant", PerSecond: 100, Burst: 1}
		if err := s.Reconfigure(cfg); err != nil {
			t.Fatal(err)
		}
		if _, err = client.Get(t.Context(), &kvpb.Request{}); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%v: what was used is not used any more", err)
		}
		time.Sleep(10 * ms)
		if _, err = client.Get(t.Context(), &kvpb.Request{}); err != nil {
			t.Errorf("%v: the old rate still holds", err)
		}
		cfg.Tenants = nil
		if err := s.Reconfigure(cfg); err != nil {
			t.Fatal(err)
		}
		if _, err = client.Get(t.Context(), &kvpb.Request{}); err != nil {
			t.Error(err)
		}
	})
}

// The end of a handler is told by what it says about the server.
func TestServerResult(t *testing.T) {
	now := time.Now()
	s := newServer(t, ServerConfig{})
	m := s.methods.Of(nil, "/kv.KV/Get")
	for range medianFew {
		m.record(now.Sub(s.born), 10*ms)
	}
	background := context.Background()
	cancelled, cancel := context.WithCancel(background)
	cancel()
	late, cancel := context.WithDeadline(background, now.Add(-ms))
	defer cancel()
	almost, cancel := context.WithDeadline(background, now.Add(time.Minute))
	cancel()
	for _, tc := range []struct {
		name string
		ctx  context.Context
		err  error
		ran  time.Duration
		want Result
	}{
		{"ok", background, nil, ms, Served},
		{"an answer", background, status.Error(codes.NotFound, ""), ms, Served},
		{"failed at once", background, status.Error(codes.Unavailable, ""), ms, Ignored},
		{"failed after work", background, status.Error(codes.Internal, ""), 20 * ms, Served},
		{"plain error", background, errors.New("plain"), 20 * ms, Served},
		{"its own timeout", background, context.DeadlineExceeded, 20 * ms, Dropped},
		{"a dependency without quota", background, status.Error(codes.ResourceExhausted, ""), 20 * ms, Dropped},
		{"cancelled", cancelled, context.Canceled, 20 * ms, Ignored},
		{"cancelled, and done nevertheless", cancelled, nil, 20 * ms, Ignored},
		{"cancelled within", background, status.Error(codes.Canceled, ""), 20 * ms, Ignored},
		{"cancelled long before the deadline", almost, nil, 20 * ms, Ignored},
		{"late", late, nil, 20 * ms, Dropped},
	} {
		p := &permit{server: s, method: m, finished: true}
		if got := p.result(tc.ctx, tc.err, now, tc.ran); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
	// The client's own timer is a little earlier than the server's.
	p := &permit{server: s, method: m, finished: true}
	if got := p.result(almost, context.Canceled, now.Add(time.Minute-ms), 20*ms); got != Dropped {
		t.Errorf("cancelled at the deadline: %v, want Dropped", got)
	}
	// Of streams only the shorter ones tell anything, and of those of the client's messages
	// only that they have ended, or were late.
	for _, tc := range []struct {
		name string
		fed  bool
		ctx  context.Context
		err  error
		ran  time.Duration
		want Result
	}{
		{"ok", false, background, nil, 20 * ms, Served},
		{"late", false, late, nil, 20 * ms, Dropped},
		{"open for long", false, background, nil, lastingAfter, Ignored},
		{"open for long, until its deadline", false, late, nil, lastingAfter, Ignored},
		{"fed, ok", true, background, nil, 20 * ms, Untimed},
		{"fed, an answer", true, background, status.Error(codes.NotFound, ""), 20 * ms, Untimed},
		{"fed, failed", true, background, status.Error(codes.Internal, ""), 20 * ms, Ignored},
		{"fed, cancelled", true, cancelled, nil, 20 * ms, Ignored},
		{"fed, late", true, late, context.DeadlineExceeded, 20 * ms, UntimedDrop},
		{"fed, open for long, until its deadline", true, late, nil, lastingAfter, Ignored},
	} {
		p := &permit{server: s, method: m, finished: true, stream: true, fed: tc.fed}
		if got := p.result(tc.ctx, tc.err, now, tc.ran); got != tc.want {
			t.Errorf("a stream, %s: %v, want %v", tc.name, got, tc.want)
		}
	}
	// What the client's messages took is not in the median.
	m = &median{}
	for range medianFew {
		m.record(now.Sub(s.born), 10*ms)
	}
	for range 2 * medianSamples {
		p := &permit{server: s, method: m, finished: true, stream: true, fed: true}
		p.result(late, nil, now, 20*ms)
	}
	if d := m.at(now.Sub(s.born)); d != 10*ms {
		t.Errorf("median %v, want 10 ms", d)
	}
}

// A clock that is set back does not make an old median a new one.
func TestServerMedianAgesBySteadyClock(t *testing.T) {
	for _, tc := range []struct {
		later time.Duration
		want  Result
	}{{medianAge / 2, Served}, {2 * medianAge, Ignored}} {
		s := newServer(t, ServerConfig{})
		m := s.methods.Of(nil, "/kv.KV/Get")
		for range medianFew {
			m.record(time.Since(s.born), 10*ms)
		}
		// The wall clock's part of a time that has both: 33 bits of seconds above 30 of
		// nanoseconds (package time, type Time). The text of the time shows whether it still is.
		now := s.born.Add(tc.later)
		wall := (*uint64)(unsafe.Pointer(&now))
		*wall -= 3600 << 30
		if d := s.born.Round(0).Sub(now.Round(0)) + tc.later; d != time.Hour {
			t.Fatalf("set back by %v", d)
		}
		p := &permit{server: s, method: m, finished: true}
		// It failed at once, for all that is known, or after work, as the median says.
		if got := p.result(context.Background(), status.Error(codes.Internal, ""), now, 20*ms); got != tc.want {
			t.Errorf("%v later, the clock having been set back: %v, want %v", tc.later, got, tc.want)
		}
	}
}

// A handler that panics tells nothing of the time that its method takes.
func TestServerPanicIsUntimed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, ServerConfig{})
		h := hooked{Server: s}
		for range 2 * medianSamples {
			for _, call := range []func(context.Context, func(context.Context)) error{h.call, h.stream} {
				if err := call(t.Context(), func(context.Context) { time.Sleep(ms); panic(errHook) }); err == nil {
					t.Fatal("no panic")
				}
			}
		}
		for _, method := range []string{"/kv.KV/Get", "/kv.KV/Scan"} {
			if d := s.methods.Of(nil, method).at(time.Since(s.born)); d != 0 {
				t.Errorf("median of %s %v, want none", method, d)
			}
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if n := s.core.flow.timed; n != 0 {
			t.Errorf("%d timed", n)
		}
	})
}

func TestServerMedian(t *testing.T) {
	now := time.Hour
	var m median
	for i := range medianFew {
		if d := m.at(now); d != 0 {
			t.Fatalf("%v after %d samples", d, i)
		}
		m.record(now, time.Duration(i+1)*ms)
	}
	if d := m.at(now); d != 5*ms {
		t.Errorf("%v, want 5 ms: 1 to 8", d)
	}
	for range medianSamples {
		m.record(now, 30*ms)
	}
	if d := m.at(now + medianAge); d != 30*ms {
		t.Errorf("%v, want 30 ms: the old samples are gone", d)
	}
	later := now + medianAge + 1
	if d := m.at(later); d != 0 {
		t.Errorf("%v, want none: nobody has called for long", d)
	}
	for i := range medianFew {
		if d := m.at(later); d != 0 {
			t.Errorf("%v from %d samples and old ones", d, i)
		}
		m.record(later, ms)
	}
	if d := m.at(later); d != ms {
		t.Errorf("%v, want 1 ms, as of the new samples", d)
	}
}

// In shadow a call whose handler ends while the call would still wait is not one that the
// server would have refused; only one whose client has gone is.
func TestServerShadowWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := staticServer(1, 10)
		cfg.Shadow = true
		var mu sync.Mutex
		var events []ServerEvent
		cfg.Report = func(_ context.Context, e ServerEvent) {
			mu.Lock()
			defer mu.Unlock()
			events = append(events, e)
		}
		s := newServer(t, cfg)
		unary, info := s.UnaryServerInterceptor(), &grpc.UnaryServerInfo{FullMethod: "/kv.KV/Get"}
		call := func(ctx context.Context, took time.Duration) {
			_, _ = unary(ctx, nil, info, func(ctx context.Context, _ any) (any, error) { time.Sleep(took); return nil, nil })
		}
		var wg sync.WaitGroup
		// The first has the slot; the others are done before it gives it back, one at a time.
		for _, took := range []time.Duration{16 * ms, 11 * ms, 12 * ms, 13 * ms, 14 * ms, 15 * ms} {
			wg.Go(func() { call(t.Context(), took) })
			synctest.Wait()
		}
		wg.Wait()
		for i, e := range events {
			want := ServerEvent{Method: "/kv.KV/Get", Admitted: true, Shadow: true}
			if i > 0 {
				want.Wait = time.Duration(10+i) * ms
			}
			if e != want {
				t.Errorf("event %d: %+v\nwant %+v", i, e, want)
			}
		}
		if st := s.Stats(); len(events) != 6 || st.Admitted != 6 || st.Refused != 0 || st.InFlight != 0 || st.Queued != 0 {
			t.Errorf("%d events, %+v", len(events), st)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*ms)
		defer cancel()
		wg.Go(func() { call(t.Context(), 16*ms) })
		synctest.Wait()
		wg.Go(func() { call(withoutDeadline{ctx}, 10*ms) })
		wg.Wait()
		if e := events[len(events)-1]; e.Reason != ClientGone || e.Admitted || e.Wait != 10*ms {
			t.Errorf("%+v, want that its client has gone", e)
		}
	})
}

// withoutDeadline is a context whose deadline nobody knows.
type withoutDeadline struct{ context.Context }

func (withoutDeadline) Deadline() (time.Time, bool) { return time.Time{}, false }

// Put into shadow, a server lets in those who wait already, at once. Put back, and into it
// again, it does that again, and it does not take those who waited in shadow for others.
func TestServerShadowReachesThoseWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := staticServer(1, 100)
		cfg.Queue.MaxWait, cfg.Queue.Target = time.Second, time.Second
		s := newServer(t, cfg)
		client, f := dial(t, s)
		var wg sync.WaitGroup
		call := func(n int) {
			for range n {
				wg.Go(func() {
					if _, err := client.Get(t.Context(), &kvpb.Request{Id: 10_000}); err != nil {
						t.Error(err)
					}
				})
			}
			synctest.Wait()
		}
		put := func(shadow, queue bool, started int64, queued int) {
			t.Helper()
			c := cfg
			c.Shadow = shadow
			if !queue {
				c.Queue = nil
			}
			if err := s.Reconfigure(c); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if n, st := f.Backends[0].Started.Load(), s.Stats(); n != started || st.Queued != queued {
				t.Errorf("%d handlers run, %d wait; want %d, %d", n, st.Queued, started, queued)
			}
		}
		call(4)
		put(false, true, 1, 3)
		put(true, true, 4, 0)
		call(2)
		put(true, true, 6, 2) // as if they waited
		put(false, true, 6, 2)
		call(3)
		put(true, false, 9, 0) // though there is no queue any more
		wg.Wait()
		if st := s.Stats(); st.InFlight != 0 || st.Queued != 0 || st.Admitted+st.Refused != 9 {
			t.Errorf("%+v", st)
		}
	})
}

// A call that looked at the configuration before the server was put into shadow, and
// arrives after that, does not wait for the sake of the old one.
func TestServerShadowOnArrival(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := staticServer(1, 100)
		s := newServer(t, cfg)
		go func() {
			_, _ = s.UnaryServerInterceptor()(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: "/kv.KV/Get"},
				func(context.Context, any) (any, error) { time.Sleep(time.Second); return nil, nil })
		}()
		synctest.Wait()
		p := &permit{server: s, cfg: s.config.Load()}
		cfg.Shadow = true
		if err := s.Reconfigure(cfg); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if _, err := p.admit(t.Context(), "/kv.KV/Get"); err != nil || time.Since(begin) != 0 {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		p.end(t.Context(), nil)
		time.Sleep(2 * time.Second)
		if st := s.Stats(); st.InFlight != 0 || st.Queued != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// lateContext is one whose timer is late, as that of a busy machine may be: its deadline has
// passed, and it does not say so yet.
type lateContext struct {
	context.Context
	deadline time.Time
}

func (c lateContext) Deadline() (time.Time, bool) { return c.deadline, true }

// Of a call that waits until its deadline the client has gone, whichever timer is the first
// to say so: it is no refusal for overload.
func TestServerWaitsUntilDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		info := &grpc.UnaryServerInfo{FullMethod: "/kv.KV/Get"}
		for i := range 100 {
			for _, timer := range []time.Duration{-time.Nanosecond, time.Nanosecond} { // the context's, beside the core's
				s := newServer(t, staticServer(1, 10)) // one that does not know yet what is hopeless
				unary := s.UnaryServerInterceptor()
				go func() {
					_, _ = unary(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: "/kv.KV/Put"},
						func(context.Context, any) (any, error) { time.Sleep(200 * ms); return nil, nil })
				}()
				synctest.Wait()
				patience := time.Duration(1+i/2) * ms
				deadline := time.Now().Add(patience)
				ctx, cancel := context.WithTimeout(t.Context(), patience+timer)
				_, err := unary(lateContext{ctx, deadline}, nil, info, func(context.Context, any) (any, error) {
					t.Error("its handler runs")
					return nil, nil
				})
				if status.Code(err) != codes.DeadlineExceeded || errors.Is(err, ErrQueueTimeout) || time.Until(deadline) > 1 {
					t.Errorf("%v, %v before its deadline", err, time.Until(deadline))
				}
				cancel()
				time.Sleep(time.Second)
				if n := s.refused[ClientGone].Load(); n != 1 || s.Stats().InFlight != 0 {
					t.Errorf("%d clients gone, %+v", n, s.Stats())
				}
			}
		}
	})
}
