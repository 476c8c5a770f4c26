package dashboardtest

import (
	"io"
	"log/slog"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
)

const rulesFile = "../../../docs/prometheus/bobtail.rules.yml"

var (
	alertName  = regexp.MustCompile(`^Bobtail[A-Z][A-Za-z]+$`)
	recordName = regexp.MustCompile(`^[a-z_]+:bobtail_[a-z0-9_]+:[a-z0-9_]+$`)
	ruleLabel  = regexp.MustCompile(`\$labels\.(\w+)`)
)

// checkRules returns every fault of a rules file, joined, and the names of its alerts.
func checkRules(all map[string]series, content string) ([]string, error) {
	c := newChecker(all)
	groups, errs := rulefmt.Parse([]byte(content), false, model.LegacyValidation, parser.NewParser(parser.Options{}),
		slog.New(slog.NewTextHandler(io.Discard, nil)))
	if c.errs = errs; groups == nil {
		return nil, c.err()
	}
	var alerts []string
	for _, g := range groups.Groups {
		for _, r := range g.Rules {
			_, labels := c.query(r.Expr)
			if r.Record != "" {
				if !recordName.MatchString(r.Record) {
					c.errorf("record %q, want level:metric:operation", r.Record)
				}
				// What the level names is there.
				level, _, _ := strings.Cut(r.Record, ":")
				for _, l := range labels {
					level = strings.Trim(strings.ReplaceAll(level, l, ""), "_")
				}
				if level != "" {
					c.errorf("record %q: its level names %q, which is no label of %v", r.Record, level, labels)
				}
				c.series[r.Record] = series{kind: "recorded", labels: labels, values: c.values(r.Expr, labels)}
				continue
			}
			if !alertName.MatchString(r.Alert) || slices.Contains(alerts, r.Alert) {
				c.errorf("alert %q, want a name of its own such as BobtailBreakerOpen", r.Alert)
			}
			alerts = append(alerts, r.Alert)
			if r.For <= 0 {
				c.errorf("%s: for %v, want more than 0: one bad minute is nobody's alarm", r.Alert, r.For)
			}
			if s := r.Labels["severity"]; s != "page" && s != "ticket" {
				c.errorf("%s: severity %q, want page or ticket", r.Alert, s)
			}
			for _, a := range []string{"summary", "description"} {
				if len(r.Annotations[a]) < 20 {
					c.errorf("%s: %s %q, want a sentence", r.Alert, a, r.Annotations[a])
				}
				c.templated(r.Alert, r.Annotations[a], ruleLabel, labels)
			}
		}
	}
	return alerts, c.err()
}

// values returns the closed lists of the labels that an expression keeps.
func (c *checker) values(text string, kept []string) map[string][]string {
	v := map[string][]string{}
	e, err := parser.NewParser(parser.Options{}).ParseExpr(text)
	if err != nil {
		return v
	}
	parser.Inspect(e, func(n parser.Node, _ []parser.Node) error {
		if s, ok := n.(*parser.VectorSelector); ok {
			for l, list := range c.series[s.Name].values {
				if slices.Contains(kept, l) {
					v[l] = list
				}
			}
		}
		return nil
	})
	return v
}

func TestRules(t *testing.T) {
	alerts, err := checkRules(known(t), read(t, rulesFile))
	if err != nil {
		t.Fatal(err)
	}
	if len(alerts) < 10 {
		t.Errorf("alerts %q, want ten and more", alerts)
	}
	// Each alert has its story.
	stories := read(t, strings.TrimSuffix(rulesFile, ".yml")+".test.yml")
	for _, a := range alerts {
		if !strings.Contains(stories, `alertname="`+a+`"`) {
			t.Errorf("nothing in bobtail.rules.test.yml raises %s", a)
		}
	}
}

func TestRulesFaults(t *testing.T) {
	all, content := known(t), read(t, rulesFile)
	for _, m := range []struct{ name, old, new, want string }{
		{"metric", "(bobtail_client_breaker_state_ratio)", "(bobtail_client_breaker_state)", `no metric "bobtail_client_breaker_state"`},
		{"recorded metric", "0.99, grpc_target_grpc_method_le:", "0.99, grpc_method_le:", "no metric"},
		{"label", `{grpc_method!="other"}`, `{method!="other"}`, `no label "method"`},
		{"value", `bobtail_event="panic began"`, `bobtail_event="panic begun"`, `is never "panic begun"`},
		{"value of a recorded metric", `bobtail_criticality="critical_plus"`, `bobtail_criticality="critical-plus"`, `is never "critical-plus"`},
		{"reason of another metric", `bobtail_reason=~"OVERLOADED|`, `bobtail_reason=~"THROTTLED|`, `is never "THROTTLED"`},
		{"sides that never match", "sum by (grpc_target) (grpc_target_grpc_method:bobtail_client_hedges:rate5m)", "grpc_target_grpc_method:bobtail_client_hedges:rate5m", "the sides have labels"},
		{"annotation's label", "{{ $labels.grpc_method }} is open", "{{ $labels.method }} is open", `no label "method"`},
		{"for", "for: 10m", "for: 0s", "want more than 0"},
		{"severity", "severity: page", "severity: urgent", `severity "urgent"`},
		{"no description", "description: >-", "note: >-", "description"},
		{"no summary", `summary: "`, `title: "`, "summary"},
		{"unknown field", "for: 10m", "fro: 10m", "fro"},
		{"twice", "alert: BobtailHedgeStorm", "alert: BobtailBreakerOpen", "name of its own"},
		{"syntax", "> 0.25", "> > 0.25", "unexpected"},
		{"template", "{{ $value | humanizeDuration }}", "{{ $value | humanise }}", "humanise"},
	} {
		t.Run(m.name, func(t *testing.T) {
			if !strings.Contains(content, m.old) {
				t.Fatalf("the rules have no %s", m.old)
			}
			_, err := checkRules(all, strings.Replace(content, m.old, m.new, 1))
			if err == nil || !strings.Contains(err.Error(), m.want) {
				t.Errorf("error %v, want %s", err, m.want)
			}
		})
	}
}

// TestRulesStories runs Prometheus's own tests of rules: what raises each alert, and that a
// healthy service raises none.
func TestRulesStories(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("there is no promtool in PATH: the stories of the alerts are not told (Debian: apt-get install --no-install-recommends prometheus)")
	}
	cmd := exec.Command(promtool, "test", "rules", "bobtail.rules.test.yml")
	cmd.Dir = filepath.Dir(rulesFile)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
