package loadbalance

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"
)

// A document is a configuration as it was written. grpc's xDS balancers write out what
// they have parsed, with json.Marshal, and parse that again on its way down
// (internal/xds/balancer/cdsbalancer): a configuration that does not come out as it went
// in is none that xDS can deliver.
type document struct{ js string }

// MarshalJSON implements json.Marshaler.
func (d document) MarshalJSON() ([]byte, error) {
	if d.js == "" { // the defaults
		return []byte("{}"), nil
	}
	return []byte(d.js), nil
}

// options are what every balancer of this package can be told.
type options struct {
	document
	// maxInFlight, [1, 1e9], is how many attempts of this client, streams included, may be
	// in flight at one endpoint. An attempt that would exceed it goes to the least loaded
	// endpoint with room, and fails with RESOURCE_EXHAUSTED if there is none. Default 0:
	// no bound.
	maxInFlight int64
	slowStart   slowStart
	ejection    ejection
	subset      subset
	zone        zone
}

func defaultOptions() options {
	return options{
		slowStart: slowStart{window: 10 * time.Second, aggression: 1},
		ejection: ejection{
			latencyFactor:      3,
			latencyFloor:       5 * time.Millisecond,
			failureRatio:       0.2,
			minimumCalls:       20,
			baseTime:           10 * time.Second,
			maxEjectionPercent: 34,
			panicThreshold:     50,
			probeEvery:         100,
		},
		zone: zone{overload: 2},
	}
}

// parsers returns the parsers of the options' keys.
func (o *options) parsers() map[string]func(json.RawMessage) error {
	return map[string]func(json.RawMessage) error{
		"maxInFlight": whole(&o.maxInFlight, 1, 1e9),
		"slowStart": object(map[string]func(json.RawMessage) error{
			"window":     duration(&o.slowStart.window, 0, time.Hour),
			"aggression": number(&o.slowStart.aggression, above(0), 100),
		}),
		"ejection": object(map[string]func(json.RawMessage) error{
			"latencyFactor":      number(&o.ejection.latencyFactor, above(1), 1000),
			"latencyFloor":       duration(&o.ejection.latencyFloor, 0, time.Hour),
			"failureRatio":       number(&o.ejection.failureRatio, above(0), 1),
			"minimumCalls":       whole(&o.ejection.minimumCalls, 1, memory-1),
			"baseEjectionTime":   duration(&o.ejection.baseTime, time.Millisecond, time.Hour),
			"maxEjectionPercent": number(&o.ejection.maxEjectionPercent, 0, 100),
			"panicThreshold":     number(&o.ejection.panicThreshold, 0, 100),
			"probeEvery":         whole(&o.ejection.probeEvery, 2, 1e9),
		}),
		"subset": func(v json.RawMessage) error {
			index, count := int64(-1), int64(0)
			err := object(map[string]func(json.RawMessage) error{
				"size":        whole(&o.subset.size, 1, 1e6),
				"clientIndex": whole(&index, 0, 1e9),
				"clientCount": whole(&count, 1, 1e9),
			})(v)
			if err != nil {
				return err
			}
			o.subset.index, o.subset.count = max(index, 0), count
			switch {
			case o.subset.size == 0:
				return errors.New("size: missing, want a whole number in [1, 1000000]")
			case index < 0 && count > 0:
				return fmt.Errorf("clientIndex: missing, want a whole number in [0, %d)", count)
			case index >= 0 && count == 0:
				return errors.New("clientCount: missing, want how many clients there are")
			case index >= max(count, 1):
				return fmt.Errorf("clientIndex: %d, want a whole number in [0, %d), below clientCount", index, count)
			}
			return nil
		},
		"zone": func(v json.RawMessage) error {
			err := object(map[string]func(json.RawMessage) error{
				"local": func(v json.RawMessage) error {
					if err := json.Unmarshal(v, &o.zone.local); err != nil || o.zone.local == "" {
						return fmt.Errorf("%.40s, want the name of the caller's zone", v)
					}
					return nil
				},
				"overload": number(&o.zone.overload, above(1), 1000),
			})(v)
			if err == nil && o.zone.local == "" {
				err = errors.New("local: missing, want the name of the caller's zone")
			}
			return err
		},
	}
}

func object(parsers map[string]func(json.RawMessage) error) func(json.RawMessage) error {
	return func(v json.RawMessage) error { return parseObject(v, parsers) }
}

func whole(to *int64, least, most int64) func(json.RawMessage) error {
	return func(v json.RawMessage) error {
		var n int64
		if err := json.Unmarshal(v, &n); err != nil || n < least || n > most {
			return fmt.Errorf("%.40s, want a whole number in [%d, %d]", v, least, most)
		}
		*to = n
		return nil
	}
}

// above makes an open bound of a closed one: the least number that is more.
func above(x float64) float64 { return math.Nextafter(x, math.Inf(1)) }

func number(to *float64, least, most float64) func(json.RawMessage) error {
	return func(v json.RawMessage) error {
		var x float64
		if err := json.Unmarshal(v, &x); err != nil || x < least || x > most {
			bracket, from := "[", least
			if below := math.Nextafter(least, math.Inf(-1)); below == math.Trunc(below) {
				bracket, from = "(", below
			}
			return fmt.Errorf("%.40s, want a number in %s%v, %v]", v, bracket, from, most)
		}
		*to = x
		return nil
	}
}

func duration(to *time.Duration, least, most time.Duration) func(json.RawMessage) error {
	return func(v json.RawMessage) error {
		d, err := parseDuration(v)
		if err != nil {
			return err
		}
		if d < least || d > most {
			return fmt.Errorf("%v, want [%v, %v]", d, least, most)
		}
		*to = d
		return nil
	}
}

// slowStart is for an endpoint that comes to those that serve already, or comes back to
// them from an ejection or a failed connection: its caches are cold. Its weight is
//
//	max(0.1, (age / window) ^ (1 / aggression))
//
// of what it will be (Envoy's,
// https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/load_balancing/slow_start).
type slowStart struct {
	// window, [0s, 1h], is how long it takes. 0s: there is none. Default 10s.
	window time.Duration
	// aggression, (0, 100], bends the ramp: above 1 it rises soon, below 1 late. Default 1.
	aggression float64
}

// leastShare is where the ramp begins: with none an endpoint would never be measured.
const leastShare = 0.1

// share returns the part of its weight that an endpoint has whose slow start began at
// ramp; -1 for none.
func (s slowStart) share(ramp, now time.Duration) float64 {
	age := max(0, now-ramp) // a sweep may have read the clock before the ramp began
	if ramp < 0 || age >= s.window {
		return 1
	}
	return max(leastShare, math.Pow(age.Seconds()/s.window.Seconds(), 1/s.aggression))
}
