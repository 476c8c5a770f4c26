package breaker

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	ms  = time.Millisecond
	sec = time.Second
)

// ends are the ends of calls that tests write as letters.
var ends = map[rune]error{
	's': nil,
	'f': status.Error(codes.Unavailable, "down"),
	'd': status.Error(codes.DeadlineExceeded, "late"),
	'p': errors.New("plain"),
	'n': status.Error(codes.NotFound, "no such key"),
	'a': status.Error(codes.InvalidArgument, "your fault"),
	'c': status.FromContextError(context.Canceled).Err(),
	'q': status.Error(codes.ResourceExhausted, "quota"),
	'l': &outcome.Refusal{Cause: errors.New("elsewhere"), Code: codes.Unavailable},
}

// rig is a breaker whose random numbers are all u, and what it told.
type rig struct {
	*Breaker
	mu      sync.Mutex
	changes []Change
}

// newRig returns a breaker of cfg that is told on changes, unless cfg has somebody else told.
func newRig(t testing.TB, cfg Config, u float64) *rig {
	t.Helper()
	r := &rig{}
	if cfg.OnStateChange == nil {
		cfg.OnStateChange = func(c Change) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.changes = append(r.changes, c)
		}
	}
	b, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.random = func() float64 { return u }
	r.Breaker = b
	return r
}

// calls makes a call for each letter, and returns how many were let in.
func (r *rig) calls(letters string) (n int) {
	for _, l := range letters {
		end, ok := ends[l]
		if !ok {
			panic("no such letter")
		}
		if p, err := r.Admit(); err == nil {
			n++
			p.Done(end)
		}
	}
	return n
}

// slowCalls makes calls that take d.
func (r *rig) slowCalls(letters string, d time.Duration) {
	for _, l := range letters {
		if p, err := r.Admit(); err == nil {
			time.Sleep(d)
			p.Done(ends[l])
		}
	}
}

// probe lets a call in that must be a probe.
func (r *rig) probe(t testing.TB) Permit {
	t.Helper()
	p, err := r.Admit()
	if err != nil {
		t.Fatalf("no probe: %v, %v", r.State(), err)
	}
	if !p.Probe() {
		t.Fatalf("no probe, but a call of a breaker that is %v", r.State())
	}
	return p
}

// reopen makes the probe of a half-open breaker fail.
func (r *rig) reopen(t testing.TB) {
	t.Helper()
	p := r.probe(t)
	p.Failure()
	r.is(t, Open)
}

func (r *rig) is(t testing.TB, want State) {
	t.Helper()
	if got := r.State(); got != want {
		t.Fatalf("the breaker is %v, want %v", got, want)
	}
}

// next returns how long the breaker stays open from now.
func (r *rig) next(t testing.TB) time.Duration {
	t.Helper()
	_, err := r.Admit()
	var refusal *outcome.Refusal
	if !errors.As(err, &refusal) || !errors.Is(err, ErrOpen) {
		t.Fatalf("let in, or refused for another reason: %v", err)
	}
	return refusal.After
}

// reasons are those of the changes so far.
func (r *rig) reasons() []Reason {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []Reason
	for _, c := range r.changes {
		all = append(all, c.Reason)
	}
	return all
}

func (r *rig) told(t testing.TB, want ...Reason) {
	t.Helper()
	if got := r.reasons(); !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
}

// bubble runs f in virtual time.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}
