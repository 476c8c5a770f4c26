//go:build race

package bobtail

const raceDetector = true
