package loadbalance

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// A record is all that a balancer has learned and counted of an endpoint.
type record struct {
	endpoint *endpoint // the very same: attempts in flight count themselves out of it

	known                                      known
	cost                                       uint64
	last, silence                              int64
	weight, exposure, answers, failures, given float64
	trial                                      trial
	flights                                    int64

	out         bool
	since, ramp time.Duration
	times       int
}

// records returns those of the endpoints, by name.
func (b *shards) records() map[string]record {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := make(map[string]record)
	for key, e := range b.endpoints {
		e.mu.Lock()
		r := record{
			endpoint: e.endpoint,
			known:    e.known.Load(), cost: e.cost.Load(), last: e.last.Load(), silence: e.silence.Load(),
			weight: e.weight, exposure: e.exposure, answers: e.answers, failures: e.failures, given: e.given,
			flights: e.flights.Load(),
			out:     e.out, since: e.since, times: e.times, ramp: e.ramp,
		}
		if e.trial != nil {
			r.trial = *e.trial
		}
		e.mu.Unlock()
		all[key] = r
	}
	return all
}

// A past is a cluster that a client knows well: three endpoints are measured, number 3
// was ejected for its failures, number 4 is in its slow start, and held calls are in
// flight.
type past struct {
	*cluster
	client  kvpb.KVClient
	options string        // of the balancer, as members of a JSON object
	release chan struct{} // the held calls, by free
	free    func()
	held    chan error
	ctx     context.Context // its calls take the events
}

var errBroken = status.Error(codes.Internal, "broken")

const (
	ejected, newcomer, heldCalls = 3, 4, 12
)

// live makes a past for the balancer of a name. Dial is handed the service config, and
// returns further options; nil for none.
func live(t *testing.T, name string, dial func(config string) []grpc.DialOption) *past {
	t.Helper()
	var broken atomic.Bool
	p := &past{
		// Nothing of the past expires while the test looks.
		options: `"slowStart": {"window": "600s"}, "ejection": {"baseEjectionTime": "600s", "minimumCalls": 5}`,
		release: make(chan struct{}),
		held:    make(chan error, heldCalls),
	}
	p.cluster = newCluster(t, 5, func(ctx context.Context, i int, req *kvpb.Request) (*kvpb.Response, error) {
		switch {
		case req.Key == "hold":
			<-p.release
		case i == ejected && broken.Load():
			return nil, errBroken
		default:
			time.Sleep(2 * ms)
		}
		return &kvpb.Response{}, nil
	})
	p.free = sync.OnceFunc(func() { close(p.release) })
	t.Cleanup(p.free)
	events := make(chan Event, maxEvents)
	p.ctx = WithEventHandler(t.Context(), func(e Event) {
		if e.Endpoint != "" { // a panic is no change of what is known
			events <- e
		}
	})
	p.watch(&spy{}, name, "{"+p.options+"}")
	var opts []grpc.DialOption
	if dial != nil {
		opts = dial(p.config)
	}
	p.client = p.connect(indexes(4), opts...)
	ready(t, p.client)
	time.Sleep(601 * time.Second) // who comes later than that is a newcomer
	p.resolve(indexes(5)...)
	time.Sleep(time.Second)
	p.load(200)
	broken.Store(true)
	p.load(700)
	for i := range heldCalls {
		go func() {
			_, err := p.client.Get(WithKey(p.ctx, fmt.Sprint("held", i)), &kvpb.Request{Key: "hold"})
			p.held <- err
		}()
	}
	synctest.Wait()

	if len(events) != 1 {
		t.Fatalf("%d events, want one ejection", len(events))
	}
	if e := <-events; e.Kind != Ejected || e.Endpoint != p.servers[ejected].name {
		t.Fatalf("event %+v, want the ejection of backend %d", e, ejected)
	}
	t.Cleanup(func() {
		for len(events) > 0 {
			t.Errorf("event %+v, want none but the ejection", <-events)
		}
	})
	all := p.spy.inner.Load().records()
	var flights, busy int64
	for i, s := range p.servers {
		r := all[s.name]
		if flights += r.flights; r.flights > 0 {
			busy++
		}
		if r.known != measured || r.out != (i == ejected) || (r.ramp >= 0) != (i == newcomer) {
			t.Fatalf("backend %d: %+v, want it measured, out if it is %d, in its slow start if it is %d", i, r, ejected, newcomer)
		}
	}
	if flights != heldCalls || busy < 2 {
		t.Fatalf("%d calls in flight at %d backends, want %d at several", flights, busy, heldCalls)
	}
	return p
}

// load makes n calls, one in 5 ms, and returns how many began at each server.
func (p *past) load(n int) (counts []int64) {
	p.t.Helper()
	for _, s := range p.servers {
		counts = append(counts, -s.calls.Load())
	}
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			_, err := p.client.Get(WithKey(p.ctx, fmt.Sprint(i)), &kvpb.Request{})
			if err != nil && status.Convert(err).Message() != status.Convert(errBroken).Message() {
				p.t.Errorf("call: %v", err)
			}
		})
		time.Sleep(5 * ms)
	}
	wg.Wait()
	for i, s := range p.servers {
		counts[i] += s.calls.Load()
	}
	return counts
}

// same checks that nothing has been lost since before, and that picks go by it.
func (p *past) same(before map[string]record) {
	t := p.t
	t.Helper()
	b := p.spy.inner.Load()
	after := b.records()
	for key, was := range before {
		if is := after[key]; is != was {
			t.Errorf("%s:\n is %+v\nwas %+v", key, is, was)
		}
	}
	if len(after) != len(before) {
		t.Errorf("%d endpoints known, want %d", len(after), len(before))
	}
	b.mu.Lock()
	now, slowStart, r := b.now(), b.policy.slowStart, b.current.rotation.Load()
	weights := make(map[string]float64)
	for _, g := range r.groups {
		for _, m := range g.members {
			weights[m.key] = m.weight
		}
	}
	b.mu.Unlock()
	for i, s := range p.servers {
		want := 1.0
		if i == newcomer {
			want = slowStart.share(before[s.name].ramp, now)
		}
		if weights[s.name] != want {
			t.Errorf("backend %d has the weight %v, want %v", i, weights[s.name], want)
		}
	}
	if len(r.bench) != 1 || r.bench[0].key != p.servers[ejected].name {
		t.Errorf("ejected %v, want backend %d alone", r.bench, ejected)
	}
	// One call in 100 is a probe.
	if n := p.load(200); n[ejected] > 2 {
		t.Errorf("calls %v, want at most 2 at the ejected backend %d", n, ejected)
	}
	p.free()
	for range heldCalls {
		if err := <-p.held; err != nil {
			t.Errorf("call in flight: %v", err)
		}
	}
	synctest.Wait()
	for key, r := range b.records() {
		if r.flights != 0 {
			t.Errorf("%s: %d in flight at the end, want 0", key, r.flights)
		}
	}
	if b.crowd != nil && b.crowd.n.Load() != 0 {
		t.Errorf("%d in flight in all at the end, want 0", b.crowd.n.Load())
	}
}

// survives checks that nothing is lost by what happens. The servers see conns more
// connections each and the balancer updates more updates: or it has not happened.
func (p *past) survives(happen func(), conns, updates int64) {
	t := p.t
	t.Helper()
	before := p.spy.inner.Load().records()
	was, told := make([]int64, len(p.servers)), p.spy.updates.Load()
	for i, s := range p.servers {
		was[i] = s.conns.Load()
	}
	happen()
	time.Sleep(time.Second)
	synctest.Wait()
	for i, s := range p.servers {
		if n := s.conns.Load() - was[i]; n != conns {
			t.Errorf("backend %d: %d new connections, want %d", i, n, conns)
		}
	}
	if n := p.spy.updates.Load() - told; n != updates {
		t.Errorf("%d updates of the balancer, want %d", n, updates)
	}
	p.same(before)
}

// Survives is for package loadbalance_test, which alone may import package bobtail:
// nothing is lost by what happens to a client that dial has made for a service config.
func Survives(t *testing.T, name string, dial func(config string) []grpc.DialOption, happen func()) {
	live(t, name, dial).survives(happen, 0, 0)
}

// Balancers is likewise.
var Balancers = balancers

// What is known of endpoints, and counted, survives whatever happens to them.
func TestNothingIsForgotten(t *testing.T) {
	// own is something that each balancer alone can be told.
	own := map[string]string{P2CName: `, "decayTime": "20s"`, RendezvousName: `, "eps": 0.5`, PrequalName: `, "qRif": 0.5`}
	for _, name := range balancers() {
		for _, tc := range []struct {
			name           string
			happen         func(*past)
			conns, updates int64
		}{
			{"resolved again", func(p *past) { p.resolve(4, 2, 0, 1, 3) }, 0, 1},
			{"idle and ready", func(p *past) {
				for i := range p.servers {
					p.blink(i)
				}
			}, 1, 0},
			{"removed and named again", func(p *past) {
				p.resolve(0)
				time.Sleep(time.Second)
				p.resolve(1, 2, 3, 4)
				time.Sleep(time.Second)
				p.resolve(indexes(5)...)
			}, 1, 3},
			{"told another policy", func(p *past) {
				p.configure(`{` + p.options + `, "maxInFlight": 1000` + own[name] + `}`)
				p.resolve(indexes(5)...)
			}, 0, 1},
		} {
			t.Run(name+"/"+tc.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p := live(t, name, nil)
					p.survives(func() { tc.happen(p) }, tc.conns, tc.updates)
				})
			})
		}
	}
}

// callsUnderChurn is how many calls the stories of churn make.
func callsUnderChurn() int {
	if testing.Short() {
		return 10_000
	}
	return 100_000
}

// A churn is what a busy day does to a cluster, at random.
type churn struct {
	*cluster
	r       *rand.Rand
	named   []int         // servers that the resolver names
	configs []string      // of the balancer, to choose from
	least   int           // how many servers stay named
	pause   time.Duration // between two changes at most

	resolved, removed, blinked, updated int
}

// until changes something every few milliseconds, until done is closed.
func (c *churn) until(done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case <-time.After(time.Duration(1+c.r.IntN(int(c.pause/ms))) * ms):
		}
		switch c.r.IntN(6) {
		case 0:
			c.r.Shuffle(len(c.named), func(i, j int) { c.named[i], c.named[j] = c.named[j], c.named[i] })
			c.resolved++
			c.resolve(c.named...)
		case 1:
			if len(c.named) > c.least {
				c.remove(c.r.IntN(len(c.named)))
			}
		case 2, 5: // so that most are there as a rule
			for i := range c.servers {
				if !slices.Contains(c.named, i) {
					c.add(i)
					break
				}
			}
		case 3:
			c.blinked++
			c.blink(c.named[c.r.IntN(len(c.named))])
		case 4:
			c.updated++
			c.configure(c.configs[c.r.IntN(len(c.configs))])
			c.resolve(c.named...)
		}
	}
}

// remove is graceful: the resolver removes the endpoint, and then the server stops
// gracefully.
func (c *churn) remove(at int) {
	i := c.named[at]
	c.named = slices.Delete(c.named, at, at+1)
	c.removed++
	c.resolve(c.named...)
	time.Sleep(time.Duration(c.r.IntN(5)) * ms)
	c.servers[i].grpc.GracefulStop()
}

// add brings a removed one back.
func (c *churn) add(i int) {
	c.start(i)
	c.named = append(c.named, i)
	c.resolve(c.named...)
}

// No pick is lost, under load, whatever happens to the endpoints.
func TestNoPickIsLost(t *testing.T) {
	own := map[string][]string{
		P2CName:        {`{}`, `{"decayTime": "1s"}`, `{"maxInFlight": 100, "slowStart": {"window": "0s"}}`},
		PrequalName:    {`{}`, `{"qRif": 0.5}`, `{"maxInFlight": 100, "slowStart": {"window": "0s"}}`},
		RendezvousName: {`{}`, `{"eps": 1}`, `{"maxInFlight": 100, "slowStart": {"window": "0s"}}`},
	}
	for k, name := range balancers() {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const callers = 16
				n := callsUnderChurn()
				c := newCluster(t, 6, func(_ context.Context, i int, req *kvpb.Request) (*kvpb.Response, error) {
					// In whole milliseconds, as are the pauses between changes: many a pick is made
					// in the instant of a change.
					time.Sleep(time.Duration(1+req.Id*7919%3) * ms)
					return &kvpb.Response{Id: req.Id}, nil
				}, grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: time.Second, MaxConnectionAgeGrace: time.Minute}))
				configs := append([]string{`{}`, `{"maxInFlight": 1000}`}, own[name]...)
				client := c.dial(name, `{}`, indexes(6))
				done := make(chan struct{})
				var over sync.WaitGroup
				day := &churn{cluster: c, r: rand.New(rand.NewPCG(1, uint64(k))), named: indexes(6), configs: configs, least: 2, pause: 20 * ms}
				var wg sync.WaitGroup
				var lost atomic.Int64
				for caller := range callers {
					wg.Go(func() {
						for i := caller; i < n; i += callers {
							res, err := client.Get(WithKey(t.Context(), fmt.Sprint(i%97)), &kvpb.Request{Id: uint64(i)})
							if (err != nil || res.Id != uint64(i)) && lost.Add(1) <= 5 {
								t.Errorf("call %d: %v, %v", i, res, err)
							}
						}
					})
				}
				time.Sleep(ms)
				over.Go(func() { day.until(done) })
				begin := time.Now()
				wg.Wait()
				took := time.Since(begin)
				close(done)
				over.Wait()
				synctest.Wait()
				if lost.Load() > 0 {
					t.Errorf("%d of %d calls lost", lost.Load(), n)
				}
				t.Logf("in %v: %d re-resolutions, %d removals, %d blinks, %d updates", took, day.resolved, day.removed, day.blinked, day.updated)
				if least := n / 2000; min(day.resolved, day.removed, day.blinked, day.updated) < least {
					t.Errorf("fewer than %d of one of these: nothing was tested", least)
				}
				b := c.spy.inner.Load()
				all := b.records()
				for _, s := range c.servers {
					if r := all[s.name]; r.flights != 0 || s.calls.Load() < int64(n/60) {
						t.Errorf("%s: %d in flight at the end, want 0; %d calls, want a tenth of a sixth at least", s.name, r.flights, s.calls.Load())
					}
				}
				if len(all) != len(c.servers) {
					t.Errorf("%d endpoints known, want %d", len(all), len(c.servers))
				}
				if b.crowd != nil && b.crowd.n.Load() != 0 {
					t.Errorf("%d in flight in all at the end, want 0", b.crowd.n.Load())
				}
			})
		})
	}
}
