package dashboardtest

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/promql/parser"
)

const dashboardFile = "../../../docs/grafana/bobtail.json"

type dashboard struct {
	Title         string
	UID           string
	SchemaVersion int
	Templating    struct {
		List []struct {
			Name, Type string
			Definition string
			Query      json.RawMessage
			Datasource *datasource
		}
	}
	Panels []panel
}

type datasource struct{ Type, UID string }

type panel struct {
	ID                       int
	Type, Title, Description string
	GridPos                  struct{ X, Y, W, H int }
	Datasource               *datasource
	FieldConfig              struct{ Defaults struct{ Unit string } }
	Targets                  []struct {
		RefID, Expr, LegendFormat string
		Datasource                *datasource
	}
	Panels []panel
}

// units are those of Grafana that the dashboard uses.
var units = []string{"s", "reqps", "percentunit", "short"}

var (
	variable    = regexp.MustCompile(`\$\{?(\w+)\}?`)
	legend      = regexp.MustCompile(`\{\{\s*(\w+)\s*\}\}`)
	labelValues = regexp.MustCompile(`^label_values\((.+), (\w+)\)$`)
)

// checkDashboard returns every fault of a dashboard, joined, and which instruments it shows.
func checkDashboard(all map[string]series, content string) (map[string]bool, error) {
	c := newChecker(all)
	var d dashboard
	if err := json.Unmarshal([]byte(content), &d); err != nil {
		return nil, err
	}
	if d.Title == "" || d.UID == "" || d.SchemaVersion < 39 {
		c.errorf("title %q, uid %q, schemaVersion %d: want all of them, the last 39 at least", d.Title, d.UID, d.SchemaVersion)
	}
	declared := []string{"__rate_interval"}
	for _, v := range d.Templating.List {
		declared = append(declared, v.Name)
	}
	for _, want := range []string{"datasource", "target", "method"} {
		if !slices.Contains(declared, want) {
			c.errorf("there is no variable %q", want)
		}
	}
	// Replaced as Grafana does for All.
	replaced := func(text string) string {
		return variable.ReplaceAllStringFunc(text, func(v string) string {
			name := variable.FindStringSubmatch(v)[1]
			if !slices.Contains(declared, name) {
				c.errorf("%q: there is no variable %q", text, name)
			}
			if name == "__rate_interval" {
				return "1m"
			}
			return ".*"
		})
	}
	for _, v := range d.Templating.List {
		if v.Type != "query" {
			continue
		}
		c.fromVariable("variable "+v.Name, v.Datasource)
		var q struct{ Query string }
		if err := json.Unmarshal(v.Query, &q); err != nil || q.Query != v.Definition {
			c.errorf("variable %s: query %s, want that of the definition %q", v.Name, v.Query, v.Definition)
		}
		m := labelValues.FindStringSubmatch(v.Definition)
		if m == nil {
			c.errorf("variable %s: %q, want label_values(series, label)", v.Name, v.Definition)
			continue
		}
		_, labels := c.query(replaced(m[1]))
		c.subset(v.Definition, m[2:], labels)
	}
	ids := map[int]bool{}
	for i, p := range d.Panels {
		where := fmt.Sprintf("panel %d %q", p.ID, p.Title)
		if p.ID <= 0 || ids[p.ID] {
			c.errorf("%s: its id is 0 or not its own", where)
		}
		ids[p.ID] = true
		g := p.GridPos
		if g.X < 0 || g.Y < 0 || g.W < 1 || g.H < 1 || g.X+g.W > 24 {
			c.errorf("%s: gridPos %+v is outside of 24 columns", where, g)
		}
		for _, o := range d.Panels[:i] {
			if h := o.GridPos; g.X < h.X+h.W && h.X < g.X+g.W && g.Y < h.Y+h.H && h.Y < g.Y+g.H {
				c.errorf("%s overlaps panel %d %q", where, o.ID, o.Title)
			}
		}
		if p.Title == "" {
			c.errorf("%s has no title", where)
		}
		if p.Type == "row" {
			if len(p.Panels) > 0 {
				c.errorf("%s: a row that holds panels is collapsed, and they are not checked", where)
			}
			continue
		}
		c.fromVariable(where, p.Datasource)
		unit := p.FieldConfig.Defaults.Unit
		if !slices.Contains(units, unit) {
			c.errorf("%s: unit %q, want one of %q", where, unit, units)
		}
		// A reader who finds a line too high wants to know what to do.
		if len(p.Description) < 60 {
			c.errorf("%s: description %q, want what it is and what to do about it", where, p.Description)
		}
		if len(p.Targets) == 0 {
			c.errorf("%s has no query", where)
		}
		refs := map[string]bool{}
		for _, target := range p.Targets {
			if target.RefID == "" || refs[target.RefID] {
				c.errorf("%s: refId %q is empty or not its own", where, target.RefID)
			}
			refs[target.RefID] = true
			c.fromVariable(where, target.Datasource)
			e, labels := c.query(replaced(target.Expr))
			if e == nil {
				continue
			}
			if s := c.seconds(e); s != (unit == "s") {
				c.errorf("%s: unit %q, but seconds is %v: %s", where, unit, s, target.Expr)
			}
			if target.LegendFormat == "" {
				c.errorf("%s: %s has no legend", where, target.Expr)
			}
			c.templated(where, target.LegendFormat, legend, labels)
			// What tells two lines apart is in the legend.
			for _, l := range labels {
				if !strings.Contains(target.LegendFormat, "{{"+l+"}}") {
					c.errorf("%s: the legend %q does not tell %q", where, target.LegendFormat, l)
				}
			}
		}
	}
	return c.used, c.err()
}

// fromVariable checks that a data source is the one that is chosen when the dashboard is
// looked at: any other would be that of whoever made it.
func (c *checker) fromVariable(where string, d *datasource) {
	if d == nil || d.Type != "prometheus" || d.UID != "${datasource}" {
		c.errorf("%s: data source %+v, want ${datasource}", where, d)
	}
}

// seconds reports whether the value of an expression is a time.
func (c *checker) seconds(e parser.Expr) bool {
	switch e := e.(type) {
	case *parser.ParenExpr:
		return c.seconds(e.Expr)
	case *parser.AggregateExpr:
		return c.seconds(e.Expr)
	case *parser.VectorSelector:
		s := c.series[e.Name]
		return s.seconds && s.kind == "gauge"
	case *parser.Call:
		found := false
		if e.Func.Name == "histogram_quantile" {
			parser.Inspect(e, func(n parser.Node, _ []parser.Node) error {
				if v, ok := n.(*parser.VectorSelector); ok && c.series[v.Name].seconds {
					found = true
				}
				return nil
			})
		}
		return found
	}
	return false
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestDashboard(t *testing.T) {
	used, err := checkDashboard(known(t), read(t, dashboardFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range instruments() {
		if !used[i.Name] {
			t.Errorf("no panel shows %s", i.Name)
		}
	}
}

// Of most of these Grafana shows "No data" and no error.
func TestDashboardFaults(t *testing.T) {
	all, content := known(t), read(t, dashboardFile)
	for _, m := range []struct{ name, old, new, want string }{
		{"metric", "bobtail_client_budget_balance{", "bobtail_client_budget_balanse{", `no metric "bobtail_client_budget_balanse"`},
		{"unit's suffix", "bobtail_client_breaker_state_ratio{", "bobtail_client_breaker_state{", `no metric "bobtail_client_breaker_state"`},
		{"no bucket", "bobtail_server_queue_wait_seconds_bucket{", "bobtail_server_queue_wait_seconds_count{", "le"},
		{"matched label", `bobtail_hedged=\"false\"`, `bobtail_hedge=\"false\"`, `no label "bobtail_hedge"`},
		{"grouped label", "sum by (bobtail_endpoint)", "sum by (endpoint)", `no label "endpoint"`},
		{"legend's label", "{{bobtail_endpoint}}", "{{endpoint}}", `no label "endpoint"`},
		{"legend without a label", "{{bobtail_attempt_kind}} {{bobtail_attempt_outcome}}", "{{bobtail_attempt_outcome}}", `does not tell "bobtail_attempt_kind"`},
		{"equal value", `bobtail_attempt_outcome=\"won\"`, `bobtail_attempt_outcome=\"win\"`, `is never "win"`},
		{"unequal value", `bobtail_attempt_outcome!=\"refused\"`, `bobtail_attempt_outcome!=\"refuse\"`, `is never "refuse"`},
		{"value of an alternation", `\"hedge|tied\"`, `\"hedge|tie\"`, `is never "tie"`},
		{"status", `grpc_status=\"OK\"`, `grpc_status=\"ok\"`, `is never "ok"`},
		{"state of another metric", `bobtail_state=\"began\"`, `bobtail_state=\"open\"`, `is never "open"`},
		{"gauge's rate", "min by (grpc_target) (bobtail_client_budget_balance{job=~\\\"$job\\\",grpc_target=~\\\"$target\\\"})",
			"sum by (grpc_target) (rate(bobtail_client_budget_balance{job=~\\\"$job\\\",grpc_target=~\\\"$target\\\"}[$__rate_interval]))", "rate of a gauge"},
		{"undeclared variable", `grpc_target=~\"$target\"`, `grpc_target=~\"$targets\"`, `no variable "targets"`},
		{"variable's label", `"definition": "label_values(bobtail_client_call_duration_seconds_count{job=~\"$job\"}, grpc_target)`,
			`"definition": "label_values(bobtail_client_call_duration_seconds_count{job=~\"$job\"}, target)`, `no label "target"`},
		{"syntax", "histogram_quantile(0.99, sum", "histogram_quantile(0.99 sum", "parse error"},
		{"duplicate id", `"id": 3,`, `"id": 2,`, "not its own"},
		{"overlap", `"x": 8,`, `"x": 7,`, "overlaps"},
		{"too wide", `"w": 24,`, `"w": 25,`, "24 columns"},
		{"unknown unit", `"unit": "reqps"`, `"unit": "rps!"`, `unit "rps!"`},
		{"unit of another quantity", `"unit": "s"`, `"unit": "short"`, "seconds is true"},
		{"no unit", `"unit": "s",`, ``, `unit ""`},
		{"no title", `"title": "Hedge win rate"`, `"title": ""`, "no title"},
		{"no description", `"description": "Share of hedges that`, `"description": "","x": "`, "what to do about it"},
		{"fixed data source", `"uid": "${datasource}"`, `"uid": "abc"`, "want ${datasource}"},
		{"refId", `"refId": "B"`, `"refId": "A"`, "refId"},
	} {
		t.Run(m.name, func(t *testing.T) {
			if !strings.Contains(content, m.old) {
				t.Fatalf("the dashboard has no %s", m.old)
			}
			_, err := checkDashboard(all, strings.Replace(content, m.old, m.new, 1))
			if err == nil || !strings.Contains(err.Error(), m.want) {
				t.Errorf("error %v, want %s", err, m.want)
			}
		})
	}
}
