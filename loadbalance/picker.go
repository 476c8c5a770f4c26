package loadbalance

import (
	"math/rand/v2"
	"sync/atomic"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
)

// errNotSent ends the attempt that may go nowhere. It is a status, so that grpc
// ends the RPC at once even if it waits for ready.
var errNotSent = refusal(codes.Unavailable, "NOT_SENT",
	"loadbalance: not sent: every ready endpoint has an attempt of this call in flight")

func refusal(code codes.Code, reason, message string) error {
	st := status.New(code, message)
	if d, err := st.WithDetails(&errdetails.ErrorInfo{Domain: "bobtail", Reason: reason}); err == nil {
		st = d
	}
	return st.Err()
}

// errFull ends the call that finds every endpoint at its maxInFlight. It is a status
// too: to wait in the client would build the backlog that the bound is there to prevent.
var errFull = refusal(codes.ResourceExhausted, "BULKHEAD_FULL",
	"loadbalance: every ready endpoint has maxInFlight attempts in flight")

// A picker sends attempts to the endpoints that were ready when it was made. What it
// counts and measures lives in the endpoints.
type picker struct {
	b     *shards
	ready []seated
	named int // how many endpoints there are, ready or not
	// rotation is who takes part. An atomic because a sweep replaces it, and picks must
	// not wait for that: so an ejection needs no new picker.
	rotation atomic.Pointer[rotation]
}

// seated is an endpoint that is ready, and the picker of its connection.
type seated struct {
	*remembered
	leaf balancer.Picker
}

// Pick implements balancer.Picker. It takes no lock, and allocates nothing as a rule.
func (p *picker) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	w := watches.Get().(*watched)
	t := p.rotation.Load()
	w.b, w.t, w.ctx = p.b, t, info.Ctx
	w.bits, w.noted = rand.Uint64(), false
	w.now, w.about = p.b.clock.at(w.bits)
	if !w.about {
		w.now = p.b.now()
		p.b.clock.tick(w.now, w.bits)
	}
	m, err := w.choose(info)
	if err != nil {
		w.recycle()
		return balancer.PickResult{}, err
	}
	result, err := m.leaf.Pick(info)
	if err != nil {
		// Not ready any more. A new picker is on its way, and grpc asks it.
		m.release(w.streaming)
		w.recycle()
		return result, err
	}
	w.e, w.done = m.endpoint, result.Done
	if w.sparse = 0; t.ended == nil {
		w.sparse = m.sampling(w.now)
	}
	w.unmeasured = passes(w.bits, w.sparse)
	if w.about && !w.unmeasured {
		w.now, w.about = p.b.now(), false
	}
	result.Done = w.finish
	return result, nil
}

// choose chooses an endpoint and counts the attempt in there.
func (w *watched) choose(info balancer.PickInfo) (*member, error) {
	a := attempt.FromContext(info.Ctx)
	if a == nil || !a.Of(info.FullMethodName) { // a call made within an attempt of another
		w.streaming = w.b.methods.streaming(info.FullMethodName)
		m := w.t.find(&w.request, attempt.View{})
		if !w.t.admit(&m, w.streaming, attempt.View{}) {
			return nil, errFull
		}
		return m, nil
	}
	w.streaming = a.Streaming
	for {
		v := a.View()
		m := w.t.find(&w.request, v)
		if m == nil {
			a.MarkUnsent()
			return nil, errNotSent
		}
		if !w.t.admit(&m, w.streaming, v) {
			if a.Kind == attempt.Hedge {
				a.MarkUnsent()
				return nil, errNotSent
			}
			return nil, errFull
		}
		if a.Claim(v, m.key) {
			return m, nil
		}
		// A sibling was picked in the meantime: look where it went.
		m.release(w.streaming)
	}
}

// unready is the picker while no endpoint is ready. The call's own attempt waits or
// fails by it, as the caller has asked; a hedge has nowhere to go and is not sent, or
// it would fail a call that is willing to wait.
type unready struct{ balancer.Picker }

func (u unready) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	if a := attempt.FromContext(info.Ctx); a != nil && a.Kind == attempt.Hedge && a.Of(info.FullMethodName) {
		a.MarkUnsent()
		return balancer.PickResult{}, errNotSent
	}
	return u.Picker.Pick(info)
}
