package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// scrapeEvery is how often Prometheus scrapes. It evaluates the rules as often.
const scrapeEvery = "500ms"

// prometheus is a Prometheus that runs as a child.
type prometheus struct {
	url, version string

	cmd    *exec.Cmd
	dir    string
	output *tail
	ended  chan struct{}
	err    error // of its end; after ended is closed
}

// findPrometheus returns the binary, or an error that says where to get it.
func findPrometheus() (string, error) {
	binary, err := exec.LookPath("prometheus")
	if err != nil {
		return "", errors.New("there is no prometheus in PATH. On Debian and Ubuntu: " +
			"apt-get install --no-install-recommends prometheus; elsewhere: https://prometheus.io/download. " +
			"Or run with --without-prometheus, which only looks whether the metrics of the dashboard are there")
	}
	return binary, nil
}

// An instance is what Prometheus takes for one process: a path at which metrics are.
type instance struct{ job, name, path string }

// startPrometheus runs a Prometheus at a free port of the loopback, with everything that it
// writes in a temporary folder, and waits until it is ready.
func startPrometheus(ctx context.Context, binary, rules, metrics string, instances []instance) (*prometheus, error) {
	rules, err := filepath.Abs(rules)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(rules); err != nil {
		return nil, fmt.Errorf("the rules are named by --rules: %w", err)
	}
	var failed error
	for range 3 { // somebody may take the port in between
		p, err := tryPrometheus(ctx, binary, rules, metrics, instances)
		if err == nil {
			return p, nil
		}
		if failed = err; ctx.Err() != nil {
			break
		}
	}
	return nil, failed
}

func tryPrometheus(ctx context.Context, binary, rules, metrics string, instances []instance) (p *prometheus, err error) {
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	p = &prometheus{url: "http://" + address, output: &tail{}, ended: make(chan struct{})}
	if p.dir, err = os.MkdirTemp("", "bobtail-telemetry-"); err != nil {
		return nil, err
	}
	started := false
	defer func() {
		if err != nil {
			if started {
				err = errors.Join(err, p.stop())
			} else {
				err = errors.Join(err, os.RemoveAll(p.dir))
			}
		}
	}()
	config := filepath.Join(p.dir, "prometheus.yml")
	if err := os.WriteFile(config, configuration(rules, metrics, instances), 0o600); err != nil {
		return nil, err
	}
	p.cmd = exec.Command(binary, "--config.file="+config, "--storage.tsdb.path="+filepath.Join(p.dir, "data"),
		"--web.listen-address="+address, "--enable-feature=exemplar-storage", "--log.level=warn")
	p.cmd.Stdout, p.cmd.Stderr = p.output, p.output
	p.cmd.SysProcAttr = childAttributes()
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	started = true
	go func() {
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	for {
		ready, _ := p.get(ctx, "/-/ready", nil)
		if ready != nil {
			break
		}
		select {
		case <-p.ended:
			return p, fmt.Errorf("prometheus: %w\n%s", cause(p.err), p.output)
		case <-ctx.Done():
			return p, context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
	info, err := p.get(ctx, "/api/v1/status/buildinfo", nil)
	if err != nil {
		return p, err
	}
	var build struct{ Data struct{ Version string } }
	if err := json.Unmarshal(info, &build); err != nil {
		return p, err
	}
	p.version = "Prometheus " + build.Data.Version
	return p, nil
}

func cause(err error) error {
	if err == nil {
		return errors.New("it ended")
	}
	return err
}

// configuration has a job for each kind of process. JSON is YAML as well.
func configuration(rules, metrics string, instances []instance) []byte {
	type static struct {
		Targets []string          `json:"targets"`
		Labels  map[string]string `json:"labels"`
	}
	type scrape struct {
		Job     string   `json:"job_name"`
		Statics []static `json:"static_configs"`
	}
	config := struct {
		Global  map[string]string `json:"global"`
		Rules   []string          `json:"rule_files"`
		Scrapes []scrape          `json:"scrape_configs"`
	}{
		map[string]string{"scrape_interval": scrapeEvery, "scrape_timeout": scrapeEvery, "evaluation_interval": scrapeEvery},
		[]string{rules}, nil,
	}
	jobs := map[string]int{}
	for _, i := range instances {
		n, ok := jobs[i.job]
		if !ok {
			n = len(config.Scrapes)
			jobs[i.job] = n
			config.Scrapes = append(config.Scrapes, scrape{Job: i.job})
		}
		config.Scrapes[n].Statics = append(config.Scrapes[n].Statics,
			static{[]string{metrics}, map[string]string{"instance": i.name, "__metrics_path__": i.path}})
	}
	b, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		panic(err) // strings only
	}
	return b
}

// stop ends the child and removes its folder. It asks first, and waits no longer than 5 s.
func (p *prometheus) stop() error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-p.ended:
	case <-time.After(5 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
	return os.RemoveAll(p.dir)
}

// get returns the body of an answer.
func (p *prometheus) get(ctx context.Context, path string, values url.Values) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+path+"?"+values.Encode(), nil)
	if err != nil {
		return nil, err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, 64<<20))
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", answer.Status, body)
	}
	if err != nil {
		return nil, err
	}
	return body, nil
}

type sample struct {
	labels map[string]string
	value  float64
}

// query asks for the value of an expression now. What is not a number is left out: it is
// no data to a reader of the dashboard.
func (p *prometheus) query(ctx context.Context, expr string) ([]sample, error) {
	body, err := p.get(ctx, "/api/v1/query", url.Values{"query": {expr}})
	if err != nil {
		return nil, err
	}
	var answer struct {
		Data struct {
			Result []struct {
				Metric map[string]string
				Value  [2]any
			}
		}
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, err
	}
	var samples []sample
	for _, r := range answer.Data.Result {
		text, _ := r.Value[1].(string)
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return nil, fmt.Errorf("value %q: %w", text, err)
		}
		if !math.IsNaN(v) {
			samples = append(samples, sample{r.Metric, v})
		}
	}
	return samples, nil
}

// rules returns how many rules are loaded, and what is wrong with them.
func (p *prometheus) rules(ctx context.Context) (n int, broken []error, err error) {
	body, err := p.get(ctx, "/api/v1/rules", nil)
	if err != nil {
		return 0, nil, err
	}
	var answer struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Name, Health, LastError string }
			}
		}
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return 0, nil, err
	}
	for _, g := range answer.Data.Groups {
		for _, r := range g.Rules {
			n++
			if r.Health != "ok" {
				broken = append(broken, fmt.Errorf("rule %s: %s %s", r.Name, r.Health, r.LastError))
			}
		}
	}
	if n == 0 {
		broken = append(broken, errors.New("no rules are loaded"))
	}
	return n, broken, nil
}

// exemplar is a call that stands for a bucket.
type exemplar struct {
	method, le, trace string
	value             float64 // s
}

// exemplars returns those of a histogram's buckets.
func (p *prometheus) exemplars(ctx context.Context, histogram string) ([]exemplar, error) {
	now := time.Now()
	body, err := p.get(ctx, "/api/v1/query_exemplars", url.Values{"query": {histogram},
		"start": {now.Add(-time.Hour).Format(time.RFC3339)}, "end": {now.Add(time.Minute).Format(time.RFC3339)}})
	if err != nil {
		return nil, err
	}
	var answer struct {
		Data []struct {
			SeriesLabels map[string]string
			Exemplars    []struct {
				Labels map[string]string
				Value  string
			}
		}
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, err
	}
	var all []exemplar
	for _, s := range answer.Data {
		for _, e := range s.Exemplars {
			v, err := strconv.ParseFloat(e.Value, 64)
			if err != nil {
				return nil, fmt.Errorf("exemplar %q: %w", e.Value, err)
			}
			all = append(all, exemplar{s.SeriesLabels["grpc_method"], s.SeriesLabels["le"], e.Labels["trace_id"], v})
		}
	}
	return all, nil
}

// tail keeps the last of what a child writes, in case it fails.
type tail struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.b.Len() > 1<<16 {
		t.b.Next(t.b.Len() - 1<<15)
	}
	return t.b.Write(p)
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(t.b.String())
}
