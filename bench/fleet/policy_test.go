package fleet

import (
	"context"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// A backend whose servers have a policy obeys it, and counts what its handlers did.
func TestPolicy(t *testing.T) {
	for _, workers := range []int{0, 1} {
		testPolicy(t, workers)
	}
}

func testPolicy(t *testing.T, workers int) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBackend(slow(func(s *scenario.Scenario) { s.Workers = workers }), 1, 0, virtualSleep) // 100 ms
		lis := bufconn.Listen(64 << 10)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			ended <- Play(ctx, b, Server{Policy: `{"limiter":{"algorithm":"static","limit":1}}`}, lis, nil, grpc.WaitForHandlers(true))
		}()
		cc, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		kv := kvpb.NewKVClient(cc)
		first := make(chan error, 1)
		go func() {
			_, err := kv.Get(t.Context(), &kvpb.Request{Id: 1})
			first <- err
		}()
		time.Sleep(10 * time.Millisecond)
		_, err = kv.Get(t.Context(), &kvpb.Request{Id: 2})
		details := status.Convert(err).Details()
		if len(details) == 0 {
			t.Fatalf("%v, want a refusal with details", err)
		}
		if info, ok := details[0].(*errdetails.ErrorInfo); !ok || info.Reason != "OVERLOADED" {
			t.Errorf("details %v, want OVERLOADED", details)
		}
		if err := <-first; err != nil {
			t.Error(err)
		}
		// One whose caller leaves half way.
		brief, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := kv.Get(brief, &kvpb.Request{Id: 3}); err == nil {
			t.Error("answered in 50 ms")
		}
		synctest.Wait()
		if got, want := b.Work(), (Work{Runs: 2, Worked: 150 * time.Millisecond, Unused: 50 * time.Millisecond}); got != want {
			t.Errorf("%d workers: %+v, want %+v", workers, got, want)
		}
		cc.Close()
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// A faulty policy is told when it is checked, and by the backend that should have it.
func TestFaultyPolicy(t *testing.T) {
	const faulty = `{"limiter":{"algorithm":"static"}}`
	if err := CheckPolicy(faulty); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("%v, want that a limit is missing", err)
	}
	if err := CheckPolicy(DefaultPolicy); err != nil {
		t.Error(err)
	}
	lis := bufconn.Listen(1)
	err := Play(t.Context(), NewBackend(tiny, 1, 0, virtualSleep), Server{Policy: faulty}, lis, nil)
	if err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("%v, want that a limit is missing", err)
	}
	if _, err := lis.Accept(); err == nil {
		t.Error("the listener is open")
	}
}

// What one of the two has, the servers that they share have.
func TestWith(t *testing.T) {
	a, b := Server{ORCA: true}, Server{Probes: true, Policy: DefaultPolicy}
	want := Server{ORCA: true, Probes: true, Policy: DefaultPolicy}
	if got := a.With(b); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := b.With(a); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}
