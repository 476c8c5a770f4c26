package scenario

import (
	"math"
	"strconv"
)

// Keys is the law by which leaf calls get keys. A share Hot of them has one key, and of
// the others key-k takes a share that falls with k as Zipf's law has it: of 1,000 keys
// with exponent 1, key-0 takes a tenth, key-9 one in seventy.
type Keys struct {
	// Count is the number of keys, 1 to 1,000,000,000.
	Count int `json:"count"`
	// Exponent s is by how much shares fall, 0 (all keys alike) to 10, default 1: the
	// share of the k-th key, from 1, is that of [k, k+1) under a density that falls with
	// x^-s from 1 to Count+1. Unlike Zipf's own sum over k^-s, that integral can be
	// inverted in closed form.
	Exponent float64 `json:"exponent"`
	// Hot is the share of calls, 0 to 1, default 0, that have the key HotKey.
	Hot float64 `json:"hot,omitempty"`
}

// HotKey is the key of the share Hot.
const HotKey = "hot"

// Key returns the key of leaf call id, the same for all its attempts; "" if the
// scenario has none. Pure and safe for concurrent use.
func (s *Scenario) Key(seed, id uint64) string {
	k := s.Keys
	if k == nil {
		return ""
	}
	d := draw{seed, id}
	if d.uniform(keyHot) < k.Hot {
		return HotKey
	}
	return "key-" + strconv.Itoa(k.rank(d.uniform(keyRank)))
}

// rank is the law's inverse distribution function, from 0.
func (k *Keys) rank(u float64) int {
	n := float64(k.Count)
	x := math.Exp(u * math.Log1p(n))
	// Close to 1 the other form loses all its digits.
	if e := 1 - k.Exponent; math.Abs(e) > 1e-6 {
		x = math.Pow(1+u*(math.Pow(n+1, e)-1), 1/e)
	}
	return int(min(max(x, 1), n)) - 1
}
