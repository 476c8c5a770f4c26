package outcome

import (
	"strconv"
	"time"

	"google.golang.org/grpc/metadata"
)

// PushbackKey is the trailer by which a server says when, or that never, to try
// again. gRFC A6, "Pushback".
const PushbackKey = "grpc-retry-pushback-ms"

// Pushback is what a server said about trying again.
type Pushback struct {
	// Given is false when the server said nothing.
	Given bool
	// Stop is set when the server asked for no further attempt: a negative value
	// or one that does not parse.
	Stop bool
	// Delay is how long to wait before the next attempt, when Given and not Stop.
	Delay time.Duration
}

// ReadPushback reads the pushback in a trailer. A6: "an ASCII encoded signed
// 32-bit integer with no unnecessary leading zeros ... If the value for pushback
// is negative or unparseable, then it will be seen as the server asking the
// client not to retry at all." A repeated key is garbled, and so stops too.
func ReadPushback(trailer metadata.MD) Pushback {
	v, ok := trailer[PushbackKey]
	if !ok || len(v) == 0 {
		return Pushback{}
	}
	if len(v) > 1 {
		return Pushback{Given: true, Stop: true}
	}
	s := v[0]
	ms, err := strconv.ParseInt(s, 10, 32)
	if err != nil || ms < 0 || s != strconv.FormatInt(ms, 10) {
		return Pushback{Given: true, Stop: true}
	}
	return Pushback{Given: true, Delay: time.Duration(ms) * time.Millisecond}
}
