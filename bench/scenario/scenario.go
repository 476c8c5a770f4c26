// Package scenario says what a benchmark runs against: how many backends, how
// long each call takes there and when they stall, how many calls arrive.
//
// A scenario is data: a JSON document, embedded or a file of the user's. Its
// service times and its faults are pure functions of seed, call, attempt, backend
// and moment ([Scenario.Service], [Scenario.Fault]), so every policy faces the same
// draws, and so do a real server and a test in virtual time.
package scenario

import (
	"embed"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"
)

// Scenario is one setting. Decode one with [Decode], or look an embedded one up
// with [Named]; both have checked every bound named here.
type Scenario struct {
	Name        string `json:"name"`
	Description string `json:"description"`
	// Backends is the number of servers, 1 to 1,000.
	Backends int `json:"backends"`
	// Fanout is the number of leaf calls that one request makes at once; the
	// request takes as long as its slowest leaf. 1 to 1,000, default 1.
	Fanout int `json:"fanout"`
	// Rate is requests per second (not leaf calls), up to 1,000,000.
	Rate float64 `json:"rate"`
	// Arrivals is "poisson" (default: independent users) or "uniform".
	Arrivals string `json:"arrivals"`
	// Requests is how many each policy is measured with.
	Requests int `json:"requests"`
	// Timeout ends a request, 1ms to 1h, default 10s.
	Timeout Duration `json:"timeout"`
	// Policies are compared when the command line names none.
	Policies []string `json:"policies,omitempty"`
	// SideBySide runs all policies at the same time, each against backends of its
	// own, over the same arrivals and faults. For what lasts longer than a turn: a
	// queue that one policy filled, a breaker that opened, would be the next
	// policy's. Otherwise they take turns against the same backends, in short
	// blocks, which compares latencies more finely.
	SideBySide bool `json:"sideBySide,omitempty"`

	// ServiceTime is a mixture: each attempt draws one component.
	ServiceTime []Component `json:"serviceTime"`
	// SameWork says that the work is the call's: all its attempts take as long as the first,
	// and a copy elsewhere saves nothing but the wait. Absent: each attempt draws anew.
	SameWork bool `json:"sameWork,omitempty"`
	// Stragglers are attempts that take longer by a fixed time, at any backend.
	Stragglers *Stragglers `json:"stragglers,omitempty"`
	// Slow replicas take Factor times as long over everything, stragglers too.
	Slow []Slow `json:"slow,omitempty"`
	// Stalls stop a backend altogether for a while, at random moments.
	Stalls *Stalls `json:"stalls,omitempty"`

	// Workers is how many calls a backend serves at once, 1 to 1,000; the others
	// wait in the order in which they came. Absent: no limit. It wants SideBySide.
	Workers int `json:"workers,omitempty"`
	// ServeAbandoned makes a backend do the work of a call whose caller has left all
	// the same, as a server does that never looks at its context: the queue keeps
	// its backlog. It wants Workers. Otherwise such a call leaves the queue, or its
	// worker, at once.
	ServeAbandoned bool `json:"serveAbandoned,omitempty"`
	// ServerTimeout, 1ms to 1h, is the patience of a proxy before the backend: a call
	// that has no answer by then is answered UNAVAILABLE, while its work goes on.
	// With Workers it wants ServeAbandoned. Absent: none.
	ServerTimeout Duration `json:"serverTimeout,omitempty"`
	// Loads are what a sweep offers, in multiples of [Scenario.Capacity], 0.01 to 100,
	// ascending. Absent: 0.5, 1, 2, 4, 6, 8, 10. They want Workers. A comparison ignores
	// them: it offers Rate.
	Loads []float64 `json:"loads,omitempty"`
	// Criticality gives each request a class: of the classes named, each has the share
	// of its weight in the sum of all. Absent: no request tells one.
	Criticality map[string]float64 `json:"criticality,omitempty"`
	// Keys give each leaf call a key. Absent: none has one.
	Keys *Keys `json:"keys,omitempty"`
	// Faults are what goes wrong at known moments.
	Faults []Fault `json:"faults,omitempty"`
}

// Component is one part of a mixture: Shift plus a draw from one distribution.
type Component struct {
	// Weight is relative to the sum of all weights; default 1.
	Weight      float64      `json:"weight"`
	Shift       Duration     `json:"shift,omitempty"`
	Lognormal   *Lognormal   `json:"lognormal,omitempty"`
	Exponential *Exponential `json:"exponential,omitempty"`
	Constant    *Constant    `json:"constant,omitempty"`
}

// Lognormal is Median x e^(Sigma x Z), Z standard normal.
type Lognormal struct {
	Median Duration `json:"median"`
	Sigma  float64  `json:"sigma"`
}

// Exponential is memoryless, of the given Mean.
type Exponential struct {
	Mean Duration `json:"mean"`
}

// Constant is always Value.
type Constant struct {
	Value Duration `json:"value"`
}

// Stragglers: with Probability an attempt takes Add longer.
type Stragglers struct {
	Probability float64  `json:"probability"`
	Add         Duration `json:"add"`
}

// Slow makes one backend, counted from 0, take Factor times as long.
type Slow struct {
	Backend int     `json:"backend"`
	Factor  float64 `json:"factor"`
}

// Stalls: in every MeanInterval each of Backends (all, if none is named) stops
// once, at a random moment, for Min to Max, which is at most half of it; what the
// backend was working on waits.
type Stalls struct {
	MeanInterval Duration `json:"meanInterval"`
	Min          Duration `json:"min"`
	Max          Duration `json:"max"`
	Backends     []int    `json:"backends,omitempty"`
}

// Duration is written as Go writes it: "2ms", "1.5s".
type Duration time.Duration

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

func (d Duration) String() string { return time.Duration(d).String() }

//go:embed scenarios/*.json
var embedded embed.FS

// Names lists the embedded scenarios, the default first.
func Names() []string {
	files, err := embedded.ReadDir("scenarios")
	if err != nil {
		panic(err) // embedded: cannot fail
	}
	names := []string{Default}
	for _, f := range files {
		if name := strings.TrimSuffix(f.Name(), ".json"); name != Default {
			names = append(names, name)
		}
	}
	return names
}

// Default is the scenario of `go run ./bench` with nothing else.
const Default = "stragglers"

// Named returns an embedded scenario.
func Named(name string) (*Scenario, error) {
	if !slices.Contains(Names(), name) {
		return nil, fmt.Errorf("scenario: no %q, want one of %s, or a file *.json", name, strings.Join(Names(), ", "))
	}
	doc, err := embedded.ReadFile(path.Join("scenarios", name+".json"))
	if err != nil {
		return nil, err
	}
	return Decode(doc)
}
