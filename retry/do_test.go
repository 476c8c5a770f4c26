package retry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Do retries any function by the same rules: what f returns, when it is called.
func TestDo(t *testing.T) {
	busy, err := status.New(codes.Unavailable, "busy").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(200 * ms)})
	if err != nil {
		t.Fatal(err)
	}
	plain := errors.New("plain")
	for _, tc := range []struct {
		name  string
		errs  []error // of each attempt; the last for all that follow
		codes []codes.Code
		calls []time.Duration
		err   error
	}{
		{"at once", []error{nil}, unavailable, []time.Duration{0}, nil},
		{"after two failures", []error{down, down, nil}, unavailable, []time.Duration{0, 10 * ms, 30 * ms}, nil},
		{"RetryInfo is obeyed", []error{busy.Err(), nil}, unavailable, []time.Duration{0, 200 * ms}, nil},
		{"a plain error is UNKNOWN", []error{plain}, []codes.Code{codes.Unknown}, []time.Duration{0, 10 * ms, 30 * ms}, plain},
		{"and not UNAVAILABLE", []error{plain}, unavailable, []time.Duration{0}, plain},
		{"a deadline of its own inside", []error{fmt.Errorf("w: %w", context.DeadlineExceeded), nil}, []codes.Code{codes.DeadlineExceeded}, []time.Duration{0, 10 * ms}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, err := New(Config{MaxAttempts: 3, Backoff: doubling, RetryableCodes: tc.codes})
				if err != nil {
					t.Fatal(err)
				}
				r.random = func() float64 { return 0.5 }
				begin := time.Now()
				var calls []time.Duration
				v, err := Do(t.Context(), r, func(ctx context.Context) (int, error) {
					calls = append(calls, time.Since(begin))
					if n := AttemptNumber(ctx); n != len(calls) {
						t.Errorf("attempt %d says that it is number %d", len(calls), n)
					}
					return 7, tc.errs[min(len(calls), len(tc.errs))-1]
				})
				if err != tc.err || v != 7 || !slices.Equal(calls, tc.calls) {
					t.Errorf("%v, %v, called at %v, want %v, 7, %v", v, err, calls, tc.err, tc.calls)
				}
			})
		})
	}
}

// Do's attempts end by their own timeout, and the caller's context by itself.
func TestDoContexts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, err := New(Config{MaxAttempts: 2, Backoff: Backoff{Initial: time.Second, Max: time.Second, Multiplier: 1, Jitter: GRPCJitter}, AttemptTimeout: 30 * ms})
		if err != nil {
			t.Fatal(err)
		}
		wait := func(ctx context.Context) (int, error) { <-ctx.Done(); return 0, ctx.Err() }
		begin, calls := time.Now(), 0
		_, err = Do(t.Context(), r, func(ctx context.Context) (int, error) { calls++; return wait(ctx) })
		if !errors.Is(err, context.DeadlineExceeded) || calls != 2 || time.Since(begin) < 860*ms {
			t.Errorf("%v after %d calls and %v, want two timeouts", err, calls, time.Since(begin))
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(100*ms, cancel)
		begin = time.Now()
		if _, err = Do(ctx, r, wait); !errors.Is(err, context.Canceled) || time.Since(begin) != 100*ms {
			t.Errorf("%v after %v, want the caller's own end", err, time.Since(begin))
		}
		if AttemptNumber(t.Context()) != 0 {
			t.Error("a context of no attempt has a number")
		}
	})
}
