package shedding

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

func bulkhead(t testing.TB, places int) *Bulkhead {
	t.Helper()
	b, err := NewBulkhead(places, "/kv.KV/Get")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestBulkheadSteps(t *testing.T) {
	b := bulkhead(t, 2)
	for i, s := range []struct {
		op       rune // 'e'nter or 'l'eave
		ok       bool
		inFlight int
	}{
		{'l', true, 0}, // nobody is in
		{'e', true, 1}, {'e', true, 2}, {'e', false, 2}, {'e', false, 2}, {'l', true, 1}, {'e', true, 2}, {'e', false, 2},
		{'l', true, 1}, {'l', true, 0}, {'l', true, 0}, {'l', true, 0},
		{'e', true, 1}, {'e', true, 2}, {'e', false, 2},
	} {
		if s.op == 'l' {
			b.Leave()
		} else if err := b.Enter(); (err == nil) != s.ok {
			t.Fatalf("step %d: %v, want in %v", i, err, s.ok)
		} else if err != nil {
			if !errors.Is(err, ErrBulkheadFull) {
				t.Errorf("step %d: %v, want ErrBulkheadFull", i, err)
			}
			checkRefusal(t, err, "BULKHEAD_FULL", "/kv.KV/Get", 0)
		}
		if got := b.InFlight(); got != s.inFlight {
			t.Fatalf("step %d: %d in flight, want %d", i, got, s.inFlight)
		}
	}
}

func TestNewBulkhead(t *testing.T) {
	for places, want := range map[int]string{
		1: "", 1_000_000: "",
		0:         "shedding: bulkhead of 0 places, want [1, 1000000]",
		-1:        "shedding: bulkhead of -1 places, want [1, 1000000]",
		1_000_001: "shedding: bulkhead of 1000001 places, want [1, 1000000]",
	} {
		b, err := NewBulkhead(places, "")
		if err == nil && want != "" || err != nil && err.Error() != want || (b == nil) == (err == nil) {
			t.Errorf("%d places: %v, %v, want %q", places, b, err, want)
		}
	}
}

func TestBulkheadModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		places := rapid.IntRange(1, 8).Draw(t, "places")
		b, err := NewBulkhead(places, "")
		if err != nil {
			t.Fatal(err)
		}
		taken := 0
		for _, enter := range rapid.SliceOfN(rapid.Bool(), 1, 200).Draw(t, "enter") {
			if enter {
				if err := b.Enter(); (err == nil) != (taken < places) {
					t.Fatalf("%v with %d of %d taken", err, taken, places)
				}
				taken = min(taken+1, places)
			} else {
				b.Leave()
				taken = max(taken-1, 0)
			}
			if got := b.InFlight(); got != taken {
				t.Fatalf("%d in flight, want %d", got, taken)
			}
		}
	})
}

// TestBulkheadConcurrent checks a history of many callers: at no instant more in than
// there are places, and nobody refused while a place was free all the time.
func TestBulkheadConcurrent(t *testing.T) {
	const places, callers, rounds = 1, 4, 150_000
	b := bulkhead(t, places)
	var clock, in atomic.Int64
	type stay struct{ from, to int64 } // by the clock
	var stays, refusals [callers][]stay
	var wg sync.WaitGroup
	start := make(chan struct{})
	for g := range callers {
		wg.Go(func() {
			<-start
			for range rounds {
				asked := clock.Add(1)
				if err := b.Enter(); err != nil {
					refusals[g] = append(refusals[g], stay{asked, clock.Add(1)})
					continue
				}
				if n := in.Add(1); n > places {
					t.Errorf("%d in, want at most %d", n, places)
				}
				if n := b.InFlight(); n < 1 || n > places {
					t.Errorf("%d in flight, want 1 to %d", n, places)
				}
				in.Add(-1)
				b.Leave()
				stays[g] = append(stays[g], stay{asked, clock.Add(1)})
			}
		})
	}
	close(start)
	wg.Wait()
	if n := b.InFlight(); n != 0 {
		t.Errorf("%d in flight in the end", n)
	}
	// most[i] is how many may have been in at instant i.
	most := make([]int, clock.Load()+2)
	for _, s := range slices.Concat(stays[:]...) {
		most[s.from]++
		most[s.to]--
	}
	for i := 1; i < len(most); i++ {
		most[i] += most[i-1]
	}
	refused := slices.Concat(refusals[:]...)
	wrong := 0
	for _, r := range refused {
		if slices.Max(most[r.from:r.to+1]) < places {
			wrong++
		}
	}
	if wrong > 0 {
		t.Errorf("%d of %d refusals came while a place was free", wrong, len(refused))
	}
}

// As many callers as there are places never meet a full bulkhead, however they collide. It
// takes as long as it takes them to collide on a machine that has a core for one.
func TestBulkheadRoomForAll(t *testing.T) {
	const callers = 4
	b := bulkhead(t, callers)
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for begin := time.Now(); time.Since(begin) < 300*ms; {
				for range 1000 {
					if err := b.Enter(); err != nil {
						t.Error(err)
						return
					}
					b.Leave()
				}
			}
		})
	}
	wg.Wait()
	if n := b.InFlight(); n != 0 {
		t.Errorf("%d in flight in the end", n)
	}
}

func TestBulkheadAllocations(t *testing.T) {
	b := bulkhead(t, 1)
	if n := testenv.Allocs(100, func() { b.Enter(); b.Enter(); b.Leave() }); n != 0 {
		t.Errorf("%v allocations, want 0, refused or not", n)
	}
}

func BenchmarkBulkhead(b *testing.B) {
	free, full := bulkhead(b, 1000), bulkhead(b, 1)
	if err := full.Enter(); err != nil {
		b.Fatal(err)
	}
	// What it replaces.
	semaphore := make(chan struct{}, 1000)
	for _, bench := range []struct {
		name string
		call func()
	}{
		{"EnterLeave", func() { free.Enter(); free.Leave() }},
		{"Refused", func() { full.Enter() }},
		{"channel as semaphore", func() {
			select {
			case semaphore <- struct{}{}:
				<-semaphore
			default:
			}
		}},
	} {
		b.Run(bench.name+"/one", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				bench.call()
			}
		})
		b.Run(bench.name+"/all", func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					bench.call()
				}
			})
		})
	}
}
