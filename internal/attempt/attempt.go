// Package attempt names one attempt of a call and where it was sent.
//
// A call is what the application makes; an attempt is what goes over the wire.
// The package that opens attempts (hedging, retry) puts an [Attempt] into the
// context of each one; the balancer's picker finds it there, reads which
// endpoints to avoid and writes down the one it chose. That is the only way in
// which the two talk to each other.
//
// The record of who was sent where is a log of claims that only grows, one log
// per [Call], with a compare-and-swap at its head. A picker reads a [View] of
// it, chooses, and claims; when a sibling has claimed in the meantime the swap
// fails and the picker looks again. So two attempts that are picked at the same
// instant can never both take the same endpoint, and no pick ever waits.
package attempt

import (
	"context"
	"sync/atomic"
)

// Kind says why an attempt was made.
type Kind uint8

const (
	// First is the attempt that every call makes.
	First Kind = iota
	// Hedge is sent while an earlier attempt is still in flight.
	Hedge
	// Retry is sent after every earlier attempt has failed.
	Retry
)

// String returns "first", "hedge" or "retry".
func (k Kind) String() string {
	switch k {
	case First:
		return "first"
	case Hedge:
		return "hedge"
	case Retry:
		return "retry"
	}
	return "unknown"
}

// Call is what the attempts of one call share. The zero value is ready; it must
// not be copied once an attempt refers to it.
type Call struct {
	// Method is the call's full method name, so that the picker of another call,
	// made under this one's context, is not misled; empty for any.
	Method string
	// head is the newest claim. It is an atomic because pickers of sibling
	// attempts append to the log concurrently and must not wait for each other.
	head atomic.Pointer[claim]
}

// A claim says that an attempt was sent to an endpoint. Claims are immutable
// once they are in the log.
type claim struct {
	by       *Attempt
	endpoint string
	next     *claim // older
}

// state is how far an attempt has come.
type state = uint32

const (
	running state = iota
	ended
	unsent
)

// Attempt is one attempt of a call. Init it before use. All methods are safe
// for concurrent use.
type Attempt struct {
	// Number counts from 1, the first attempt of its call.
	Number int
	// Kind says why it was made.
	Kind Kind
	// Streaming tells the balancer that the time until the end of this attempt
	// is the length of a stream, which is no latency.
	Streaming bool

	call *Call
	// state is an atomic because the owner of the attempt ends it while pickers
	// of its siblings ask whether it is still in flight.
	state atomic.Uint32
	// superseded is an atomic for the same reason.
	superseded atomic.Bool
	// first is the claim of the first pick, here so that it costs no allocation.
	// used guards it: only one pick may have it.
	first claim
	used  atomic.Bool
}

// Init makes a ready to be attempt number of call c.
func (a *Attempt) Init(c *Call, number int, kind Kind) {
	a.call, a.Number, a.Kind = c, number, kind
}

// Of reports whether the attempt is one of a call of this method. A call that an
// interceptor or credentials make under the context of an attempt carries that
// attempt too, and is not it.
func (a *Attempt) Of(method string) bool {
	return a.call == nil || a.call.Method == "" || a.call.Method == method
}

// End records that the attempt is over: nothing of it is in flight any more.
func (a *Attempt) End() { a.state.CompareAndSwap(running, ended) }

// Supersede records that a sibling's answer has made the attempt needless, so that it is
// about to be cancelled.
func (a *Attempt) Supersede() { a.superseded.Store(true) }

// Superseded reports whether Supersede has been called.
func (a *Attempt) Superseded() bool { return a.superseded.Load() }

// MarkUnsent records that the picker had no endpoint for this attempt, so that
// it fails locally and was never launched.
func (a *Attempt) MarkUnsent() { a.state.Store(unsent) }

// Unsent reports whether the picker refused to send this attempt anywhere.
func (a *Attempt) Unsent() bool { return a.state.Load() == unsent }

// Endpoint returns the endpoint of the attempt's last pick, or "" when no
// balancer of ours has picked one.
func (a *Attempt) Endpoint() string {
	if a.call == nil {
		return ""
	}
	for c := a.call.head.Load(); c != nil; c = c.next {
		if c.by == a {
			return c.endpoint
		}
	}
	return ""
}

// View is the log of claims as it stood at one moment, seen by one attempt. It
// shows the claims of its siblings, never its own.
type View struct {
	self *Attempt
	head *claim
}

// View returns the log as it stands.
func (a *Attempt) View() View {
	if a.call == nil {
		return View{self: a}
	}
	return View{self: a, head: a.call.head.Load()}
}

// Empty reports whether the log holds nothing at all, which is so for the first
// pick of a call: no endpoint need be avoided.
func (v View) Empty() bool { return v.head == nil }

// InFlight reports whether a sibling is in flight at the endpoint.
func (v View) InFlight(endpoint string) bool {
	in, _ := v.look(endpoint)
	return in
}

// Tried reports whether a sibling was sent to the endpoint, whether or not it
// is still in flight there.
func (v View) Tried(endpoint string) bool {
	_, tried := v.look(endpoint)
	return tried
}

func (v View) look(endpoint string) (inFlight, tried bool) {
	// An attempt may be picked more than once (a connection that broke, a
	// transparent retry). Its newest claim holds; seen has a bit for each
	// attempt whose newest claim has been met on the way from the head.
	var seen uint64
	for c := v.head; c != nil; c = c.next {
		if c.by == v.self {
			continue
		}
		bit := uint64(1) << (uint(c.by.Number) % 64)
		if seen&bit != 0 {
			continue
		}
		st := c.by.state.Load()
		if st == unsent {
			continue
		}
		seen |= bit
		if c.endpoint == endpoint {
			tried = true
			inFlight = inFlight || st == running
		}
	}
	return inFlight, tried
}

// Claim records that the attempt goes to the endpoint, provided that nobody has
// claimed since v was taken. When it returns false the caller must take a new
// view and choose again.
func (a *Attempt) Claim(v View, endpoint string) bool {
	if a.call == nil {
		return true
	}
	c := &a.first
	if a.used.Swap(true) {
		c = new(claim) // a second pick of the same attempt is rare
	}
	c.by, c.endpoint, c.next = a, endpoint, v.head
	if a.call.head.CompareAndSwap(v.head, c) {
		return true
	}
	if c == &a.first {
		a.used.Store(false)
	}
	return false
}

// Key is the context key under which an *Attempt travels to the picker. It is
// exported so that a context type of hedging's own can answer it without the
// allocation of context.WithValue.
type Key struct{}

// NewContext returns a context that carries a.
func NewContext(ctx context.Context, a *Attempt) context.Context {
	return context.WithValue(ctx, Key{}, a)
}

// FromContext returns the attempt that ctx carries, or nil.
func FromContext(ctx context.Context) *Attempt {
	a, _ := ctx.Value(Key{}).(*Attempt)
	return a
}
