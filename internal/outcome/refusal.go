package outcome

import (
	"errors"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Domain is the domain of the google.rpc.ErrorInfo in every refusal.
const Domain = "bobtail"

// Refusal is the error of a call that was refused before anything of it was sent.
// It is a gRPC status, which carries a google.rpc.ErrorInfo and, if After is
// known, a google.rpc.RetryInfo; and errors.Is finds its Cause. Its status is only
// made when somebody asks for it: under overload refusals must stay cheap.
//
// A refusal says nothing about the server, so [Of] ignores it. Sent on over a
// connection it is a plain status: to the next caller it is a failure like others.
type Refusal struct {
	// Cause is the sentinel that callers compare with, such as breaker.ErrOpen. Its
	// text is the status message.
	Cause error
	// Code is the status code.
	Code codes.Code
	// Reason is that of the ErrorInfo, such as "BREAKER_OPEN".
	Reason string
	// Method is the full name of the refused method, "" if unknown: metadata
	// "method" of the ErrorInfo.
	Method string
	// After is how long it makes no sense to try again; 0 or less is unknown.
	After time.Duration
}

// Error implements error, in the form that grpc gives a status.
func (r *Refusal) Error() string {
	return "rpc error: code = " + r.Code.String() + " desc = " + r.message()
}

func (r *Refusal) message() string {
	if r.Method == "" {
		return r.Cause.Error()
	}
	return r.Cause.Error() + ": " + r.Method
}

// Unwrap returns the sentinel.
func (r *Refusal) Unwrap() error { return r.Cause }

// GRPCStatus is what package status finds.
func (r *Refusal) GRPCStatus() *status.Status {
	st := status.New(r.Code, r.message())
	info := &errdetails.ErrorInfo{Domain: Domain, Reason: r.Reason}
	if r.Method != "" {
		info.Metadata = map[string]string{"method": r.Method}
	}
	details := []protoadapt.MessageV1{info}
	if r.After > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(r.After)})
	}
	if with, err := st.WithDetails(details...); err == nil { // it fails for OK only
		st = with
	}
	return st
}

// IsRefusal reports whether err is, or wraps, a [Refusal] made in this process.
func IsRefusal(err error) bool {
	var r *Refusal
	return errors.As(err, &r)
}

// RetryDelay returns how long the server of a failed attempt asked to wait before
// another one, by a google.rpc.RetryInfo in the details of its status: the longest,
// if there are several. A negative delay is none.
func RetryDelay(err error) (d time.Duration, ok bool) {
	st, is := status.FromError(err)
	if !is {
		return 0, false
	}
	for _, detail := range st.Details() {
		info, is := detail.(*errdetails.RetryInfo)
		if !is || info.RetryDelay == nil || info.RetryDelay.CheckValid() != nil {
			continue
		}
		d, ok = max(d, info.RetryDelay.AsDuration(), 0), true
	}
	return d, ok
}
