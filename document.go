package bobtail

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
	"time"

	"google.golang.org/grpc/codes"
)

// ErrNotSupported is what a fault of a policy document wraps when its key is one
// of the design's that this version does not build. At present there is none.
var ErrNotSupported = errors.New("not supported yet")

// maxDepth bounds how deeply a document may nest: ours need 6.
const maxDepth = 64

// node is a value of a JSON document: nil, bool, json.Number, string, []node or
// *object.
type node any

// object is a JSON object in the document's order.
type object struct {
	keys   []string
	fields map[string]node
}

// document reads a policy document and collects all of its faults, each with its
// JSON path. Nothing is repaired in silence.
type document struct {
	what   string // for the errors: "policy"
	faults []error
}

func (d *document) fault(path, format string, args ...any) {
	if path == "" {
		path = "document"
	}
	// A path holds keys of the user's, which must not be taken for a format.
	d.faults = append(d.faults, fmt.Errorf("bobtail: %s: %s: %w", d.what, path, fmt.Errorf(format, args...)))
}

// parse returns the root object, nil if the text is no JSON object.
func (d *document) parse(text []byte) *object {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	n, err := d.value(dec, "", 0)
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
		d.fault("", "not valid JSON at byte %d: %w", dec.InputOffset(), err)
		return nil
	}
	o, ok := n.(*object)
	if !ok {
		d.fault("", "%s, want an object", kind(n))
		return nil
	}
	return o
}

func (d *document) value(dec *json.Decoder, path string, depth int) (node, error) {
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
			n, err := d.value(dec, fmt.Sprintf("%s[%d]", path, len(list)), depth+1)
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
			n, err := d.value(dec, join(path, key), depth+1)
			if err != nil {
				return nil, err
			}
			if _, dup := o.fields[key]; dup {
				d.fault(join(path, key), "given twice")
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

func join(path, key string) string {
	if path == "" || key == "" {
		return path + key
	}
	return path + "." + key
}

// kind names a JSON value in an error.
func kind(n node) string {
	switch n := n.(type) {
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

// reader reads the keys of one object. Its methods return ok false where the key
// is absent and where its value is a fault, which is then recorded.
type reader struct {
	d    *document
	path string
	o    *object
	read []string // keys asked for, in the order of asking
}

func (d *document) reader(path string, n node) *reader {
	o, ok := n.(*object)
	if !ok {
		d.fault(path, "%s, want an object", kind(n))
		o = &object{}
	}
	return &reader{d: d, path: path, o: o}
}

func (r *reader) fault(key, format string, args ...any) {
	r.d.fault(join(r.path, key), format, args...)
}

// get returns the value of a key. null is a fault: it is neither given nor absent.
func (r *reader) get(key string) (node, bool) {
	r.read = append(r.read, key)
	n, ok := r.o.fields[key]
	if ok && n == nil {
		r.fault(key, "null, want a value or no such key")
		return nil, false
	}
	return n, ok
}

// has reports whether the key stands in the document, without reading it.
func (r *reader) has(key string) bool {
	_, ok := r.o.fields[key]
	return ok
}

func (r *reader) text(key string) (string, bool) {
	n, ok := r.get(key)
	if !ok {
		return "", false
	}
	s, ok := n.(string)
	if !ok {
		r.fault(key, "%s, want a string", kind(n))
	}
	return s, ok
}

func (r *reader) boolean(key string) (v, ok bool) {
	n, ok := r.get(key)
	if !ok {
		return false, false
	}
	v, ok = n.(bool)
	if !ok {
		r.fault(key, "%s, want true or false", kind(n))
	}
	return v, ok
}

// number reads a number; proto JSON allows it to be written as a string.
func (r *reader) number(key, want string, in func(float64) bool) (float64, bool) {
	n, ok := r.get(key)
	if !ok {
		return 0, false
	}
	var s string
	switch n := n.(type) {
	case json.Number:
		s = n.String()
	case string:
		s = n
	default:
		r.fault(key, "%s, want %s", kind(n), want)
		return 0, false
	}
	v, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(v) || math.IsInf(v, 0) || !in(v) {
		r.fault(key, "%s, want %s", s, want)
		return 0, false
	}
	return v, true
}

// maxSeconds is the longest duration of proto JSON that fits a time.Duration.
const maxSeconds = math.MaxInt64 / int64(time.Second)

// duration reads a duration of proto JSON: decimal seconds with up to nine
// places and an "s", as in "0.250s".
func (r *reader) duration(key, want string, in func(time.Duration) bool) (time.Duration, bool) {
	n, ok := r.get(key)
	if !ok {
		return 0, false
	}
	s, ok := n.(string)
	if !ok {
		r.fault(key, "%s, want a duration in seconds such as %q", kind(n), "0.250s")
		return 0, false
	}
	d, err := parseDuration(s)
	if err != nil {
		r.fault(key, "%q, %w", s, err)
		return 0, false
	}
	if !in(d) {
		r.fault(key, "%q, want %s", s, want)
		return 0, false
	}
	return d, true
}

func parseDuration(s string) (time.Duration, error) {
	body, ok := strings.CutSuffix(s, "s")
	neg := strings.HasPrefix(body, "-")
	body = strings.TrimPrefix(body, "-")
	whole, frac, dotted := strings.Cut(body, ".")
	digits := func(s string) bool { return strings.Trim(s, "0123456789") == "" }
	if !ok || !digits(whole) || !digits(frac) || whole+frac == "" || dotted && frac == "" || len(frac) > 9 {
		return 0, fmt.Errorf("want a duration in seconds such as %q", "0.250s")
	}
	var sec int64
	if whole != "" {
		var err error
		if sec, err = strconv.ParseInt(whole, 10, 64); err != nil || sec >= maxSeconds {
			return 0, fmt.Errorf("want at most %ds", maxSeconds-1)
		}
	}
	nano, err := strconv.ParseInt((frac + "000000000")[:9], 10, 64)
	if err != nil {
		return 0, err // cannot be: nine digits
	}
	d := time.Duration(sec)*time.Second + time.Duration(nano)
	if neg {
		d = -d
	}
	return d, nil
}

func atLeast0(d time.Duration) bool { return d >= 0 }
func above0(d time.Duration) bool   { return d > 0 }

func (r *reader) list(key string) ([]node, bool) {
	n, ok := r.get(key)
	if !ok {
		return nil, false
	}
	l, ok := n.([]node)
	if !ok {
		r.fault(key, "%s, want a list", kind(n))
	}
	return l, ok
}

// object returns a reader of a key's object, nil if it is absent.
func (r *reader) object(key string) *reader {
	n, ok := r.get(key)
	if !ok {
		return nil
	}
	return r.d.reader(join(r.path, key), n)
}

// codes reads a list of status codes, by name in any case or by number (A6). OK
// is a fault in every list of ours.
func (r *reader) codes(key string) []codes.Code {
	l, _ := r.list(key)
	var out []codes.Code
	for i, n := range l {
		at := fmt.Sprintf("%s[%d]", key, i)
		var c codes.Code
		switch n := n.(type) {
		case string:
			if err := c.UnmarshalJSON([]byte(strconv.Quote(strings.ToUpper(n)))); err != nil {
				r.fault(at, "%q, want a gRPC status code", n)
				continue
			}
		case json.Number:
			// grpc-java reads every number as a double, and so accepts 14.0.
			v, err := n.Float64()
			if err != nil || v != math.Trunc(v) || v < 0 || v > float64(codes.Unauthenticated) {
				r.fault(at, "%s, want a gRPC status code, 1 to 16", n)
				continue
			}
			c = codes.Code(v)
		default:
			r.fault(at, "%s, want a gRPC status code", kind(n))
			continue
		}
		if c == codes.OK {
			r.fault(at, "OK, want a code of a failure")
			continue
		}
		out = append(out, c)
	}
	return out
}

// pass returns the JSON of a key that is handed to grpc as it is.
func (r *reader) pass(key string) (json.RawMessage, bool) {
	n, ok := r.get(key)
	if !ok {
		return nil, false
	}
	return encode(n), true
}

// end records the keys that nobody asked for.
func (r *reader) end() {
	for _, k := range r.o.keys {
		if slices.Contains(r.read, k) {
			continue
		}
		if near := nearest(k, r.read); near != "" {
			r.fault(k, "unknown key, did you mean %q?", near)
		} else {
			r.fault(k, "unknown key, want one of %s", strings.Join(r.read, ", "))
		}
	}
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

// edits is the Levenshtein distance.
func edits(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64 // no key is that long: a hostile one must not cost a square
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// encode writes a node back as JSON, keys in the document's order.
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
