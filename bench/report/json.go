package report

import (
	"encoding/json"
	"io"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

// schema is the version of the JSON document. Keys may be added within one.
const schema = 1

type document struct {
	Schema      int                `json:"schema"`
	Kind        string             `json:"kind"`
	Scenario    *scenario.Scenario `json:"scenario"`
	Seed        uint64             `json:"seed"`
	BlockMs     float64            `json:"block_ms"`
	Interrupted bool               `json:"interrupted"`
	Runs        []Run              `json:"runs"`
	Generator   generator          `json:"generator"`
	TraceRatio  float64            `json:"trace_ratio,omitempty"`
}

type generator struct {
	LagP99Ms  float64  `json:"lag_p99_ms"`
	CPU       float64  `json:"cpu"`
	Overflow  int64    `json:"overflow"`
	Abandoned int64    `json:"abandoned"`
	Saturated bool     `json:"saturated"`
	Why       []string `json:"why,omitempty"`
}

// JSON writes the report as one document. What the samples cannot give is null.
func (r *Report) JSON(w io.Writer) error {
	g := r.Generator
	runs := r.Runs()
	why := g.saturated(runs)
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(document{
		Schema:      schema,
		Kind:        Kind,
		Scenario:    r.Scenario,
		Seed:        r.Seed,
		BlockMs:     ms(r.Block),
		Interrupted: r.Interrupted,
		Runs:        runs,
		TraceRatio:  r.TraceRatio,
		Generator: generator{
			LagP99Ms: ms(g.LagP99), CPU: g.CPU, Overflow: g.Overflow, Abandoned: g.Abandoned,
			Saturated: len(why) > 0, Why: why,
		},
	})
}
