package breaker_test

import (
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/breaker"
)

// A server that refuses two calls of three for want of room is overloaded, not broken: the
// breaker lets calls through, the throttle holds some back. The same answers without the
// mark open the breaker.
func TestOverloadOpensNothing(t *testing.T) {
	marked, err := status.New(codes.Unavailable, "overloaded").WithDetails(&errdetails.ErrorInfo{Domain: "bobtail", Reason: "OVERLOADED"})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		refusal error
		want    breaker.State
	}{
		{"marked", marked.Err(), breaker.Closed},
		{"not marked", status.Error(codes.Unavailable, "overloaded"), breaker.Open},
	} {
		synctest.Test(t, func(t *testing.T) {
			b, err := breaker.New(breaker.Config{})
			if err != nil {
				t.Fatal(err)
			}
			h, err := breaker.NewThrottle(breaker.ThrottleConfig{}, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			for i := range 300 {
				time.Sleep(10 * time.Millisecond)
				end := tc.refusal
				if i%3 == 0 {
					end = nil
				}
				h.Record(time.Now(), end)
				p, err := b.Admit()
				if err != nil {
					continue
				}
				if i%2 == 0 {
					p.Done(end)
				} else {
					p.DoneStream(end)
				}
			}
			if got := b.State(); got != tc.want {
				t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
			}
			// (requests - 2 x accepts) / requests
			if p := h.Probability(time.Now()); p < 0.3 || p > 0.34 {
				t.Errorf("%s: the throttle refuses %.2f, want 0.33", tc.name, p)
			}
		})
	}
}
