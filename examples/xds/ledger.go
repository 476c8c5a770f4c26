package main

import (
	"context"
	"sync"

	"google.golang.org/grpc/metadata"
)

// userHeader says whose call it is.
const userHeader = "x-user-id"

// A ledger counts what arrives at the backends, and of whom. The zero value is empty.
type ledger struct {
	mu       sync.Mutex
	arrivals map[arrival]int // as many as there are pairs of a backend and a user
}

type arrival struct {
	backend int
	user    string
}

// note counts a call that has arrived at a backend.
func (l *ledger) note(ctx context.Context, backend int) {
	a := arrival{backend: backend}
	if values := metadata.ValueFromIncomingContext(ctx, userHeader); len(values) > 0 {
		a.user = values[0]
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.arrivals == nil {
		l.arrivals = make(map[arrival]int)
	}
	l.arrivals[a]++
}

// take returns the counts, and starts again from none.
func (l *ledger) take() counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	taken := l.arrivals
	l.arrivals = nil
	return taken
}

// counts are what a ledger has counted.
type counts map[arrival]int

// at returns how many calls arrived at a backend.
func (c counts) at(backend int) (n int) {
	for a, calls := range c {
		if a.backend == backend {
			n += calls
		}
	}
	return n
}

// homes returns for each user at how many backends the user's calls arrived.
func (c counts) homes() map[string]int {
	homes := make(map[string]int)
	for a := range c {
		homes[a.user]++
	}
	return homes
}
