//go:build race

package testenv

// Race says that the race detector is on. What measures policies over many thousand calls takes
// minutes then, and finds no more races than what checks them.
const Race = true
