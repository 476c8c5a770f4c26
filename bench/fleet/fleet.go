// Package fleet runs a scenario's backends: real gRPC servers on loopback TCP,
// in child processes of this same binary, so that their scheduling and their
// garbage are not the generator's.
//
// A child lives while its standard input is open. The kernel closes that when
// the parent ends, however it ends: no child outlives a crash or a SIGKILL.
package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
)

// Config says what to start.
type Config struct {
	Scenario *scenario.Scenario
	Seed     uint64
	// Command is the child's command line, e.g. os.Executable() and "serve".
	Command []string
	// Server is what is installed in each backend's server.
	Server Server
	// Processes is how many children share the backends; default 1.
	Processes int
}

// Fleet is the backends, running. Close ends them.
type Fleet struct {
	addrs    []string
	children []*child
	died     chan error
	closing  chan struct{}
	close    sync.Once
}

// Start starts the backends and returns when all listen, or ctx ends.
func Start(ctx context.Context, cfg Config) (*Fleet, error) {
	doc, err := json.Marshal(cfg.Scenario)
	if err != nil {
		return nil, fmt.Errorf("fleet: %w", err)
	}
	n := cfg.Scenario.Backends
	procs := min(max(cfg.Processes, 1), n)
	f := &Fleet{addrs: make([]string, n), died: make(chan error, procs), closing: make(chan struct{})}
	for p := range procs {
		var mine []int
		for b := p; b < n; b += procs {
			mine = append(mine, b)
		}
		c, addrs, err := spawn(ctx, cfg.Command, Orders{Scenario: doc, Seed: cfg.Seed, Backends: mine, Server: cfg.Server})
		if err != nil {
			f.Close()
			return nil, err
		}
		f.children = append(f.children, c)
		for i, b := range mine {
			f.addrs[b] = addrs[i]
		}
		go f.watch(c)
	}
	return f, nil
}

// Died yields an error if a backend ends before Close.
func (f *Fleet) Died() <-chan error { return f.died }

func (f *Fleet) watch(c *child) {
	<-c.ended
	select {
	case <-f.closing:
	default:
		f.died <- fmt.Errorf("fleet: a backend process ended: %w", c.failure())
	}
}

// Dial connects to all backends.
func (f *Fleet) Dial(opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	r := manual.NewBuilderWithScheme("bench")
	var st resolver.State
	for _, a := range f.addrs {
		st.Endpoints = append(st.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: a}}})
	}
	r.InitialState(st)
	opts = append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithResolvers(r),
		grpc.WithNoProxy(), // the backends are here, whatever the environment says
	}, opts...)
	return grpc.NewClient("bench:///kv", opts...)
}

// Close ends the children and waits for them.
func (f *Fleet) Close() {
	f.close.Do(func() {
		close(f.closing)
		for _, c := range f.children {
			c.stdin.Close()
		}
		for _, c := range f.children {
			c.reap()
		}
	})
}

// child is one process.
type child struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	stderr tail
	ended  chan struct{} // closed once the process is reaped
	err    error         // of its end; read after ended
}

// patience is how long a child may take to say hello or to end: both take
// milliseconds, a loaded machine a hundred times that.
const patience = 10 * time.Second

func spawn(ctx context.Context, command []string, o Orders) (*child, []string, error) {
	c := &child{cmd: exec.Command(command[0], command[1:]...), ended: make(chan struct{})}
	c.cmd.Stderr = &c.stderr
	stdin, err := c.cmd.StdinPipe()
	if err != nil {
		return nil, nil, fmt.Errorf("fleet: %w", err)
	}
	c.stdin = stdin
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, nil, fmt.Errorf("fleet: %w", err)
	}
	if err := c.cmd.Start(); err != nil {
		return nil, nil, fmt.Errorf("fleet: start %s: %w", command[0], err)
	}

	// The exchange blocks on pipes; killing the child breaks them.
	type answer struct {
		hello Hello
		err   error
	}
	got := make(chan answer, 1)
	go func() {
		var a answer
		if a.err = json.NewEncoder(stdin).Encode(o); a.err == nil {
			a.err = json.NewDecoder(stdout).Decode(&a.hello)
		}
		got <- a
		io.Copy(io.Discard, stdout) //nolint:errcheck // until the child ends
		c.err = c.cmd.Wait()        // only now: Wait closes the pipe that is read here
		close(c.ended)
	}()

	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	var a answer
	select {
	case a = <-got:
	case <-ctx.Done():
		a.err = ctx.Err()
	case <-timeout.C:
		a.err = fmt.Errorf("no answer in %v", patience)
	}
	if a.err == nil && len(a.hello.Addrs) != len(o.Backends) {
		a.err = fmt.Errorf("%d addresses, want %d", len(a.hello.Addrs), len(o.Backends))
	}
	if a.err != nil {
		stdin.Close()
		c.cmd.Process.Kill() //nolint:errcheck // it may have ended by itself
		<-c.ended
		return nil, nil, fmt.Errorf("fleet: backend process did not start: %w%s", a.err, c.stderr.quoted())
	}
	return c, a.hello.Addrs, nil
}

// reap waits for the child, whose input is closed, and kills one that will not go.
func (c *child) reap() {
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	select {
	case <-c.ended:
	case <-timeout.C:
		c.cmd.Process.Kill() //nolint:errcheck // it may have ended by itself
		<-c.ended
	}
}

func (c *child) failure() error {
	err := c.err
	if err == nil {
		err = errors.New("exit status 0")
	}
	return fmt.Errorf("%w%s", err, c.stderr.quoted())
}

// tail keeps the last of what a child says on its standard error.
type tail struct {
	mu  sync.Mutex // guards buf
	buf []byte
}

func (t *tail) Write(p []byte) (int, error) {
	const most = 4096
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if len(t.buf) > most {
		t.buf = t.buf[len(t.buf)-most:]
	}
	return len(p), nil
}

func (t *tail) quoted() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.buf) == 0 {
		return ""
	}
	return "; it said: " + string(bytes.TrimSpace(t.buf))
}
