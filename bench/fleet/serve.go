package fleet

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"

	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail/bench/clock"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// Orders are what a child is told, as one JSON document on its standard input.
// The input then stays open: its end is the parent's end, and the child's.
type Orders struct {
	Scenario json.RawMessage `json:"scenario"`
	Seed     uint64          `json:"seed"`
	// Backends are the indexes this child plays.
	Backends []int `json:"backends"`
}

// Hello is the child's answer on its standard output, once it listens.
type Hello struct {
	// Addrs are the addresses of the backends, in the order they were named.
	Addrs []string `json:"addrs"`
}

// Serve is the child: it reads its orders, serves, and returns when in ends.
func Serve(in io.Reader, out io.Writer) error {
	// Ctrl-C reaches every process of the terminal; the report needs the backends a little longer.
	signal.Ignore(os.Interrupt)
	RelaxGC()
	dec := json.NewDecoder(in)
	var o Orders
	if err := dec.Decode(&o); err != nil {
		return fmt.Errorf("fleet: read orders: %w", err)
	}
	sc, err := scenario.Decode(o.Scenario)
	if err != nil {
		return err
	}
	clk, err := clock.New()
	if err != nil {
		return err
	}
	defer clk.Close()

	var hello Hello
	var servers sync.WaitGroup
	defer servers.Wait()
	for _, index := range o.Backends {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return fmt.Errorf("fleet: backend %d: %w", index, err)
		}
		// A half-open connection would hold Stop, and so an orphan, for two minutes.
		srv := grpc.NewServer(grpc.ConnectionTimeout(patience / 2))
		kvpb.RegisterKVServer(srv, NewBackend(sc, o.Seed, index, clk.Sleep))
		servers.Go(func() { srv.Serve(lis) }) //nolint:errcheck // it returns when stopped
		defer srv.Stop()
		hello.Addrs = append(hello.Addrs, lis.Addr().String())
	}
	if err := json.NewEncoder(out).Encode(hello); err != nil {
		return fmt.Errorf("fleet: say hello: %w", err)
	}
	if _, err := io.Copy(io.Discard, io.MultiReader(dec.Buffered(), in)); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("fleet: wait for the parent: %w", err)
	}
	return nil
}

// RelaxGC lets the heap grow to five times what lives before it is collected.
// On two cores a collection takes one from the other side for milliseconds: a
// tail that is ours and no policy's. What lives here is a few MB.
func RelaxGC() { debug.SetGCPercent(400) }
