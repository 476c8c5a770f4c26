package telemetry

import (
	"maps"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
)

// MaxEndpoints bounds how many endpoints, of all targets together, have series of their own.
// Those beyond share the series of endpoint "other" of target "other".
const MaxEndpoints = 1000

type endpointKey struct{ target, endpoint string }

// endpoint is one endpoint of one target, with the sets that its attempts need, made when
// first needed; as those of a [Method].
type endpoint struct {
	labels   []attribute.KeyValue
	attempts [outcomes]atomic.Pointer[set]
}

func newEndpoint(k endpointKey) *endpoint {
	return &endpoint{labels: []attribute.KeyValue{attribute.String(labelTarget, k.target), attribute.String(labelEndpoint, k.endpoint)}}
}

func (t *Telemetry) endpoint(target, name string) *endpoint {
	k := endpointKey{target, name}
	if e, ok := t.endpoints.known(k); ok {
		return e
	}
	return t.endpoints.learn(k, endpointKey{other, other}, MaxEndpoints, newEndpoint)
}

func (e *endpoint) outcomeSet(o Outcome) *set {
	p := &e.attempts[o]
	s := p.Load()
	if s == nil {
		s = newSet(append(e.labels[:len(e.labels):len(e.labels)], attribute.String(labelOutcome, outcomeNames[o]))...)
		p.Store(s)
	}
	return s
}

// bounded is a map that only grows, to a bound. The zero value is empty.
type bounded[K comparable, V any] struct {
	// all is copied on write, because calls read it.
	all atomic.Pointer[map[K]V]
	mu  sync.Mutex // serialises its writers
}

func (b *bounded[K, V]) known(k K) (v V, ok bool) {
	if all := b.all.Load(); all != nil {
		v, ok = (*all)[k]
	}
	return v, ok
}

// learn returns the value of k, made if there is none, and that of rest if there is no room.
// Of the most places one is kept for rest.
func (b *bounded[K, V]) learn(k, rest K, most int, build func(K) V) V {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := map[K]V{}
	if all := b.all.Load(); all != nil {
		old = *all
	}
	if v, ok := old[k]; ok {
		return v
	}
	if _, kept := old[rest]; k != rest && (kept && len(old) >= most || !kept && len(old) >= most-1) {
		if k = rest; kept {
			return old[k]
		}
	}
	grown := maps.Clone(old)
	v := build(k)
	grown[k] = v
	b.all.Store(&grown)
	return v
}
