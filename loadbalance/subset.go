package loadbalance

import (
	"cmp"
	"maps"
	"math"
	"slices"

	"google.golang.org/grpc/experimental/balancer/weight"
	"google.golang.org/grpc/resolver"
)

// subset is which of the endpoints a client uses: with thousands of clients and of
// servers, to connect each to each costs memory and health checks, and leaves each pair
// too few calls to learn from.
//
// With clientIndex and clientCount the subset is deterministic: the endpoints, in an
// order that all clients agree on, fill a ring in proportion to their weights; client i
// of n has the stretch of it from i/n on that is as long as size endpoints, or longer
// if some are heavy, and a whole number of n-ths; and an endpoint that only a part of
// lies in the stretch has that part of its weight. So every point of the ring belongs to equally many clients, and equal
// clients load the endpoints in proportion to their weights exactly, whatever the
// numbers (Finagle's deterministic aperture,
// https://twitter.github.io/finagle/guide/ApertureLoadBalancers.html).
//
// Without them it is random: the endpoints that rank highest for a number that each
// client draws for itself (rendezvous hashing, as gRFC A68). Then an endpoint more or less changes
// at most one of a subset, and the number of clients of an endpoint is binomial.
type subset struct {
	// size, [1, 1e6], is how many endpoints a client uses at least; with a zone, how many of it
	// and how many others. Default 0: all.
	size int64
	// index, [0, count), is this client's among count, [1, 1e9], that share the endpoints; with a
	// zone, among those of the same zone.
	// Default: none, the subset is random.
	index, count int64
}

// shares returns the endpoints to use, with their weights, by their keys. With a zone there is
// one subset of it and one of the others: or a client would have few of its own zone by chance,
// or none; and without any of the others its zone could not spill.
func (o *options) shares(endpoints []resolver.Endpoint, seed uint64) map[string]float64 {
	if o.zone.local == "" || o.subset.size == 0 {
		return o.subset.of(endpoints, seed)
	}
	var near, far []resolver.Endpoint
	for _, e := range endpoints {
		if zoneOf(e) == o.zone.local {
			near = append(near, e)
		} else {
			far = append(far, e)
		}
	}
	shares := o.subset.of(near, seed)
	maps.Copy(shares, o.subset.of(far, seed))
	return shares
}

// of returns those of the endpoints to use.
func (s subset) of(endpoints []resolver.Endpoint, seed uint64) map[string]float64 {
	weights := make(map[string]float64, len(endpoints))
	for _, e := range endpoints {
		weights[keyOf(e)] = float64(max(1, weight.FromEndpoint(e).Weight)) // 0 if there is none
	}
	if s.size == 0 || int(s.size) >= len(weights) {
		return weights
	}
	if s.count == 0 {
		return s.random(weights, seed)
	}
	return s.aperture(weights)
}

// chosen returns those of the endpoints that have a share.
func chosen(endpoints []resolver.Endpoint, shares map[string]float64) []resolver.Endpoint {
	return slices.DeleteFunc(slices.Clone(endpoints), func(e resolver.Endpoint) bool {
		_, ok := shares[keyOf(e)]
		return !ok
	})
}

func (s subset) random(weights map[string]float64, seed uint64) map[string]float64 {
	type ranked struct {
		key  string
		rank uint64
	}
	all := make([]ranked, 0, len(weights))
	for key := range weights {
		all = append(all, ranked{key, mix(seed ^ mix(uint64(hashKey(key))))})
	}
	slices.SortFunc(all, func(a, b ranked) int { return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.key, b.key)) })
	shares := make(map[string]float64, s.size)
	for _, r := range all[:s.size] {
		shares[r.key] = weights[r.key]
	}
	return shares
}

func (s subset) aperture(weights map[string]float64) map[string]float64 {
	keys := make([]string, 0, len(weights))
	var sum float64
	for key, w := range weights {
		keys = append(keys, key)
		sum += w
	}
	// By their hashes, so that neighbours on the ring are none in the data centre.
	slices.SortFunc(keys, func(a, b string) int {
		return cmp.Or(cmp.Compare(hashKey(a), hashKey(b)), cmp.Compare(a, b))
	})
	// In units of 1/n of the ring: the client begins at index, and the stretch has a
	// whole length.
	n := float64(s.count)
	from := float64(s.index)
	length := math.Ceil(n*float64(s.size)/float64(len(keys)) - 1e-9)
	// Longer than any size-1 neighbours, or where they are heavy a client would have no more.
	length = max(length, math.Floor(n*heaviest(keys, weights, s.size-1)/sum+1e-9)+1)
	to := from + min(length, n)
	shares := make(map[string]float64)
	var at float64
	for _, key := range keys {
		begin, end := at/sum*n, (at+weights[key])/sum*n
		at += weights[key]
		// The stretch may reach around the ring.
		part := overlap(begin, end, from, to) + overlap(begin+n, end+n, from, to)
		if part > 1e-9*(end-begin) {
			shares[key] = part
		}
	}
	return shares
}

// heaviest returns the greatest weight of so many neighbours on the ring.
func heaviest(ring []string, weights map[string]float64, neighbours int64) (most float64) {
	var sum float64
	for i := range len(ring) + int(neighbours) {
		sum += weights[ring[i%len(ring)]]
		if i >= int(neighbours) {
			sum -= weights[ring[(i-int(neighbours))%len(ring)]]
		}
		most = max(most, sum)
	}
	return most
}

// overlap is how much two intervals have in common.
func overlap(a, b, c, d float64) float64 { return max(0, min(b, d)-max(a, c)) }
