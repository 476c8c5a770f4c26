//go:build !linux

package clock

import (
	"context"
	"time"
)

type waits struct{}

func (*waits) open() error  { return nil }
func (*waits) close() error { return nil }

func (*waits) sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
