package outcome_test

import (
	"errors"
	"fmt"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

func TestOverloaded(t *testing.T) {
	with := func(c codes.Code, domain, reason string) error {
		st, err := status.New(c, "no room").WithDetails(&errdetails.ErrorInfo{Domain: domain, Reason: reason})
		if err != nil {
			t.Fatal(err)
		}
		return st.Err()
	}
	for _, tc := range []struct {
		name string
		err  error
		want bool
	}{
		{"none", nil, false},
		{"plain", errors.New("plain"), false},
		{"no detail", status.Error(codes.Unavailable, "down"), false},
		{"at the limit", with(codes.Unavailable, "bobtail", "OVERLOADED"), true},
		{"wrapped", fmt.Errorf("w: %w", with(codes.Unavailable, "bobtail", "OVERLOADED")), true},
		{"waited too long", with(codes.Unavailable, "bobtail", "QUEUE_TIMEOUT"), true},
		{"over quota", with(codes.ResourceExhausted, "bobtail", "TENANT_QUOTA"), true},
		{"hopeless", with(codes.DeadlineExceeded, "bobtail", "DEADLINE_HOPELESS"), true},
		{"about to stop", with(codes.Unavailable, "bobtail", "DRAINING"), true},
		{"somebody else's", with(codes.Unavailable, "example.com", "OVERLOADED"), false},
		{"refused by the breaker of a server on the way", with(codes.Unavailable, "bobtail", "BREAKER_OPEN"), false},
		{"a code that no refusal has", with(codes.Internal, "bobtail", "OVERLOADED"), false},
	} {
		if got := outcome.Overloaded(tc.err); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}
