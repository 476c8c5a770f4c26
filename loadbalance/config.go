package loadbalance

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// parseObject hands each value of a JSON object to the parser of its key. It
// reports every fault, by key: one that no parser knows, one that stands twice,
// a null, and what the parsers find.
func parseObject(js json.RawMessage, parsers map[string]func(json.RawMessage) error) error {
	dec := json.NewDecoder(bytes.NewReader(js))
	t, err := dec.Token()
	if err != nil {
		return fmt.Errorf("not JSON: %w", err)
	}
	if t != json.Delim('{') {
		return fmt.Errorf("%.40s, want an object", js)
	}
	var errs []error
	seen := make(map[string]bool)
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return errors.Join(append(errs, fmt.Errorf("not JSON: %w", err))...)
		}
		key := t.(string) // the decoder gives nothing else for a key
		var v json.RawMessage
		if err := dec.Decode(&v); err != nil {
			return errors.Join(append(errs, fmt.Errorf("%s: not JSON: %w", key, err))...)
		}
		parse, ok := parsers[key]
		switch {
		case !ok:
			errs = append(errs, unknownKey(key, slices.Sorted(maps.Keys(parsers))))
		case seen[key]:
			errs = append(errs, fmt.Errorf("%s: given twice", key))
		case string(v) == "null":
			errs = append(errs, fmt.Errorf("%s: null, want a value", key))
		default:
			if err := parse(v); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", key, err))
			}
		}
		seen[key] = true
	}
	if _, err := dec.Token(); err != nil {
		return errors.Join(append(errs, fmt.Errorf("not JSON: %w", err))...)
	}
	// Not dec.More, to which a brace too many is an end.
	if _, err := dec.Token(); err != io.EOF {
		errs = append(errs, errors.New("not JSON: more than one value"))
	}
	return errors.Join(errs...)
}

func unknownKey(key string, known []string) error {
	best, nearest := 4, "" // further off is no misspelling
	for _, k := range known {
		if d := distance(strings.ToLower(key), strings.ToLower(k)); d < best {
			best, nearest = d, k
		}
	}
	if nearest != "" {
		return fmt.Errorf("unknown key %.40q, nearest is %q", key, nearest)
	}
	return fmt.Errorf("unknown key %.40q, want one of %q", key, known)
}

// distance is Levenshtein's. Keys longer than any of ours are far off.
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			d := diagonal
			if a[i] != b[j] {
				d++
			}
			diagonal = row[j+1]
			row[j+1] = min(d, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}

// parseDuration reads a duration as service configs write it: "10s", "0.25s".
func parseDuration(js json.RawMessage) (time.Duration, error) {
	var s string
	if err := json.Unmarshal(js, &s); err != nil {
		return 0, fmt.Errorf(`%.40s, want a duration such as "10s"`, js)
	}
	n, ok := strings.CutSuffix(s, "s")
	d, err := time.ParseDuration(s)
	if err != nil || !ok || strings.Trim(n, "-0123456789.") != "" {
		return 0, fmt.Errorf(`%.40q, want a duration such as "10s"`, s)
	}
	return d, nil
}
