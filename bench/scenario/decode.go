package scenario

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
)

// Decode reads a scenario. It reports every fault, each with its JSON path;
// unknown and repeated keys are faults, for a misspelt scenario measures
// something else than its author thinks.
func Decode(doc []byte) (*Scenario, error) {
	dec := json.NewDecoder(bytes.NewReader(doc))
	dec.UseNumber()
	r := &reader{}
	tree, err := r.tree(dec, "$", 0)
	if err == nil {
		if _, more := dec.Token(); more != io.EOF {
			err = errors.New("something follows the document")
		}
	}
	if err != nil {
		return nil, fmt.Errorf("scenario: not JSON: %w", err)
	}
	s := r.scenario(cursor{r, "$", tree})
	if len(r.faults) > 0 {
		return nil, fmt.Errorf("scenario: %w", errors.Join(r.faults...))
	}
	return s, nil
}

// reader collects faults.
type reader struct{ faults []error }

func (r *reader) fault(path, format string, args ...any) {
	r.faults = append(r.faults, fmt.Errorf("%s: %s", path, fmt.Sprintf(format, args...)))
}

// tree reads one JSON value. encoding/json would let the last of two equal keys win.
func (r *reader) tree(dec *json.Decoder, path string, depth int) (any, error) {
	const maxDepth = 20 // a scenario needs 4
	if depth > maxDepth {
		return nil, fmt.Errorf("%s: nested more than %d deep", path, maxDepth)
	}
	tok, err := dec.Token()
	if err != nil {
		return nil, err
	}
	switch tok {
	case json.Delim('{'):
		obj := map[string]any{}
		for dec.More() {
			key, err := dec.Token()
			if err != nil {
				return nil, err
			}
			k := key.(string) // the decoder lets nothing else pass
			if _, twice := obj[k]; twice {
				r.fault(path+"."+k, "given twice")
			}
			if obj[k], err = r.tree(dec, path+"."+k, depth+1); err != nil {
				return nil, err
			}
		}
		_, err := dec.Token()
		return obj, err
	case json.Delim('['):
		arr := []any{}
		for dec.More() {
			v, err := r.tree(dec, fmt.Sprintf("%s[%d]", path, len(arr)), depth+1)
			if err != nil {
				return nil, err
			}
			arr = append(arr, v)
		}
		_, err := dec.Token()
		return arr, err
	}
	return tok, nil
}

// cursor is one value of the document and where it stands.
type cursor struct {
	r    *reader
	path string
	v    any
}

// object says whether c is an object with no key but these.
func (c cursor) object(keys ...string) bool {
	obj, ok := c.v.(map[string]any)
	if !ok {
		c.r.fault(c.path, "%s, want an object", kind(c.v))
		return false
	}
	for k := range obj {
		if !slices.Contains(keys, k) {
			c.r.fault(c.path+"."+k, "unknown key, want one of %s", strings.Join(keys, ", "))
		}
	}
	return true
}

// key returns a member; ok is false where it is absent.
func (c cursor) key(name string) (member cursor, ok bool) {
	obj, _ := c.v.(map[string]any)
	v, ok := obj[name]
	return cursor{c.r, c.path + "." + name, v}, ok
}

// items returns the elements of the array under name.
func (c cursor) items(name string) []cursor {
	k, ok := c.key(name)
	if !ok {
		return nil
	}
	arr, ok := k.v.([]any)
	if !ok {
		c.r.fault(k.path, "%s, want an array", kind(k.v))
		return nil
	}
	var out []cursor
	for i, v := range arr {
		out = append(out, cursor{c.r, fmt.Sprintf("%s[%d]", k.path, i), v})
	}
	return out
}

// need is the default of a value that has none.
const need = -1

// number reads a number in [lo, hi]. Absent: def, or a fault if def is need.
func (c cursor) number(name string, lo, hi, def float64) float64 {
	k, ok := c.key(name)
	if !ok {
		if def == need {
			c.r.fault(k.path, "missing")
		}
		return def
	}
	return k.float(lo, hi)
}

func (c cursor) float(lo, hi float64) float64 {
	n, ok := c.v.(json.Number)
	if !ok {
		c.r.fault(c.path, "%s, want a number", kind(c.v))
		return lo
	}
	f, err := n.Float64()
	if err != nil || !(f >= lo && f <= hi) {
		c.r.fault(c.path, "%s, want %v to %v", n, lo, hi)
		return lo
	}
	return f
}

// whole reads an integer in [lo, hi].
func (c cursor) whole(name string, lo, hi, def float64) int {
	f := c.number(name, lo, hi, def)
	if f != math.Trunc(f) {
		c.r.fault(c.path+"."+name, "%v, want a whole number", f)
	}
	return int(f)
}

// duration reads a duration in [lo, hi]. Absent: def, or a fault if def is need.
func (c cursor) duration(name string, lo, hi, def time.Duration) Duration {
	k, ok := c.key(name)
	if !ok {
		if def == need {
			c.r.fault(k.path, "missing")
		}
		return Duration(def)
	}
	text, ok := k.v.(string)
	if !ok {
		c.r.fault(k.path, "%s, want a duration such as \"2ms\"", kind(k.v))
		return Duration(lo)
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < lo || d > hi {
		c.r.fault(k.path, "%q, want a duration from %v to %v", text, lo, hi)
		return Duration(lo)
	}
	return Duration(d)
}

// span is an optional duration of at least lo; 0 says that it is absent.
func (c cursor) span(name string, lo time.Duration) Duration {
	if _, ok := c.key(name); !ok {
		return 0
	}
	return c.duration(name, lo, maxDuration, need)
}

// indexes reads a list of backends, counted from 0.
func (c cursor) indexes(name string, backends int) (out []int) {
	for _, k := range c.items(name) {
		f := k.float(0, float64(backends-1))
		if f != math.Trunc(f) {
			c.r.fault(k.path, "%v, want a whole number", f)
		}
		out = append(out, int(f))
	}
	return out
}

// boolean is false where it is absent.
func (c cursor) boolean(name string) bool {
	k, ok := c.key(name)
	if !ok {
		return false
	}
	b, ok := k.v.(bool)
	if !ok {
		c.r.fault(k.path, "%s, want true or false", kind(k.v))
	}
	return b
}

// code reads the name of a status code of a failure. Absent: def.
func (c cursor) code(name string, def Code) Code {
	k, ok := c.key(name)
	if !ok {
		return def
	}
	text := k.string()
	v, ok := code.Code_value[text]
	if !ok || v == int32(code.Code_OK) {
		c.r.fault(k.path, "%q, want the name of a failure, such as \"UNAVAILABLE\"", text)
		return def
	}
	return Code(v)
}

func (c cursor) text(name string) string {
	k, ok := c.key(name)
	if !ok {
		return ""
	}
	return k.string()
}

func (c cursor) string() string {
	s, ok := c.v.(string)
	if !ok {
		c.r.fault(c.path, "%s, want a string", kind(c.v))
	}
	return s
}

func kind(v any) string {
	switch v.(type) {
	case nil:
		return "null"
	case bool:
		return "a boolean"
	case json.Number:
		return "a number"
	case string:
		return "a string"
	case []any:
		return "an array"
	}
	return "an object"
}
