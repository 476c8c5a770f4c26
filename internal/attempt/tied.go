package attempt

import (
	"context"

	"google.golang.org/grpc/metadata"
)

// TiedKey marks a tied call (Dean and Barroso, "The Tail at Scale", 2013) in both
// directions: a client that sends it asks to be told when the handler starts, and a
// server tells so by a header that has it, sent at that moment.
const TiedKey = "bobtail-tied"

// Tied returns ctx with the metadata that marks its calls as tied.
func Tied(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, TiedKey, "1")
}

// IsTied reports whether ctx is that of a server serving a tied call. Anything but "1"
// is garbled, and does not count.
func IsTied(ctx context.Context) bool {
	for _, v := range metadata.ValueFromIncomingContext(ctx, TiedKey) {
		if v == "1" {
			return true
		}
	}
	return false
}
