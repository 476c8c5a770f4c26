package retry

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
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
		wait, why := c.ended(end{err: err, code: code(err), timedOut: timedOut})
		if why == "" {
			if why = c.again(wait); why == CallEnded {
				err = ctx.Err()
			}
		}
		if why != "" {
			c.report(why, code(err))
			return v, err
		}
	}
}

func tryOnce[T any](c *call, f func(context.Context) (T, error)) (v T, err error, timedOut bool) {
	limit := c.r.cfg.AttemptTimeout
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

func code(err error) codes.Code {
	switch {
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	}
	return status.Code(err)
}

// AttemptNumber returns which attempt of its call ctx belongs to, from 1; 0 if it
// belongs to none.
func AttemptNumber(ctx context.Context) int {
	if a := attempt.FromContext(ctx); a != nil {
		return a.Number
	}
	return 0
}
