package scenario

import (
	"fmt"
	"math"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/bobtail-rpc/bobtail/internal/strictjson"
)

// Decode reads a scenario. It reports every fault, each with its JSON path;
// unknown and repeated keys are faults, for a misspelt scenario measures
// something else than its author thinks.
func Decode(doc []byte) (*Scenario, error) {
	var s *Scenario
	if err := strictjson.Read(doc, "scenario", func(o *strictjson.Object) { s = reader{o}.scenario() }); err != nil {
		return nil, err
	}
	return s, nil
}

// reader reads one object of a scenario.
type reader struct{ *strictjson.Object }

func object(v strictjson.Value) (reader, bool) {
	o, ok := v.Object()
	return reader{o}, ok
}

// need is the default of a value that has none.
const need = -1

// number reads a number in [lo, hi]. Absent: def, or a fault if def is need.
func (r reader) number(name string, lo, hi, def float64) float64 {
	v := r.Key(name)
	if r.Has(name) {
		return float(v, lo, hi)
	}
	if def == need {
		r.Need(name)
	}
	return def
}

func float(v strictjson.Value, lo, hi float64) float64 {
	f, ok := v.Number(fmt.Sprintf("%v to %v", lo, hi), func(f float64) bool { return f >= lo && f <= hi })
	if !ok {
		return lo
	}
	return f
}

// whole reads an integer in [lo, hi].
func (r reader) whole(name string, lo, hi, def float64) int {
	return integer(r.Key(name), r.number(name, lo, hi, def))
}

func integer(v strictjson.Value, f float64) int {
	if f != math.Trunc(f) {
		v.Fault("%v, want a whole number", f)
	}
	return int(f)
}

// duration reads a duration in [lo, hi]. Absent: def, or a fault if def is need.
func (r reader) duration(name string, lo, hi, def time.Duration) Duration {
	v := r.Key(name)
	if !r.Has(name) {
		if def == need {
			r.Need(name)
		}
		return Duration(def)
	}
	want := fmt.Sprintf("a duration from %v to %v", lo, hi)
	text, ok := v.Text(want)
	if !ok {
		return Duration(lo)
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < lo || d > hi {
		v.Fault("%q, want %s", text, want)
		return Duration(lo)
	}
	return Duration(d)
}

// indexes reads a list of backends, counted from 0.
func (r reader) indexes(name string, backends int) (out []int) {
	for _, v := range r.Key(name).List() {
		out = append(out, integer(v, float(v, 0, float64(backends-1))))
	}
	return out
}

// code reads the name of a status code of a failure. Absent: def.
func (r reader) code(name string, def Code) Code {
	const want = `the name of a failure, such as "UNAVAILABLE"`
	v := r.Key(name)
	text, ok := v.Text(want)
	if !ok {
		return def
	}
	c, ok := code.Code_value[text]
	if !ok || c == int32(code.Code_OK) {
		v.Fault("%q, want %s", text, want)
		return def
	}
	return Code(c)
}

func (r reader) text(name string) string {
	s, _ := r.Key(name).Text("a string")
	return s
}

// boolean is false where it is absent.
func (r reader) boolean(name string) bool {
	b, _ := r.Key(name).Bool()
	return b
}
