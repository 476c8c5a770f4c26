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
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// Who is too bad, by latency in milliseconds and failures in percent. Each has had 50
// attempts if nothing else is said.
func TestEjectionJudges(t *testing.T) {
	type bad map[int]Reason
	for name, tc := range map[string]struct {
		latency, failures, calls []float64
		near                     int // so many are of the caller's zone; 0: all
		change                   func(*ejection)
		want                     bad
	}{
		"nobody":                           {},
		"alone":                            {latency: []float64{900}},
		"alone, and failing":               {latency: []float64{1}, failures: []float64{100}},
		"two: neither is the normal":       {latency: []float64{2, 900}},
		"two, one failing":                 {latency: []float64{2, 2}, failures: []float64{0, 30}, want: bad{1: ReasonFailures}},
		"three":                            {latency: []float64{2, 900, 2.1}, want: bad{1: ReasonLatency}},
		"three that differ":                {latency: []float64{2, 20, 11}},
		"one far":                          {latency: []float64{5, 6, 5.5, 100, 6.2, 5.1}, want: bad{3: ReasonLatency}},
		"one infinitely far":               {latency: []float64{5, 6, 5.5, 1e9, 6.2, 5.1}, want: bad{3: ReasonLatency}},
		"one fast":                         {latency: []float64{50, 60, 55, .1, 62, 51}},
		"two of ten":                       {latency: []float64{5, 6, 5, 6, 100, 5, 6, 5, 90, 6}, want: bad{4: ReasonLatency, 8: ReasonLatency}},
		"four of ten":                      {latency: []float64{5, 5, 5, 5, 5, 5, 90, 90, 90, 90}, want: bad{6: ReasonLatency, 7: ReasonLatency, 8: ReasonLatency, 9: ReasonLatency}},
		"half":                             {latency: []float64{5, 5, 5, 90, 90, 90}},
		"all slow alike":                   {latency: []float64{900, 950, 910, 905, 940}},
		"all the same":                     {latency: []float64{9, 9, 9, 9}},
		"at three times":                   {latency: []float64{10, 10, 10, 30}},
		"over three times":                 {latency: []float64{10, 10, 10, 30.1}, want: bad{3: ReasonLatency}},
		"within the deviation":             {latency: []float64{6, 12, 18, 24, 40}},
		"over the deviation":               {latency: []float64{9, 12, 12, 15, 37}, want: bad{4: ReasonLatency}},
		"the same, at the deviation":       {latency: []float64{9, 12, 12, 15, 34}}, // 12 + 5 x 1.4826 x 3 = 34.2
		"at the floor":                     {latency: []float64{.1, .1, .1, 5}},
		"over the floor":                   {latency: []float64{.1, .1, .1, 5.01}, want: bad{3: ReasonLatency}},
		"no floor":                         {latency: []float64{.1, .1, .1, .4}, change: func(c *ejection) { c.latencyFloor = 0 }, want: bad{3: ReasonLatency}},
		"too few calls":                    {latency: []float64{5, 5, 5, 900}, calls: []float64{50, 50, 50, 19.9}},
		"just enough":                      {latency: []float64{5, 5, 5, 900}, calls: []float64{50, 50, 50, 20}, want: bad{3: ReasonLatency}},
		"a peer with too few is none":      {latency: []float64{5, 900, 5}, calls: []float64{50, 50, 19}},
		"and does not move the median":     {latency: []float64{100, 110, 105, 1, 1, 1, 1}, calls: []float64{50, 50, 50, 9, 9, 9, 9}},
		"failing":                          {latency: []float64{5, 5, 5}, failures: []float64{0, 20, 0}, want: bad{1: ReasonFailures}},
		"failing too little":               {latency: []float64{5, 5, 5}, failures: []float64{0, 19.9, 0}},
		"failing as the peers do":          {latency: []float64{5, 5, 5}, failures: []float64{10, 30, 10}},
		"failing more than they do":        {latency: []float64{5, 5, 5}, failures: []float64{10, 31, 10}, want: bad{1: ReasonFailures}},
		"all failing":                      {latency: []float64{5, 5, 5}, failures: []float64{100, 100, 100}},
		"failing at once, so fast":         {latency: []float64{50, .1, 50}, failures: []float64{0, 90, 0}, want: bad{1: ReasonFailures}},
		"both: it is told by the failures": {latency: []float64{5, 900, 5}, failures: []float64{0, 90, 0}, want: bad{1: ReasonFailures}},
		"one slow, another failing":        {latency: []float64{5, 5, 5, 90, 5}, failures: []float64{0, 50, 0, 0, 0}, want: bad{1: ReasonFailures, 3: ReasonLatency}},
		"farther away":                     {latency: []float64{2, 2, 2, 2, 40, 41}, near: 4},
		"alone in its zone":                {latency: []float64{2, 2, 2, 2, 40}, near: 4},
		"one in each zone":                 {latency: []float64{2, 40}, failures: []float64{0, 50}, near: 1, want: bad{1: ReasonFailures}},
		"slow in the other zone":           {latency: []float64{2, 2, 2, 40, 41, 40, 200}, near: 3, want: bad{6: ReasonLatency}},
		"slow in the zone, as others far":  {latency: []float64{2, 40, 2, 2, 40, 41, 40}, near: 4, want: bad{1: ReasonLatency}},
		"failing in the other zone":        {latency: []float64{2, 2, 2, 40, 41}, failures: []float64{0, 0, 0, 0, 30}, near: 3, want: bad{4: ReasonFailures}},
		"another ratio":                    {latency: []float64{5, 5, 5}, failures: []float64{0, 99, 100}, change: func(c *ejection) { c.failureRatio = 1 }},
		"another factor":                   {latency: []float64{10, 10, 10, 16}, change: func(c *ejection) { c.latencyFactor = 1.5 }, want: bad{3: ReasonLatency}},
	} {
		c := defaultOptions().ejection
		if tc.change != nil {
			tc.change(&c)
		}
		var all []sample
		for i, l := range tc.latency {
			s := sample{calls: 50, latency: l * 1e6, far: tc.near > 0 && i >= tc.near}
			if tc.failures != nil {
				s.failures = tc.failures[i] / 100
			}
			if tc.calls != nil {
				s.calls = tc.calls[i]
			}
			all = append(all, s)
		}
		got := c.judge(all)
		if len(got) != len(all) {
			t.Fatalf("%s: %d verdicts of %d", name, len(got), len(all))
		}
		for i, e := range got {
			if e.Reason != tc.want[i] {
				t.Errorf("%s: endpoint %d: %q, want %q", name, i, e.Reason, tc.want[i])
			}
		}
	}
}

// What an endpoint was judged by, and its peers without it.
func TestEjectionTellsTheFigures(t *testing.T) {
	c := defaultOptions().ejection
	var all []sample
	for i, latency := range []float64{5e6, 7e6, 90e6, 9e6, 80e6} {
		all = append(all, sample{calls: 50, latency: latency, failures: []float64{.01, .02, .5, .06, 0}[i]})
	}
	got := c.judge(all)
	want := Event{Reason: ReasonFailures, Latency: 90 * ms, PeerLatency: 8 * ms, FailureRatio: .5, PeerFailureRatio: .015}
	if got[2] != want {
		t.Errorf("%+v, want %+v", got[2], want)
	}
	want = Event{Reason: ReasonLatency, Latency: 80 * ms, PeerLatency: 8 * ms, PeerFailureRatio: .04}
	if got[4] != want || got[0] != (Event{}) {
		t.Errorf("%+v, want %+v; and %+v, want nothing", got[4], want, got[0])
	}
}

func TestEjectionBounds(t *testing.T) {
	for _, tc := range []struct {
		percent float64
		n, want int
	}{{34, 1, 0}, {34, 2, 0}, {34, 3, 1}, {34, 5, 1}, {34, 6, 2}, {34, 10, 3}, {0, 100, 0}, {100, 7, 7}, {50, 2, 1}, {50, 3, 1},
		{29, 100, 29}, {57, 100, 57}, {7, 100, 7}, {0.5, 200, 1}, {0.5, 199, 0}} {
		c := ejection{maxEjectionPercent: tc.percent}
		if got := c.allowed(tc.n); got != tc.want {
			t.Errorf("%v%% of %d: %d, want %d", tc.percent, tc.n, got, tc.want)
		}
	}
	c := defaultOptions().ejection
	for _, tc := range []struct {
		e    Event
		want time.Duration
	}{
		{Event{Reason: ReasonLatency, PeerLatency: 10 * ms}, 20 * ms},
		{Event{Reason: ReasonLatency, PeerLatency: ms}, 5 * ms},
		{Event{Reason: ReasonFailures, PeerLatency: 10 * ms}, 1<<63 - 1},
	} {
		if got := c.limit(tc.e); got != tc.want {
			t.Errorf("%+v: good probes take at most %v, want %v", tc.e, got, tc.want)
		}
	}
}

// What the detector sees of an endpoint: a superseded attempt is a lower bound of its
// latency, one that the caller gave up says nothing, and a failure is as slow as the rest.
func TestSample(t *testing.T) {
	for name, tc := range map[string]struct {
		ends     []verdict // of 10 ms each, after 20 answers of 10 ms
		latency  time.Duration
		failures float64
	}{
		"answers":    {nil, 10 * ms, 0},
		"superseded": {slices.Repeat([]verdict{superseded}, 20), 20 * ms, 0},
		"given up":   {slices.Repeat([]verdict{cut}, 20), 10 * ms, 0},
		"failures":   {slices.Repeat([]verdict{failed}, 20), 20 * ms, .5},
	} {
		e := &endpoint{}
		for range 20 {
			e.record(0, 10*ms, tau, answered)
		}
		for _, v := range tc.ends {
			e.record(0, 10*ms, tau, v)
		}
		s := e.sample()
		if d := time.Duration(s.latency) - tc.latency; d > tc.latency/50 || d < -tc.latency/50 || s.failures != tc.failures || name != "given up" && s.calls != float64(20+len(tc.ends)) {
			t.Errorf("%s: %+v, want latency %v and failures %v", name, s, tc.latency, tc.failures)
		}
	}
}

// A detected is a fleet whose calls take the events of their balancer.
type detected struct {
	t      *testing.T
	f      *grpctest.Fleet
	c      kvpb.KVClient
	slow   []atomic.Int64  // of each backend: how long it takes, in nanoseconds
	noise  atomic.Bool     // whether slow is the mean of an exponential distribution
	fails  []atomic.Int64  // one in so many calls it fails at once; 0: none
	peak   []atomic.Int64  // the most calls that it has had at once since it was last set to 0
	keys   int             // of how many keys the calls are; 0: of none
	events chan Event      // buffered
	begin  time.Time       //
	calls  [][]int64       // by second and backend, since the last run began
	ctx    context.Context // with the handler of events
	failed atomic.Int64
}

func detect(t *testing.T, n int, name, js string, opts ...grpc.DialOption) *detected {
	d := &detected{t: t, slow: make([]atomic.Int64, n), fails: make([]atomic.Int64, n), peak: make([]atomic.Int64, n), events: make(chan Event, 1000), keys: 500}
	var counts = make([]atomic.Int64, n)
	d.f = grpctest.NewFleet(t, n, grpctest.Handlers{Unary: func(ctx context.Context, b *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
		now := b.Started.Load() - b.Ended.Load()
		for p := &d.peak[b.Index]; ; {
			if x := p.Load(); now <= x || p.CompareAndSwap(x, now) {
				break
			}
		}
		if k := d.fails[b.Index].Load(); k > 0 && counts[b.Index].Add(1)%10 < k {
			return nil, status.Error(codes.Unavailable, "x")
		}
		took := time.Duration(d.slow[b.Index].Load())
		if d.noise.Load() {
			took = time.Duration(rand.ExpFloat64() * float64(took))
		}
		select {
		case <-time.After(2*ms + took):
			return &kvpb.Response{Id: req.Id, Backend: b.Name}, nil
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}})
	d.ctx = WithEventHandler(t.Context(), func(e Event) { d.events <- e })
	d.c = dialWith(t, d.f, name, js, opts...)
	d.begin = time.Now()
	return d
}

// run makes 200 calls a second for d, and returns how many each backend got.
func (d *detected) run(long time.Duration) []int64 {
	d.t.Helper()
	var wg sync.WaitGroup
	n := len(d.f.Backends)
	count := func() []int64 {
		c := make([]int64, n)
		for i, b := range d.f.Backends {
			c[i] = b.Started.Load()
		}
		return c
	}
	minus := func(a, b []int64) []int64 {
		c := make([]int64, n)
		for i := range c {
			c[i] = a[i] - b[i]
		}
		return c
	}
	d.calls = nil
	all := count()
	last := all
	for i := range int(long / (5 * ms)) {
		wg.Go(func() {
			ctx := d.ctx
			if d.keys > 0 {
				ctx = WithKey(ctx, fmt.Sprint(i%d.keys))
			}
			if _, err := d.c.Get(ctx, &kvpb.Request{}); err != nil {
				d.failed.Add(1)
			}
		})
		time.Sleep(5 * ms)
		if i%200 == 199 {
			now := count()
			d.calls = append(d.calls, minus(now, last))
			last = now
		}
	}
	wg.Wait()
	synctest.Wait()
	return minus(count(), all)
}

// told returns the events since the last time.
func (d *detected) told() (es []Event) {
	for {
		select {
		case e := <-d.events:
			if e.Target != "fleet:///kv" {
				d.t.Errorf("target %q", e.Target)
			}
			es = append(es, e)
		default:
			return es
		}
	}
}

// until runs until there are events, for at most so long, and returns them.
func (d *detected) until(most time.Duration) []Event {
	d.t.Helper()
	for end := time.Now().Add(most); time.Now().Before(end); {
		d.run(100 * ms)
		if es := d.told(); len(es) > 0 {
			return es
		}
	}
	d.t.Fatalf("no event within %v", most)
	return nil
}

// The life of an ejection: a backend becomes slow, leaves after two sweeps, gets few
// probes, one at a time; recovers, and comes back when three
// probes were good and the base time is over, with a slow start. The next time it is out for
// twice as long.
func TestTheLifeOfAnEjection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := detect(t, 5, RendezvousName, `{}`)
		if d.run(5 * time.Second); len(d.told()) > 0 {
			t.Fatal("events though nothing is wrong")
		}
		d.slow[0].Store(int64(200 * ms))
		start := time.Now()
		es := d.until(6 * time.Second)
		if e := es[0]; len(es) != 1 || e.Kind != Ejected || e.Endpoint != "backend-0" || e.Reason != ReasonLatency ||
			e.Latency < 15*ms || e.PeerLatency > 3*ms || e.FailureRatio != 0 {
			t.Fatalf("%+v, want backend-0 ejected for its latency", es)
		}
		if took := time.Since(start); took < time.Second {
			t.Errorf("ejected after %v, want two sweeps", took)
		}
		time.Sleep(300 * ms) // what was in flight
		out := time.Now()
		d.peak[0].Store(0)
		n := d.run(5 * time.Second)
		if n[0] > 3 || n[0] < 1 || d.peak[0].Load() != 1 { // after 2s, 4s ...
			t.Errorf("%d of 1000 calls, and %d at once, want few probes, one at a time", n[0], d.peak[0].Load())
		}
		if es := d.told(); len(es) > 0 {
			t.Errorf("%+v while it is slow", es)
		}
		d.slow[0].Store(0)
		es = d.until(16 * time.Second)
		if e := es[0]; len(es) != 1 || e.Kind != Readmitted || e.Reason != ReasonProbes || e.Endpoint != "backend-0" ||
			e.Out < 10*time.Second || e.Out > 21*time.Second || time.Since(out) > 21*time.Second {
			t.Fatalf("%+v, want backend-0 back after 10s and three good probes", es)
		}
		d.run(14 * time.Second)
		share := func(sec int) float64 {
			var sum int64
			for _, n := range d.calls[sec] {
				sum += n
			}
			return float64(d.calls[sec][0]) / float64(sum)
		}
		// The share of its keys among 500 is not a fifth exactly.
		if a, b, c := share(0), share(5), share(13); a > .06 || a == 0 || b < .06 || b > .18 || c < .14 {
			t.Errorf("shares of %.2f, %.2f after 5s, and %.2f in the end, want a ramp", a, b, c)
		}
		d.slow[0].Store(int64(200 * ms))
		if es = d.until(6 * time.Second); len(es) != 1 || es[0].Kind != Ejected {
			t.Fatalf("%+v, want it ejected again", es)
		}
		d.slow[0].Store(0)
		es = d.until(23 * time.Second)
		if e := es[0]; len(es) != 1 || e.Kind != Readmitted || e.Out < 20*time.Second || e.Out > 21500*ms {
			t.Errorf("%+v, want it back after 20s", es)
		}
		if d.failed.Load() > 0 {
			t.Errorf("%d calls failed", d.failed.Load())
		}
	})
}

// A probe that takes more than half way to what ejects is a bad one: the endpoint stays out.
func TestBadProbesKeepAnEndpointOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := detect(t, 5, RendezvousName, `{"ejection": {"baseEjectionTime": "2s"}}`)
		d.slow[0].Store(int64(200 * ms))
		d.until(8 * time.Second)
		d.slow[0].Store(int64(6 * ms)) // 8 ms; good is max(5, 2 x 2)
		d.run(30 * time.Second)
		if es := d.told(); len(es) > 0 {
			t.Errorf("%+v, want it out", es)
		}
		d.slow[0].Store(int64(ms))
		if es := d.until(8 * time.Second); es[0].Kind != Readmitted || es[0].Reason != ReasonProbes {
			t.Errorf("%+v, want it back", es)
		}
	})
}

// With bobtail_p2c, a backend that fails 30% of its calls at once, and so looks fast,
// leaves.
func TestAFailingBackendLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := detect(t, 5, P2CName, `{}`)
		d.keys = 0
		d.run(5 * time.Second)
		d.fails[3].Store(3)
		es := d.until(15 * time.Second)
		if e := es[0]; len(es) != 1 || e.Kind != Ejected || e.Reason != ReasonFailures || e.Endpoint != "backend-3" || e.FailureRatio < .2 || e.PeerFailureRatio != 0 {
			t.Fatalf("%+v, want backend-3 ejected for its failures", es)
		}
		before := d.failed.Swap(0)
		d.run(9 * time.Second)
		if after := d.failed.Load(); before < 5 || after > 9 {
			t.Errorf("%d calls failed until it left, %d of 1800 then, want at most 1 in 200", before, after)
		}
		d.fails[3].Store(0)
		d.told()
		if es = d.until(15 * time.Second); es[0].Kind != Readmitted || es[0].Endpoint != "backend-3" {
			t.Errorf("%+v, want it back", es)
		}
	})
}

// All bad alike is nobody's fault.
func TestAllBadAlikeStay(t *testing.T) {
	for _, name := range ours {
		synctest.Test(t, func(t *testing.T) {
			d := detect(t, 5, name, `{"ejection": {"maxEjectionPercent": 100, "panicThreshold": 0}}`)
			d.run(3 * time.Second)
			for i := range d.slow {
				d.slow[i].Store(int64(300 * ms))
				d.fails[i].Store(5)
			}
			d.run(10 * time.Second)
			if es := d.told(); len(es) > 0 {
				t.Errorf("%s: %+v", name, es)
			}
		})
	}
}

// Without calls nothing happens, and there is nothing that could: no goroutine, no timer.
func TestNoCallsNoEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := detect(t, 5, RendezvousName, `{"ejection": {"baseEjectionTime": "1s"}}`)
		d.slow[0].Store(int64(200 * ms))
		d.until(8 * time.Second)
		d.slow[0].Store(0)
		time.Sleep(20 * time.Minute) // after 30 gRPC closes the balancer
		if es := d.told(); len(es) > 0 {
			t.Errorf("%+v", es)
		}
		// It had no bad probe, or it had: in either case the calls bring it back.
		if es := d.until(5 * time.Second); es[0].Kind != Readmitted || es[0].Out < 20*time.Minute {
			t.Errorf("%+v, want it back after the silence", es)
		}
	})
}

// An ejected endpoint that restarts is another: it is back as soon as it is connected.
func TestARestartReadmits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := detect(t, 5, RendezvousName, `{}`)
		d.slow[0].Store(int64(200 * ms))
		d.until(8 * time.Second)
		d.f.Stop(0)
		d.run(time.Second)
		d.slow[0].Store(0)
		d.f.Start(0)
		es := d.until(5 * time.Second)
		if e := es[0]; len(es) != 1 || e.Kind != Readmitted || e.Reason != ReasonReconnected || e.Out > 8*time.Second {
			t.Errorf("%+v, want backend-0 back", es)
		}
	})
}

// A slow endpoint whose attempts are all superseded by hedges is found, though it never
// answers; where the caller gives up it is not.
func TestSupersededAttemptsTell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := detect(t, 5, RendezvousName, `{}`, grpc.WithChainUnaryInterceptor(
			hedging.UnaryClientInterceptor(hedging.Config{MaxAttempts: 2, Delay: 20 * ms})))
		d.run(3 * time.Second)
		d.slow[0].Store(int64(time.Second))
		es := d.until(8 * time.Second)
		if e := es[0]; e.Kind != Ejected || e.Endpoint != "backend-0" || e.Reason != ReasonLatency {
			t.Errorf("%+v, want backend-0 ejected for its latency", es)
		}
		if d.failed.Load() > 0 {
			t.Errorf("%d calls failed", d.failed.Load())
		}
	})
	synctest.Test(t, func(t *testing.T) {
		d := detect(t, 5, RendezvousName, `{}`)
		d.run(3 * time.Second)
		d.slow[0].Store(int64(time.Second))
		for i := range 2000 {
			ctx, cancel := context.WithCancel(WithKey(d.ctx, fmt.Sprint(i)))
			time.AfterFunc(20*ms, cancel)
			_, _ = d.c.Get(ctx, &kvpb.Request{})
			cancel()
		}
		if es := d.told(); len(es) > 0 {
			t.Errorf("%+v for attempts that the caller gave up", es)
		}
	})
}

// judged brings the detector of a balancer without servers to its next sweep, with as many
// attempts everywhere as before, which take as long.
func judged(b *shards) []Event {
	time.Sleep(sweepEvery)
	for _, e := range b.endpoints {
		if s := e.sample(); s.calls > 0 && !e.out {
			for range 50 {
				e.record(b.now(), time.Duration(s.latency), tau, answered)
			}
		}
	}
	return swept(b)
}

// swept sweeps, and takes the events.
func swept(b *shards) []Event {
	b.sweep(b.now())
	b.mu.Lock()
	defer b.mu.Unlock()
	es := b.events
	b.events = nil
	return es
}

// met has an endpoint meet 50 attempts.
func (b *shards) met(i int, took time.Duration, v verdict) {
	e := b.endpoints[fmt.Sprintf("10.0.0.%d:443", i)]
	for range 50 {
		e.record(b.now(), took, tau, v)
	}
}

// No more than maxEjectionPercent ever leave, the worst first; and the next one as soon as one is
// back.
func TestMaxEjectionPercent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tc := range []struct{ n, percent, bad, want int }{
			{10, 34, 4, 3}, {10, 34, 2, 2}, {3, 34, 1, 1}, {5, 0, 2, 0}, {5, 19, 2, 0}, {5, 20, 2, 1}, {10, 100, 4, 4}} {
			_, sh, _ := configured(t, RendezvousName, tc.n, fmt.Sprintf(`{"ejection": {"maxEjectionPercent": %d}}`, tc.percent))
			b := shardsOf(sh)
			for i := range tc.n {
				b.met(i, 2*ms, answered)
			}
			for i := range tc.bad {
				b.met(i, time.Duration(i+1)*100*ms, answered)
			}
			if es := judged(b); len(es) > 0 {
				t.Errorf("%+v: %+v after one sweep", tc, es)
			}
			es := append(judged(b), append(judged(b), judged(b)...)...)
			if len(es) != tc.want {
				t.Errorf("%+v: %d ejected", tc, len(es))
			}
			for k, e := range es {
				if want := fmt.Sprintf("10.0.0.%d:443", tc.bad-1-k); e.Endpoint != want {
					t.Errorf("%+v: ejected %s, want %s, the worst", tc, e.Endpoint, want)
				}
			}
		}
	})
}

// Two sweeps in a row are two: one between that is good begins anew.
func TestStrikesAreInARow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, sh, _ := configured(t, P2CName, 5, `{}`)
		b := shardsOf(sh)
		for i, slow := range []bool{true, false, true, false, true, true} {
			for k := range 5 {
				b.met(k, 2*ms, answered)
			}
			if slow {
				b.met(0, 100*ms, answered)
			} else {
				for range 20 { // outweighs what was
					b.met(0, 2*ms, answered)
				}
			}
			if es := judged(b); len(es) != map[bool]int{true: 1}[i == 5] {
				t.Errorf("sweep %d: %+v", i+1, es)
			}
		}
	})
}

// With fewer than half left all take part, and panic is told once when it begins
// and when it ends.
func TestPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, sh, _ := configured(t, RendezvousName, 10, `{"ejection": {"maxEjectionPercent": 40}}`)
		b := shardsOf(sh)
		for i := range 10 {
			b.met(i, 2*ms, answered)
		}
		for i := range 4 {
			b.met(i, 100*ms, answered)
		}
		judged(b)
		if es := judged(b); len(es) != 4 {
			t.Fatalf("%+v, want four ejected", es)
		}
		rot := func() *rotation { return cc.state.Picker.(*picker).rotation.Load() }
		if n, out := len(rot().groups[0].members), len(rot().bench); n != 6 || out != 4 {
			t.Errorf("%d in rotation and %d on the bench, want 6 and 4", n, out)
		}
		lose := func(addr string, s connectivity.State) {
			for _, sc := range cc.conns {
				if sc.addr == addr {
					sc.step(s)
				}
			}
		}
		told := func() []Event {
			b.sweep(0)
			b.mu.Lock()
			defer b.mu.Unlock()
			es := b.events
			b.events = nil
			return es
		}
		lose("10.0.0.9:443", connectivity.Idle)
		if es := told(); len(es) > 0 || len(rot().bench) != 4 {
			t.Errorf("%+v with five of ten", es)
		}
		lose("10.0.0.8:443", connectivity.Idle)
		if es := told(); len(es) != 1 || es[0] != (Event{Kind: PanicBegan, Target: es[0].Target, Ready: 8, Ejected: 4}) {
			t.Errorf("%+v with four of ten, want panic", es)
		}
		if n, out := len(rot().groups[0].members), len(rot().bench); n != 8 || out != 0 {
			t.Errorf("%d in rotation and %d on the bench in panic, want 8 and none", n, out)
		}
		lose("10.0.0.7:443", connectivity.Idle)
		if es := told(); len(es) > 0 {
			t.Errorf("%+v while in panic", es)
		}
		for _, a := range []string{"10.0.0.7:443", "10.0.0.8:443"} {
			lose(a, connectivity.Connecting)
			lose(a, connectivity.Ready)
		}
		if es := told(); len(es) != 1 || es[0] != (Event{Kind: PanicEnded, Target: es[0].Target, Ready: 9, Ejected: 4}) {
			t.Errorf("%+v with five of ten again, want the end of panic", es)
		}
		if len(rot().bench) != 4 {
			t.Errorf("%d on the bench, want 4", len(rot().bench))
		}
	})
}

// A configuration that ejects nobody brings all back at once.
func TestDisabledEjection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, sh, _ := configured(t, P2CName, 5, `{}`)
		b := shardsOf(sh)
		for i := range 5 {
			b.met(i, 2*ms, answered)
		}
		b.met(1, 100*ms, answered)
		judged(b)
		if es := judged(b); len(es) != 1 {
			t.Fatalf("%+v", es)
		}
		cfg, _ := p2cBuilder{}.ParseConfig([]byte(`{"ejection": {"maxEjectionPercent": 0}}`))
		resolve(t, sh, cfg, 5)
		if r := cc.state.Picker.(*picker).rotation.Load(); len(r.bench) > 0 || len(r.groups[0].members) != 5 {
			t.Error("not all are back")
		}
		if es := judged(b); len(es) != 1 || es[0].Reason != ReasonDisabled || es[0].Out > time.Second {
			t.Errorf("%+v, want it readmitted", es)
		}
	})
}

// Events wait for a call that takes them: the newest 64, each for one call only.
func TestEventsAreTakenOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, sh, _ := configured(t, P2CName, 3, `{}`)
		b := shardsOf(sh)
		call := func(ctx context.Context) {
			res, err := cc.state.Picker.Pick(balancer.PickInfo{FullMethodName: "/kv.KV/Get", Ctx: ctx})
			if err != nil {
				t.Fatal(err)
			}
			res.Done(got)
		}
		for i := range 100 {
			b.mu.Lock()
			b.tell(Event{Kind: PanicBegan, Ready: i})
			b.mu.Unlock()
		}
		call(t.Context())
		call(WithEventHandler(t.Context(), nil))
		if n := len(b.events); n != maxEvents {
			t.Errorf("%d events wait, want %d", n, maxEvents)
		}
		var mu sync.Mutex
		var taken []int
		ctx := WithEventHandler(t.Context(), func(e Event) {
			mu.Lock()
			defer mu.Unlock()
			taken = append(taken, e.Ready)
		})
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() { call(ctx) })
		}
		wg.Wait()
		if len(taken) != maxEvents || taken[0] != 36 || !slices.IsSorted(taken) || taken[63] != 99 {
			t.Errorf("taken %v, want the newest 64 in their order", taken)
		}
		if b.news.Load() || len(b.events) > 0 {
			t.Error("events are left")
		}
	})
}

// A hedge with no other place to go goes to an ejected endpoint; a first attempt and one
// that has another place do not.
func TestHedgesMayUseTheBench(t *testing.T) {
	for _, name := range ours {
		synctest.Test(t, func(t *testing.T) {
			cc, sh, _ := configured(t, name, 3, `{"ejection": {"probeEvery": 1000000}}`)
			b := shardsOf(sh)
			for i := range 3 {
				b.met(i, 2*ms, answered)
			}
			b.met(1, 100*ms, answered)
			judged(b)
			if es := judged(b); len(es) != 1 {
				t.Fatalf("%+v", es)
			}
			for range 200 {
				var call attempt.Call
				var as [4]attempt.Attempt
				var done []func(balancer.DoneInfo)
				for i := range as {
					as[i].Init(&call, i+1, attempt.Hedge)
					res, err := cc.state.Picker.Pick(balancer.PickInfo{FullMethodName: "/kv.KV/Get", Ctx: attempt.NewContext(t.Context(), &as[i])})
					if err == nil {
						done = append(done, res.Done)
					}
					if bench := as[i].Endpoint() == "10.0.0.1:443"; bench != (i == 2) || as[i].Unsent() != (i == 3) {
						t.Fatalf("%s: attempt %d at %q, unsent %v", name, i+1, as[i].Endpoint(), as[i].Unsent())
					}
				}
				for _, d := range done {
					d(balancer.DoneInfo{})
				}
			}
		})
	}
}

// With no panic wanted and nobody left but the ejected, these serve, and no policy is asked to
// choose among none.
func TestOnlyTheBenchIsLeft(t *testing.T) {
	for _, name := range ours {
		synctest.Test(t, func(t *testing.T) {
			cc, sh, _ := configured(t, name, 3, `{"ejection": {"panicThreshold": 0}}`)
			b := shardsOf(sh)
			for i := range 3 {
				b.met(i, 2*ms, answered)
			}
			b.met(1, 100*ms, answered)
			judged(b)
			if es := judged(b); len(es) != 1 {
				t.Fatalf("%+v", es)
			}
			for _, sc := range cc.conns {
				if sc.addr != "10.0.0.1:443" {
					sc.step(connectivity.Idle)
				}
			}
			for i, g := range cc.state.Picker.(*picker).rotation.Load().groups {
				if len(g.members) == 0 {
					t.Errorf("%s: group %d is empty", name, i)
				}
			}
			res, err := cc.state.Picker.Pick(balancer.PickInfo{FullMethodName: "/kv.KV/Get", Ctx: WithKey(t.Context(), "k")})
			if err != nil || at(b.endpoints["10.0.0.1:443"].endpoint) != 1 {
				t.Fatalf("%s: %v, want a pick of the ejected one", name, err)
			}
			res.Done(got)
		})
	}
}

// The threshold of the panic is a part of the whole, to the endpoint: with 55% of 20 left
// there is none.
func TestPanicThreshold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, sh, _ := configured(t, P2CName, 20, `{"ejection": {"maxEjectionPercent": 50, "panicThreshold": 55}}`)
		b := shardsOf(sh)
		for i := range 20 {
			b.met(i, 2*ms, answered)
		}
		for i := range 9 {
			b.met(i, 100*ms, answered)
		}
		if es := append(judged(b), judged(b)...); len(es) != 9 || b.panicking {
			t.Errorf("%d events, panic %v, want nine ejections", len(es), b.panicking)
		}
	})
}

// The length of a stream is no latency, of one that fails neither.
func TestAFailedStreamIsNoLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, sh, _ := configured(t, P2CName, 1, `{}`)
		b := shardsOf(sh)
		b.met(0, 2*ms, answered)
		for range 5 {
			res, err := cc.state.Picker.Pick(balancer.PickInfo{FullMethodName: "/kv.KV/Scan", Ctx: t.Context()})
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(100 * ms)
			res.Done(balancer.DoneInfo{Err: status.Error(codes.Unavailable, "x"), BytesSent: true})
		}
		s := b.endpoints["10.0.0.0:443"].sample()
		if s.latency > float64(3*ms) || s.failures < .05 {
			t.Errorf("%+v after five streams that failed, want their failures and no latency", s)
		}
	})
}

// At most one of 100 calls is a probe, however many there are between two that are due; and
// with few calls, the time between them is the bound.
func TestProbesAreFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tc := range []struct {
			every time.Duration // between calls
			want  int           // probes among 1000 calls; each is good
		}{{10 * ms, 5}, {ms / 10, 0}, {50 * ms, 10}} {
			cc, sh, _ := configured(t, P2CName, 5, `{}`)
			b := shardsOf(sh)
			for i := range 5 {
				b.met(i, 2*ms, answered)
			}
			b.met(1, 100*ms, answered)
			judged(b)
			if es := judged(b); len(es) != 1 {
				t.Fatalf("%+v", es)
			}
			b.due.Store(int64(24 * time.Hour)) // nobody is readmitted
			e, probes := b.endpoints["10.0.0.1:443"], 0
			for range 1000 {
				res, err := cc.state.Picker.Pick(balancer.PickInfo{FullMethodName: "/kv.KV/Get", Ctx: t.Context()})
				if err != nil {
					t.Fatal(err)
				}
				if at(e.endpoint) > 0 {
					probes++
				}
				res.Done(got)
				time.Sleep(tc.every)
			}
			if probes < tc.want-1 || probes > tc.want {
				t.Errorf("a call every %v: %d probes in 1000, want %d", tc.every, probes, tc.want)
			}
		}
	})
}

// An endpoint that has had no bad probe is back after ten times the base time; and so long
// after it was readmitted, the next ejection counts as the first.
func TestLongAgo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, sh, _ := configured(t, P2CName, 5, `{}`)
		b := shardsOf(sh)
		e := b.endpoints["10.0.0.1:443"]
		eject := func() {
			t.Helper()
			for i := range 5 {
				b.met(i, 2*ms, answered)
			}
			b.met(1, 100*ms, answered)
			judged(b)
			if es := judged(b); len(es) != 1 || es[0].Kind != Ejected {
				t.Fatalf("%+v", es)
			}
		}
		eject()
		time.Sleep(98 * time.Second)
		if es := swept(b); len(es) > 0 {
			t.Errorf("%+v before ten times the base time", es)
		}
		time.Sleep(2 * time.Second)
		if es := swept(b); len(es) != 1 || es[0].Reason != ReasonTime || es[0].Out != 100*time.Second {
			t.Errorf("%+v after ten times the base time", es)
		}
		if eject(); e.times != 2 {
			t.Errorf("ejected %d times, want 2", e.times)
		}
		e.record(b.now(), time.Second, tau, answered) // a bad probe
		time.Sleep(200 * time.Second)
		if es := swept(b); len(es) > 0 {
			t.Errorf("%+v after a bad probe", es)
		}
		for range goodProbes {
			e.record(b.now(), ms, tau, answered)
		}
		time.Sleep(sweepEvery)
		if es := swept(b); len(es) != 1 || es[0].Reason != ReasonProbes {
			t.Errorf("%+v after three good ones", es)
		}
		time.Sleep(101 * time.Second)
		swept(b)
		if eject(); e.times != 1 {
			t.Errorf("ejected %d times, want the first time again", e.times)
		}
	})
}

// The attempts of one sweep are no reason for a second strike: an endpoint that has paused
// once, and gets no attempts for that, stays.
func TestNoStrikeWithoutAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, sh, _ := configured(t, P2CName, 5, `{}`)
		b := shardsOf(sh)
		for i := range 5 {
			b.met(i, 2*ms, answered)
		}
		b.met(0, 100*ms, answered)
		for range 5 {
			time.Sleep(sweepEvery)
			if es := swept(b); len(es) > 0 {
				t.Fatalf("%+v by the same attempts", es)
			}
			for i := range 4 {
				b.met(i+1, 2*ms, answered)
			}
		}
		time.Sleep(sweepEvery)
		b.met(0, 100*ms, answered)
		if es := swept(b); len(es) != 1 {
			t.Errorf("%+v when it is still slow, want it ejected", es)
		}
	})
}

// Not even where ejected endpoints come back that the resolver had removed.
func TestNoMoreAreOutThanMayBe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, sh, cfg := configured(t, P2CName, 10, `{"ejection":{"panicThreshold":0}}`)
		b := shardsOf(sh)
		for i := range 10 {
			b.met(i, 2*ms, answered)
		}
		for i := 7; i < 10; i++ {
			b.met(i, 100*ms, answered)
		}
		judged(b)
		if es := judged(b); len(es) != 3 {
			t.Fatalf("%+v", es)
		}
		resolve(t, sh, cfg, 7) // resolver loses the three
		for i := range 2 {
			b.met(i, 100*ms, answered)
		}
		judged(b)
		judged(b)
		cc := sh.(*p2cBalancer).ClientConn.(*fakeConn)
		cc.conns = nil
		resolve(t, sh, cfg, 10)
		for _, sc := range cc.conns {
			sc.step(connectivity.Connecting, connectivity.Ready)
		}
		time.Sleep(sweepEvery)
		b.sweep(b.now())
		out := 0
		for _, e := range b.endpoints {
			if e.out && e.named {
				out++
			}
		}
		if out > 3 {
			t.Errorf("%d of 10 are out, want at most 3", out)
		}
	})
}

// Ejected while its peers took 1 ms; now all take 8 ms, and so do its probes.
func TestAProbeIsJudgedByThePresent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, sh, _ := configured(t, P2CName, 5, `{}`)
		b := shardsOf(sh)
		for i := range 5 {
			b.met(i, ms, answered)
		}
		b.met(1, 100*ms, answered)
		judged(b)
		if es := judged(b); len(es) != 1 {
			t.Fatalf("%+v", es)
		}
		e := b.endpoints["10.0.0.1:443"]
		for sec := range 120 {
			time.Sleep(time.Second)
			for _, p := range b.endpoints {
				if p != e {
					for range 50 {
						p.record(b.now(), 8*ms, tau, answered)
					}
				}
			}
			if sec%2 == 0 && e.out {
				e.record(b.now(), 8*ms, tau, answered) // a probe
			}
			swept(b)
		}
		if e.out {
			t.Errorf("still out after two minutes of probes that were as good as its peers' calls (limit %v)", e.trial.limit)
		}
	})
}

// Events that nobody takes do not have each call look for who does, for ever.
func TestEventsOfNobodyAreDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, sh, _ := configured(t, P2CName, 3, `{}`)
		b := shardsOf(sh)
		var taken int
		ctx := WithEventHandler(t.Context(), func(Event) { taken++ })
		call := func(ctx context.Context, n int) {
			for range n {
				res, err := cc.state.Picker.Pick(balancer.PickInfo{FullMethodName: "/kv.KV/Get", Ctx: ctx})
				if err != nil {
					t.Fatal(err)
				}
				res.Done(balancer.DoneInfo{Err: status.Error(codes.Unavailable, "x"), BytesSent: true}) // which is measured always
			}
		}
		tell := func() {
			b.mu.Lock()
			b.tell(Event{Kind: PanicBegan})
			b.mu.Unlock()
		}
		tell()
		call(t.Context(), mostDeclined-1)
		tell() // the latest counts
		call(t.Context(), mostDeclined-1)
		if call(ctx, 1); taken != 2 {
			t.Errorf("%d events taken after %d calls that do not, want both", taken, mostDeclined-1)
		}
		tell()
		call(t.Context(), mostDeclined)
		if b.news.Load() || len(b.events) > 0 {
			t.Error("an event waits for ever")
		}
		if call(ctx, 1); taken != 2 {
			t.Errorf("%d events taken, want 2", taken)
		}
		tell()
		if call(ctx, 1); taken != 3 {
			t.Errorf("%d events taken, want 3", taken)
		}
	})
}
