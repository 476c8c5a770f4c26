package hedging

import (
	"context"

	"google.golang.org/grpc/codes"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// Do makes one call of f, hedged by h, without gRPC. It returns the result of the
// attempt that decided the call: the first to succeed or to fail fatally, else
// the one whose failure came last, its error as f returned it.
//
// f is called once for each attempt, the hedges on goroutines of their own, and
// must return soon after its context is cancelled; [AttemptNumber] tells it which
// attempt it is, so that it can choose another replica. An error's code is its
// gRPC status; one that has none is codes.Unknown, or that of the context error
// that it wraps. When ctx ends while no attempt runs on the caller's goroutine,
// Do returns ctx.Err().
//
// A panic of f reaches the caller as it would from a plain call, if that attempt
// decides the call; that of a loser is dropped.
func Do[T any](ctx context.Context, h *Hedger, f func(ctx context.Context) (T, error)) (T, error) {
	now := h.now()
	h.deposit(now)
	d := &do[T]{f: f}
	d.race.h, d.race.ctx, d.race.op = h, ctx, d
	d.first.own = &own{}
	d.begin(now)
	d.run(now)
	d.report()
	w := d.decided
	if w == nil {
		var zero T
		return zero, ctx.Err()
	}
	w.cancel()
	if w.panicked != nil {
		panic(w.panicked)
	}
	v, _ := w.reply.(T)
	return v, w.err
}

type do[T any] struct {
	race
	f func(context.Context) (T, error)
}

func (d *do[T]) prepare(*branch) {}

func (d *do[T]) try(b *branch) error {
	v, err := d.f(b)
	b.reply = v
	return err
}

func (d *do[T]) code(err error) codes.Code { return outcome.CodeOf(err) }

// AttemptNumber returns which attempt of its call ctx belongs to, from 1; 0 if it
// belongs to none.
func AttemptNumber(ctx context.Context) int {
	if a := attempt.FromContext(ctx); a != nil {
		return a.Number
	}
	return 0
}
