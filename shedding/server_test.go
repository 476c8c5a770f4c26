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
	m := &median{}
	for range medianFew {
		m.record(now, 10*ms)
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
		p := &permit{method: m, finished: true}
		if got := p.result(tc.ctx, tc.err, now, tc.ran); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
	// The client's own timer is a little earlier than the server's.
	p := &permit{method: m, finished: true}
	if got := p.result(almost, context.Canceled, now.Add(time.Minute-ms), 20*ms); got != Dropped {
		t.Errorf("cancelled at the deadline: %v, want Dropped", got)
	}
	for _, p := range []*permit{{method: m}, {method: m, finished: true, stream: true}} {
		if got := p.result(background, nil, now, 20*ms); got != Ignored {
			t.Errorf("a panic, or a stream of the client's: %v, want Ignored", got)
		}
	}
}

func TestServerMedian(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
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
	if d := m.at(now.Add(medianAge)); d != 30*ms {
		t.Errorf("%v, want 30 ms: the old samples are gone", d)
	}
	later := now.Add(medianAge + 1)
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
