package fleet

import (
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// A backend reports its load with each answer if it is told to, and else does not.
func TestORCA(t *testing.T) {
	t.Setenv("FLEET_TEST", "serve")
	for _, on := range []bool{true, false} {
		f, err := Start(t.Context(), Config{Scenario: tiny, Command: self(), Server: Server{ORCA: on}})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cc, err := f.Dial()
		if err != nil {
			t.Fatal(err)
		}
		defer cc.Close()
		var trailer metadata.MD
		if _, err := kvpb.NewKVClient(cc).Get(t.Context(), &kvpb.Request{}, grpc.Trailer(&trailer)); err != nil {
			t.Fatal(err)
		}
		if got := trailer["endpoint-load-metrics-bin"]; (len(got) == 1 && got[0] != "") != on {
			t.Errorf("reports on: %v, report %q", on, got)
		}
	}
}
