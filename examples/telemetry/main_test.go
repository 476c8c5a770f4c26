package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// here names the files of the repository.
func here(withoutPrometheus bool) settings {
	return settings{dashboard: "../../docs/grafana/bobtail.json", rules: "../../docs/prometheus/bobtail.rules.yml",
		withoutPrometheus: withoutPrometheus, traffic: 2 * time.Minute}
}

// needsPrometheus skips a test where there is none, and has temporary files where they can be
// counted.
func needsPrometheus(t *testing.T) (temporary string) {
	t.Helper()
	if _, err := findPrometheus(); err != nil {
		t.Skip(err)
	}
	temporary = t.TempDir()
	t.Setenv("TMPDIR", temporary)
	return temporary
}

// The whole program, against the real ones: every query of the dashboard has data, every
// rule is loaded, a hedged call is a trace, and a bucket leads to one.
func TestRun(t *testing.T) {
	temporary := needsPrometheus(t)
	var out bytes.Buffer
	err := run(t.Context(), &out, here(false))
	t.Logf("\n%s", out.String())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{", 0 without data", " 0 of them with an error", "attempt.kind=hedge attempt.outcome=won",
		"admission=admitted", "which the collector has"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output has no %q", want)
		}
	}
	clean(t, temporary)
}

// A run that is interrupted leaves no process and no file.
func TestInterrupted(t *testing.T) {
	temporary := needsPrometheus(t)
	ctx, cancel := context.WithCancel(t.Context())
	started := signalled{writer: io.Discard, on: "calls are made:", then: cancel}
	if err := run(ctx, &started, here(false)); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want canceled", err)
	}
	clean(t, temporary)
}

// signalled calls then when on is written.
type signalled struct {
	writer io.Writer
	on     string
	then   func()
}

func (s *signalled) Write(p []byte) (int, error) {
	if strings.Contains(string(p), s.on) {
		s.then()
	}
	return s.writer.Write(p)
}

// clean checks that nothing is left of a run.
func clean(t *testing.T, temporary string) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(temporary, "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if runtime.GOOS != "linux" {
		return
	}
	// A child would have the folder on its command line.
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range lines {
		if line, err := os.ReadFile(file); err == nil && bytes.Contains(line, []byte(temporary)) {
			t.Errorf("%s still runs: %q", file, line)
		}
	}
}

// What fails is said, and fails the program.
func TestRunFaults(t *testing.T) {
	for _, test := range []struct {
		name string
		path string // PATH
		set  func(*settings)
		want string
	}{
		{"no prometheus", t.TempDir(), func(*settings) {}, "apt-get install --no-install-recommends prometheus"},
		{"no dashboard", os.Getenv("PATH"), func(s *settings) { s.dashboard = "nowhere.json" }, "--dashboard"},
		{"too short", os.Getenv("PATH"), func(s *settings) { s.traffic = time.Second }, "traffic 1s, want [10s, 10m]"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("PATH", test.path)
			s := here(false)
			test.set(&s)
			if err := run(t.Context(), io.Discard, s); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %s", err, test.want)
			}
		})
	}
}

// A child that ends at once, and rules that are not there.
func TestPrometheusFails(t *testing.T) {
	temporary := needsPrometheus(t)
	bad := filepath.Join(t.TempDir(), "bad.yml")
	if err := os.WriteFile(bad, []byte("groups: [{name: x, rules: [{alert: A, expr: '1 +'}]}]"), 0o600); err != nil {
		t.Fatal(err)
	}
	for rules, want := range map[string]string{"nowhere.yml": "--rules", bad: "parse error"} {
		_, err := startPrometheus(t.Context(), "prometheus", rules, "127.0.0.1:1", nil)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %s", rules, err, want)
		}
	}
	clean(t, temporary)
}

// A query without data fails the program, though the metric exists.
func TestEmptyQueryFails(t *testing.T) {
	needsPrometheus(t)
	p, err := startPrometheus(t.Context(), "prometheus", here(false).rules, "127.0.0.1:1", []instance{{"j", "i", "/metrics"}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	}()
	err = ask(t.Context(), io.Discard, p, []panel{{"full", []query{{"vector(1)", ""}}}, {"not a number", []query{{"vector(0) / 0", ""}}}, {"hole", []query{{"bobtail_nothing{}", ""}}}})
	if err == nil || !strings.Contains(err.Error(), `"hole" has no data`) || !strings.Contains(err.Error(), `"not a number" has no data`) || strings.Contains(err.Error(), "full") {
		t.Errorf("error %v, want one that names hole and not a number", err)
	}
}

func TestMissingName(t *testing.T) {
	otlp, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	w, err := newWorld(t.Context(), otlp)
	if err != nil {
		t.Fatal(err)
	}
	err = lookForNames(t.Context(), io.Discard, w, []panel{{"p", []query{{`sum(bobtail_server_limit{job=~".*"}) / bobtail_server_limits{}`, ""}}}})
	if err == nil || !strings.Contains(err.Error(), "bobtail_server_limits,") || strings.Contains(err.Error(), "bobtail_server_limit,") {
		t.Errorf("error %v, want one that names bobtail_server_limits alone", err)
	}
	w.close() // no collector takes its spans
}
