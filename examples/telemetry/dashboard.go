package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
)

// panel is one of the dashboard that asks something.
type panel struct {
	title   string
	queries []query
}

type query struct{ expr, legend string }

// readDashboard returns the panels of a Grafana dashboard, with All in place of its variables.
func readDashboard(file string) ([]panel, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("the dashboard is named by --dashboard: %w", err)
	}
	var d struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr, LegendFormat string }
		}
	}
	if err := json.Unmarshal(content, &d); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	// The window is the whole run, so that what happened at its beginning is seen as well.
	all := strings.NewReplacer("$__rate_interval", "1m", "$job", ".*", "$target", ".*", "$method", ".*")
	var panels []panel
	for _, p := range d.Panels {
		own := panel{title: p.Title}
		for _, t := range p.Targets {
			own.queries = append(own.queries, query{all.Replace(t.Expr), t.LegendFormat})
		}
		if len(own.queries) > 0 {
			panels = append(panels, own)
		}
	}
	if len(panels) == 0 {
		return nil, fmt.Errorf("%s: no panel asks anything", file)
	}
	return panels, nil
}

var (
	anything = regexp.MustCompile(`[a-z_]+=~"\.\*",?`)
	metric   = regexp.MustCompile(`\b((?:bobtail|grpc)_\w+)\{`)
)

// shortened is an expression without the selectors that select everything.
func shortened(expr string) string {
	s := strings.NewReplacer("{}", "", ",}", "}").Replace(anything.ReplaceAllString(expr, ""))
	if len(s) > 90 {
		s = s[:87] + "..."
	}
	return s
}

// greatest shows the series of an answer that has the greatest value.
func greatest(answer []sample) string {
	if len(answer) == 0 {
		return "NO DATA"
	}
	s := slices.MaxFunc(answer, func(a, b sample) int {
		switch {
		case a.value < b.value:
			return -1
		case a.value > b.value:
			return 1
		}
		return 0
	})
	var labels []string
	for _, k := range slices.Sorted(maps.Keys(s.labels)) {
		labels = append(labels, s.labels[k])
	}
	return strings.TrimSpace(fmt.Sprintf("%.4g %s", s.value, strings.Join(labels, " ")))
}

// lookForNames looks whether the metrics that the dashboard asks for are exported.
func lookForNames(ctx context.Context, out io.Writer, w *world, panels []panel) error {
	exported, err := w.scrape(ctx)
	if err != nil {
		return err
	}
	wanted := map[string]string{}
	for _, p := range panels {
		for _, q := range p.queries {
			for _, m := range metric.FindAllStringSubmatch(q.expr, -1) {
				wanted[m[1]] = p.title
			}
		}
	}
	var missing []error
	for _, name := range slices.Sorted(maps.Keys(wanted)) {
		if !exported[name] {
			missing = append(missing, fmt.Errorf("%q asks for %s, which nobody exports", wanted[name], name))
		}
	}
	fmt.Fprintf(out, "WITHOUT PROMETHEUS: %d of the %d metrics of the dashboard are exported; its queries and the rules were not run\n",
		len(wanted)-len(missing), len(wanted))
	return errors.Join(missing...)
}
