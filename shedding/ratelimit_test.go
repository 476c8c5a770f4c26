package shedding

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

func limit(t testing.TB, perSecond float64, burst int) *RateLimit {
	t.Helper()
	l, err := NewRateLimit(RateLimitConfig{PerSecond: perSecond, Burst: burst, Method: "/kv.KV/Get"})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func (d decision) String() string { return [...]string{"admit", "hold", "refuse", "expired"}[d] }

func TestRateLimitSteps(t *testing.T) {
	const none = time.Duration(math.MinInt64)
	type step struct {
		t, deadline time.Duration // since epoch
		want        decision
		wait        time.Duration
	}
	for _, test := range []struct {
		name      string
		perSecond float64
		burst     int
		steps     []step
	}{
		{"a full bucket, and then turns at the rate", 10, 2, []step{
			{0, none, admit, 0}, {0, none, admit, 0}, {0, none, hold, 100 * ms}, {0, none, hold, 200 * ms},
			{50 * ms, none, hold, 250 * ms}, {300 * ms, none, hold, 100 * ms}, {500 * ms, none, admit, 0}, {500 * ms, none, hold, 100 * ms},
		}},
		{"a pause fills it, and no further", 10, 2, []step{
			{0, none, admit, 0}, {0, none, admit, 0},
			{time.Hour, none, admit, 0}, {time.Hour, none, admit, 0}, {time.Hour, none, hold, 100 * ms},
		}},
		{"a turn before the deadline is waited for; at it, or after, it is refused and costs nothing", 10, 1, []step{
			{0, time.Hour, admit, 0},
			{0, 50 * ms, refuse, 100 * ms}, {0, 100 * ms, refuse, 100 * ms}, {20 * ms, 100 * ms, refuse, 80 * ms},
			{20 * ms, 100*ms + 1, hold, 80 * ms},
			{20 * ms, 200 * ms, refuse, 180 * ms}, {20 * ms, 300 * ms, hold, 180 * ms},
			{290 * ms, 299 * ms, refuse, 10 * ms}, {300 * ms, 300*ms + 1, admit, 0},
		}},
		{"after its deadline a call takes no token", 10, 1, []step{
			{10 * ms, 9 * ms, expired, 0}, {10 * ms, 10 * ms, expired, 0}, {10 * ms, none, admit, 0}, {10 * ms, 5 * ms, expired, 0},
		}},
		{"a time that has passed is the latest", 10, 1, []step{
			{0, none, admit, 0}, {1000 * ms, none, admit, 0},
			{500 * ms, none, hold, 100 * ms}, {500 * ms, 1100 * ms, refuse, 200 * ms}, {500 * ms, 900 * ms, expired, 0},
			{1000 * ms, none, hold, 200 * ms}, {1200 * ms, none, hold, 100 * ms},
		}},
		{"a rate whose turns are no whole nanoseconds", 3, 1, []step{
			{0, none, admit, 0}, {0, none, hold, 333_333_333}, {0, none, hold, 666_666_667}, {time.Second, none, admit, 0},
		}},
		{"nobody goes before one who waits for a part of a nanosecond", 7, 1, []step{
			{0, none, admit, 0}, {0, none, hold, 142_857_143}, {142_857_142, none, hold, 142_857_144},
		}},
		{"the least rate: no turn in three centuries", math.SmallestNonzeroFloat64, 1, []step{
			{0, none, admit, 0}, {0, time.Hour, refuse, rate.InfDuration}, {0, none, refuse, rate.InfDuration},
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := limit(t, test.perSecond, test.burst)
			for i, s := range test.steps {
				var deadline time.Time
				if s.deadline != none {
					deadline = epoch.Add(s.deadline)
				}
				if got := l.reserve(epoch.Add(s.t), deadline); got.decision != s.want || got.wait != s.wait {
					t.Fatalf("step %d: %v, %v, want %v, %v", i, got.decision, got.wait, s.want, s.wait)
				}
			}
		})
	}
}

// When a call gives up, those behind it move up, and its token is as if never taken.
func TestGiveUp(t *testing.T) {
	l := limit(t, 10, 1)
	wait := func(at time.Duration) turn { return l.reserve(epoch.Add(at), time.Time{}) }
	expect := func(what string, got turn, want time.Duration) {
		t.Helper()
		if got.wait != want {
			t.Errorf("%s: the wait is %v, want %v", what, got.wait, want)
		}
	}
	hears := func(what string, w turn, called bool, want time.Duration) {
		t.Helper()
		select {
		case <-w.waiter.news:
		default:
			t.Errorf("%s: the first in the queue was not told", what)
		}
		if is, _, wait := l.asks(w.waiter, l.latest); is != called || !called && wait != want {
			t.Errorf("%s: called %v, to wait %v, want %v, %v", what, is, wait, called, want)
		}
	}
	wait(0)
	first, second, third := wait(0), wait(0), wait(0)
	expect("third in the queue", third, 300*ms)
	l.givesUp(second.waiter)
	expect("after one in the middle has gone", wait(50*ms), 250*ms) // third before it
	l.givesUp(first.waiter)
	hears("after the first has gone", third, false, 50*ms)
	expect("after the first has gone", wait(50*ms), 250*ms)
	// Its turn comes, and it does not look until later; the next is told as well.
	next := l.queue.Front().Next().Value.(*waiter)
	l.settle(epoch.Add(150 * ms))
	hears("when its turn has come", third, true, 0)
	hears("when the turn of the one before has come", turn{waiter: next}, false, 50*ms)
	l.givesUp(third.waiter) // too late: it is gone
	for l.queue.Len() > 0 {
		l.givesUp(l.queue.Back().Value.(*waiter))
	}
	// The turns at 0 and 100 ms were taken: the token of 200 ms is there at its time.
	expect("after all have gone", wait(199*ms), ms)
	expect("", wait(300*ms), 0)
}

// Callers who give up together leave nothing behind.
func TestGiveUpTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limit(t, 10, 5)
		for range 5 {
			l.Probe(time.Now())
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() {
				if err := l.Wait(ctx); status.Code(err) != codes.Canceled {
					t.Error(err)
				}
			})
		}
		time.Sleep(50 * ms)
		cancel()
		wg.Wait()
		begin := time.Now()
		if err := l.Wait(t.Context()); err != nil || time.Since(begin) != 50*ms {
			t.Errorf("%v after %v, want the token that comes in 50ms", err, time.Since(begin))
		}
		time.Sleep(500 * ms)
		for i := range 5 {
			if wait := l.Probe(time.Now()); wait != 0 {
				t.Errorf("call %d waits %v, want a full bucket", i, wait)
			}
		}
	})
}

// Those behind one who gives up are woken sooner than they were promised.
func TestMoveUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limit(t, 10, 1)
		begin := time.Now()
		if err := l.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for i, want := range []time.Duration{0, 100 * ms, 0, 200 * ms, 300 * ms} {
			wg.Go(func() {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if want == 0 {
					time.AfterFunc(20*ms, cancel)
				}
				if err := l.Wait(ctx); (err == nil) != (want > 0) || err == nil && time.Since(begin) != want {
					t.Errorf("call %d: %v after %v, want %v", i, err, time.Since(begin), want)
				}
			})
			synctest.Wait()
		}
		wg.Wait()
	})
}

// A timer that is late costs those behind it nothing: each turn is at its own time.
func TestLateTimer(t *testing.T) {
	l := limit(t, 1000, 1)
	var all []turn
	for range 6 {
		all = append(all, l.reserve(epoch, time.Time{}))
	}
	if called, _, _ := l.asks(all[1].waiter, epoch.Add(3*ms)); !called {
		t.Fatal("not called")
	}
	for i, want := range []bool{true, true, true, false, false} {
		if got := all[i+1].waiter.called; got != want {
			t.Errorf("after 3ms call %d is called %v, want %v", i+1, got, want)
		}
	}
	if wait := l.reserve(epoch.Add(3*ms), time.Time{}).wait; wait != 3*ms {
		t.Errorf("the wait is %v, want 3ms behind two", wait)
	}
}

func TestRateLimitConfig(t *testing.T) {
	for _, test := range []struct {
		cfg  RateLimitConfig
		want string // "" is none
	}{
		{RateLimitConfig{PerSecond: 1e9, Burst: 1e9}, ""},
		{RateLimitConfig{PerSecond: math.SmallestNonzeroFloat64}, ""},
		{RateLimitConfig{}, "shedding: rate limit perSecond 0, want (0, 1000000000]"},
		{RateLimitConfig{PerSecond: -1, Burst: -1}, "shedding: rate limit perSecond -1, want (0, 1000000000]\n" +
			"shedding: rate limit burst -1, want [1, 1000000000], or 0 for the default"},
		{RateLimitConfig{PerSecond: math.NaN()}, "shedding: rate limit perSecond NaN, want (0, 1000000000]"},
		{RateLimitConfig{PerSecond: math.Inf(1)}, "shedding: rate limit perSecond +Inf, want (0, 1000000000]"},
		{RateLimitConfig{PerSecond: 1e9 + 1}, "shedding: rate limit perSecond 1.000000001e+09, want (0, 1000000000]"},
		{RateLimitConfig{PerSecond: 1, Burst: 1e9 + 1}, "shedding: rate limit burst 1000000001, want [1, 1000000000], or 0 for the default"},
	} {
		l, err := NewRateLimit(test.cfg)
		if err == nil && test.want != "" || err != nil && err.Error() != test.want || (l == nil) == (err == nil) {
			t.Errorf("%+v: %v, %v, want %q", test.cfg, l, err, test.want)
		}
	}
	for perSecond, burst := range map[float64]int{0.001: 1, 1: 1, 10: 1, 10.5: 2, 11: 2, 1000: 100, 1e9: 1e8} {
		l := limit(t, perSecond, 0)
		if got := l.bucket.Burst(); got != burst {
			t.Errorf("%v per second: burst %d, want %d", perSecond, got, burst)
		}
	}
}

// What Wait does, and when.
func TestWait(t *testing.T) {
	within := func(d time.Duration) func(*testing.T) context.Context {
		return func(t *testing.T) context.Context {
			ctx, cancel := context.WithTimeout(t.Context(), d)
			t.Cleanup(cancel)
			return ctx
		}
	}
	cancelled := func(after time.Duration) func(*testing.T) context.Context {
		return func(t *testing.T) context.Context {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(after, cancel)
			return ctx
		}
	}
	ended := func(t *testing.T) context.Context {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		return ctx
	}
	background := func(*testing.T) context.Context { return context.Background() }
	// Calls that come one behind the other, at once, to 10 per second and a bucket of 1:
	// how each ends and when.
	type call struct {
		ctx  func(*testing.T) context.Context
		code codes.Code
		at   time.Duration
		next time.Duration // when the next token is there after all that
	}
	for _, test := range []struct {
		name  string
		calls []call
	}{
		{"one behind the other", []call{{background, codes.OK, 0, 100 * ms}, {background, codes.OK, 100 * ms, 200 * ms}, {background, codes.OK, 200 * ms, 300 * ms}}},
		{"within the deadline", []call{{background, codes.OK, 0, 100 * ms},
			{within(101 * ms), codes.OK, 100 * ms, 200 * ms}}},
		{"a turn at the deadline is refused at once", []call{{background, codes.OK, 0, 100 * ms},
			{within(100 * ms), codes.ResourceExhausted, 0, 100 * ms},
			{background, codes.OK, 100 * ms, 200 * ms}}},
		{"cancelled while it waits: the turn is given back", []call{{background, codes.OK, 0, 100 * ms},
			{cancelled(30 * ms), codes.Canceled, 30 * ms, 100 * ms}}},
		{"ended at the instant of its turn, and its turn was", []call{{background, codes.OK, 0, 100 * ms},
			{func(*testing.T) context.Context { return silent{context.Background(), time.Now().Add(100 * ms)} }, codes.Canceled, 100 * ms, 100 * ms}}},
		{"ended before it came: no token is taken", []call{{ended, codes.Canceled, 0, 0},
			{within(-1), codes.DeadlineExceeded, 0, 0}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := limit(t, 10, 1)
				begin := time.Now()
				var wg sync.WaitGroup
				for i, c := range test.calls {
					wg.Go(func() {
						err := l.Wait(c.ctx(t))
						if status.Code(err) != c.code || time.Since(begin) != c.at {
							t.Errorf("call %d: %v at %v, want %v at %v", i, err, time.Since(begin), c.code, c.at)
						}
						if (c.code == codes.ResourceExhausted) != errors.Is(err, ErrRateLimited) {
							t.Errorf("call %d: %v", i, err)
						}
					})
					synctest.Wait()
				}
				wg.Wait()
				next := test.calls[len(test.calls)-1].next
				if wait := l.reserve(time.Now(), time.Time{}).wait; wait != max(next-time.Since(begin), 0) {
					t.Errorf("then the wait is %v at %v, want a turn at %v", wait, time.Since(begin), next)
				}
			})
		})
	}
}

// silent is a context that ends at a time and tells only those who ask.
type silent struct {
	context.Context
	at time.Time
}

func (s silent) Err() error {
	if time.Now().Before(s.at) {
		return nil
	}
	return context.Canceled
}

// A deadline that has passed though its timer is late is no reason to say that the rate
// was the matter.
func TestWaitLateTimer(t *testing.T) {
	l := limit(t, 10, 1)
	err := l.Wait(lateTimer{context.Background()})
	if status.Code(err) != codes.DeadlineExceeded || errors.Is(err, ErrRateLimited) {
		t.Errorf("%v, want DEADLINE_EXCEEDED", err)
	}
	if got := l.reserve(time.Now(), time.Time{}); got.decision != admit {
		t.Error("it took a token")
	}
}

type lateTimer struct{ context.Context }

func (lateTimer) Deadline() (time.Time, bool) { return time.Now().Add(-ms), true }

func TestRateLimitRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limit(t, 10, 1)
		ctx, cancel := context.WithTimeout(t.Context(), 50*ms)
		defer cancel()
		if err := l.Wait(ctx); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * ms)
		err := l.Wait(ctx)
		checkRefusal(t, err, "RATE_LIMITED", "/kv.KV/Get", 80*ms)
		if want := "rpc error: code = ResourceExhausted desc = shedding: rate limited: /kv.KV/Get"; err.Error() != want {
			t.Errorf("%q, want %q", err, want)
		}
	})
}

// Shadow says of each call of a load what Wait would have done to it.
func TestShadowTellsTheTruth(t *testing.T) {
	type told struct {
		wait    time.Duration
		refused bool
	}
	// 200 calls/s for 5 s against 100/s and 10, with deadlines of 0.1 s to 0.5 s.
	load := func(t *testing.T, ask func(context.Context) told) (all []told) {
		all = make([]told, 1000)
		var wg sync.WaitGroup
		for i := range all {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(100+100*(i%5))*ms)
				defer cancel()
				all[i] = ask(ctx)
			})
			time.Sleep(5 * ms)
		}
		wg.Wait()
		return all
	}
	synctest.Test(t, func(t *testing.T) {
		real, shadow := limit(t, 100, 10), limit(t, 100, 10)
		did := load(t, func(ctx context.Context) told {
			begin := time.Now()
			err := real.Wait(ctx)
			return told{time.Since(begin), err != nil}
		})
		refused, waited := 0, 0
		would := load(t, func(ctx context.Context) told {
			begin := time.Now()
			wait, err := shadow.Shadow(ctx)
			if time.Since(begin) != 0 {
				t.Error("Shadow waited")
			}
			if err != nil {
				checkRefusal(t, err, "RATE_LIMITED", "/kv.KV/Get", wait)
				wait = 0 // refused at once
			}
			return told{wait, err != nil}
		})
		for i := range did {
			if did[i] != would[i] {
				t.Fatalf("call %d: Wait did %+v, Shadow told %+v", i, did[i], would[i])
			}
			if did[i].refused {
				refused++
			} else if did[i].wait > 0 {
				waited++
			}
		}
		if refused < 300 || waited < 300 {
			t.Errorf("%d refused, %d waited of %d: the load tells nothing", refused, waited, len(did))
		}
	})
}

// Calls without a deadline build up no queue in shadow, and calls that have ended take
// no part.
func TestShadowWithoutDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limit(t, 10, 1)
		ended, end := context.WithCancel(t.Context())
		end()
		if wait, err := l.Shadow(ended); wait != 0 || err != nil {
			t.Errorf("%v, %v", wait, err)
		}
		for i, want := range []time.Duration{0, 100 * ms, 100 * ms, 100 * ms} {
			if wait, err := l.Shadow(t.Context()); wait != want || err != nil {
				t.Errorf("call %d: %v, %v, want %v", i, wait, err, want)
			}
		}
	})
}

func TestProbe(t *testing.T) {
	l := limit(t, 10, 2)
	for i, s := range []struct{ at, want time.Duration }{
		{0, 0}, {0, 0}, {0, 100 * ms}, {0, 100 * ms}, {60 * ms, 40 * ms}, {100 * ms, 0}, {100 * ms, 100 * ms}, {50 * ms, 100 * ms},
		{150 * ms, 50 * ms},
	} {
		if wait := l.Probe(epoch.Add(s.at)); wait != s.want {
			t.Errorf("step %d: %v, want %v", i, wait, s.want)
		}
	}
}

// TestRateLimitModel: a bucket that is empty at time zero and brings a token every gap, and
// a list of those who wait.
func TestRateLimitModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		gap := time.Duration(rapid.IntRange(10_000, 1_000_000_000).Draw(t, "gap"))
		burst := rapid.IntRange(1, 5).Draw(t, "burst")
		l, err := NewRateLimit(RateLimitConfig{PerSecond: 1e9 / float64(gap), Burst: burst})
		if err != nil {
			t.Fatal(err)
		}
		var (
			now   time.Duration
			zero  = -time.Duration(burst) * gap
			queue []*waiter
			went  []time.Duration
		)
		// Each step may lose a nanosecond in rounding.
		near := func(a, b time.Duration) bool { return (a - b).Abs() <= 200 }
		l.reserve(epoch, epoch) // has no effect but to begin the clock
		for range rapid.IntRange(1, 100).Draw(t, "steps") {
			// Some bring a time that has passed.
			at := now + time.Duration(rapid.Float64Range(0, 2).Draw(t, "pause")*float64(gap))
			if rapid.IntRange(0, 4).Draw(t, "late") == 0 {
				at = now - time.Duration(rapid.Float64Range(0, 3).Draw(t, "by")*float64(gap))
			}
			what := rapid.SampledFrom([]string{"call", "call", "call", "give up", "probe"}).Draw(t, "what")
			if what == "give up" {
				if len(queue) > 0 {
					i := rapid.IntRange(0, len(queue)-1).Draw(t, "who")
					l.givesUp(queue[i])
					queue = slices.Delete(queue, i, i+1)
				}
				continue
			}
			for i := range queue {
				if near(zero+time.Duration(i+1)*gap, at) {
					at += 1000 // whether its turn has come was a matter of rounding
				}
			}
			now = max(now, at)
			for len(queue) > 0 && zero+gap <= now {
				zero += gap
				went = append(went, zero)
				queue = queue[1:]
			}
			zero = max(zero, now-time.Duration(burst)*gap)
			wait := max(zero+time.Duration(len(queue)+1)*gap-now, 0)
			if what == "probe" {
				got := l.Probe(epoch.Add(at))
				if !near(got, wait) {
					t.Fatalf("probe %v, want %v", got, wait)
				}
				if got == 0 {
					zero += gap
					went = append(went, now)
				}
				continue
			}
			var deadline time.Time
			patience := time.Duration(math.MaxInt64)
			if rapid.Bool().Draw(t, "deadline") {
				patience = time.Duration(rapid.Float64Range(-1, 8).Draw(t, "patience") * float64(gap))
				deadline = epoch.Add(now + patience)
			}
			got := l.reserve(epoch.Add(at), deadline)
			if patience > 0 && !near(got.wait, wait) {
				t.Fatalf("wait %v, want %v", got.wait, wait)
			}
			want := hold
			switch {
			case patience <= 0:
				want = expired
			case got.wait == 0:
				want = admit
				zero += gap
				went = append(went, now)
			case got.wait >= patience:
				want = refuse
			default:
				queue = append(queue, got.waiter)
			}
			if got.decision != want {
				t.Fatalf("%v with a wait of %v and %v to spare, want %v", got.decision, got.wait, patience, want)
			}
		}
		for i := range went {
			for k := i + burst; k < len(went); k++ {
				if span, least := went[k]-went[i], time.Duration(k-i-burst+1)*gap; span < least-200 {
					t.Fatalf("%d calls in %v, want at least %v", k-i+1, span, least)
				}
			}
		}
		for w := l.queue.Front(); w != nil; w = w.Next() {
			if len(queue) == 0 || queue[0] != w.Value.(*waiter) || queue[0].called {
				t.Fatal("the queue is not that of the model")
			}
			queue = queue[1:]
		}
	})
}

// Many callers at once, who come, wait, give up and come again: never more go than may,
// and nobody who has a deadline hears of it later than at once.
func TestRateLimitConcurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const perSecond, burst = 1000, 10
		l := limit(t, perSecond, burst)
		var mu sync.Mutex
		var went []time.Duration
		begin := time.Now()
		var wg sync.WaitGroup
		for g := range 50 {
			wg.Go(func() {
				for i := range 100 {
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+(g*7+i*3)%60)*ms)
					if (g+i)%4 == 0 {
						time.AfterFunc(time.Duration(i%7)*ms, cancel)
					}
					from := time.Now()
					err := l.Wait(ctx)
					cancel()
					switch status.Code(err) {
					case codes.OK:
						mu.Lock()
						went = append(went, time.Since(begin))
						mu.Unlock()
					case codes.ResourceExhausted:
						if d := time.Since(from); d != 0 {
							t.Errorf("refused after %v, want at once", d)
						}
						time.Sleep(time.Duration(1+g%5) * ms)
					case codes.Canceled:
					default:
						t.Errorf("%v: waited for a turn that came too late", err)
					}
				}
			})
		}
		wg.Wait()
		slices.Sort(went)
		for i := range went {
			for k := i + burst; k < len(went); k++ {
				if span, least := went[k]-went[i], time.Duration(k-i-burst+1)*time.Second/perSecond; span < least-time.Microsecond {
					t.Fatalf("%d calls in %v, want at least %v", k-i+1, span, least)
				}
			}
		}
		if len(went) < 200 {
			t.Errorf("%d calls went in %v: the test tells nothing", len(went), time.Since(begin))
		}
	})
}

// In real time, where callers are held up between the clock and the lock.
func TestRateLimitRealTime(t *testing.T) {
	const perSecond, burst = 100_000, 5
	l := limit(t, perSecond, burst)
	begin := time.Now()
	counts := make([]int, 8)
	var wg sync.WaitGroup
	for g := range counts {
		wg.Go(func() {
			for range 20_000 {
				if l.Probe(time.Now()) == 0 {
					counts[g]++
				}
			}
		})
	}
	wg.Wait()
	took, sum := time.Since(begin), 0
	for _, n := range counts {
		sum += n
	}
	if most := burst + perSecond*took.Seconds() + 1; float64(sum) > most {
		t.Errorf("%d calls in %v, want at most %.0f", sum, took, most)
	}
}

func TestRateLimitAllocations(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	plenty := limit(t, 1e9, 1e9)
	if n := testenv.Allocs(100, func() { plenty.Wait(ctx) }); n != 0 {
		t.Errorf("%v allocations for a token that is there, want 0", n)
	}
	if n := testenv.Allocs(100, func() { plenty.Shadow(ctx) }); n != 0 {
		t.Errorf("%v allocations in shadow, want 0", n)
	}
	none := limit(t, 1e-9, 1)
	none.Probe(time.Now())
	if n := testenv.Allocs(100, func() { none.Wait(ctx) }); n > 1 {
		t.Errorf("%v allocations for a refusal, want its error only", n)
	}
}

// Beside the bare library: Wait, which also waits, and Allow, which does not.
func BenchmarkRateLimit(b *testing.B) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	plenty, none := limit(b, 1e9, 1e9), limit(b, 1e-9, 1)
	none.Probe(time.Now())
	barePlenty, bareNone := rate.NewLimiter(1e9, 1e9), rate.NewLimiter(1e-9, 1)
	bareNone.Allow()
	for _, bench := range []struct {
		name string
		call func()
	}{
		{"Go/Wait", func() { plenty.Wait(ctx) }},
		{"Go/Shadow", func() { plenty.Shadow(ctx) }},
		{"Go/bare Wait", func() { barePlenty.Wait(ctx) }},
		{"Go/bare Allow", func() { barePlenty.Allow() }},
		{"Refused/Wait", func() { none.Wait(ctx) }},
		{"Refused/bare Wait", func() { bareNone.Wait(ctx) }},
		{"Refused/bare Allow", func() { bareNone.Allow() }},
	} {
		for _, procs := range []string{"one", "all"} {
			b.Run(fmt.Sprintf("%s/%s", bench.name, procs), func(b *testing.B) {
				b.ReportAllocs()
				if procs == "one" {
					for b.Loop() {
						bench.call()
					}
					return
				}
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						bench.call()
					}
				})
			})
		}
	}
}
