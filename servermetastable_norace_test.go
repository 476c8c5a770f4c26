//go:build !race

package bobtail_test

const underRace = false
