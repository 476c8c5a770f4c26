// Package testenv tells tests what they run on, and measures what that disturbs.
package testenv

import "testing"

// Allocs is how many objects one call of f allocates: the least mean of five rounds of runs
// calls. [testing.AllocsPerRun] counts what the whole process allocates, so a collection or the
// last goroutines of an earlier test can add one in a single round.
//
// Under the race detector a [sync.Pool] drops at random what is put into it: tests of code that
// uses one skip there, see [Race].
func Allocs(runs int, f func()) float64 {
	least := testing.AllocsPerRun(runs, f)
	for range 4 {
		least = min(least, testing.AllocsPerRun(runs, f))
	}
	return least
}
