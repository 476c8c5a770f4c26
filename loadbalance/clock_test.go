package loadbalance

import (
	"context"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
)

// A ticker makes picks at a clock.
type ticker struct {
	clock
	r   *rand.Rand
	now time.Duration
}

// run makes picks for a while, every so often. It returns which part of them did not read the
// time in the last half, and how old a time they had at most.
func (c *ticker) run(every, long time.Duration) (about float64, oldest time.Duration) {
	n, all := 0., 0.
	for from, end := c.now, c.now+long; c.now < end; {
		c.now += time.Duration(float64(every) * c.r.ExpFloat64())
		bits := c.r.Uint64()
		at, ok := c.at(bits)
		if !ok {
			c.tick(c.now, bits)
		}
		if c.now-from < long/2 {
			continue
		}
		if all++; ok {
			n++
			oldest = max(oldest, c.now-at)
		}
	}
	return n / all, oldest
}

// Most picks go by the reading of another where there are very many, and none where a
// reading would be old.
func TestClock(t *testing.T) {
	c := &ticker{r: rand.New(rand.NewPCG(1, 2))}
	for _, tc := range []struct {
		every       time.Duration
		least, most float64
	}{
		{10 * time.Microsecond, 0, 0.02}, // 100,000 a second
		{time.Microsecond, .93, .94},     // 15 of 16
		{100 * time.Nanosecond, .93, .94},
		{20 * time.Microsecond, 0, 0.001},
		{time.Millisecond, 0, 0},
	} {
		about, oldest := c.run(tc.every, time.Second)
		if about < tc.least || about > tc.most {
			t.Errorf("a pick every %v: %.3f go by the clock, want %v to %v", tc.every, about, tc.least, tc.most)
		}
		// That nobody reads it for this long is one in e^10.
		if about > .5 && oldest > 10*16*tc.every+slack {
			t.Errorf("a pick every %v: a time is %v old", tc.every, oldest)
		}
	}
}

// What goes before a pause is not taken for a part of what comes after it.
func TestClockAfterAPause(t *testing.T) {
	const pause = 8 * time.Hour
	c := &ticker{r: rand.New(rand.NewPCG(1, 2))}
	c.run(time.Microsecond, 100*ms)
	sent, ok := c.at(1 << 40)
	if !ok {
		t.Fatal("it does not go")
	}
	if x := c.elapsed(sent, c.now+slack/2); x < slack/2 || x > slack {
		t.Errorf("elapsed %v while it goes, want %v", x, slack/2)
	}
	c.now += pause
	sent, _ = c.at(1 << 40) // which is as old as the pause is long
	if c.now-sent < pause {
		t.Fatal("it does not stand still")
	}
	c.tick(c.now+ms, 0) // another pick
	if x := c.elapsed(sent, c.now+3*ms); x != 2*ms {
		t.Errorf("elapsed %v, want 2ms since the pause was seen to be over", x)
	}
	if _, ok := c.at(1 << 40); ok {
		t.Error("it goes on after a pause")
	}

	c.now += 10 * ms
	c.run(time.Microsecond, 100*ms)
	c.now += pause
	sent, ok = c.at(1 << 40)
	if x := c.elapsed(sent, c.now+5*ms); !ok || x != 0 { // and no other pick
		t.Errorf("elapsed %v, want 0 as nothing is known", x)
	}
}

// Where only one in many attempts is measured, those that fail, or are cancelled, are all
// seen, with the time they took.
func TestUnmeasuredFailuresAreSeen(t *testing.T) {
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	var call attempt.Call
	over := new(attempt.Attempt)
	over.Init(&call, 1, attempt.First)
	over.Supersede()
	gone := balancer.DoneInfo{Err: status.Error(codes.Canceled, "x"), BytesSent: true}
	for name, tc := range map[string]struct {
		ctx  context.Context
		info balancer.DoneInfo
		// By how much exposure, answers, failures and what was left grow at one in 2^k.
		exposure, failures, left float64
	}{
		"an answer":              {context.Background(), got, 0, 0, 0},
		"an application's error": {context.Background(), balancer.DoneInfo{Err: status.Error(codes.NotFound, "x"), BytesSent: true, BytesReceived: true}, 0, 0, 0},
		"a failure":              {context.Background(), balancer.DoneInfo{Err: status.Error(codes.Unavailable, "x"), BytesSent: true, BytesReceived: true}, 30e6, 1, 0},
		"superseded":             {attempt.NewContext(canceled, over), gone, 30e6, 0, 0},
		"cancelled":              {canceled, gone, 30e6, 0, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			cc, b := fakeReady(t, P2CName, 1)
			defer b.Close()
			sh := shardsOf(b)
			e := sh.endpoints["10.0.0.0:443"].endpoint
			const n = 4000
			var dones []func(balancer.DoneInfo)
			time.Sleep(ms)
			e.record(sh.now(), ms, tau, answered)
			e.sparse.Store(maxSparse)
			sh.clock.going.Store(true)
			sh.clock.read.Store(int64(sh.now()))
			for range n {
				if name == "superseded" {
					call = attempt.Call{}
					again := new(attempt.Attempt)
					again.Init(&call, 1, attempt.First)
					again.Supersede()
					tc.ctx = attempt.NewContext(canceled, again)
				}
				res, err := cc.state.Picker.Pick(balancer.PickInfo{FullMethodName: "/kv.KV/Get", Ctx: tc.ctx})
				if err != nil {
					t.Fatal(err)
				}
				dones = append(dones, res.Done)
			}
			time.Sleep(30 * ms)
			e.mu.Lock()
			e.weight, e.exposure, e.answers = 0, 0, 0
			e.mu.Unlock()
			sh.clock.read.Store(int64(sh.now())) // others have picked in the meantime
			for _, done := range dones {
				done(tc.info)
			}
			e.mu.Lock()
			defer e.mu.Unlock()
			const part = n / float64(1<<maxSparse)
			near := func(x, want float64) bool { return x > .9*want-1e-9 && x < 1.1*want+1e-9 }
			if tc.exposure > 0 && (!near(e.weight, part) || !near(e.exposure, part*tc.exposure) || !near(e.failures, part*tc.failures) || !near(e.left, part*tc.left)) {
				t.Errorf("%s: weight %v, exposure %v, failures %v, left %v, want %v, %v, %v, %v", name,
					e.weight, e.exposure, e.failures, e.left, part, part*tc.exposure, part*tc.failures, part*tc.left)
			}
			if tc.exposure == 0 && (e.answers < 4 || e.answers > 35 || e.weight != e.answers) {
				t.Errorf("%s: %v answers of weight %v, want one in 256 of 4000", name, e.answers, e.weight)
			}
			if unary, _ := e.inFlight(); unary != 0 {
				t.Errorf("%s: %d in flight at the end", name, unary)
			}
		})
	}
}

// After a pause the first picks go by the time before it; what is measured, or seen because it
// failed, is not taken to have lasted as long as the pause.
func TestNoAttemptLastsAsLongAsAPause(t *testing.T) {
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	gone := balancer.DoneInfo{Err: status.Error(codes.Canceled, "x"), BytesSent: true}
	for name, tc := range map[string]struct {
		sparse uint32
		ctx    context.Context
		info   balancer.DoneInfo
		want   float64
	}{
		"measured":  {0, context.Background(), got, 5e6},
		"cancelled": {maxSparse, canceled, gone, 0}, // at least 0, as nothing is known
	} {
		synctest.Test(t, func(t *testing.T) {
			cc, b := fakeReady(t, P2CName, 1)
			defer b.Close()
			sh := shardsOf(b)
			e := sh.endpoints["10.0.0.0:443"].endpoint
			seen := 0
			for range 50 {
				e.record(sh.now(), ms, tau, answered)
				e.sparse.Store(tc.sparse)
				sh.clock.going.Store(true)
				sh.clock.read.Store(int64(sh.now()))
				time.Sleep(time.Hour)
				res, err := cc.state.Picker.Pick(balancer.PickInfo{FullMethodName: "/kv.KV/Get", Ctx: tc.ctx})
				if err != nil {
					t.Fatal(err)
				}
				if sh.clock.going.Load() {
					seen++ // it did not read the time
				}
				time.Sleep(5 * ms)
				e.mu.Lock()
				e.weight, e.exposure, e.answers = 0, 0, 0
				e.mu.Unlock()
				res.Done(tc.info)
				if x := e.exposure; x > 5e6 || x < tc.want {
					t.Fatalf("%s: an exposure of %v after 5ms", name, time.Duration(x))
				}
			}
			if seen < 30 {
				t.Errorf("%s: %d of 50 picks go by the clock, want nearly all", name, seen)
			}
		})
	}
}
