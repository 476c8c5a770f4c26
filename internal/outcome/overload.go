package outcome

import (
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Overloaded reports whether err is the answer of a server that works, and had no room for
// the call, or is about to stop: its status carries a google.rpc.ErrorInfo of our domain with one of the reasons
// of a server's admission. Such a call never reached its handler, so it says nothing about
// the method; it says all about how much should be sent. So a circuit breaker ignores it, and
// a throttle counts it.
//
// A server that passes on the answer of another one behind it is taken to be overloaded
// itself: for its callers it is.
func Overloaded(err error) bool {
	if err == nil {
		return false
	}
	st, ok := status.FromError(err)
	if !ok {
		return false
	}
	switch st.Code() {
	case codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded:
	default:
		return false
	}
	for _, detail := range st.Details() {
		info, ok := detail.(*errdetails.ErrorInfo)
		if !ok || info.GetDomain() != Domain {
			continue
		}
		switch info.GetReason() {
		case "OVERLOADED", "QUEUE_TIMEOUT", "TENANT_QUOTA", "DEADLINE_HOPELESS", "DRAINING":
			return true
		}
	}
	return false
}
