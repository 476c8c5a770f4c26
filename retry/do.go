package retry

import (
	"context"

	"google.golang.org/grpc/codes"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// Do makes one call of f, retried by r, without gRPC. It returns the result of the last
// attempt, its error as f returned it; or ctx.Err(), if ctx ended between two attempts.
//
// An error's code is its gRPC status; one that has none is codes.Unknown, or that of
// the context error that it wraps. A google.rpc.RetryInfo in its details is obeyed.
// [AttemptNumber] tells f which attempt it is, so that it can choose another replica.
func Do[T any](ctx context.Context, r *Retrier, f func(ctx context.Context) (T, error)) (T, error) {
	c := &call{}
	c.begin(r, ctx, "", false)
	for {
		v, err, timedOut := tryOnce(c, f)
		if err == nil {
			c.succeeded()
			c.report("", codes.OK)
			return v, nil
		}
		wait, why := c.ended(end{err: err, code: outcome.CodeOf(err), timedOut: timedOut})
		if why == "" {
			if why = c.again(wait); why == CallEnded {
				err = ctx.Err()
			}
		}
		if why != "" {
			c.report(why, outcome.CodeOf(err))
			return v, err
		}
	}
}

func tryOnce[T any](c *call, f func(context.Context) (T, error)) (v T, err error, timedOut bool) {
	limit := c.r.cfg.attemptTimeout()
	if limit > 0 {
		limited, cancel := context.WithTimeout(c.current.Context, limit)
		defer cancel()
		c.current.Context = limited
	}
	v, err = f(c.current)
	c.now = c.r.now()
	timedOut = limit > 0 && c.current.Err() != nil
	return v, err, timedOut
}

// AttemptNumber returns which attempt of its call ctx belongs to, from 1; 0 if it
// belongs to none.
func AttemptNumber(ctx context.Context) int {
	if a := attempt.FromContext(ctx); a != nil {
		return a.Number
	}
	return 0
}
