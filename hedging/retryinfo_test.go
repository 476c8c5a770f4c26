package hedging_test

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// A server that refuses a call before it has a stream for it (in a tap) has no trailer for
// a pushback: what it has to say is in the status.
func TestRetryInfo(t *testing.T) {
	for _, tc := range []struct {
		name     string
		first    part
		arrivals []time.Duration
		code     codes.Code
	}{
		{"a RetryInfo is waited for", part{After: 2 * ms, Code: codes.Unavailable, Info: 25 * ms}, []time.Duration{0, 27 * ms}, codes.OK},
		{"beside it a pushback is exact", part{After: 2 * ms, Code: codes.Unavailable, Info: 25 * ms, Push: "7"}, []time.Duration{0, 9 * ms}, codes.OK},
		{"it does not make a fatal code less so", part{After: 2 * ms, Code: codes.Aborted, Info: 25 * ms}, []time.Duration{0}, codes.Aborted},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newStage(tc.first, part{After: ms})
			c, _ := s.dial(t, hedging.Config{MaxAttempts: 2, Delay: 10 * ms, NonFatalCodes: []codes.Code{codes.Unavailable}})
			_, err := c.Get(t.Context(), &kvpb.Request{})
			if got := status.Code(err); got != tc.code || !slices.Equal(s.Arrivals(), tc.arrivals) {
				t.Errorf("%s: %v, arrivals %v, want %v, %v", tc.name, err, s.Arrivals(), tc.code, tc.arrivals)
			}
		})
	}
}
