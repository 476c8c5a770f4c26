package fleet

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// This test binary also plays the child, and a parent that is killed.
func TestMain(m *testing.M) {
	switch os.Getenv("FLEET_TEST") {
	case "":
		goleak.VerifyTestMain(m)
	case "serve":
		if err := Serve(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "mute":
		fmt.Fprintln(os.Stderr, "no voice")
		os.Exit(3)
	case "parent":
		os.Setenv("FLEET_TEST", "serve")
		f, err := Start(context.Background(), Config{Scenario: tiny, Command: self(), Processes: 2})
		if err != nil {
			panic(err)
		}
		for _, a := range f.addrs {
			fmt.Println(a)
		}
		select {}
	}
}

var tiny = &scenario.Scenario{
	Name: "tiny", Backends: 3, Fanout: 1, Rate: 1, Arrivals: "poisson", Requests: 1, Timeout: scenario.Duration(time.Second),
	ServiceTime: []scenario.Component{{Weight: 1, Constant: &scenario.Constant{Value: scenario.Duration(time.Millisecond)}}},
}

func self() []string {
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return []string{exe}
}

func start(t *testing.T, processes int) *Fleet {
	t.Helper()
	t.Setenv("FLEET_TEST", "serve")
	f, err := Start(t.Context(), Config{Scenario: tiny, Seed: 1, Command: self(), Processes: processes})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f
}

// Backends in child processes answer, each under its own index.
func TestFleet(t *testing.T) {
	for _, processes := range []int{1, 2, 9} {
		f := start(t, processes)
		if want := min(processes, 3); len(f.children) != want {
			t.Errorf("%d processes, want %d", len(f.children), want)
		}
		cc, err := f.Dial()
		if err != nil {
			t.Fatal(err)
		}
		res, err := kvpb.NewKVClient(cc).Get(t.Context(), &kvpb.Request{Id: 9})
		if err != nil || res.Id != 9 || res.Backend == "" {
			t.Errorf("%v, %v", res, err)
		}
		cc.Close()
		f.Close()
		for _, c := range f.children {
			if c.err != nil {
				t.Errorf("a child ended with %v", c.err)
			}
		}
		select {
		case err := <-f.Died():
			t.Errorf("Close is told as a death: %v", err)
		default:
		}
		f.Close() // harmless
	}
}

// A backend that dies is noticed.
func TestDied(t *testing.T) {
	f := start(t, 1)
	if err := f.children[0].cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-f.Died(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("%v, want that it was killed", err)
	}
}

// A child that fails says why; an interrupt while starting ends it.
func TestStartFails(t *testing.T) {
	t.Setenv("FLEET_TEST", "mute")
	_, err := Start(t.Context(), Config{Scenario: tiny, Command: self()})
	if err == nil || !strings.Contains(err.Error(), "no voice") {
		t.Errorf("%v, want what the child said", err)
	}
	if _, err := Start(t.Context(), Config{Scenario: tiny, Command: []string{"/nonexistent"}}); err == nil {
		t.Error("started a program that is not there")
	}
	t.Setenv("FLEET_TEST", "serve")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	// Whether the hello or the interrupt is seen first is the scheduler's choice.
	if f, err := Start(ctx, Config{Scenario: tiny, Command: self()}); err == nil {
		f.Close()
	} else if !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want Canceled", err)
	}
	bad := *tiny
	bad.Backends, bad.Rate = 1, -1
	if _, err := Start(t.Context(), Config{Scenario: &bad, Command: self()}); err == nil || !strings.Contains(err.Error(), "scenario: rate: ") {
		t.Errorf("%v, want the child's complaint", err)
	}
}

// When the parent is killed outright, its children end by themselves: their
// connections close.
func TestOrphans(t *testing.T) {
	parent := exec.Command(self()[0])
	parent.Env = append(os.Environ(), "FLEET_TEST=parent")
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	var conns []*grpc.ClientConn
	lines := bufio.NewScanner(out)
	for range tiny.Backends {
		if !lines.Scan() {
			t.Fatal("the parent did not start its children")
		}
		c, err := grpc.NewClient(lines.Text(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := kvpb.NewKVClient(c).Get(t.Context(), &kvpb.Request{}); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	parent.Wait() //nolint:errcheck // it was killed
	for _, c := range conns {
		c.WaitForStateChange(t.Context(), connectivity.Ready)
	}
}

// The child ends with its input, and refuses orders that it does not understand.
func TestServe(t *testing.T) {
	doc, err := json.Marshal(tiny)
	if err != nil {
		t.Fatal(err)
	}
	in, orders := io.Pipe()
	hello, out := io.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- Serve(in, out) }()
	if err := json.NewEncoder(orders).Encode(Orders{Scenario: doc, Backends: []int{2, 0}}); err != nil {
		t.Fatal(err)
	}
	var h Hello
	if err := json.NewDecoder(hello).Decode(&h); err != nil || len(h.Addrs) != 2 || !strings.HasPrefix(h.Addrs[0], "127.0.0.1:") {
		t.Errorf("%+v, %v, want two addresses on loopback", h, err)
	}
	orders.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "{", `{"scenario":{}}`} {
		if err := Serve(strings.NewReader(bad), io.Discard); err == nil {
			t.Errorf("orders %q were accepted", bad)
		}
	}
}
