//go:build race

package main

// underRace says that the race detector is on: what measures policies over many thousand calls
// takes minutes then and finds no more races than what checks them.
const underRace = true
