package shedding

import (
	"errors"
	"fmt"
	"sync/atomic"

	"google.golang.org/grpc/codes"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// ErrBulkheadFull is found by errors.Is in the error of a call that came when as many as
// may be were in flight. Its status is RESOURCE_EXHAUSTED, its reason BULKHEAD_FULL.
var ErrBulkheadFull = errors.New("shedding: too many calls in flight")

// maxPlaces is where a bound stops to be one: a million calls in flight take gigabytes.
const maxPlaces = 1_000_000

// Bulkhead has a number of places, one for each call in flight. A call that finds none
// free is refused at once: there is no queue, because a call that waits for a slow
// server's other calls is in flight as much as they are.
//
// By Little's law the places that a method needs are its rate times its latency: 1000
// calls/s of 20 ms hold 20. Some times that leaves them alone and still bounds what a
// stalled server can pile up.
//
// A Bulkhead is made by [NewBulkhead] and is safe for concurrent use.
type Bulkhead struct {
	// places is an atomic because Resize changes it under calls that come.
	places atomic.Int64
	full   error // made once: a refusal costs nothing
	// taken is an atomic because every call comes by twice, and must wait for nobody.
	taken atomic.Int64
}

// NewBulkhead returns a bulkhead with the given number of places, in [1, 1000000], for
// the method whose full name refusals carry ("" for none).
func NewBulkhead(places int, method string) (*Bulkhead, error) {
	b := &Bulkhead{full: &outcome.Refusal{
		Cause: ErrBulkheadFull, Code: codes.ResourceExhausted, Reason: "BULKHEAD_FULL", Method: method,
	}}
	if err := b.Resize(places); err != nil {
		return nil, err
	}
	return b, nil
}

// Resize changes the number of places. Calls that are in stay in: when there are fewer
// places than that, none is let in until enough of them have left.
func (b *Bulkhead) Resize(places int) error {
	if places < 1 || places > maxPlaces {
		return fmt.Errorf("shedding: bulkhead of %d places, want [1, %d]", places, maxPlaces)
	}
	b.places.Store(int64(places))
	return nil
}

// Enter takes a place, which [Bulkhead.Leave] gives back, or returns an error that is
// [ErrBulkheadFull]. There are never more calls in than there are places, and a call is
// refused only if at that instant all are taken.
func (b *Bulkhead) Enter() error {
	for {
		taken := b.taken.Load()
		if taken >= b.places.Load() {
			return b.full
		}
		// Not an addition that is undone when it was too much: until it is undone, it
		// takes the place of a call that there is room for.
		if b.taken.CompareAndSwap(taken, taken+1) {
			return nil
		}
	}
}

// Leave gives a place back: once for each Enter that returned nil. When no place is
// taken it does nothing, so that the bound holds ever after; a second Leave of one call
// while others are in flight cannot be told from theirs, and lets one too many in.
func (b *Bulkhead) Leave() {
	for {
		taken := b.taken.Load()
		if taken == 0 || b.taken.CompareAndSwap(taken, taken-1) {
			return
		}
	}
}

// InFlight is how many places are taken.
func (b *Bulkhead) InFlight() int { return int(b.taken.Load()) }
