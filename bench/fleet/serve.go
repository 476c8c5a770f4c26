package fleet

import (
	"context"
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
)

// Orders are what a child is told, as one JSON document on its standard input.
// The input then stays open: its end is the parent's end, and the child's.
type Orders struct {
	Scenario json.RawMessage `json:"scenario"`
	Seed     uint64          `json:"seed"`
	// Backends are the indexes this child plays.
	Backends []int `json:"backends"`
	// Server is what is installed in their servers.
	Server Server `json:"server"`
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
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	ended := make(chan error, len(o.Backends)+1) // of a server, of the input
	for _, index := range o.Backends {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return fmt.Errorf("fleet: backend %d: %w", index, err)
		}
		addr := lis.Addr().String()
		hello.Addrs = append(hello.Addrs, addr)
		b := NewBackend(sc, o.Seed, index, clk.Sleep)
		servers.Go(func() {
			err := Play(ctx, b, o.Server, lis, func() (net.Listener, error) { return net.Listen("tcp", addr) },
				// A half-open connection would hold Stop, and so an orphan, for two minutes.
				grpc.ConnectionTimeout(patience/2))
			if err != nil {
				ended <- fmt.Errorf("fleet: backend %d: %w", index, err)
			}
		})
	}
	if err := json.NewEncoder(out).Encode(hello); err != nil {
		return fmt.Errorf("fleet: say hello: %w", err)
	}
	go func() {
		_, err := io.Copy(io.Discard, io.MultiReader(dec.Buffered(), in))
		if err != nil && !errors.Is(err, os.ErrClosed) {
			ended <- fmt.Errorf("fleet: wait for the parent: %w", err)
		}
		ended <- nil
	}()
	return <-ended
}

// RelaxGC lets the heap grow to five times what lives before it is collected.
// On two cores a collection takes one from the other side for milliseconds: a
// tail that is ours and no policy's. What lives here is a few MB.
func RelaxGC() { debug.SetGCPercent(400) }
