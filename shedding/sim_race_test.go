//go:build race

package shedding

const underRace = true
