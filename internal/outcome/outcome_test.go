package outcome_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// Every code has its outcome; whoever adds one must say which.
func TestEveryCode(t *testing.T) {
	want := map[codes.Code]outcome.Outcome{
		codes.OK: outcome.Success, codes.InvalidArgument: outcome.Success, codes.NotFound: outcome.Success,
		codes.AlreadyExists: outcome.Success, codes.PermissionDenied: outcome.Success, codes.FailedPrecondition: outcome.Success,
		codes.Aborted: outcome.Success, codes.OutOfRange: outcome.Success, codes.Unimplemented: outcome.Success,
		codes.Unauthenticated: outcome.Success,
		codes.Unavailable:     outcome.Failure, codes.DeadlineExceeded: outcome.Failure, codes.Internal: outcome.Failure,
		codes.Unknown: outcome.Failure, codes.DataLoss: outcome.Failure,
		codes.Canceled: outcome.Ignored, codes.ResourceExhausted: outcome.Ignored,
	}
	for c := codes.OK; c <= codes.Unauthenticated; c++ {
		if w, ok := want[c]; !ok || outcome.OfCode(c) != w || outcome.Of(status.Error(c, "")) != w {
			t.Errorf("%v is %v, want %v", c, outcome.OfCode(c), w)
		}
	}
	for err, w := range map[error]outcome.Outcome{
		nil:                                      outcome.Success,
		errors.New("plain"):                      outcome.Failure,
		context.Canceled:                         outcome.Failure, // carries no status: whoever returns it below gRPC is not the caller
		fmt.Errorf("w: %w", status.Error(5, "")): outcome.Success,
	} {
		if got := outcome.Of(err); got != w {
			t.Errorf("%v is %v, want %v", err, got, w)
		}
	}
	if s := fmt.Sprint(outcome.Success, outcome.Failure, outcome.Ignored); s != "success failure ignored" {
		t.Error(s)
	}
}

func TestReadPushback(t *testing.T) {
	stop := outcome.Pushback{Given: true, Stop: true}
	wait := func(ms int) outcome.Pushback {
		return outcome.Pushback{Given: true, Delay: time.Duration(ms) * time.Millisecond}
	}
	for _, tc := range []struct {
		values []string
		want   outcome.Pushback
	}{
		{nil, outcome.Pushback{}},
		{[]string{"0"}, wait(0)},
		{[]string{"250"}, wait(250)},
		{[]string{"2147483647"}, wait(2147483647)},
		{[]string{"2147483648"}, stop},
		{[]string{"-1"}, stop},
		{[]string{"-0"}, stop},
		{[]string{"007"}, stop},
		{[]string{"+5"}, stop},
		{[]string{" 5"}, stop},
		{[]string{"5ms"}, stop},
		{[]string{""}, stop},
		{[]string{"1", "2"}, stop},
	} {
		md := metadata.MD{}
		if tc.values != nil {
			md[outcome.PushbackKey] = tc.values
		}
		if got := outcome.ReadPushback(md); got != tc.want {
			t.Errorf("%q: %+v, want %+v", tc.values, got, tc.want)
		}
	}
}
