package attempt

import (
	"context"
	"strconv"

	"google.golang.org/grpc/metadata"
)

const (
	// PreviousAttempts counts the attempts before this one. gRFC A6, "Exposed
	// Retry Metadata": absent on the first attempt.
	PreviousAttempts = "grpc-previous-rpc-attempts"
	// KindKey tells the server why it sees this attempt: "hedge" or "retry". It
	// is absent on the first attempt.
	KindKey = "bobtail-attempt"
)

// Outgoing returns ctx with the metadata that tells the server which attempt
// this is. For the first attempt it returns ctx itself.
func (a *Attempt) Outgoing(ctx context.Context) context.Context {
	if a.Number <= 1 {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx,
		PreviousAttempts, strconv.Itoa(a.Number-1), KindKey, a.Kind.String())
}

// IsExtra reports whether ctx is that of a server serving an extra attempt: a
// hedge or a retry, of bobtail or of any gRPC client that follows A6. Calls made
// under it get no extra attempts of their own, or n layers of 3 attempts would
// multiply to 3^n. Garbled metadata counts as a first attempt.
func IsExtra(ctx context.Context) bool {
	if v := metadata.ValueFromIncomingContext(ctx, KindKey); len(v) > 0 {
		return v[0] == "hedge" || v[0] == "retry"
	}
	for _, s := range metadata.ValueFromIncomingContext(ctx, PreviousAttempts) {
		if n, err := strconv.Atoi(s); err == nil && n >= 1 {
			return true
		}
	}
	return false
}
