// Package permethod keeps one value for each method of each target, as the
// interceptors of the policy packages need when they are used alone.
package permethod

import (
	"maps"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
)

// Max is how many values a [Map] keeps. Method names can come from outside (a proxy
// calls what it is told to), so what they cost must be bounded.
const Max = 1000

// Map has a value for each method of each target, made when the method is first
// called. Methods beyond [Max] share one value. A Map is made by [New] and is safe for
// concurrent use.
type Map[V any] struct {
	build func(method string) V
	// known is copied on write, so that the read on every call is one atomic load.
	known  atomic.Pointer[map[key]V]
	mu     sync.Mutex // serialises the writers of known; guards what follows
	rest   V          // of all methods beyond Max
	shared bool       // rest has been made
}

type key struct{ target, method string }

// New returns a Map whose values are made by build, under a lock. It is given the full
// name of the method, "" for the value that methods beyond the bound share.
func New[V any](build func(method string) V) *Map[V] {
	m := &Map[V]{build: build}
	m.known.Store(&map[key]V{})
	return m
}

// Of returns the value for a method, called over cc; a nil cc is a target of its own.
func (m *Map[V]) Of(cc *grpc.ClientConn, method string) V {
	k := key{method: method}
	if cc != nil {
		k.target = cc.Target()
	}
	if v, ok := (*m.known.Load())[k]; ok {
		return v
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	old := *m.known.Load()
	if v, ok := old[k]; ok {
		return v
	}
	if len(old) >= Max {
		if !m.shared {
			m.rest, m.shared = m.build(""), true
		}
		return m.rest
	}
	grown := make(map[key]V, len(old)+1)
	maps.Copy(grown, old)
	v := m.build(method)
	grown[k] = v
	m.known.Store(&grown)
	return v
}
