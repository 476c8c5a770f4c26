package bobtail_test

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/bobtail-rpc/bobtail"

// policies are the packages that stand side by side below the root and know
// nothing of each other.
var policies = []string{"retry", "hedging", "breaker", "loadbalance", "shedding", "fanout"}

// foundations are the packages that stand below the policies.
var foundations = []string{"internal/attempt", "internal/outcome", "internal/latency", "internal/permethod", "internal/rpc", "internal/strictjson"}

// An arrow says that a non-test file of package from imports package to. Packages
// of this module are named by their folder ("." is the root), others in full.
type arrow struct{ from, to string }

// broken says which rule of the house an arrow breaks, or "". Imports go down only:
//
//	bench, examples -> root -> policies -> internal/{attempt, outcome, latency, permethod, rpc, strictjson}
//
// and the root alone has telemetry beside the policies.
func broken(a arrow) string {
	helper := func(p string) bool { return strings.HasPrefix(p, "internal/grpctest") || p == "internal/testenv" }
	top := func(p string) string { first, _, _ := strings.Cut(p, "/"); return first }
	if strings.HasPrefix(a.to, "go.opentelemetry.io/") {
		if top(a.from) != "bench" && top(a.from) != "examples" && a.from != "internal/telemetry" {
			return "internal/telemetry is the only importer of OpenTelemetry in the library"
		}
		return ""
	}
	if a.to == "testing" || strings.HasPrefix(a.to, "testing/") || strings.HasPrefix(a.to, "pgregory.net/") || strings.HasPrefix(a.to, "go.uber.org/") {
		if top(a.from) != "bench" && !helper(a.from) {
			return "what tests need is no part of the library"
		}
		return ""
	}
	if strings.Contains(top(a.to), ".") && a.to != "." {
		return "" // another module: the linked-modules test looks at these
	}
	std := !slices.Contains([]string{".", "bench", "examples", "internal", "tools"}, top(a.to)) && !slices.Contains(policies, top(a.to))
	if std {
		return ""
	}
	switch {
	case top(a.from) == "bench" || top(a.from) == "examples":
		return ""
	case helper(a.from):
		return "" // a test helper: nothing but tests and bench may import it
	case helper(a.to):
		return "internal/grpctest and internal/testenv are for tests and bench"
	case a.from == ".":
		if slices.Contains(policies, top(a.to)) || slices.Contains(foundations, a.to) || a.to == "internal/telemetry" {
			return ""
		}
		return "the root imports policies, foundations and internal/telemetry"
	case slices.Contains(policies, top(a.from)):
		if top(a.to) == top(a.from) || slices.Contains(foundations, a.to) {
			return ""
		}
		return "a policy package imports internal/{attempt, outcome, latency, permethod, rpc, strictjson} and nothing else of the house"
	case slices.Contains(foundations, a.from) || a.from == "internal/telemetry":
		return "a foundation imports nothing of the house"
	}
	return "a package that the house does not know: give it its place here and in the design"
}

// arrows reads the imports of every non-test Go file below root. Test files may
// import more (a policy's test may drive a balancer): they are nobody's dependency.
func arrows(root string) ([]arrow, error) {
	var all []arrow
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if file != root && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "testdata") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		from, err := filepath.Rel(root, filepath.Dir(file))
		if err != nil {
			return err
		}
		for _, spec := range f.Imports {
			to, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if to == module {
				to = "."
			}
			all = append(all, arrow{filepath.ToSlash(from), strings.TrimPrefix(to, module+"/")})
		}
		return nil
	})
	return all, err
}

func TestImportsGoDown(t *testing.T) {
	all, err := arrows(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		if why := broken(a); why != "" {
			t.Errorf("%s imports %s: %s", a.from, a.to, why)
		}
	}
	// The walk has seen the house.
	for _, want := range []arrow{{".", "hedging"}, {".", "google.golang.org/grpc"}, {"hedging", "internal/attempt"}} {
		if !slices.Contains(all, want) {
			t.Errorf("%s does not import %s, or the walk is blind", want.from, want.to)
		}
	}
}

func TestImportRules(t *testing.T) {
	for _, test := range []struct {
		from, to string
		ok       bool
	}{
		{".", "hedging", true},
		{".", "internal/latency", true},
		{".", "internal/telemetry", true},
		{".", "context", true},
		{".", "google.golang.org/grpc", true},
		{".", "bench", false},
		{".", "internal/grpctest", false},
		{"retry", "internal/testenv", false},
		{".", "go.opentelemetry.io/otel/metric", false},
		{".", "pgregory.net/rapid", false},
		{"hedging", "internal/attempt", true},
		{"hedging", "retry", false},
		{"hedging", ".", false},
		{"hedging", "internal/telemetry", false},
		{"hedging", "testing/synctest", false},
		{"loadbalance", "hedging", false},
		{"loadbalance/sub", "loadbalance", true},
		{"retry", "sync/atomic", true},
		{"fanout", "bench/load", false},
		{"internal/latency", "math", true},
		{"internal/latency", "internal/attempt", false},
		{"loadbalance", "internal/strictjson", true},
		{"internal/strictjson", "internal/latency", false},
		{"internal/attempt", "hedging", false},
		{"internal/telemetry", "go.opentelemetry.io/otel", true},
		{"internal/telemetry", "hedging", false},
		{"internal/grpctest", "testing", true},
		{"internal/testenv", "testing", true},
		{"internal/grpctest", "internal/attempt", true},
		{"internal/surprise", "hedging", false},
		{"bench/load", ".", true},
		{"bench/load", "internal/grpctest/kvpb", true},
		{"examples/quickstart", ".", true},
	} {
		if why := broken(arrow{test.from, test.to}); (why == "") != test.ok {
			t.Errorf("%s imports %s: %q, want allowed %v", test.from, test.to, why, test.ok)
		}
	}
}

// linked are the modules that a program which imports the library may link.
var linked = []string{
	module,
	"google.golang.org/grpc",
	"google.golang.org/protobuf",
	"google.golang.org/genproto/googleapis/rpc",
	"github.com/sony/gobreaker/v2",
	"golang.org/x/time",
	"go.opentelemetry.io/otel", // the API
	"go.opentelemetry.io/otel/metric",
	"go.opentelemetry.io/otel/trace",
	// What grpc needs.
	"golang.org/x/net", "golang.org/x/sys", "golang.org/x/text",
	// What grpc's package orca needs: load reports.
	"github.com/cncf/xds/go", "github.com/envoyproxy/protoc-gen-validate",
	// What the OpenTelemetry API needs.
	"go.opentelemetry.io/auto/sdk", "github.com/go-logr/logr", "github.com/go-logr/stdr", "github.com/cespare/xxhash/v2",
}

// strangers returns the modules of listing, lines of "module package", that are
// not in linked, each with one of its packages.
func strangers(listing string) []string {
	found := map[string]string{}
	for line := range strings.Lines(listing) {
		mod, pkg, ok := strings.Cut(strings.TrimSpace(line), " ")
		if ok && !slices.Contains(linked, mod) && found[mod] == "" {
			found[mod] = pkg
		}
	}
	var all []string
	for mod, pkg := range found {
		all = append(all, fmt.Sprintf("%s (for %s)", mod, pkg))
	}
	slices.Sort(all)
	return all
}

func TestLibraryLinksLittle(t *testing.T) {
	packages := []string{"."}
	for _, p := range policies {
		if _, err := os.Stat(p); err == nil {
			packages = append(packages, "./"+path.Clean(p)+"/...")
		}
	}
	cmd := exec.Command("go", append([]string{"list", "-deps", "-f", "{{with .Module}}{{.Path}} {{end}}{{.ImportPath}}"}, packages...)...)
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=readonly", "GOPROXY=off", "GOWORK=off")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, stderr.String())
	}
	for _, s := range strangers(string(out)) {
		t.Errorf("the library links %s", s)
	}
	if !strings.Contains(string(out), "google.golang.org/grpc google.golang.org/grpc\n") {
		t.Error("go list does not show grpc: the listing is blind")
	}
}

func TestStrangers(t *testing.T) {
	listing := "errors\ngoogle.golang.org/grpc google.golang.org/grpc/codes\n" +
		"github.com/envoyproxy/go-control-plane github.com/envoyproxy/go-control-plane/x\n" +
		"github.com/envoyproxy/go-control-plane github.com/envoyproxy/go-control-plane/y\n" +
		"go.opentelemetry.io/otel/sdk go.opentelemetry.io/otel/sdk/trace\n"
	got := strings.Join(strangers(listing), ", ")
	want := "github.com/envoyproxy/go-control-plane (for github.com/envoyproxy/go-control-plane/x), go.opentelemetry.io/otel/sdk (for go.opentelemetry.io/otel/sdk/trace)"
	if got != want {
		t.Errorf("strangers: %s\nwant %s", got, want)
	}
}
