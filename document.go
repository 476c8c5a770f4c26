package bobtail

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/bobtail-rpc/bobtail/internal/strictjson"
)

// ErrNotSupported is what a fault of a policy document wraps when its key is one
// of the design's that this version does not build. At present there is none.
var ErrNotSupported = errors.New("not supported yet")

// reader reads one object of a policy document, its numbers, durations and codes as
// proto JSON has them. Its methods return ok false where the key is absent and where its
// value is a fault, which is then recorded.
type reader struct{ *strictjson.Object }

// readerOf returns a reader of an object, nil if it is absent. Of a value that is no
// object, what is missing in it is told, too.
func readerOf(v strictjson.Value) *reader {
	o, _ := v.Object()
	if o == nil {
		return nil
	}
	return &reader{o}
}

func (r *reader) object(key string) *reader { return readerOf(r.Key(key)) }

func (r *reader) text(key string) (string, bool) { return r.Key(key).Text("a string") }

func (r *reader) number(key, want string, in func(float64) bool) (float64, bool) {
	return r.Key(key).NumberOrText(want, in)
}

// maxSeconds is the longest duration of proto JSON that fits a time.Duration.
const maxSeconds = math.MaxInt64 / int64(time.Second)

// duration reads a duration of proto JSON: decimal seconds with up to nine
// places and an "s", as in "0.250s".
func (r *reader) duration(key, want string, in func(time.Duration) bool) (time.Duration, bool) {
	v := r.Key(key)
	s, ok := v.Text(`a duration in seconds such as "0.250s"`)
	if !ok {
		return 0, false
	}
	d, err := parseDuration(s)
	if err != nil {
		v.Fault("%q, %w", s, err)
		return 0, false
	}
	if !in(d) {
		v.Fault("%q, want %s", s, want)
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

// seconds writes a duration as a document has it.
func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', -1, 64) + "s" }

func atLeast0(d time.Duration) bool { return d >= 0 }
func above0(d time.Duration) bool   { return d > 0 }

// codes reads a list of status codes, by name in any case or by number (A6). OK
// is a fault in every list of ours.
func (r *reader) codes(key string) []codes.Code {
	var out []codes.Code
	for _, v := range r.Key(key).List() {
		var c codes.Code
		switch n := v.Scalar().(type) {
		case string:
			if err := c.UnmarshalJSON([]byte(strconv.Quote(strings.ToUpper(n)))); err != nil {
				v.Fault("%q, want a gRPC status code", n)
				continue
			}
		case json.Number:
			// grpc-java reads every number as a double, and so accepts 14.0.
			x, err := n.Float64()
			if err != nil || x != math.Trunc(x) || x < 0 || x > float64(codes.Unauthenticated) {
				v.Fault("%s, want a gRPC status code, 1 to 16", n)
				continue
			}
			c = codes.Code(x)
		default:
			v.Fault("%s, want a gRPC status code", v)
			continue
		}
		if c == codes.OK {
			v.Fault("OK, want a code of a failure")
			continue
		}
		out = append(out, c)
	}
	return out
}
