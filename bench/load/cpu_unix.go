//go:build unix

package load

import (
	"syscall"
	"time"
)

// CPUTime is the processor time that this process has used. Its children's is
// not in it.
func CPUTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
