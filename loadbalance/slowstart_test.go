package loadbalance

import (
	"fmt"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
)

// The ramp, and its ends.
func TestSlowStartShare(t *testing.T) {
	for _, tc := range []struct {
		window     time.Duration
		aggression float64
		ramp, now  time.Duration
		want       float64
	}{
		{10 * time.Second, 1, -1, 0, 1}, // it has none
		{10 * time.Second, 1, 0, 0, .1},
		{10 * time.Second, 1, 5 * time.Second, 5 * time.Second, .1},
		{10 * time.Second, 1, 0, time.Second, .1},
		{10 * time.Second, 1, 0, 2 * time.Second, .2},
		{10 * time.Second, 1, 5 * time.Second, 10 * time.Second, .5},
		{10 * time.Second, 1, 0, 10*time.Second - 1, 1},
		{10 * time.Second, 1, 0, 10 * time.Second, 1},
		{10 * time.Second, 1, 0, time.Hour, 1},
		{10 * time.Second, 2, 0, 2500 * ms, .5},
		{10 * time.Second, .5, 0, 5 * time.Second, .25},
		{10 * time.Second, 100, 0, 0, .1},
		{10 * time.Second, 100, 0, 1, math.Pow(1e-10, .01)},
		{10 * time.Second, 1e-320, 0, 9 * time.Second, .1},
		{0, 1, 0, 0, 1},
		{0, 1, 5, 4, 1}, // and before it began: see below
		// A sweep that has read the clock a hair before the endpoint came.
		{10 * time.Second, 1, 5, 4, .1},
		{10 * time.Second, 2, 5, 4, .1},
		{10 * time.Second, .3, 5, 4, .1},
	} {
		if got := (slowStart{tc.window, tc.aggression}).share(tc.ramp, tc.now); !(math.Abs(got-tc.want) < 1e-6) {
			t.Errorf("%+v: %v", tc, got)
		}
	}
}

// weightsNow returns the weights in rotation, by the last digit of the address; 0 for
// those that are not in it.
func weightsNow(cc *fakeConn, n int) []float64 {
	ws := make([]float64, n)
	for _, g := range cc.state.Picker.(*picker).rotation.Load().groups {
		for _, m := range g.members {
			var i int
			_, _ = fmt.Sscanf(m.key, "10.0.0.%d:443", &i)
			ws[i] = m.weight
		}
	}
	return ws
}

// restart is what is seen of a server that is away for a while.
var restart = []connectivity.State{connectivity.Idle, connectivity.Connecting, connectivity.TransientFailure,
	connectivity.Idle, connectivity.Connecting, connectivity.Ready}

// step has a connection go through states in a bubble, and waits for what each sets off:
// endpointsharding reconnects from a goroutine of its own.
func (sc *fakeSubConn) step(states ...connectivity.State) {
	for _, s := range states {
		sc.become(s)
		synctest.Wait()
	}
}

// Who has a slow start and who has not.
func TestWhoStartsSlowly(t *testing.T) {
	become := func(cc *fakeConn, i int, states ...connectivity.State) {
		for _, sc := range cc.conns {
			if sc.addr == fmt.Sprintf("10.0.0.%d:443", i) {
				sc.step(states...)
				return
			}
		}
	}
	up := []connectivity.State{connectivity.Connecting, connectivity.Ready}
	for name, tc := range map[string]struct {
		js   string
		do   func(cc *fakeConn, b balancer.Balancer, resolveTo func(n int))
		want float64 // of endpoint 2, 2 s later
	}{
		"the first fleet": {`{}`, func(*fakeConn, balancer.Balancer, func(int)) {}, 1},
		"one that is removed and soon named again": {`{}`, func(cc *fakeConn, _ balancer.Balancer, to func(int)) {
			time.Sleep(time.Minute)
			to(2)
			time.Sleep(10 * time.Second)
			cc.conns = nil
			to(3)
			become(cc, 2, up...)
		}, 1},
		"one that is named for the first time in long": {`{}`, func(cc *fakeConn, _ balancer.Balancer, to func(int)) {
			to(2)
			time.Sleep(rememberFor + 1)
			to(2)
			cc.conns = nil
			to(3)
			become(cc, 2, up...)
		}, .2},
		"one that is idle for a moment": {`{}`, func(cc *fakeConn, _ balancer.Balancer, _ func(int)) {
			time.Sleep(time.Minute)
			become(cc, 2, connectivity.Idle, connectivity.Connecting, connectivity.Ready)
		}, 1},
		"one that could not be reached": {`{}`, func(cc *fakeConn, _ balancer.Balancer, _ func(int)) {
			time.Sleep(time.Minute)
			become(cc, 2, restart...)
		}, .2},
		"and within the first seconds": {`{}`, func(cc *fakeConn, _ balancer.Balancer, _ func(int)) {
			become(cc, 2, restart...)
		}, .2},
		"with no window": {`{"slowStart": {"window": "0s"}}`, func(cc *fakeConn, _ balancer.Balancer, _ func(int)) {
			time.Sleep(time.Minute)
			become(cc, 2, restart...)
		}, 1},
		"with another window": {`{"slowStart": {"window": "4s"}}`, func(cc *fakeConn, _ balancer.Balancer, _ func(int)) {
			time.Sleep(time.Minute)
			become(cc, 2, restart...)
		}, .5},
		"with another aggression": {`{"slowStart": {"aggression": 2}}`, func(cc *fakeConn, _ balancer.Balancer, _ func(int)) {
			time.Sleep(time.Minute)
			become(cc, 2, restart...)
		}, math.Sqrt(.2)},
	} {
		for _, policy := range ours {
			synctest.Test(t, func(t *testing.T) {
				cc, b, cfg := configured(t, policy, 3, tc.js)
				tc.do(cc, b, func(n int) { resolve(t, b, cfg, n) })
				time.Sleep(2 * time.Second)
				shardsOf(b).sweep(shardsOf(b).now())
				if ws := weightsNow(cc, 3); math.Abs(ws[2]-tc.want) > 1e-6 || ws[0] != 1 || ws[1] != 1 {
					t.Errorf("%s: %s: weights %v, want %v for the last", policy, name, ws, tc.want)
				}
				time.Sleep(10 * time.Second)
				shardsOf(b).sweep(shardsOf(b).now())
				if r := cc.state.Picker.(*picker).rotation.Load(); r.ramping || weightsNow(cc, 3)[2] != 1 {
					t.Errorf("%s: %s: weights %v after the window, ramping %v", policy, name, weightsNow(cc, 3), r.ramping)
				}
			})
		}
	}
}

// The weight of a slow start is a part of the endpoint's own.
func TestSlowStartOfAWeight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, b := fakeReady(t, RendezvousName, 2)
		time.Sleep(time.Minute)
		update(t, b, nil, 8, 2)
		sc := cc.conns[0]
		i := map[string]int{"10.0.0.0:443": 0, "10.0.0.1:443": 1}[sc.addr]
		sc.step(restart...)
		want := []float64{8, 2}
		want[i] /= 10
		if ws := weightsNow(cc, 2); math.Abs(ws[0]-want[0]) > 1e-9 || math.Abs(ws[1]-want[1]) > 1e-9 {
			t.Errorf("weights %v, want %v", ws, want)
		}
	})
}

// A newcomer to a fleet that serves gets its share by and by; so does a backend that has
// restarted. The fleet itself began with no ramp.
func TestNewcomersRamp(t *testing.T) {
	for _, name := range ours {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := detect(t, 5, name, `{"ejection": {"maxEjectionPercent": 0}}`)
				share := func(from, to int) float64 {
					var mine, all int64
					for _, sec := range d.calls[from:to] {
						for i, n := range sec {
							all += n
							if i == 4 {
								mine += n
							}
						}
					}
					return float64(mine) / float64(all)
				}
				d.run(3 * time.Second)
				if x := share(0, 3); x < .14 || x > .26 {
					t.Errorf("a share of %.2f in the first seconds of all, want a fifth", x)
				}
				check := func(who string) {
					t.Helper()
					d.run(15 * time.Second)
					begin, middle, end := share(0, 1), share(4, 7), share(11, 15)
					if begin > .08 || begin == 0 || middle < .06 || middle > .185 || end < .14 || end > .26 {
						t.Errorf("%s: shares of %.3f in the first second, %.3f around the sixth, %.3f in the end, want a ramp", who, begin, middle, end)
					}
				}
				d.f.Resolve(0, 1, 2, 3)
				time.Sleep(rememberFor + time.Second)
				d.f.Resolve(0, 1, 2, 3)
				d.f.Resolve(0, 1, 2, 3, 4)
				time.Sleep(10 * ms)
				check("a newcomer")
				d.f.Stop(4)
				d.run(2 * time.Second)
				d.f.Start(4)
				time.Sleep(2 * time.Second) // connects after a backoff
				// Its slow start began somewhere in these: only its end is sure.
				d.run(15 * time.Second)
				if begin, end := share(0, 1), share(11, 15); begin > .12 || end < .14 {
					t.Errorf("after a restart: shares of %.3f and %.3f, want a ramp", begin, end)
				}
			})
		})
	}
}

// A server that the resolver takes away, that is restarted and named again has a slow start.
func TestARestartBehindTheResolver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, b, cfg := configured(t, P2CName, 3, `{}`)
		time.Sleep(time.Minute)
		resolve(t, b, cfg, 2)
		time.Sleep(time.Minute) // restarted meanwhile
		cc.conns = nil
		resolve(t, b, cfg, 3)
		for _, sc := range cc.conns {
			sc.step(connectivity.Connecting, connectivity.Ready)
		}
		if ws := weightsNow(cc, 3); ws[2] > .5 {
			t.Errorf("weights %v: no slow start after a minute away", ws)
		}
	})
}
