package outcome_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

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
		context.Canceled:                         outcome.Ignored, // an interceptor's, as it is
		context.DeadlineExceeded:                 outcome.Failure,
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

func TestCodeOf(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK}, {errors.New("plain"), codes.Unknown}, {status.Error(codes.Aborted, ""), codes.Aborted},
		{fmt.Errorf("w: %w", context.Canceled), codes.Canceled}, {context.DeadlineExceeded, codes.DeadlineExceeded},
	} {
		if got := outcome.CodeOf(tc.err); got != tc.want {
			t.Errorf("%v: %v, want %v", tc.err, got, tc.want)
		}
	}
}

// A refusal of our own is a full gRPC status, is found by its sentinel, also when it
// is wrapped, and is nobody's fault.
func TestRefusal(t *testing.T) {
	cause := errors.New("breaker: open")
	r := &outcome.Refusal{Cause: cause, Code: codes.Unavailable, Reason: "BREAKER_OPEN", Method: "/kv.KV/Get", After: 3 * time.Second}
	for _, err := range []error{r, fmt.Errorf("wrapped: %w", r)} {
		if !errors.Is(err, cause) || status.Code(err) != codes.Unavailable || outcome.Of(err) != outcome.Ignored {
			t.Errorf("%v: errors.Is %v, code %v, outcome %v", err, errors.Is(err, cause), status.Code(err), outcome.Of(err))
		}
		st := status.Convert(err)
		var info *errdetails.ErrorInfo
		for _, d := range st.Details() {
			if i, ok := d.(*errdetails.ErrorInfo); ok {
				info = i
			}
		}
		if info == nil || info.Domain != "bobtail" || info.Reason != "BREAKER_OPEN" || info.Metadata["method"] != "/kv.KV/Get" {
			t.Errorf("%v: ErrorInfo %v", err, info)
		}
		if d, ok := outcome.RetryDelay(err); !ok || d != 3*time.Second {
			t.Errorf("%v: RetryInfo %v, %v", err, d, ok)
		}
	}
	if got, want := r.Error(), status.Convert(r).Err().Error(); got != want {
		t.Errorf("error %q, want what grpc prints: %q", got, want)
	}
	// Once it has crossed a connection it is the server's own failure.
	if o := outcome.Of(status.Convert(r).Err()); o != outcome.Failure {
		t.Errorf("from a server it is %v, want a failure", o)
	}
	if _, ok := outcome.RetryDelay(&outcome.Refusal{Cause: cause, Code: codes.Unavailable}); ok {
		t.Error("a RetryInfo, though no time is known")
	}
}

func TestRetryDelay(t *testing.T) {
	with := func(delays ...*durationpb.Duration) error {
		st := status.New(codes.Unavailable, "")
		for _, d := range delays {
			var err error
			if st, err = st.WithDetails(&errdetails.RetryInfo{RetryDelay: d}); err != nil {
				t.Fatal(err)
			}
		}
		return st.Err()
	}
	for _, tc := range []struct {
		name string
		err  error
		want time.Duration
		ok   bool
	}{
		{"no error", nil, 0, false},
		{"no status", errors.New("plain"), 0, false},
		{"no detail", with(), 0, false},
		{"no delay in it", with(nil), 0, false},
		{"a delay", with(durationpb.New(250 * time.Millisecond)), 250 * time.Millisecond, true},
		{"0", with(durationpb.New(0)), 0, true},
		{"negative", with(durationpb.New(-time.Second)), 0, true},
		{"out of range", with(&durationpb.Duration{Seconds: 1 << 62}), 0, false},
		{"the longest of several", with(durationpb.New(1e6), durationpb.New(3e6), durationpb.New(2e6)), 3e6, true},
		{"wrapped", fmt.Errorf("w: %w", with(durationpb.New(1e6))), 1e6, true},
	} {
		if d, ok := outcome.RetryDelay(tc.err); d != tc.want || ok != tc.ok {
			t.Errorf("%s: %v, %v, want %v, %v", tc.name, d, ok, tc.want, tc.ok)
		}
	}
}
