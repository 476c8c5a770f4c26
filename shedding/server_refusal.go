package shedding

import (
	"context"
	"errors"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// Sentinels that errors.Is finds in the errors of a server's refusals, for interceptors
// outside of ours.
var (
	ErrOverloaded       = errors.New("shedding: overloaded")
	ErrQueueTimeout     = errors.New("shedding: waited too long")
	ErrDeadlineHopeless = errors.New("shedding: cannot be done by the deadline")
	ErrTenantQuota      = errors.New("shedding: tenant over quota")
	ErrDraining         = errors.New("shedding: draining")
)

// Reasons of a [Server] beside those of an [Admission].
const (
	TenantQuota Reason = Hopeless + 1 + iota // the tenant has used up its quota
	Draining                                 // the server is about to stop
	ClientGone                               // its context ended while it waited

	reasons = int(ClientGone) + 1
)

// drainPushback is when to come again to one who is refused by a server that drains. By
// then the balancer has seen it.
const drainPushback = 100 * time.Millisecond

// refusal returns the error of a call that is refused. The pushback, and the RetryInfo,
// are after.
func refusal(ctx context.Context, method string, why Reason, after time.Duration) error {
	r := &outcome.Refusal{Cause: ErrOverloaded, Code: codes.Unavailable, Reason: why.String(), Method: method, After: after}
	switch why {
	case QueueTimeout:
		r.Cause = ErrQueueTimeout
	case Hopeless:
		r.Cause, r.Code = ErrDeadlineHopeless, codes.DeadlineExceeded
	case TenantQuota:
		r.Cause, r.Code = ErrTenantQuota, codes.ResourceExhausted
	case Draining:
		r.Cause = ErrDraining
	}
	// Rounded up: a pushback of 0 says "at once". It fails only where there is no
	// transport, as in a test of the interceptor.
	ms := (after + time.Millisecond - 1) / time.Millisecond
	_ = grpc.SetTrailer(ctx, metadata.MD{outcome.PushbackKey: []string{strconv.FormatInt(int64(ms), 10)}})
	return r
}
