package attempt_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"google.golang.org/grpc/metadata"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
)

func TestClaims(t *testing.T) {
	var c attempt.Call
	a := make([]attempt.Attempt, 4)
	for i := range a {
		a[i].Init(&c, i+1, attempt.Hedge)
	}
	see := func(i int, endpoint string, inFlight, tried bool) {
		t.Helper()
		v := a[i].View()
		if v.InFlight(endpoint) != inFlight || v.Tried(endpoint) != tried {
			t.Errorf("attempt %d at %s: in flight %v, tried %v, want %v, %v",
				i+1, endpoint, v.InFlight(endpoint), v.Tried(endpoint), inFlight, tried)
		}
	}
	claim := func(i int, endpoint string) {
		t.Helper()
		if !a[i].Claim(a[i].View(), endpoint) {
			t.Fatalf("attempt %d: claim of %s failed", i+1, endpoint)
		}
	}

	if !a[0].View().Empty() {
		t.Error("a new call has claims")
	}
	claim(0, "x")
	see(0, "x", false, false) // its own
	see(1, "x", true, true)
	see(1, "y", false, false)
	claim(0, "y") // picked again: the last pick holds
	see(1, "x", false, false)
	see(1, "y", true, true)
	if e := a[0].Endpoint(); e != "y" {
		t.Errorf("endpoint %q, want y", e)
	}
	a[0].End()
	see(1, "y", false, true)
	claim(1, "z")
	claim(2, "x")
	a[2].MarkUnsent()
	see(3, "x", false, false)
	see(3, "z", true, true)
	a[2].End() // an unsent attempt stays unsent
	if !a[2].Unsent() {
		t.Error("the attempt is no longer unsent")
	}

	// A number that an unsent attempt gave back is used again.
	var again attempt.Attempt
	again.Init(&c, 3, attempt.Hedge)
	if !again.Claim(again.View(), "w") {
		t.Fatal("claim failed")
	}
	see(3, "w", true, true)
	see(3, "x", false, false)
}

// A view taken before a sibling's claim cannot be claimed on.
func TestStaleViewsFail(t *testing.T) {
	var c attempt.Call
	var a, b attempt.Attempt
	a.Init(&c, 1, attempt.First)
	b.Init(&c, 2, attempt.Hedge)
	va, vb := a.View(), b.View()
	if !b.Claim(vb, "x") {
		t.Fatal("claim on a fresh view failed")
	}
	if a.Claim(va, "x") {
		t.Fatal("claim on a stale view succeeded")
	}
	if va = a.View(); !va.InFlight("x") {
		t.Error("the new view does not show the sibling")
	}
	if !a.Claim(va, "y") || a.Endpoint() != "y" {
		t.Error("the second try failed")
	}
}

// Attempts that are picked at the same instant never take the same endpoint.
func TestConcurrentClaims(t *testing.T) {
	endpoints := []string{"a", "b", "c", "d", "e"}
	for range 2000 {
		var c attempt.Call
		a := make([]attempt.Attempt, 4)
		var wg sync.WaitGroup
		for i := range a {
			a[i].Init(&c, i+1, attempt.Hedge)
			wg.Go(func() {
				for {
					v := a[i].View()
					free := slices.DeleteFunc(slices.Clone(endpoints), v.InFlight)
					if a[i].Claim(v, free[rand.IntN(len(free))]) {
						return
					}
				}
			})
		}
		wg.Wait()
		seen := map[string]bool{}
		for i := range a {
			if e := a[i].Endpoint(); seen[e] {
				t.Fatalf("two attempts are in flight at %s", e)
			} else {
				seen[e] = true
			}
		}
	}
}

func TestContext(t *testing.T) {
	var c attempt.Call
	var a attempt.Attempt
	a.Init(&c, 1, attempt.First)
	if attempt.FromContext(context.Background()) != nil {
		t.Error("an empty context has an attempt")
	}
	if attempt.FromContext(attempt.NewContext(context.Background(), &a)) != &a {
		t.Error("the attempt did not travel")
	}
}

func TestMetadata(t *testing.T) {
	for _, tc := range []struct {
		number int
		kind   attempt.Kind
		want   string
	}{
		{1, attempt.First, "map[]"},
		{2, attempt.Hedge, "map[bobtail-attempt:[hedge] grpc-previous-rpc-attempts:[1]]"},
		{3, attempt.Retry, "map[bobtail-attempt:[retry] grpc-previous-rpc-attempts:[2]]"},
	} {
		var a attempt.Attempt
		a.Init(new(attempt.Call), tc.number, tc.kind)
		md, _ := metadata.FromOutgoingContext(a.Outgoing(context.Background()))
		if got := fmt.Sprint(map[string][]string(md)); got != tc.want {
			t.Errorf("attempt %d: %s, want %s", tc.number, got, tc.want)
		}
		if in := metadata.NewIncomingContext(context.Background(), md); attempt.IsExtra(in) != (tc.number > 1) {
			t.Errorf("attempt %d is extra: %v", tc.number, attempt.IsExtra(in))
		}
	}
	for _, garbled := range []metadata.MD{nil, metadata.Pairs("bobtail-attempt", "first"),
		metadata.Pairs("grpc-previous-rpc-attempts", "-1"), metadata.Pairs("grpc-previous-rpc-attempts", "99999999999999999999")} {
		if attempt.IsExtra(metadata.NewIncomingContext(context.Background(), garbled)) {
			t.Errorf("%v is taken for an extra attempt", garbled)
		}
	}
}

func TestKindString(t *testing.T) {
	if s := fmt.Sprint(attempt.First, attempt.Hedge, attempt.Retry, attempt.Kind(9)); s != "first hedge retry unknown" {
		t.Error(s)
	}
}

func TestOf(t *testing.T) {
	var a attempt.Attempt
	if !a.Of("/any/method") {
		t.Error("an attempt of no call is of no method")
	}
	c := attempt.Call{Method: "/kv.KV/Get"}
	a.Init(&c, 1, attempt.First)
	if !a.Of("/kv.KV/Get") || a.Of("/auth.Auth/Token") {
		t.Error("an attempt belongs to the calls of its method")
	}
}
