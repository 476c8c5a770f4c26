// Package strictjson reads JSON that people write: policies, configurations, scenarios.
// All of a document's faults are found at once, each with its path, and nothing is
// repaired in silence: a key that nobody asked for, a key given twice and a null are
// faults, for what a misspelt document does is not what its author thinks.
//
// [Read] hands out the document as an [Object], whose keys are asked for one by one and
// lead to [Value]s. The methods of both record faults instead of returning errors, so that
// the reading goes on after the first.
package strictjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
)

// maxDepth bounds how deeply a document may nest: ours need 6.
const maxDepth = 64

// Read calls read with the object that text is, unless it is none, and returns all faults,
// joined, nil if there are none: those of the text, then what read recorded, then the
// unknown keys of objects that read has not ended itself. Each is written "prefix: path:
// what is wrong", as in
//
//	bobtail: policy: methodConfig[0].timeout: "1", want a duration
//
// where the path of the object itself is "document". After an error, what read has made of
// the object is not to be used.
func Read(text []byte, prefix string, read func(*Object)) error {
	d := &document{prefix: prefix}
	if o := d.parse(text); o != nil {
		read(o)
		for _, o := range d.objects {
			o.End()
		}
	}
	return errors.Join(d.faults...)
}

type document struct {
	prefix  string
	faults  []error
	objects []*Object // all that are read
}

// place is where a value stands: at a step, ".key" or "[index]", below another place.
type place struct {
	doc  *document
	in   *place // nil for the document itself
	step string
}

func (p *place) key(k string) *place {
	if k != "" {
		k = "." + k
	}
	return &place{p.doc, p, k}
}

func (p *place) item(i int) *place {
	return &place{p.doc, p, "[" + strconv.Itoa(i) + "]"}
}

func (p *place) path() string {
	if p.in == nil {
		return ""
	}
	return p.in.path() + p.step
}

func (p *place) fault(format string, args ...any) {
	path := strings.TrimPrefix(p.path(), ".")
	if path == "" {
		path = "document"
	}
	// A path holds keys of the author's, which must not be taken for a format.
	p.doc.faults = append(p.doc.faults, fmt.Errorf("%s: %s: %w", p.doc.prefix, path, fmt.Errorf(format, args...)))
}

// node is a value without its place: nil, bool, json.Number, string, []node or *object.
type node any

// object is a JSON object in the document's order.
type object struct {
	keys   []string
	fields map[string]node
}

// parse returns the root object, nil if the text is no JSON object.
func (d *document) parse(text []byte) *Object {
	root := &place{doc: d}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	n, err := parse(dec, root, 0)
	if err == nil {
		if _, err = dec.Token(); err == io.EOF {
			err = nil
		} else if err == nil {
			err = errors.New("more text after the end of the document")
		}
	}
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		root.fault("not valid JSON at byte %d: %w", dec.InputOffset(), err)
		return nil
	}
	if o, ok := (Value{root, n, true}).Object(); ok {
		return o
	}
	return nil
}

// parse reads the next value. encoding/json would let the last of two equal keys win.
func parse(dec *json.Decoder, at *place, depth int) (node, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("nested more than %d deep", maxDepth)
	}
	t, err := dec.Token()
	if err != nil {
		return nil, err
	}
	switch t {
	case json.Delim('['):
		list := []node{}
		for dec.More() {
			n, err := parse(dec, at.item(len(list)), depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, n)
		}
		_, err := dec.Token()
		return list, err
	case json.Delim('{'):
		o := &object{fields: map[string]node{}}
		for dec.More() {
			t, err := dec.Token()
			if err != nil {
				return nil, err
			}
			key := t.(string) // the decoder lets nothing else stand here
			n, err := parse(dec, at.key(key), depth+1)
			if err != nil {
				return nil, err
			}
			if _, dup := o.fields[key]; dup {
				at.key(key).fault("given twice")
				continue
			}
			o.keys = append(o.keys, key)
			o.fields[key] = n
		}
		_, err := dec.Token()
		return o, err
	}
	return t, nil
}

// An Object reads one object of a document.
type Object struct {
	at    *place
	o     *object
	asked []string // in the order of asking
	ended bool
}

// Key returns the value of a key. It is absent if the document has no such key, and if it
// is null there, which is a fault: null is neither given nor absent.
func (o *Object) Key(key string) Value {
	n, ok := o.o.fields[key]
	v := Value{o.at.key(key), n, n != nil}
	if !slices.Contains(o.asked, key) {
		o.asked = append(o.asked, key)
		if ok && n == nil {
			v.Fault("null, want a value or no such key")
		}
	}
	return v
}

// Has reports whether the document has a key, null or not. It does not ask for it.
func (o *Object) Has(key string) bool {
	_, ok := o.o.fields[key]
	return ok
}

// Need records keys that the document does not have.
func (o *Object) Need(keys ...string) {
	for _, k := range keys {
		if !o.Has(k) {
			o.Fault(k, "missing")
		}
	}
}

// Fault records what is wrong with a key, or with the object itself if key is "".
func (o *Object) Fault(key, format string, args ...any) {
	o.at.key(key).fault(format, args...)
}

// Faults returns how many faults the document has so far, elsewhere too.
func (o *Object) Faults() int { return len(o.at.doc.faults) }

// End records the keys that [Object.Key] was not asked for, each with the one that was
// probably meant, if there is one, else with all that can be. [Read] does so at its end: a
// caller does who wants to know of them, by [Object.Faults], before.
func (o *Object) End() {
	if o.ended {
		return
	}
	o.ended = true
	for _, k := range o.o.keys {
		if slices.Contains(o.asked, k) {
			continue
		}
		if near := nearest(k, o.asked); near != "" {
			o.Fault(k, "unknown key, did you mean %q?", near)
		} else {
			o.Fault(k, "unknown key, want one of %s", strings.Join(o.asked, ", "))
		}
	}
}

// A Value is one value of a document. Each of its readers returns ok false, or nil, where
// the value is absent and where it is a fault, which is then recorded. The argument want
// tells the author what is wanted there, as in "a string".
type Value struct {
	at    *place
	n     node
	given bool
}

// as returns the value as a T.
func as[T node](v Value, want string) (t T, ok bool) {
	t, ok = v.n.(T)
	if !ok && v.given {
		v.Fault("%s, want %s", v, want)
	}
	return t, ok
}

// Text reads a string.
func (v Value) Text(want string) (string, bool) { return as[string](v, want) }

// Bool reads a truth value.
func (v Value) Bool() (b, ok bool) { return as[bool](v, "true or false") }

// Number reads a finite number for which in holds.
func (v Value) Number(want string, in func(float64) bool) (float64, bool) {
	n, ok := as[json.Number](v, want)
	if !ok {
		return 0, false
	}
	return v.number(n.String(), want, in)
}

// NumberOrText is Number where the number may also be written as a string, as proto JSON
// allows.
func (v Value) NumberOrText(want string, in func(float64) bool) (float64, bool) {
	if s, ok := v.n.(string); ok {
		return v.number(s, want, in)
	}
	return v.Number(want, in)
}

// Integer reads an integer for which in holds, written without a point or an exponent.
func (v Value) Integer(want string, in func(int64) bool) (int64, bool) {
	n, ok := as[json.Number](v, want)
	if !ok {
		return 0, false
	}
	i, err := n.Int64()
	if err != nil || !in(i) {
		v.Fault("%s, want %s", n, want)
		return 0, false
	}
	return i, true
}

func (v Value) number(s, want string, in func(float64) bool) (float64, bool) {
	x, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(x) || math.IsInf(x, 0) || !in(x) {
		v.Fault("%s, want %s", s, want)
		return 0, false
	}
	return x, true
}

// List reads a list. It is not nil where the list is empty.
func (v Value) List() []Value {
	l, ok := as[[]node](v, "a list")
	if !ok {
		return nil
	}
	all := make([]Value, len(l))
	for i, n := range l {
		all[i] = Value{v.at.item(i), n, true}
	}
	return all
}

// Object reads an object, once: nil if it is absent, and one without keys if the value is
// no object.
func (v Value) Object() (o *Object, ok bool) {
	n, ok := as[*object](v, "an object")
	if !v.given {
		return nil, false
	}
	if !ok {
		n = new(object)
	}
	o = &Object{at: v.at, o: n}
	v.at.doc.objects = append(v.at.doc.objects, o)
	return o, ok
}

// Only returns the key and the value, perhaps a null, of an object that has one key only.
// That a value is anything else is no fault.
func (v Value) Only() (key string, only Value, ok bool) {
	o, ok := v.n.(*object)
	if !ok || len(o.keys) != 1 {
		return "", Value{}, false
	}
	key = o.keys[0]
	return key, Value{v.at.key(key), o.fields[key], true}, true
}

// Scalar returns the value as a bool, json.Number or string, nil if it is none of them.
func (v Value) Scalar() any {
	switch v.n.(type) {
	case bool, json.Number, string:
		return v.n
	}
	return nil
}

// Fault records what is wrong with the value.
func (v Value) Fault(format string, args ...any) { v.at.fault(format, args...) }

// String names the value in a fault.
func (v Value) String() string {
	switch n := v.n.(type) {
	case nil:
		return "null"
	case bool:
		return strconv.FormatBool(n)
	case json.Number:
		return "number " + n.String()
	case string:
		return strconv.Quote(n)
	case []node:
		return "a list"
	}
	return "an object"
}

// JSON writes the value, with the keys of objects in the document's order.
func (v Value) JSON() json.RawMessage { return encode(v.n) }

func encode(n node) json.RawMessage {
	var b bytes.Buffer
	switch n := n.(type) {
	case []node:
		b.WriteByte('[')
		for i, e := range n {
			if i > 0 {
				b.WriteByte(',')
			}
			b.Write(encode(e))
		}
		b.WriteByte(']')
	case *object:
		b.WriteByte('{')
		for i, k := range n.keys {
			if i > 0 {
				b.WriteByte(',')
			}
			b.Write(encode(k))
			b.WriteByte(':')
			b.Write(encode(n.fields[k]))
		}
		b.WriteByte('}')
	default:
		text, err := json.Marshal(n)
		if err != nil {
			return json.RawMessage("null") // cannot be: it came out of the decoder
		}
		b.Write(text)
	}
	return b.Bytes()
}

// nearest returns the name that is fewest edits away from s, "" if none is near.
func nearest(s string, names []string) string {
	best, bound := "", max(1, len(s)/3)+1
	for _, n := range names {
		if d := edits(strings.ToLower(s), strings.ToLower(n)); d < bound {
			best, bound = n, d
		}
	}
	return best
}

// edits is how many letters have to be put in, left out, changed, or swapped with the next
// (Damerau, 1964), or more.
func edits(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return max(len(a), len(b)) // no key is that long: a hostile one must not cost a square
	}
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before, last, row = last, row, before
		row[0] = i + 1
		for j := range len(b) {
			cost := last[j]
			if a[i] != b[j] {
				cost++
			}
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				cost = min(cost, before[j-1]+1)
			}
			row[j+1] = min(cost, last[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}
