package loadbalance

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/base"
	_ "google.golang.org/grpc/balancer/leastrequest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// A fakeConn is a channel whose connections are made by hand, so that pickers can
// be had without servers.
type fakeConn struct {
	balancer.ClientConn
	state balancer.State
	conns []*fakeSubConn
}

func (c *fakeConn) UpdateState(s balancer.State)          { c.state = s }
func (c *fakeConn) Target() string                        { return "fake:///" }
func (c *fakeConn) ResolveNow(resolver.ResolveNowOptions) {}
func (c *fakeConn) RemoveSubConn(balancer.SubConn)        {}
func (c *fakeConn) NewSubConn(as []resolver.Address, o balancer.NewSubConnOptions) (balancer.SubConn, error) {
	sc := &fakeSubConn{addr: as[0].Addr, listen: o.StateListener}
	c.conns = append(c.conns, sc)
	return sc, nil
}

type fakeSubConn struct {
	balancer.SubConn
	addr           string
	listen, health func(balancer.SubConnState)
}

func (sc *fakeSubConn) GetOrBuildProducer(b balancer.ProducerBuilder) (balancer.Producer, func()) {
	return b.Build(refusing{})
}

// refusing is a connection to a server that has no service.
type refusing struct{}

func (refusing) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	return status.Error(codes.Unimplemented, "refusing")
}

func (refusing) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, status.Error(codes.Unimplemented, "refusing")
}

func (sc *fakeSubConn) Connect()                                             {}
func (sc *fakeSubConn) Shutdown()                                            {}
func (sc *fakeSubConn) RegisterHealthListener(f func(balancer.SubConnState)) { sc.health = f }

func (sc *fakeSubConn) become(s connectivity.State) {
	sc.listen(balancer.SubConnState{ConnectivityState: s})
	if s == connectivity.Ready {
		sc.health(balancer.SubConnState{ConnectivityState: s})
	}
}

// fakeReady builds the named balancer with n ready endpoints.
func fakeReady(tb testing.TB, name string, n int) (*fakeConn, balancer.Balancer) {
	tb.Helper()
	cc := &fakeConn{}
	b := balancer.Get(name).Build(cc, balancer.BuildOptions{})
	tb.Cleanup(b.Close)
	cfg, err := balancer.Get(name).(balancer.ConfigParser).ParseConfig([]byte(`{}`))
	if err != nil {
		tb.Fatal(err)
	}
	resolve(tb, b, cfg, n)
	for _, sc := range cc.conns {
		sc.become(connectivity.Connecting)
		sc.become(connectivity.Ready)
	}
	return cc, b
}

func resolve(tb testing.TB, b balancer.Balancer, cfg serviceconfig.LoadBalancingConfig, n int) {
	tb.Helper()
	var rs resolver.State
	for i := range n {
		rs.Endpoints = append(rs.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: fmt.Sprintf("10.0.%d.%d:443", i/256, i%256)}}})
	}
	if err := b.UpdateClientConnState(balancer.ClientConnState{ResolverState: rs, BalancerConfig: cfg}); err != nil {
		tb.Fatal(err)
	}
}

// chooserOf returns the chooser of the endpoints in rotation.
func chooserOf(cc *fakeConn) chooser {
	return cc.state.Picker.(*picker).rotation.Load().groups[0].chooser
}

// got is the DoneInfo of an attempt that was answered.
var got = balancer.DoneInfo{BytesSent: true, BytesReceived: true}

// ours are the names of this package's balancers.
var ours = []string{P2CName, RendezvousName}

// shardsOf returns the machinery of one of ours.
func shardsOf(b balancer.Balancer) *shards {
	switch b := b.(type) {
	case *rendezvousBalancer:
		return b.shards
	case *prequalBalancer:
		return b.shards
	}
	return b.(*p2cBalancer).shards
}

func TestPickAllocatesOnce(t *testing.T) {
	for _, name := range balancers() {
		t.Run(name, func(t *testing.T) { testPickAllocatesOnce(t, name) })
	}
}

func testPickAllocatesOnce(t *testing.T, policy string) {
	cc, _ := fakeReady(t, policy, 10)
	var call attempt.Call
	a := new(attempt.Attempt)
	a.Init(&call, 1, attempt.First)
	for name, ctx := range map[string]context.Context{
		"plain":        context.Background(),
		"with key":     WithKey(context.Background(), "k"),
		"with attempt": attempt.NewContext(WithKey(context.Background(), "k"), a),
	} {
		info := balancer.PickInfo{FullMethodName: "/kv.KV/Get", Ctx: ctx}
		pick := func() {
			res, err := cc.state.Picker.Pick(info)
			if err != nil {
				t.Fatal(err)
			}
			res.Done(got)
		}
		if name == "with attempt" {
			// Each pick of an attempt after its first allocates a claim; so does no
			// call, whose attempts are picked once.
			pick = func() {
				call, *a = attempt.Call{}, attempt.Attempt{}
				a.Init(&call, 1, attempt.First)
				res, err := cc.state.Picker.Pick(info)
				if err != nil {
					t.Fatal(err)
				}
				res.Done(got)
			}
		}
		if n := testenv.Allocs(1000, pick); n > 1 {
			t.Errorf("%s: %v allocations, want at most 1", name, n)
		}
	}
}

// What the end of an attempt says.
func TestJudge(t *testing.T) {
	over, cancel := context.WithCancel(context.Background())
	cancel()
	live := context.Background()
	fault := func(c codes.Code, sent, received bool) balancer.DoneInfo {
		return balancer.DoneInfo{Err: status.Error(c, "x"), BytesSent: sent, BytesReceived: received}
	}
	for _, tc := range []struct {
		name           string
		ctx            context.Context
		info           balancer.DoneInfo
		unary, streams string // "" is nothing
	}{
		{"an empty DoneInfo", live, balancer.DoneInfo{}, "", ""},
		{"OK", live, got, "answered", ""},
		{"the application's error", live, fault(codes.NotFound, true, true), "answered", ""},
		{"the same, made up locally", live, fault(codes.Unauthenticated, false, false), "", ""},
		{"cancelled by the caller", over, fault(codes.Canceled, true, false), "cut", ""},
		{"and before it could be sent", over, fault(codes.Canceled, false, false), "cut", ""},
		{"cancelled by the server", live, fault(codes.Canceled, true, true), "failed", "failed"},
		{"unavailable", live, fault(codes.Unavailable, true, true), "failed", "failed"},
		{"never sent", live, fault(codes.Unavailable, false, false), "", ""},
		{"too late", over, fault(codes.DeadlineExceeded, true, false), "failed", "failed"},
		{"turned away", live, fault(codes.ResourceExhausted, true, true), "failed", "failed"},
		{"no status at all", live, balancer.DoneInfo{Err: errors.New("x"), BytesSent: true}, "failed", "failed"},
	} {
		for streaming, want := range map[bool]string{false: tc.unary, true: tc.streams} {
			v, ok := judge(tc.ctx, tc.info, streaming)
			name := [...]string{"answered", "cut", "failed"}[v]
			if !ok {
				name = ""
			}
			if name != want {
				t.Errorf("%s, streaming %v: %q, want %q", tc.name, streaming, name, want)
			}
		}
	}
}

// Done releases what Pick counted, and an empty DoneInfo does no more.
func TestEmptyDoneInfo(t *testing.T) {
	cc, b := fakeReady(t, P2CName, 1)
	e := b.(*p2cBalancer).endpoints["10.0.0.0:443"]
	for _, tc := range []struct {
		info balancer.DoneInfo
		want known
	}{{balancer.DoneInfo{}, nothing}, {got, measured}} {
		res, err := cc.state.Picker.Pick(balancer.PickInfo{Ctx: t.Context()})
		if err != nil {
			t.Fatal(err)
		}
		if unary, _ := e.inFlight(); unary != 1 {
			t.Errorf("%d in flight, want 1", unary)
		}
		res.Done(tc.info)
		if unary, _ := e.inFlight(); unary != 0 {
			t.Errorf("%d in flight after Done, want 0", unary)
		}
		if k := e.known.Load(); k != tc.want {
			t.Errorf("known %d, want %d", k, tc.want)
		}
	}
}

// A configuration comes out as it went in: xDS writes it out and parses it again.
func TestConfigsSurviveMarshalling(t *testing.T) {
	for name, js := range map[string]string{
		P2CName:        `{"decayTime": "3s", "maxInFlight": 7, "ejection": {"minimumCalls": 5}}`,
		RendezvousName: `{"header": "x-user-id", "eps": 2, "subset": {"size": 3}}`,
		PrequalName:    `{"qRif": 0.5, "maxProbesPerSecond": 7, "maxInFlight": 3}`,
	} {
		p := balancer.Get(name).(balancer.ConfigParser)
		for _, js := range []string{js, `{}`} {
			first, err := p.ParseConfig([]byte(js))
			if err != nil {
				t.Fatal(err)
			}
			out, err := json.Marshal(first)
			if err != nil {
				t.Fatal(err)
			}
			again, err := p.ParseConfig(out)
			if err != nil {
				t.Fatalf("%s: %s comes out as %s: %v", name, js, out, err)
			}
			var a, b bytes.Buffer
			for buf, c := range map[*bytes.Buffer]any{&a: first, &b: again} {
				fmt.Fprintf(buf, "%+v", c)
			}
			// But for the spaces in the document itself, which json.Marshal drops.
			if strings.ReplaceAll(a.String(), " ", "") != strings.ReplaceAll(b.String(), " ", "") {
				t.Errorf("%s: %s\nbecomes %s", name, &a, &b)
			}
		}
	}
}

// A chooser is told the time, whether the attempt is a stream, and the decay time. Two
// endpoints are equally idle, and the slower one is due for a probe, which no stream is.
func TestRoute(t *testing.T) {
	fast, slow := &endpoint{key: "fast"}, &endpoint{key: "slow"}
	fast.record(0, 2*ms, tau, answered)
	slow.record(0, 3*ms, tau, answered)
	fast.record(2*tau, 2*ms, tau, answered)
	eps := []*endpoint{fast, slow}
	for name, p := range map[string]chooser{
		P2CName:        newP2C(membersOf(eps), tau),
		RendezvousName: newRendezvous(membersOf(eps), &rendezvousConfig{eps: .25}, new(crowd)),
	} {
		for _, tc := range []struct {
			now       time.Duration
			streaming bool
			want      *endpoint
		}{{0, false, fast}, {2 * tau, false, slow}, {2 * tau, true, fast}} {
			r := &request{ctx: t.Context(), now: tc.now, streaming: tc.streaming, intn: func(int) int { return 0 }}
			if got := eps[p.route(r, bars{})]; got != tc.want {
				t.Errorf("%s at %v, streaming %v: %s, want %s", name, tc.now, tc.streaming, got.key, tc.want.key)
			}
		}
	}

	cc, b := fakeReady(t, P2CName, 1)
	resolve(t, b, &p2cConfig{decayTime: time.Second}, 1)
	p := cc.state.Picker.(*picker)
	if r, in := p.rotation.Load(), chooserOf(cc).(*p2c); r.tau != time.Second || in.tau != time.Second {
		t.Errorf("decay times %v and %v, want 1s", r.tau, in.tau)
	}
	var c attempt.Call
	a := attempt.Attempt{Streaming: true}
	a.Init(&c, 1, attempt.First)
	if _, err := p.Pick(balancer.PickInfo{Ctx: attempt.NewContext(t.Context(), &a)}); err != nil {
		t.Fatal(err)
	}
	if unary, streams := p.ready[0].inFlight(); unary != 0 || streams != 1 {
		t.Errorf("%d unary and %d streams in flight, want the stream", unary, streams)
	}
}

// Attempts of one call that are picked at the same instant never share an
// endpoint.
func TestConcurrentPicksNeverShare(t *testing.T) {
	for _, name := range balancers() {
		t.Run(name, func(t *testing.T) { testConcurrentPicksNeverShare(t, name) })
	}
}

func testConcurrentPicksNeverShare(t *testing.T, name string) {
	cc, _ := fakeReady(t, name, 4)
	for round := range 2000 {
		var call attempt.Call
		as := make([]attempt.Attempt, 6)
		start := make(chan struct{})
		var wg sync.WaitGroup
		for i := range as {
			as[i].Init(&call, i+1, attempt.Hedge)
			ctx := attempt.NewContext(WithKey(context.Background(), "k"), &as[i])
			wg.Go(func() {
				<-start
				res, err := cc.state.Picker.Pick(balancer.PickInfo{Ctx: ctx})
				if err == nil {
					res.Done(balancer.DoneInfo{})
				}
			})
		}
		close(start)
		wg.Wait()
		used := map[string]int{}
		for i := range as {
			used[as[i].Endpoint()]++ // "" where it was not sent
			if as[i].Unsent() != (as[i].Endpoint() == "") {
				t.Fatalf("round %d: attempt %d at %q, unsent %v", round, i+1, as[i].Endpoint(), as[i].Unsent())
			}
		}
		if len(used) != 5 || used[""] != 2 {
			t.Fatalf("round %d: attempts per endpoint %v, want one at each of 4 and 2 unsent", round, used)
		}
	}
}

// Concurrent picks of real pickers, while endpoints come and go: counts come out
// even.
func TestPicksDuringChurn(t *testing.T) {
	for _, name := range balancers() {
		t.Run(name, func(t *testing.T) { testPicksDuringChurn(t, name) })
	}
}

func testPicksDuringChurn(t *testing.T, name string) {
	cc, b := fakeReady(t, name, 20)
	var mu sync.Mutex // guards cc.state, as grpc's picker wrapper would
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			var open []func(balancer.DoneInfo)
			for i := range 5000 {
				mu.Lock()
				p := cc.state.Picker
				mu.Unlock()
				if res, err := p.Pick(balancer.PickInfo{Ctx: WithKey(context.Background(), strconv.Itoa(i%8))}); err == nil {
					open = append(open, res.Done)
				}
				if len(open) > 10 {
					i := rand.IntN(len(open))
					open[i](got)
					open = slices.Delete(open, i, i+1)
				}
			}
			for _, done := range open {
				done(got)
			}
		})
	}
	for i := range 200 {
		mu.Lock()
		resolve(t, b, nil, 1+i%20)
		for _, sc := range cc.conns[20:] {
			if sc.health == nil {
				sc.become(connectivity.Connecting)
				sc.become(connectivity.Ready)
			}
		}
		mu.Unlock()
	}
	wg.Wait()
	for key, e := range shardsOf(b).endpoints {
		if unary, streams := e.inFlight(); unary != 0 || streams != 0 {
			t.Errorf("%s: %d unary and %d streams in flight at the end", key, unary, streams)
		}
	}
	if n := len(shardsOf(b).endpoints); n != 20 {
		t.Errorf("%d endpoints known, want 20", n)
	}
	if all := shardsOf(b).crowd; all != nil && all.n.Load() != 0 {
		t.Errorf("%d in flight in all at the end", all.n.Load())
	}
}

// Removed endpoints are remembered for 5 minutes, and never more than 1024.
func TestRememberedIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := &fakeConn{}
		b := p2cBuilder{}.Build(cc, balancer.BuildOptions{}).(*p2cBalancer)
		defer b.Close()
		resolve(t, b, nil, 10)
		nine := b.endpoints["10.0.0.9:443"].endpoint
		resolve(t, b, nil, 5)
		time.Sleep(rememberFor)
		resolve(t, b, nil, 10)
		if b.endpoints["10.0.0.9:443"].endpoint != nine {
			t.Error("forgotten after 5 minutes")
		}
		resolve(t, b, nil, 5)
		time.Sleep(rememberFor + 1)
		resolve(t, b, nil, 5)
		if n := len(b.endpoints); n != 5 {
			t.Errorf("%d endpoints known, want 5", n)
		}
		resolve(t, b, nil, 3)
		time.Sleep(time.Nanosecond)
		resolve(t, b, nil, 3000)
		resolve(t, b, nil, 1)
		if n := len(b.endpoints); n != 1+rememberMax {
			t.Errorf("%d endpoints known, want %d", n, 1+rememberMax)
		}
	})
}

// With nothing ready the child's state and errors pass through.
func TestNothingReady(t *testing.T) {
	synctest.Test(t, testNothingReady)
}

func testNothingReady(t *testing.T) {
	cc, b := fakeReady(t, P2CName, 1)
	if _, ok := cc.state.Picker.(*picker); !ok || cc.state.ConnectivityState != connectivity.Ready {
		t.Fatalf("state %v, picker %T", cc.state.ConnectivityState, cc.state.Picker)
	}
	cc.conns[0].step(connectivity.Idle, connectivity.Connecting)
	if _, err := cc.state.Picker.Pick(balancer.PickInfo{Ctx: t.Context()}); !errors.Is(err, balancer.ErrNoSubConnAvailable) {
		t.Errorf("got %v while reconnecting, want ErrNoSubConnAvailable", err)
	}
	err := b.UpdateClientConnState(balancer.ClientConnState{})
	if !errors.Is(err, balancer.ErrBadResolverState) {
		t.Errorf("no endpoints: %v, want ErrBadResolverState", err)
	}

	cc = &fakeConn{}
	b = p2cBuilder{}.Build(cc, balancer.BuildOptions{})
	defer b.Close()
	b.ResolverError(errors.New("no such host"))
	if cc.state.ConnectivityState != connectivity.TransientFailure {
		t.Errorf("state %v after a resolver error, want TRANSIENT_FAILURE", cc.state.ConnectivityState)
	}
}

func TestKeyOf(t *testing.T) {
	for _, tc := range []struct {
		addrs []string
		want  string
	}{
		{[]string{"a:1"}, "a:1"},
		{[]string{"b:1", "a:1"}, "a:1,b:1"},
		{[]string{"a:1", "b:1", "a:1"}, "a:1,b:1"},
		{[]string{"a,b"}, `"a,b"`},
		{[]string{`"a`, "b"}, `"\"a",b`},
		{nil, ""},
	} {
		var e resolver.Endpoint
		for _, a := range tc.addrs {
			e.Addresses = append(e.Addresses, resolver.Address{Addr: a})
		}
		if k := keyOf(e); k != tc.want {
			t.Errorf("%q: key %q, want %q", tc.addrs, k, tc.want)
		}
	}
}

func TestMethods(t *testing.T) {
	var m methods
	for range 2 {
		for method, want := range map[string]bool{
			"/kv.KV/Get": false, "/kv.KV/Scan": true, "/kv.KV/Load": true, "/kv.KV/Sync": true,
			"/kv.KV/Unknown": false, "/kv.KV": false, "": false, "//..": false,
		} {
			if s := m.streaming(method); s != want {
				t.Errorf("%q: streaming %v, want %v", method, s, want)
			}
		}
	}
	for i := range 2 * maxMethods {
		m.streaming(fmt.Sprintf("/kv.KV/M%d", i))
	}
	if n := len(*m.known.Load()); n != maxMethods {
		t.Errorf("%d methods remembered, want %d", n, maxMethods)
	}
	if !m.streaming("/kv.KV/Scan") {
		t.Error("forgotten")
	}
	if n := testenv.Allocs(100, func() { m.streaming("/kv.KV/Scan") }); n > 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

// A stream that lasts for a minute makes no endpoint look slow.
func TestStreamLengthIsNoLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := serve(func(*grpctest.Backend) time.Duration { return ms })
		h.Scan = func(*grpctest.Backend, *kvpb.Request, grpc.ServerStreamingServer[kvpb.Response]) error {
			time.Sleep(time.Minute)
			return nil
		}
		f := grpctest.NewFleet(t, 2, h)
		_, c := dialP2C(f)
		ready(t, c)
		load(t, f, c, time.Second)
		s, err := c.Scan(t.Context(), &kvpb.Request{})
		if err != nil {
			t.Fatal(err)
		}
		_, _ = s.Recv() // the end
		n := load(t, f, c, time.Second)
		if n[0] < 20 || n[1] < 20 {
			t.Errorf("calls after the stream: %v, want both to serve", n)
		}
	})
}

func BenchmarkPick(b *testing.B) {
	var keyed [64]context.Context
	for i := range keyed {
		keyed[i] = WithKey(context.Background(), fmt.Sprint("user-", i))
	}
	for _, n := range []int{10, 100, 1000} {
		for _, name := range []string{P2CName, RendezvousName, "least_request_experimental"} {
			cc, _ := fakeReady(b, name, n)
			pick := func(i int) {
				info := balancer.PickInfo{FullMethodName: "/kv.KV/Get", Ctx: keyed[i%len(keyed)]}
				res, err := cc.state.Picker.Pick(info)
				if err != nil {
					b.Fatal(err)
				}
				res.Done(got)
			}
			for i := range 10 * n {
				pick(i)
			}
			b.Run(fmt.Sprintf("endpoints=%d/%s/serial", n, name), func(b *testing.B) {
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					pick(i)
				}
			})
			b.Run(fmt.Sprintf("endpoints=%d/%s/parallel", n, name), func(b *testing.B) {
				b.ReportAllocs()
				b.RunParallel(func(pb *testing.PB) {
					for i := 0; pb.Next(); i++ {
						pick(i)
					}
				})
			})
		}
	}
}

// BenchmarkHedge is the pick of a second attempt beside a running first.
func BenchmarkHedge(b *testing.B) {
	for _, n := range []int{2, 10, 1000} {
		b.Run(fmt.Sprintf("endpoints=%d", n), func(b *testing.B) {
			cc, _ := fakeReady(b, P2CName, n)
			b.ReportAllocs()
			for b.Loop() {
				var call attempt.Call
				var as [2]attempt.Attempt
				var done [2]func(balancer.DoneInfo)
				for i := range as {
					as[i].Init(&call, i+1, attempt.Hedge)
					res, err := cc.state.Picker.Pick(balancer.PickInfo{Ctx: attempt.NewContext(context.Background(), &as[i])})
					if err != nil {
						b.Fatal(err)
					}
					done[i] = res.Done
				}
				done[0](got)
				done[1](got)
			}
		})
	}
}

// While nothing is ready the call's own attempt is left to the child's picker, which
// waits or fails; a hedge is not sent, or it would wait for the same connection.
func TestUnreadyPicker(t *testing.T) {
	u := unready{base.NewErrPicker(balancer.ErrNoSubConnAvailable)}
	c := attempt.Call{Method: "/kv.KV/Get"}
	for _, tc := range []struct {
		kind   attempt.Kind
		method string
		want   error
	}{
		{attempt.First, "/kv.KV/Get", balancer.ErrNoSubConnAvailable},
		{attempt.Retry, "/kv.KV/Get", balancer.ErrNoSubConnAvailable},
		{attempt.Hedge, "/kv.KV/Get", errNotSent},
		{attempt.Hedge, "/auth.Auth/Token", balancer.ErrNoSubConnAvailable},
	} {
		var a attempt.Attempt
		a.Init(&c, 2, tc.kind)
		_, err := u.Pick(balancer.PickInfo{FullMethodName: tc.method, Ctx: attempt.NewContext(t.Context(), &a)})
		if err != tc.want || a.Unsent() != (tc.want == errNotSent) {
			t.Errorf("%v of %s: %v, unsent %v, want %v", tc.kind, tc.method, err, a.Unsent(), tc.want)
		}
	}
	if _, err := u.Pick(balancer.PickInfo{Ctx: t.Context()}); err != balancer.ErrNoSubConnAvailable {
		t.Errorf("without an attempt: %v", err)
	}
}

// An endpoint that is named twice is one.
func TestTheSameAddressesAreOneEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, name := range balancers() {
			cc := &fakeConn{}
			b := balancer.Get(name).Build(cc, balancer.BuildOptions{})
			a := resolver.Address{Addr: "10.0.0.1:443"}
			o := resolver.Address{Addr: "10.0.0.2:443"}
			var rs resolver.State
			rs.Endpoints = []resolver.Endpoint{{Addresses: []resolver.Address{a}}, {Addresses: []resolver.Address{a, a}}, {Addresses: []resolver.Address{o}}}
			if err := b.UpdateClientConnState(balancer.ClientConnState{ResolverState: rs}); err != nil {
				t.Fatal(err)
			}
			for _, sc := range cc.conns {
				sc.step(connectivity.Connecting, connectivity.Ready)
			}
			p := cc.state.Picker.(*picker)
			seen := map[string]int{}
			for _, m := range p.rotation.Load().groups[0].members {
				seen[m.key]++
			}
			if seen["10.0.0.1:443"] > 1 {
				t.Errorf("%s: an endpoint is two members: %v", name, seen)
			}
			b.Close()
		}
	})
}
