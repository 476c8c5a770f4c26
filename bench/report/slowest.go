package report

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"time"
)

// MaxSlowest bounds how many requests of a policy a report names.
const MaxSlowest = 5

// Traced is a request whose trace a receiver has.
type Traced struct {
	// Ms is how long it took, from its intended start, whether it succeeded or not.
	Ms float64 `json:"ms"`
	// TraceID is 32 hexadecimal digits.
	TraceID string `json:"trace_id"`
	// Request is its number. The same one stands for the same arrival and the same service
	// times under every policy.
	Request uint64 `json:"request"`
	// T is when it was meant to start, in seconds of the scenario's time.
	T float64 `json:"t_s"`
	// Error is the status of one that failed, such as DEADLINE_EXCEEDED.
	Error string `json:"error,omitempty"`
}

// Slowest keeps the MaxSlowest slowest of the requests that it is given, in any order: of
// two that took as long, that which was meant to start first. Its zero value is ready. It is
// not safe for concurrent use.
type Slowest struct {
	list []Traced // the slowest first
}

// Add takes a request.
func (s *Slowest) Add(t Traced) {
	at, _ := slices.BinarySearchFunc(s.list, t, slower)
	if at == MaxSlowest {
		return
	}
	s.list = slices.Insert(s.list, at, t)
	s.list = s.list[:min(len(s.list), MaxSlowest)]
}

// List returns what is kept, the slowest first.
func (s *Slowest) List() []Traced { return slices.Clone(s.list) }

// slower orders requests, the slowest first.
func slower(a, b Traced) int {
	return cmp.Or(cmp.Compare(b.Ms, a.Ms), cmp.Compare(a.Request, b.Request))
}

// traces lists the slowest requests that were traced.
func (r *Report) traces(out *bytes.Buffer, runs []Run) {
	rows := [][]string{{"policy", "trace", "ms", "request", "at s", "error"}}
	for _, run := range runs {
		for _, t := range run.Slowest {
			rows = append(rows, []string{run.Policy, t.TraceID, millisText(t.Ms), strconv.FormatUint(t.Request, 10), fixed(3)(t.T), cmp.Or(t.Error, "-")})
		}
	}
	what := "each one"
	if r.TraceRatio < 1 {
		what = number(100*r.TraceRatio) + "% of all"
	}
	fmt.Fprintf(out, "\nslowest of the requests that were traced, %s\n", what)
	if len(rows) == 1 {
		out.WriteString("none has reached the receiver\n")
		return
	}
	columns(out, rows, 2)
}

// Millis is d as a report has it.
func Millis(d time.Duration) float64 { return ms(d) }
