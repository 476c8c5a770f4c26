// Package outcome is the one classifier of what became of an attempt, and the
// one reader of what a server says about trying again.
//
// There are three outcomes, not two. What was cancelled by the caller, or
// superseded by a sibling that was faster, says nothing about the health of the
// server that did it: counting it as a failure makes a balancer starve the
// backends that hedging leaves behind.
package outcome

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Outcome is what an attempt says about its server.
type Outcome uint8

const (
	// Success: the server did its work, whatever the answer. INVALID_ARGUMENT
	// and NOT_FOUND are answers.
	Success Outcome = iota
	// Failure: the server, or the way to it, did not.
	Failure
	// Ignored: nobody knows. Cancelled, superseded, refused before it was sent,
	// or refused for want of quota.
	Ignored
)

// String returns "success", "failure" or "ignored".
func (o Outcome) String() string {
	switch o {
	case Success:
		return "success"
	case Failure:
		return "failure"
	}
	return "ignored"
}

// Of classifies the error of an attempt; nil is success. An error that carries
// no gRPC status is that of the context error that it wraps, which interceptors return as
// it is, else UNKNOWN, a failure; a [Refusal] is ignored.
func Of(err error) Outcome {
	if err == nil {
		return Success
	}
	if IsRefusal(err) {
		return Ignored
	}
	return OfCode(CodeOf(err))
}

// CodeOf is the status code of an error of any function, gRPC's or not: that of a context
// error that it wraps, else that of its gRPC status, else UNKNOWN; nil is OK.
func CodeOf(err error) codes.Code {
	switch {
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	}
	return status.Code(err)
}

// OfCode classifies a status code.
func OfCode(c codes.Code) Outcome {
	switch c {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Internal, codes.Unknown, codes.DataLoss:
		return Failure
	case codes.Canceled, codes.ResourceExhausted:
		return Ignored
	}
	return Success
}
