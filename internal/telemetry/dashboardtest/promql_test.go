package dashboardtest

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
)

// checker knows what may be asked for.
type checker struct {
	series map[string]series
	used   map[string]bool // instruments that somebody asked for
	errs   []error
}

func (c *checker) errorf(format string, args ...any) {
	c.errs = append(c.errs, fmt.Errorf(format, args...))
}

// query checks an expression and returns the labels of its result.
func (c *checker) query(text string) (parser.Expr, []string) {
	e, err := parser.NewParser(parser.Options{}).ParseExpr(text)
	if err != nil {
		c.errorf("%q: %w", text, err)
		return nil, nil
	}
	return e, c.labels(e, "")
}

// labels checks e, to which the function in is applied, and returns the labels of its result.
func (c *checker) labels(e parser.Expr, in string) []string {
	switch e := e.(type) {
	case *parser.NumberLiteral, *parser.StringLiteral:
		return nil
	case *parser.ParenExpr:
		return c.labels(e.Expr, in)
	case *parser.UnaryExpr:
		return c.labels(e.Expr, in)
	case *parser.MatrixSelector:
		return c.labels(e.VectorSelector, in)
	case *parser.VectorSelector:
		return c.selector(e, in)
	case *parser.AggregateExpr:
		inner := c.labels(e.Expr, in)
		c.subset(e.String(), e.Grouping, inner)
		if e.Without {
			return minus(inner, e.Grouping...)
		}
		return e.Grouping
	case *parser.Call:
		var result []string
		for _, arg := range e.Args {
			if arg.Type() == parser.ValueTypeVector || arg.Type() == parser.ValueTypeMatrix {
				result = c.labels(arg, e.Func.Name)
			}
		}
		if e.Func.Name == "histogram_quantile" {
			c.subset(e.String(), []string{"le"}, result)
			return minus(result, "le")
		}
		return result
	case *parser.BinaryExpr:
		return c.binary(e)
	}
	c.errorf("%q: no check of a %T", e, e)
	return nil
}

func (c *checker) binary(e *parser.BinaryExpr) []string {
	left, right := c.labels(e.LHS, ""), c.labels(e.RHS, "")
	switch {
	case e.LHS.Type() == parser.ValueTypeScalar:
		return right
	case e.RHS.Type() == parser.ValueTypeScalar:
		return left
	}
	common := slices.DeleteFunc(slices.Clone(left), func(l string) bool { return !slices.Contains(right, l) })
	if e.VectorMatching.On || len(e.VectorMatching.MatchingLabels) > 0 {
		c.subset(e.String(), e.VectorMatching.MatchingLabels, common)
		return common
	}
	// Without on or ignoring both sides have the same labels, or never match.
	if len(common) != len(left) || len(common) != len(right) {
		c.errorf("%q: the sides have labels %v and %v", e, left, right)
	}
	return common
}

func (c *checker) selector(e *parser.VectorSelector, in string) []string {
	names := []string{e.Name}
	if e.Name == "" {
		names = nil
		for _, m := range e.LabelMatchers {
			if m.Name == model.MetricNameLabel {
				names = strings.Split(m.Value, "|")
			}
		}
	}
	if len(names) == 0 {
		c.errorf("%q names no metric", e)
	}
	var result []string
	for i, name := range names {
		s, ok := c.series[name]
		if !ok {
			c.errorf("%q: there is no metric %q", e, name)
			continue
		}
		c.used[s.from] = true
		// A rate of a gauge means nothing, nor does a quantile of anything but buckets.
		if total := s.kind != "gauge"; s.kind != "recorded" && (in == "rate" || in == "increase") != total && in != "" {
			c.errorf("%q: %s of a %s", e, in, s.kind)
		}
		if in == "histogram_quantile" && !slices.Contains(s.labels, "le") {
			c.errorf("%q: a quantile of what has no buckets", e)
		}
		for _, m := range e.LabelMatchers {
			c.matcher(e, s, m)
		}
		if i == 0 {
			result = s.labels
		} else {
			result = slices.DeleteFunc(slices.Clone(result), func(l string) bool { return !slices.Contains(s.labels, l) })
		}
	}
	return result
}

// matcher checks a label and its value. A misspelt value is silent: with = nothing
// matches, with != everything.
func (c *checker) matcher(e parser.Expr, s series, m *labels.Matcher) {
	if m.Name == model.MetricNameLabel {
		return
	}
	c.subset(e.String(), []string{m.Name}, s.labels)
	list := s.values[m.Name]
	if len(list) == 0 {
		return
	}
	patterns := []string{regexp.QuoteMeta(m.Value)}
	if m.Type == labels.MatchRegexp || m.Type == labels.MatchNotRegexp {
		patterns = strings.Split(m.Value, "|")
	}
	for _, p := range patterns {
		re, err := regexp.Compile("^(?:" + p + ")$")
		if err != nil || !slices.ContainsFunc(list, re.MatchString) {
			c.errorf("%q: %s is never %q, it is one of %q", e, m.Name, p, list)
		}
	}
}

func (c *checker) subset(where string, some, of []string) {
	for _, l := range some {
		if !slices.Contains(of, l) {
			c.errorf("%q: there is no label %q here, but %v", where, l, of)
		}
	}
}

// templated checks the labels that a text such as "{{grpc_method}}" asks for.
func (c *checker) templated(where, text string, pattern *regexp.Regexp, of []string) {
	for _, m := range pattern.FindAllStringSubmatch(text, -1) {
		c.subset(where+": "+text, []string{m[1]}, of)
	}
}

func (c *checker) err() error { return errors.Join(c.errs...) }

func newChecker(all map[string]series) *checker {
	return &checker{series: maps.Clone(all), used: map[string]bool{}}
}

func minus(all []string, some ...string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(l string) bool { return slices.Contains(some, l) })
}
