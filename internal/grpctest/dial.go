package grpctest

import (
	"context"
	"net"
	"sync"

	"google.golang.org/grpc/test/bufconn"
)

// dialing guards Dial.
var dialing sync.Mutex

// Dial connects to a listener in memory, one connection at a time. A bufconn's pipe begins
// with timers that are due at once; and two goroutines of one bubble that run such timers at the same
// moment crash under the race detector, as Go 1.26 gives both the same context
// (runtime.synctestBubble.timers.raceCtx).
func Dial(ctx context.Context, lis *bufconn.Listener) (net.Conn, error) {
	dialing.Lock()
	defer dialing.Unlock()
	return lis.DialContext(ctx)
}
