package bobtail_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/bobtail-rpc/bobtail"
	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
	"github.com/bobtail-rpc/bobtail/shedding"
)

// oneWay is how long a message takes between a client and a server of the fleet below, as
// within a data center. Without it no two servers would ever start the same call: they do
// if both are free within a round trip.
const oneWay = 100 * time.Microsecond

// far is a connection over which everything takes oneWay.
type far struct {
	net.Conn
	out, in chan packet
	closed  chan struct{}
	once    sync.Once
	rest    []byte
}

type packet struct {
	due  time.Time
	data []byte
}

func newFar(c net.Conn) *far {
	f := &far{Conn: c, out: make(chan packet, 4096), in: make(chan packet, 4096), closed: make(chan struct{})}
	go func() {
		for {
			select {
			case p := <-f.out:
				time.Sleep(time.Until(p.due))
				if _, err := f.Conn.Write(p.data); err != nil {
					return
				}
			case <-f.closed:
				return
			}
		}
	}()
	go func() {
		defer close(f.in)
		for {
			b := make([]byte, 16<<10)
			n, err := f.Conn.Read(b)
			if err != nil {
				return
			}
			f.in <- packet{time.Now().Add(oneWay), b[:n]}
		}
	}()
	return f
}

func (f *far) Write(b []byte) (int, error) {
	select {
	case f.out <- packet{time.Now().Add(oneWay), slices.Clone(b)}:
		return len(b), nil
	case <-f.closed:
		return 0, net.ErrClosed
	}
}

func (f *far) Read(b []byte) (int, error) {
	if len(f.rest) == 0 {
		p, ok := <-f.in
		if !ok {
			return 0, net.ErrClosed
		}
		time.Sleep(time.Until(p.due))
		f.rest = p.data
	}
	n := copy(b, f.rest)
	f.rest = f.rest[n:]
	return n, nil
}

func (f *far) Close() error {
	f.once.Do(func() { close(f.closed) })
	return f.Conn.Close()
}

// clinic is a fleet of servers with one worker and a queue each, as package shedding makes
// them, a way off from their clients.
type clinic struct {
	kvpb.UnimplementedKVServer
	index   int
	service func(call uint64, backend int) time.Duration
	total   *tally
	lis     *bufconn.Listener
}

// tally counts what the handlers of all servers did.
type tally struct {
	started atomic.Int64
	wasted  atomic.Int64 // ns of handlers that were cancelled
	worked  atomic.Int64 // ns of all
}

func (c *clinic) Get(ctx context.Context, req *kvpb.Request) (*kvpb.Response, error) {
	c.total.started.Add(1)
	begun := time.Now()
	defer func() { c.total.worked.Add(int64(time.Since(begun))) }()
	t := time.NewTimer(c.service(req.Id, c.index))
	defer t.Stop()
	select {
	case <-t.C:
		return &kvpb.Response{}, nil
	case <-ctx.Done():
		c.total.wasted.Add(int64(time.Since(begun)))
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// cell is one of the table.
type cell struct {
	p50, p99, p999 time.Duration
	failed         int
	twice          float64 // handlers beyond one per call, per call
	extra          float64 // work of handlers that were cancelled, of all work
	copies         float64 // attempts beyond one per call, per call
}

// queueingFleet drives 8 servers of one worker and 10 ms of work per call on average at a
// load in (0, 1) by 8 clients, of the policy each, for n calls.
func queueingFleet(t *testing.T, text string, load float64, n int, service func(uint64, int) time.Duration) (o cell) {
	const servers, clients, mean = 8, 8, 10 * time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		defer time.Sleep(time.Second) // what is on its way when all is closed arrives
		var total tally
		var attempts atomic.Int64
		r := manual.NewBuilderWithScheme("clinic")
		var st resolver.State
		fleet := map[string]*clinic{}
		for i := range servers {
			s, err := shedding.NewServer(shedding.ServerConfig{
				Limiter: shedding.LimiterConfig{Algorithm: shedding.Static, Limit: 1},
				// A plain queue: what is shed would make the tail look good.
				Queue: &shedding.QueueConfig{Target: time.Minute, MaxWait: time.Minute},
			})
			if err != nil {
				t.Fatal(err)
			}
			c := &clinic{index: i, service: service, total: &total, lis: bufconn.Listen(256 << 10)}
			srv := grpc.NewServer(grpc.WaitForHandlers(true), grpc.ChainUnaryInterceptor(s.UnaryServerInterceptor()))
			kvpb.RegisterKVServer(srv, c)
			go srv.Serve(c.lis) //nolint:errcheck // it returns when the server stops
			defer srv.Stop()
			name := fmt.Sprintf("backend-%d", i)
			fleet[name] = c
			st.Endpoints = append(st.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: name}}})
		}
		r.InitialState(st)
		var conns []kvpb.KVClient
		for range clients {
			c, err := bobtail.NewClient(policy(t, text), bobtail.WithLogger(nil),
				bobtail.WithHedgeReports(func(_ context.Context, r hedging.Report) { attempts.Add(int64(r.Attempts)) }))
			if err != nil {
				t.Fatal(err)
			}
			cc, err := grpc.NewClient("clinic:///kv", append(c.DialOptions(), grpc.WithResolvers(r),
				grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
					conn, err := grpctest.Dial(ctx, fleet[addr].lis)
					if err != nil {
						return nil, err
					}
					return newFar(conn), nil
				}))...)
			if err != nil {
				t.Fatal(err)
			}
			defer cc.Close()
			cc.Connect()
			conns = append(conns, kvpb.NewKVClient(cc))
		}
		time.Sleep(time.Second)

		rnd := rand.New(rand.NewPCG(1, uint64(load*1000)))
		took := make([]time.Duration, n)
		var failed atomic.Int64
		var wg sync.WaitGroup
		for i := range n {
			time.Sleep(time.Duration(rnd.ExpFloat64() * float64(mean) / (servers * load)))
			c := conns[rnd.IntN(clients)]
			wg.Go(func() {
				begun := time.Now()
				if _, err := c.Get(t.Context(), &kvpb.Request{Id: uint64(i)}); err != nil {
					failed.Add(1)
				}
				took[i] = time.Since(begun)
			})
		}
		wg.Wait()
		time.Sleep(time.Second)
		took = took[n/10:] // before that the clients learn
		slices.Sort(took)
		at := func(q float64) time.Duration { return took[int(q*float64(len(took)))] }
		o = cell{p50: at(.5), p99: at(.99), p999: at(.999), failed: int(failed.Load()),
			twice: float64(total.started.Load()-int64(n)) / float64(n),
			extra: float64(total.wasted.Load()) / float64(total.worked.Load()),
		}
		if a := attempts.Load(); a > 0 {
			o.copies = float64(a-int64(n)) / float64(n)
		}
	})
	return o
}

// exponential is a service time of 10 ms on average, of its own at each backend: the
// kindest to hedging, for a long one is probably short elsewhere.
func exponential(call uint64, backend int) time.Duration {
	return time.Duration(rand.New(rand.NewPCG(call, uint64(backend))).ExpFloat64() * 1e7)
}

// Queueing servers without, with hedged and with tied calls. A tied call waits in the
// shorter of two queues, which no percentile can do, and costs next to nothing; a hedge
// costs what it wins, and the budget keeps it from most of those who would need it. Both
// together also cut off the handlers that are slow themselves.
func TestTiedTable(t *testing.T) {
	const get = `"methodConfig": [{"name": [{"service": "kv.KV", "method": "Get"}], "hedgingPolicy": `
	policies := []struct{ name, text string }{
		{"none", `{}`},
		{"hedge", `{"extraLoad": {"max": 0.05}, ` + get + `{"maxAttempts": 2, "hedgingPercentile": 95}}]}`},
		{"tied", `{"extraLoad": {"max": 0.05}, ` + get + `{"maxAttempts": 2, "tied": true}}]}`},
		{"both", `{"extraLoad": {"max": 0.05}, ` + get + `{"maxAttempts": 2, "tied": true, "hedgingPercentile": 95}}]}`},
	}
	loads, n := []float64{0.3, 0.5, 0.7, 0.85}, 6000
	if testing.Short() || testenv.Race {
		loads, n = loads[1:2], 3000
	}
	for _, load := range loads {
		var cells []cell
		for _, p := range policies {
			c := queueingFleet(t, p.text, load, n, exponential)
			cells = append(cells, c)
			t.Logf("%2.0f%% %-5s  p50 %5.1f  p99 %5.1f  p99.9 %5.1f ms   copies %4.1f%%  handlers twice %4.2f%%  extra work %4.2f%%",
				100*load, p.name, c.p50.Seconds()*1e3, c.p99.Seconds()*1e3, c.p999.Seconds()*1e3, 100*c.copies, 100*c.twice, 100*c.extra)
			if c.failed > 0 {
				t.Errorf("%v of load, %s: %d calls failed", load, p.name, c.failed)
			}
		}
		none, hedge, tied := cells[0], cells[1], cells[2]
		// At a third of the load few calls queue, and the two are much alike; near saturation
		// p99 is that of the longest busy spell of a run, and either may have the luck.
		than := hedge
		if load < 0.5 || load > 0.8 {
			than = none
		}
		if tied.p99 >= than.p99 || tied.p50 > none.p50 {
			t.Errorf("%v of load: tied p50 %v, p99 %v; want at most %v and less than %v", load, tied.p50, tied.p99, none.p50, than.p99)
		}
		if tied.twice > 0.03 || tied.extra > 0.01 {
			t.Errorf("%v of load: tied ran %.4f of the handlers twice and did %.4f of extra work, want at most 0.03 and 0.01", load, tied.twice, tied.extra)
		}
	}
}

// Update may untie and tie again where the connection was dialed for it, and not where the
// stats handler is missing: there a tied call would be a costly hedge, in silence.
func TestUpdateTied(t *testing.T) {
	const text = `{"methodConfig": [{"name": [{"service": "kv.KV"}], "mode": "off", "hedgingPolicy": {"maxAttempts": 2, "tied": %v}}]}`
	tied, untied := policy(t, fmt.Sprintf(text, true)), policy(t, fmt.Sprintf(text, false))
	for _, tc := range []struct {
		dialed  bobtail.Policy
		options int
		want    string
	}{
		{tied, 5, ""},
		{untied, 4, "bobtail: update: tied true, want false as in the policy that was dialed with: the stats handler that tied calls need is fixed when a connection is dialed"},
	} {
		c, err := bobtail.NewClient(tc.dialed, bobtail.WithLogger(nil))
		if err != nil {
			t.Fatal(err)
		}
		if n := len(c.DialOptions()); n != tc.options {
			t.Errorf("%d dial options, want %d: the stats handler stands only where a method is tied", n, tc.options)
		}
		if err := c.Update(untied); err != nil {
			t.Error(err)
		}
		err = c.Update(tied)
		if got := fmt.Sprint(err); got != tc.want && (err != nil || tc.want != "") {
			t.Errorf("%v, want %q", err, tc.want)
		}
	}
}
