package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/bobtail-rpc/bobtail/bench/report"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

// This test binary also plays the program: as the child that serves, and whole.
func TestMain(m *testing.M) {
	if os.Getenv("BENCH_TEST_MAIN") != "" {
		main()
	}
	goleak.VerifyTestMain(m)
}

// bench runs the program in this process; its backends are this test binary again.
func bench(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	t.Setenv("BENCH_TEST_MAIN", "1")
	var out, errs bytes.Buffer
	code = run(t.Context(), args, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

// What the JSON document promises, by its keys. No figure is judged:
// the machine may be busy.
type document struct {
	Schema   int
	Scenario json.RawMessage
	Seed     uint64
	Runs     []struct {
		Policy          string
		Calls, Errors   int
		MeanMs          *float64 `json:"mean_ms"`
		P50             *float64 `json:"p50_ms"`
		P999            *float64 `json:"p999_ms"`
		AttemptsPerCall *float64 `json:"attempts_per_call"`
		Goodput         *float64 `json:"goodput_per_s"`
		Timeline        []struct {
			T       float64 `json:"t_s"`
			Offered float64 `json:"offered_per_s"`
			Goodput float64 `json:"goodput_per_s"`
			Errors  int
		}
		Faults *struct {
			During struct {
				AttemptsPerCall *float64 `json:"attempts_per_call"`
				GoodputShare    *float64 `json:"goodput_share"`
			}
			RecoveredS *float64 `json:"recovered_s"`
		}
	}
	Generator   struct{ Saturated bool }
	Interrupted bool
}

func decode(t *testing.T, text string) (d document) {
	t.Helper()
	unmarshal(t, text, &d)
	return d
}

func unmarshal(t *testing.T, text string, to any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), to); err != nil {
		t.Fatalf("%v, of %q", err, text)
	}
}

// The whole program on real servers, briefly.
func TestCompare(t *testing.T) {
	code, out, errs := bench(t, "--rate", "100", "--calls", "60", "--block", "200ms", "--warmup", "200ms", "--seed", "3",
		"--policies", "none,p2c,hedge", "-O", "json")
	d := decode(t, out)
	// A machine too busy to send 100 requests/s on time is saturated, and right to say so.
	if code != 0 && (code != exitSaturated || !d.Generator.Saturated) {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	sc, err := scenario.Decode(d.Scenario) // what a report ran can be run again
	if err != nil {
		t.Fatal(err)
	}
	if d.Schema != 1 || d.Seed != 3 || sc.Name != "stragglers" || sc.Rate != 100 || sc.Requests != 60 {
		t.Errorf("schema %d, seed %d, scenario %+v", d.Schema, d.Seed, sc)
	}
	for i, want := range []string{"none", "p2c", "hedge"} {
		r := d.Runs[i]
		if r.Policy != want || r.Calls != 60 || r.P50 == nil || *r.P50 <= 0 || r.P999 != nil || r.Goodput == nil {
			t.Errorf("run %d: %+v, want 60 calls of %s, p50, no p99.9", i, r, want)
		}
		if a := *r.AttemptsPerCall; a < 1 || want != "hedge" && a != 1 {
			t.Errorf("%s: %v attempts per call", want, a)
		}
	}
}

// A fan-out, files instead of names, a table, a duration.
func TestCompareFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name, doc string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(doc), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	sc := write("mine.json", `{"name":"mine","description":"of mine","backends":2,"fanout":5,"rate":50,"requests":9,
		"serviceTime":[{"constant":{"value":"1ms"}}]}`)
	pol := write("gentle.json", `{"loadBalancingConfig":[{"bobtail_p2c":{}}]}`)
	code, out, errs := bench(t, "compare", "--scenario", sc, "--policies", pol+",none", "--duration", "300ms", "--block", "100ms", "--warmup", "0s")
	if code != 0 && code != exitSaturated {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	for _, want := range []string{"real gRPC over loopback · scenario mine · seed 1", "gentle", "none", "5 leaf calls each", "generator: lag p99"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

// Side by side on real servers: each policy meets the fault at the same time, with
// backends of its own, whose one worker no other policy's calls keep busy.
func TestCompareSideBySide(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mine.json")
	err := os.WriteFile(path, []byte(`{"name":"mine","description":"of mine","backends":1,"rate":50,"requests":100,"arrivals":"uniform",
		"serviceTime":[{"constant":{"value":"12ms"}}],"sideBySide":true,"workers":1,"serveAbandoned":true,
		"faults":[{"kind":"error","from":"400ms","for":"400ms"}]}`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	code, out, errs := bench(t, "--scenario", path, "--policies", "none,retry-naive,p2c", "--block", "200ms", "--warmup", "200ms", "-O", "json")
	d := decode(t, out)
	if code != 0 && (code != exitSaturated || !d.Generator.Saturated) {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	for i, want := range []string{"none", "retry-naive", "p2c"} {
		r := d.Runs[i]
		if r.Policy != want || r.Calls != 100 || len(r.Timeline) != 10 || r.Timeline[0].T != 0 {
			t.Errorf("run %d: %d calls of %s, timeline %+v, want 100 of %s in 10 bins from 0", i, r.Calls, r.Policy, r.Timeline, want)
			continue
		}
		f := r.Faults
		if f == nil || f.During.AttemptsPerCall == nil {
			t.Errorf("%s: no figures of the fault", want)
			continue
		}
		// 36 ms of work in 20 would grow a queue of seconds, were the backend shared.
		if d.Generator.Saturated {
			continue
		}
		if r.MeanMs == nil || want != "retry-naive" && *r.MeanMs > 200 {
			t.Errorf("%s: a mean of %v ms, want little more than 12", want, r.MeanMs)
		}
		switch a := *f.During.AttemptsPerCall; {
		case want == "retry-naive" && a < 2, want != "retry-naive" && (a != 1 || r.Errors == 0):
			t.Errorf("%s: %v attempts per call in the fault, %d errors", want, a, r.Errors)
		}
	}
}

// A sweep on real servers, briefly: as a table, for a plot, and interrupted.
func TestSweep(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mine.json")
	err := os.WriteFile(path, []byte(`{"name":"mine","description":"of mine","backends":1,"rate":50,"requests":100,"timeout":"100ms",
		"serviceTime":[{"constant":{"value":"20ms"}}],"sideBySide":true,"workers":2,"loads":[0.5,3],"criticality":{"critical":1,"sheddable":1}}`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"sweep", "--scenario", path, "--duration", "1s", "--warmup", "0s"}
	code, out, errs := bench(t, append(args, "--policies", "none,shed", "-O", "json")...)
	if code != 0 && code != exitSaturated {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	var d struct {
		Schema   int
		Capacity float64 `json:"capacity_per_s"`
		Points   []report.Point
	}
	if err := json.Unmarshal([]byte(out), &d); err != nil {
		t.Fatalf("%v, of %q", err, out)
	}
	if d.Schema != 1 || d.Capacity != 100 || len(d.Points) != 4 {
		t.Fatalf("schema %d, capacity %v, %d points, want 1, 100, 4", d.Schema, d.Capacity, len(d.Points))
	}
	for i, p := range d.Points {
		if want := []string{"none", "shed"}[i%2]; p.Policy != want || p.Load != []float64{0.5, 3}[i/2] {
			t.Errorf("point %d: %s at %vx", i, p.Policy, p.Load)
		}
		if math.Abs(p.OfferedPerS/(p.Load*100)-1) > 0.4 {
			t.Errorf("%s at %gx: %.0f/s offered, want about %.0f", p.Policy, p.Load, p.OfferedPerS, p.Load*100)
		}
		if p.Calls < 10 || len(p.Classes) != 2 || p.Generator.LagP99Ms <= 0 {
			t.Errorf("%+v, want calls of two classes, and the generator's lag", p)
		}
	}
	code, out, errs = bench(t, append(args, "--policies", "shed", "--loads", "3x", "-O", "csv")...)
	if lines := strings.Split(strings.TrimSpace(out), "\n"); code != 0 && code != exitSaturated || len(lines) != 2 || !strings.HasPrefix(lines[1], "shed,3,") {
		t.Errorf("exit code %d, output %q: %s", code, out, errs)
	}
}

// Bad input: exit 2, the flag, the value and the bound.
func TestUsage(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.json")
	if err := os.WriteFile(bad, []byte(`{"methodConfig":[{"name":[{}],"hedginPolicy":{}}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	faulty := filepath.Join(t.TempDir(), "faulty.json")
	if err := os.WriteFile(faulty, []byte(`{"name":"x","backends":1,"rate":1,"requests":1,"serviceTime":[{"constant":{"value":"1ms"}}],
		"workers":1,"faults":[{"kind":"stall"},{"kind":"error","from":"10s","for":"5s","every":"14s"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, c := range []struct {
		args string
		want []string
	}{
		{"--rate 0", []string{"--rate 0, want more than 0"}},
		{"--rate -3", []string{"--rate -3"}},
		{"--rate NaN", []string{"--rate NaN"}},
		{"--rate lots", []string{"lots", "--rate"}},
		{"--calls 0", []string{"--calls 0, want 1 to 10000000"}},
		{"--calls 5 --duration 5s", []string{"--calls 5 and --duration 5s"}},
		{"--duration 0s", []string{"--duration 0s, want 1ms to 24h"}},
		{"--duration 24h --rate 1000", []string{"86400000 requests, want at most 10000000"}},
		{"--block 1ns", []string{"--block 1ns, want 10ms to 1h"}},
		{"--warmup -1s", []string{"--warmup -1s"}},
		{"--timeout 0s", []string{"--timeout 0s"}},
		{"--arrivals bursts", []string{`--arrivals "bursts", want poisson or uniform`}},
		{"-O xml", []string{`--output "xml", want table or json`}},
		{"--scenario nonesuch", []string{"--scenario nonesuch", "stragglers, bigtable, blackhole, cold-start, error-burst, gc-pause, healthy, hot-key, metastable, outage, overload, sinkhole, skewed, slow-replica, tied"}},
		{"--scenario nonesuch.json", []string{"nonesuch.json"}},
		{"--scenario " + bad, []string{"--scenario", "scenario: methodConfig: unknown key", "scenario: name: missing"}},
		{"--scenario " + faulty, []string{"--scenario", "scenario: faults[0].for: missing", "scenario: faults[1].every: 14s, want at least from + for, 15s", "scenario: workers: 1, want \"sideBySide\": true"}},
		{"--policies nonesuch", []string{`--policies: no policy "nonesuch", want one of none, round_robin`}},
		{"--policies none,none", []string{"--policies: none is named twice"}},
		{"--policies=", []string{"--policies: empty, want names"}},
		{"sweep --policies=", []string{"--policies: empty, want names"}},
		{"--policies " + bad, []string{"--policies: policy bad", "hedginPolicy"}},
		{"--policies nonesuch.json", []string{"nonesuch.json"}},
		{"--nonesuch", []string{"--nonesuch"}},
		{"nonesuch", []string{"nonesuch"}},
		{"compare nonesuch", []string{"nonesuch"}},
		{"--policies none,shed", []string{"--policies: none and shed differ in their server policy", "sideBySide"}},
		{"--otlp nowhere", []string{`--otlp "nowhere"`, "want host:port, http://host:port or https://host:port"}},
		{"--otlp localhost:0", []string{`--otlp "localhost:0": port "0", want 1 to 65535`}},
		{"--otlp=", []string{`--otlp ""`, "want host:port"}},
		{"--otlp localhost:4317 --otlp-ratio 1.5", []string{"--otlp-ratio 1.5, want more than 0, at most 1"}},
		{"--otlp localhost:4317 --otlp-ratio NaN", []string{"--otlp-ratio NaN"}},
		{"--otlp-ratio 0.5", []string{"--otlp-ratio 0.5, want --otlp too"}},
		{"--prometheus=", []string{`--prometheus "", want host:port`}},
		{"--prometheus 9464", []string{`--prometheus "9464"`, "missing port"}},
		{"--prometheus " + taken.Addr().String(), []string{"--prometheus " + strconv.Quote(taken.Addr().String()), "in use"}},
		{"sweep --otlp localhost:4317", []string{"--otlp"}},
		{"sweep nonesuch", []string{"nonesuch"}},
		{"sweep --loads 0", []string{"--loads 0, want 0.01 to 100"}},
		{"sweep --loads 1,lots", []string{"--loads lots, want 0.01 to 100"}},
		{"sweep --loads NaN", []string{"--loads NaN"}},
		{"sweep --duration 10ms", []string{"--duration 10ms, want 1s to 1h"}},
		{"sweep --warmup -1s", []string{"--warmup -1s, want 0s to 1h"}},
		{"sweep -O xml", []string{`--output "xml", want table, json or csv`}},
		{"sweep --scenario nonesuch", []string{"--scenario nonesuch", "overload"}},
		{"sweep --scenario stragglers", []string{"--scenario stragglers: no workers"}},
		{"sweep --scenario metastable", []string{"--scenario metastable: faults that begin or end"}},
		{"sweep --policies none+nonesuch", []string{"--policies: no server policy \"nonesuch\""}},
		{"sweep --policies none,none", []string{"--policies: none is named twice"}},
	} {
		code, out, errs := bench(t, strings.Fields(c.args)...)
		if code != exitUsage || out != "" {
			t.Errorf("%s: exit code %d, output %q, want %d and none", c.args, code, out, exitUsage)
		}
		for _, want := range c.want {
			if !strings.Contains(errs, want) {
				t.Errorf("%s: %q, want %q in it", c.args, errs, want)
			}
		}
		if strings.Contains(errs, "Usage:") {
			t.Errorf("%s: the error is buried in the usage text", c.args)
		}
	}
}

func TestListsAndHelp(t *testing.T) {
	code, out, _ := bench(t, "scenarios")
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	for _, want := range append(scenario.Names(), policyNames()...) {
		if !strings.Contains(out, "  "+want+" ") {
			t.Errorf("no %s in\n%s", want, out)
		}
	}
	code, out, _ = bench(t, "--help")
	if code != 0 || !strings.Contains(out, "How to read the table") || !strings.Contains(out, "--policies") || strings.Contains(out, "serve ") {
		t.Errorf("exit code %d, help\n%s", code, out)
	}
}

// Every policy that is listed, or that a scenario names, can be had.
func TestPolicies(t *testing.T) {
	for _, name := range scenario.Names() {
		for _, p := range named(t, name).Policies {
			if _, err := findPolicy(p); err != nil {
				t.Errorf("scenario %s: %v", name, err)
			}
		}
	}
	for _, name := range policyNames() {
		if p, err := findPolicy(name); err != nil || len(p.opts) == 0 {
			t.Errorf("%s: %d options, %v", name, len(p.opts), err)
		}
	}
}

// Ctrl-C: the report of what there is, and exit code 130.
func TestInterrupt(t *testing.T) {
	for scenario, sig := range map[string]os.Signal{"stragglers": os.Interrupt, "slow-replica": syscall.SIGTERM, "outage": os.Interrupt} {
		d := decode(t, interruptedRun(t, sig, "--scenario", scenario, "--policies", "none", "--rate", "200", "--duration", "10m", "--block", "50ms", "--warmup", "0s", "-O", "json"))
		if !d.Interrupted || d.Runs[0].Calls == 0 {
			t.Errorf("%s, %v: interrupted %v, %d calls", scenario, sig, d.Interrupted, d.Runs[0].Calls)
		}
	}
	var d struct {
		Interrupted bool
		Points      []report.Point
	}
	out := interruptedRun(t, os.Interrupt, "sweep", "--policies", "none", "--loads", "0.1", "--duration", "10m", "--warmup", "0s", "-O", "json")
	if err := json.Unmarshal([]byte(out), &d); err != nil || !d.Interrupted || len(d.Points) != 1 || d.Points[0].Calls == 0 {
		t.Errorf("%v, of %s, want one point, interrupted", err, out)
	}
}

// interruptedRun runs the program, sends it the signal after six blocks, and returns its
// output.
func interruptedRun(t *testing.T, sig os.Signal, args ...string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), "BENCH_TEST_MAIN=1", "BENCH_PROGRESS_EVERY=1ns")
	var out bytes.Buffer
	cmd.Stdout = &out
	errs, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(errs)
	for n := 0; n < 6 && lines.Scan(); n++ { // six blocks have been sent
		if n == 5 {
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
		}
	}
	for lines.Scan() { // to its end
	}
	err = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != exitInterrupted {
		t.Errorf("%v, %v: exit code %d (%v), want %d", args, sig, code, err, exitInterrupted)
	}
	return out.String()
}
