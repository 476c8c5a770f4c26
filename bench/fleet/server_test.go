package fleet

import (
	"context"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

func connectEvery(d time.Duration) grpc.DialOption {
	return grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: d, Multiplier: 1, MaxDelay: d}})
}

// A backend that goes down cuts off what it was at, refuses who comes, and is back.
func TestPlayDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := slow(func(s *scenario.Scenario) {
			s.Workers = 1
			s.Faults = []scenario.Fault{
				{Kind: scenario.Down, From: scenario.Duration(time.Second), For: scenario.Duration(2 * time.Second)},
				{Kind: scenario.Down, From: scenario.Duration(2 * time.Second), For: scenario.Duration(2 * time.Second)},
			}
		})
		// A clock may wake a sleeper a little early.
		hasty := func(ctx context.Context, d time.Duration) error {
			if d > time.Second {
				d -= time.Millisecond
			}
			return virtualSleep(ctx, d)
		}
		var lis atomic.Pointer[bufconn.Listener]
		listens := 0
		listen := func() (net.Listener, error) {
			listens++
			lis.Store(bufconn.Listen(1 << 16))
			return lis.Load(), nil
		}
		first, _ := listen()
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() {
			ended <- Play(ctx, NewBackend(sc, 1, 0, hasty), Server{}, first, listen, grpc.WaitForHandlers(true))
		}()
		cc, err := grpc.NewClient("passthrough:///one", grpc.WithTransportCredentials(insecure.NewCredentials()), connectEvery(10*time.Millisecond),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.Load().DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		epoch := time.Now()
		get := func(opts ...grpc.CallOption) (codes.Code, time.Duration) {
			_, err := kvpb.NewKVClient(cc).Get(t.Context(), &kvpb.Request{EpochUnixNs: epoch.UnixNano()}, opts...)
			return status.Code(err), time.Since(epoch)
		}
		expect := func(what string, wantCode codes.Code, from, to time.Duration, opts ...grpc.CallOption) {
			t.Helper()
			if code, at := get(opts...); code != wantCode || at < from || at > to {
				t.Errorf("%s: %v at %v, want %v at %v to %v", what, code, at, wantCode, from, to)
			}
		}
		const ms = time.Millisecond
		expect("up", codes.OK, 100*ms, 100*ms)
		time.Sleep(850 * ms)
		expect("cut off", codes.Unavailable, time.Second, time.Second)
		time.Sleep(500 * ms)
		expect("refused", codes.Unavailable, 1500*ms, 1500*ms)
		time.Sleep(1700 * ms) // the first fault has ended, the second has not
		expect("refused still", codes.Unavailable, 3200*ms, 3200*ms)
		expect("back, with a free worker", codes.OK, 4099*ms, 4130*ms, grpc.WaitForReady(true))
		cc.Close()
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if listens != 3 {
			t.Errorf("listens %d times, want once at first and once after each fault", listens)
		}
	})
}

// What has ended does not begin again, even if the sleep until its end was a little short.
func TestUntilDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := slow(func(s *scenario.Scenario) {
			s.Faults = []scenario.Fault{{Kind: scenario.Down, From: scenario.Duration(time.Second), For: scenario.Duration(time.Second)}}
		})
		b := NewBackend(sc, 1, 0, virtualSleep)
		go b.Get(t.Context(), &kvpb.Request{}) //nolint:errcheck // it begins the timeline
		for _, from := range []time.Duration{0, 2 * time.Second} {
			ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
			defer cancel()
			if _, down := b.untilDown(ctx, from); down != (from == 0) {
				t.Errorf("down %v from %v on, want it down before 2s only", down, from)
			}
		}
	})
}

// Over TCP: the same address, once it is back.
func TestServeDown(t *testing.T) {
	sc := *tiny
	sc.SideBySide = true
	sc.Faults = []scenario.Fault{{Kind: scenario.Down, For: scenario.Duration(500 * time.Millisecond)}}
	t.Setenv("FLEET_TEST", "serve")
	f, err := Start(t.Context(), Config{Scenario: &sc, Command: self()})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cc, err := f.Dial(connectEvery(time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	kv := kvpb.NewKVClient(cc)
	now := time.Now().UnixNano()
	// The first call tells the backends that their time has begun: soon they refuse.
	for err == nil {
		_, err = kv.Get(ctx, &kvpb.Request{EpochUnixNs: now})
	}
	for err != nil {
		if status.Code(err) != codes.Unavailable {
			t.Fatal(err)
		}
		_, err = kv.Get(ctx, &kvpb.Request{EpochUnixNs: now}, grpc.WaitForReady(true))
	}
	select {
	case err := <-f.Died():
		t.Error(err)
	default:
	}
}

// A backend that cannot come back says so.
func TestPlayLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := slow(func(s *scenario.Scenario) {
			s.Faults = []scenario.Fault{{Kind: scenario.Down, For: scenario.Duration(time.Second)}}
		})
		b := NewBackend(sc, 1, 0, virtualSleep)
		go b.Get(t.Context(), &kvpb.Request{}) //nolint:errcheck // it begins the timeline
		err := Play(t.Context(), b, Server{}, bufconn.Listen(1), func() (net.Listener, error) { return nil, net.ErrClosed })
		if err == nil || !strings.Contains(err.Error(), net.ErrClosed.Error()) {
			t.Errorf("%v, want %v", err, net.ErrClosed)
		}
		synctest.Wait()
	})
}
