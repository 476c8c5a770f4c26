package strictjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

func positive(x float64) bool { return x > 0 }

// sample reads an object with a key of each kind, and one more of its kind within it.
func sample(o *Object) {
	o.Key("name").Text("a string")
	o.Key("on").Bool()
	o.Key("rate").Number("more than 0", positive)
	o.Key("share").NumberOrText("more than 0", positive)
	o.Key("count").Integer("[1, 9]", func(n int64) bool { return n >= 1 && n <= 9 })
	for _, v := range o.Key("parts").List() {
		if p, ok := v.Object(); ok {
			sample(p)
			p.Need("name")
		}
	}
	if w, ok := o.Key("within").Object(); ok {
		sample(w)
		w.End()
	}
}

// seeds are documents and the faults that are found in them, without the prefix; FuzzRead
// begins with them.
var seeds = []struct{ name, text, want string }{
	{"nothing", ``, `document: not valid JSON at byte 0: unexpected EOF`},
	{"blank", " \n", `document: not valid JSON at byte 0: unexpected EOF`},
	{"cut off", `{"on": true`, `document: not valid JSON at byte 11: unexpected EOF`},
	{"cut off within", `{"within": {"parts": [`, `document: not valid JSON at byte 22: unexpected EOF`},
	{"cut off after a fault", `{"on": true, "on": true`, "on: given twice\ndocument: not valid JSON at byte 23: unexpected EOF"},
	{"no JSON", `{on: true}`, `document: not valid JSON at byte 1: invalid character 'o'`},
	{"a key that is none", `{1: 2}`, `document: not valid JSON at byte 1: invalid character '1'`},
	{"a comma too many", `{"parts": [{"name": ""},]}`, `document: not valid JSON at byte 24: invalid character ']' looking for beginning of value`},
	{"another document", `{} {}`, `document: not valid JSON at byte 4: more text after the end of the document`},
	{"another value", `{}1`, `document: not valid JSON at byte 3: more text after the end of the document`},
	{"a brace too many", `{}}`, `document: not valid JSON at byte 2: invalid character '}' looking for beginning of value`},
	{"space after the end", "{}\n\t ", ``},
	{"null", `null`, `document: null, want an object`},
	{"a list", `[{}]`, `document: a list, want an object`},
	{"a faulty list", `[{"a": 1, "a": 2}]`, "[0].a: given twice\ndocument: a list, want an object"},
	{"a string", `"a\n"`, `document: "a\n", want an object`},
	{"a number", `1e2`, `document: number 1e2, want an object`},

	{"all is well", `{"name": "", "on": false, "rate": 1e-320, "share": "0.5", "count": 9, "parts": [], "within": {}}`, ``},
	{"no key at all", `{}`, ``},
	{"other kinds", `{"name": 1, "on": "true", "rate": "1", "share": [], "count": {}, "parts": true, "within": "x"}`,
		"name: number 1, want a string\non: \"true\", want true or false\nrate: \"1\", want more than 0\nshare: a list, want more than 0\n" +
			"count: an object, want [1, 9]\nparts: true, want a list\nwithin: \"x\", want an object"},
	{"out of bounds", `{"rate": 0, "share": "-1", "count": 10}`, "rate: 0, want more than 0\nshare: -1, want more than 0\ncount: 10, want [1, 9]"},
	{"no finite number", `{"rate": 1e999, "share": "Inf"}`, "rate: 1e999, want more than 0\nshare: Inf, want more than 0"},
	{"no number", `{"share": "much"}`, `share: much, want more than 0`},
	{"NaN", `{"share": "NaN"}`, `share: NaN, want more than 0`},
	{"a point", `{"count": 2.0}`, `count: 2.0, want [1, 9]`},
	{"an exponent", `{"count": 1e0}`, `count: 1e0, want [1, 9]`},
	{"too large for an int64", `{"count": 9223372036854775808}`, `count: 9223372036854775808, want [1, 9]`},

	{"nulls", `{"name": null, "on": null, "rate": null, "share": null, "count": null, "parts": null, "within": null}`,
		"name: null, want a value or no such key\non: null, want a value or no such key\nrate: null, want a value or no such key\n" +
			"share: null, want a value or no such key\ncount: null, want a value or no such key\nparts: null, want a value or no such key\n" +
			"within: null, want a value or no such key"},
	{"a null in a list", `{"parts": [null, {"name": "b"}]}`, `parts[0]: null, want an object`},
	{"a null that is needed", `{"parts": [{"name": null}]}`, `parts[0].name: null, want a value or no such key`},
	{"what is needed", `{"parts": [{"name": "a"}, {}]}`, `parts[1].name: missing`},

	{"given twice", `{"on": true, "on": true}`, `on: given twice`},
	{"given twice, the second a null", `{"on": true, "on": null}`, `on: given twice`},
	{"given three times", `{"on": true, "on": 1, "on": 2}`, "on: given twice\non: given twice"},
	{"given twice, unknown", `{"zzzzz": 1, "zzzzz": 2}`,
		"zzzzz: given twice\nzzzzz: unknown key, want one of name, on, rate, share, count, parts, within"},
	{"given twice, once escaped", `{"on": true, "\u006fn": true}`, `on: given twice`},
	{"given twice at depth", `{"parts": [{"name": "a"}, {"name": "b", "within": {"parts": [{"name": "c", "rate": 1, "rate": 0}]}}]}`,
		`parts[1].within.parts[0].rate: given twice`},
	{"given twice where nobody reads", `{"name": [[{"x": 1, "x": 2}]]}`, "name[0][0].x: given twice\nname: a list, want a string"},
	{"alike in all but case", `{"on": true, "ON": true}`, `ON: unknown key, did you mean "on"?`},

	{"misspelt", `{"naem": 1, "within": {"conut": 1, "shaer": 1, "Within": 1, "partz": 1}}`,
		"within.conut: unknown key, did you mean \"count\"?\n" +
			"within.shaer: unknown key, did you mean \"share\"?\n" +
			"within.Within: unknown key, did you mean \"within\"?\nwithin.partz: unknown key, did you mean \"parts\"?\n" +
			"naem: unknown key, did you mean \"name\"?"},
	{"misspelt where nobody ends", `{"parts": [{"Name": 1, "name": ""}, {"zzzzz": 1, "name": ""}], "within": {"On": 1}}`,
		"within.On: unknown key, did you mean \"on\"?\nparts[0].Name: unknown key, did you mean \"name\"?\n" +
			"parts[1].zzzzz: unknown key, want one of name, on, rate, share, count, parts, within"},
	{"in the order of the document", `{"within": {"n10": 1, "n9": 1, "n8": 1, "n7": 1, "n6": 1, "n5": 1, "n4": 1, "n3": 1, "n2": 1, "n1": 1}}`,
		order("within.n10", "within.n9", "within.n8", "within.n7", "within.n6", "within.n5", "within.n4", "within.n3", "within.n2", "within.n1")},
	{"an unknown null", `{"colour": null}`, `colour: unknown key, want one of name, on, rate, share, count, parts, within`},
	{"an escaped key", `{"r\u0061tes": 1, "a\"b\\\u000a%d%s": 1}`,
		"rates: unknown key, did you mean \"rate\"?\na\"b\\\n%d%s: unknown key, want one of name, on, rate, share, count, parts, within"},
	{"a key that is no text", "{\"nam\xff\": 1}", "nam\ufffd: unknown key, want one of name, on, rate, share, count, parts, within"},
	{"a key of one half", `{"\ud800": 1, "\udfff": 1}`,
		"\ufffd: given twice\n\ufffd: unknown key, want one of name, on, rate, share, count, parts, within"},
	{"an empty key", `{"within": {"": 1}}`, `within: unknown key, want one of name, on, rate, share, count, parts, within`},
	{"long keys", `{"` + strings.Repeat("n", 64) + `": 1, "` + strings.Repeat("n", 65) + `": 1, "` + strings.Repeat("n", 1000) + `": 1}`,
		strings.Repeat("n", 64) + ": unknown key, want one of name, on, rate, share, count, parts, within\n" +
			strings.Repeat("n", 65) + ": unknown key, want one of name, on, rate, share, count, parts, within\n" +
			strings.Repeat("n", 1000) + ": unknown key, want one of name, on, rate, share, count, parts, within"},
}

// order is what is told of keys that are like none.
func order(paths ...string) string {
	const what = ": unknown key, want one of name, on, rate, share, count, parts, within"
	return strings.Join(paths, what+"\n") + what
}

func TestRead(t *testing.T) {
	for _, tc := range seeds {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			if err := Read([]byte(tc.text), "a test", sample); err != nil {
				for _, fault := range err.(interface{ Unwrap() []error }).Unwrap() {
					what, ok := strings.CutPrefix(fault.Error(), "a test: ")
					if !ok {
						t.Errorf("%v, want it to begin with the prefix", fault)
					}
					got = append(got, what)
				}
			}
			if got := strings.Join(got, "\n"); got != tc.want {
				t.Errorf("%s\n got: %s\nwant: %s", tc.text, got, tc.want)
			}
		})
	}
}

func TestDepth(t *testing.T) {
	nested := func(open, shut string, n int) string {
		return `{"within": ` + strings.Repeat(open, n) + `1` + strings.Repeat(shut, n) + `}`
	}
	// The number is one deeper than the lists, and they one deeper than the document.
	if err := Read([]byte(nested("[", "]", maxDepth-1)), "p", func(o *Object) { o.ended = true }); err != nil {
		t.Error(err)
	}
	for _, tc := range []struct {
		text string
		at   int
	}{
		{nested("[", "]", maxDepth), len(`{"within": `) + maxDepth},
		{nested(`{"a":`, "}", maxDepth), len(`{"within": `) + maxDepth*len(`{"a":`) - 1},
		{nested("[", "", 1e6), len(`{"within": `) + maxDepth},
	} {
		err := Read([]byte(tc.text), "p", func(*Object) { t.Error("it is read") })
		if want := fmt.Sprintf("p: document: not valid JSON at byte %d: nested more than 64 deep", tc.at); err == nil || err.Error() != want {
			t.Errorf("%.40s: %v\nwant %s", tc.text, err, want)
		}
	}
}

// What the readers return, and what they return where there is nothing.
func TestValues(t *testing.T) {
	const text = `{"s": "a\u0062", "b": true, "n": 2.5, "i": -3, "t": "1e3", "l": ["x", null], "o": {"k": null}, "e": {}, "z": null, "none": [], "two": {"a": 1, "b": 2}, "nan": "NaN"}`
	bad := errors.New("bad")
	err := Read([]byte(text), "p", func(o *Object) {
		any64 := func(float64) bool { return true }
		s, ok1 := o.Key("s").Text("")
		b, ok2 := o.Key("b").Bool()
		n, ok3 := o.Key("n").Number("", any64)
		i, ok4 := o.Key("i").Integer("", func(int64) bool { return true })
		x, ok5 := o.Key("t").NumberOrText("", any64)
		y, ok6 := o.Key("n").NumberOrText("", any64)
		if s != "ab" || !b || n != 2.5 || i != -3 || x != 1000 || y != 2.5 || !ok1 || !ok2 || !ok3 || !ok4 || !ok5 || !ok6 {
			t.Error(s, b, n, i, x, y, ok1, ok2, ok3, ok4, ok5, ok6)
		}
		l := o.Key("l").List()
		if len(l) != 2 || l[0].Scalar() != "x" || l[1].Scalar() != nil || l[1].String() != "null" {
			t.Errorf("list %v", l)
		}
		if none := o.Key("none").List(); none == nil || len(none) > 0 {
			t.Errorf("an empty list is %v, nil %t", none, none == nil)
		}
		for key, want := range map[string]any{"s": "ab", "b": true, "n": json.Number("2.5"), "l": nil, "o": nil, "nowhere": nil} {
			if got := o.Key(key).Scalar(); got != want {
				t.Errorf("%s is %v, want %v", key, got, want)
			}
		}
		if k, v, ok := o.Key("o").Only(); k != "k" || v.String() != "null" || !ok {
			t.Error(k, v, ok)
		}
		for _, key := range []string{"e", "s", "l", "two", "nowhere"} {
			if k, _, ok := o.Key(key).Only(); ok {
				t.Errorf("%s has one key, %q", key, k)
			}
		}
		if got := string(o.Key("o").JSON()) + string(o.Key("l").JSON()) + string(o.Key("s").JSON()); got != `{"k":null}["x",null]"ab"` {
			t.Error(got)
		}
		if !o.Has("z") || o.Has("nowhere") {
			t.Error("z is not there, or nowhere is")
		}

		if o.Faults() != 0 {
			t.Errorf("%d faults so far", o.Faults())
		}
		for _, key := range []string{"nowhere", "z"} {
			v := o.Key(key)
			_, ok1 = v.Text("")
			_, ok2 = v.Bool()
			_, ok3 = v.Number("", any64)
			_, ok4 = v.Integer("", nil)
			_, ok5 = v.NumberOrText("", any64)
			w, ok6 := v.Object()
			if ok1 || ok2 || ok3 || ok4 || ok5 || ok6 || w != nil || v.List() != nil {
				t.Errorf("%s has a value", key)
			}
		}
		if o.Faults() != 1 {
			t.Errorf("%d faults, want one: the null, once", o.Faults())
		}
		if x, ok := o.Key("nan").NumberOrText("a number", any64); ok || x != 0 {
			t.Errorf("NaN is the number %v", x)
		}
		o.Key("nowhere").Fault("want %d", 1)
		if w, ok := o.Key("s").Object(); ok || w == nil {
			t.Errorf("a string is the object %v, %t", w, ok)
		} else {
			w.Need("k")
			w.Fault("", "want %w", bad)
		}
	})
	const want = "p: z: null, want a value or no such key\np: nan: NaN, want a number\np: nowhere: want 1\np: s: \"ab\", want an object\np: s.k: missing\np: s: want bad"
	if err == nil || err.Error() != want || !errors.Is(err, bad) {
		t.Errorf("%v\nwant\n%s", err, want)
	}
}

func TestNearest(t *testing.T) {
	names := []string{"maxAttempts", "hedgingDelay", "k", "on", strings.Repeat("x", 70)}
	for s, want := range map[string]string{
		"maxAttempts": "maxAttempts", "maxattempts": "maxAttempts", "maxAttemps": "maxAttempts", "axAtempt": "",
		"maxAtempt": "maxAttempts", "hedgeDelay": "hedgingDelay", "K": "k", "q": "k", "of": "on", "off": "", "colour": "", "": "k",
		strings.Repeat("x", 69): "", strings.Repeat("y", 1000): "",
	} {
		if got := nearest(s, names); got != want {
			t.Errorf("%q is near to %q, want %q", s, got, want)
		}
	}
	for _, tc := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"kitten", "sitting", 3}, {"flaw", "lawn", 2}, {"ab", "ba", 1}, {"form", "from", 1}, {"ca", "abc", 3}, {"same", "same", 0}} {
		if got := edits(tc.a, tc.b); got != tc.want {
			t.Errorf("%q to %q takes %d edits, want %d", tc.a, tc.b, got, tc.want)
		}
	}
}

// walk reads a value by all its readers, and all that is in it.
func walk(v Value) {
	v.Text("")
	v.Bool()
	v.Number("", positive)
	v.NumberOrText("", positive)
	v.Integer("", func(n int64) bool { return n > 0 })
	v.Only()
	for _, e := range v.List() {
		walk(e)
	}
	if o, ok := v.Object(); ok {
		for i, k := range o.o.keys {
			if i%2 == 0 {
				walk(o.Key(k))
			}
		}
	}
}

// plain is a node as encoding/json has it.
func plain(n node) any {
	switch n := n.(type) {
	case []node:
		all := make([]any, len(n))
		for i, e := range n {
			all[i] = plain(e)
		}
		return all
	case *object:
		all := map[string]any{}
		for k, e := range n.fields {
			all[k] = plain(e)
		}
		return all
	}
	return n
}

// Nothing panics; what has no fault is what encoding/json reads of it; and a document that
// is written and read again is the same, the order of its keys too.
func FuzzRead(f *testing.F) {
	for _, tc := range seeds {
		f.Add([]byte(tc.text))
	}
	f.Add([]byte(`{"a": [0, -0, 1E+2, "\u2028<&>", true, null, {}, []], "b": {"c": {"d": 1.50}}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if err := Read(text, "p", sample); err == nil && !json.Valid(text) {
			t.Error("it is taken for JSON")
		}
		var tree *object
		err := Read(text, "p", func(o *Object) { tree, o.ended = o.o, true })
		if err == nil {
			dec := json.NewDecoder(bytes.NewReader(text))
			dec.UseNumber()
			var want any
			if err := dec.Decode(&want); err != nil {
				t.Fatal(err)
			}
			if got := plain(tree); !reflect.DeepEqual(got, want) {
				t.Errorf("read %v, want %v", got, want)
			}
		}
		if tree == nil {
			return
		}
		Read(text, "p", func(o *Object) { walk(Value{o.at, o.o, true}) })
		again := encode(tree)
		var second *object
		if err := Read(again, "p", func(o *Object) { second, o.ended = o.o, true }); err != nil {
			t.Fatalf("written as %s: %v", again, err)
		}
		if !reflect.DeepEqual(tree, second) {
			t.Errorf("written as %s, which is %s", again, encode(second))
		}
	})
}
