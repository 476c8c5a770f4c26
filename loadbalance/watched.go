package loadbalance

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// watched is an attempt in flight. It is pooled with its function, which is what a pick
// would allocate otherwise: grpc calls that once and not again
// (balancer.PickResult.Done).
type watched struct {
	request
	finish func(balancer.DoneInfo)
	b      *shards
	e      *endpoint
	t      *rotation
	done   func(balancer.DoneInfo)
	// about says that now is from a clock, and not read for this pick.
	about bool
	// unmeasured says that the attempt is passed over, as only one in 2^sparse is measured: it
	// is noted only if it was no success.
	unmeasured bool
	sparse     uint32
}

var watches sync.Pool

func init() {
	watches.New = func() any {
		w := new(watched)
		w.intn = rand.IntN
		w.finish = w.end
		return w
	}
}

// recycle gives w back.
func (w *watched) recycle() {
	w.b, w.ctx, w.e, w.t, w.done = nil, nil, nil, nil, nil
	watches.Put(w)
}

// end counts the attempt out, and notes what it says about its endpoint.
func (w *watched) end(info balancer.DoneInfo) {
	b, ctx, e, t, done := w.b, w.ctx, w.e, w.t, w.done
	if b == nil {
		return // called twice, which grpc does not
	}
	sent, about, streaming, sparse, unmeasured := w.now, w.about, w.streaming, w.sparse, w.unmeasured
	w.recycle()

	e.release(streaming)
	if unmeasured && info.Err == nil {
		if done != nil {
			done(info)
		}
		return
	}
	v, ok := judge(ctx, info, streaming)
	if unmeasured && v == answered {
		ok = false // an application's error
	}
	if ok || t.ended != nil && info.ServerLoad != nil {
		now := b.now()
		if ok {
			took := now - sent
			if about {
				took = b.clock.elapsed(sent, now)
			}
			if streaming {
				took = 0 // a stream's length is no latency when it fails either
			}
			part := 1.0
			if v != answered {
				part /= float64(int(1) << sparse) // all of these are seen, and one in so many of the others
			}
			e.recordPart(now, took, t.tau, v, part)
		}
		if t.ended != nil {
			t.ended(e, now, v, info.ServerLoad)
		}
		if now >= time.Duration(b.due.Load()) {
			b.sweep(now)
		}
	}
	if b.news.Load() {
		b.deliver(ctx)
	}
	if done != nil {
		done(info)
	}
}

// judge says what the end of an attempt tells about its endpoint; false if
// nothing.
func judge(ctx context.Context, info balancer.DoneInfo, streaming bool) (verdict, bool) {
	if info.Err == nil {
		// The length of a stream is no latency; and an empty DoneInfo is that of a
		// connection that was not ready any more.
		return answered, info.BytesReceived && !streaming
	}
	code := status.Code(info.Err)
	if code == codes.Canceled && ctx.Err() != nil {
		if a := attempt.FromContext(ctx); a != nil && a.Superseded() {
			return superseded, !streaming
		}
		return cut, !streaming
	}
	if !info.BytesSent && ctx.Err() == nil {
		// The request never left: a draining connection, or credentials that were
		// not to be had. It says nothing about how the endpoint serves.
		return failed, false
	}
	if outcome.OfCode(code) == outcome.Success {
		return answered, info.BytesReceived && !streaming
	}
	// Not only outcome's failures. RESOURCE_EXHAUSTED is ignored elsewhere, as it is
	// no fault; here it is work not done, and a replica that turns calls away at
	// once must not look fast. Nor may one that answers CANCELLED unasked.
	return failed, true
}
