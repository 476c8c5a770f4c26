package experiment

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/bench/report"
	"github.com/bobtail-rpc/bobtail/bench/scenario"
	"github.com/bobtail-rpc/bobtail/internal/grpctest"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// Failures are told apart: a refusal of bobtail's by its reason, wherever it was made; a
// deadline that has passed, unless that is a refusal; and all others.
func TestTally(t *testing.T) {
	refused := errors.New("no")
	synctest.Test(t, func(t *testing.T) {
		f := grpctest.NewFleet(t, 1, grpctest.Handlers{
			Unary: func(ctx context.Context, _ *grpctest.Backend, req *kvpb.Request) (*kvpb.Response, error) {
				switch req.Id % 10 {
				case 0:
					return nil, (&outcome.Refusal{Cause: refused, Code: codes.Unavailable, Reason: "OVERLOADED"}).GRPCStatus().Err()
				case 1:
					return nil, (&outcome.Refusal{Cause: refused, Code: codes.DeadlineExceeded, Reason: "DEADLINE_HOPELESS"}).GRPCStatus().Err()
				case 2:
					<-ctx.Done()
					return nil, status.FromContextError(ctx.Err()).Err()
				case 3:
					st, err := status.New(codes.Unavailable, "not by bobtail").WithDetails(&errdetails.ErrorInfo{Domain: "example.com", Reason: "TIRED"})
					if err != nil {
						t.Error(err)
					}
					return nil, st.Err()
				}
				return &kvpb.Response{Id: req.Id}, nil
			},
		})
		c := Config{
			Scenario: &scenario.Scenario{
				Name: "test", Rate: 100, Arrivals: "uniform", Requests: 200, Fanout: 1, Timeout: scenario.Duration(time.Second),
				Criticality: map[string]float64{"critical": 1, "sheddable": 0},
			},
			Seed: 1, Block: 5 * time.Second, Sleep: sleep, Arms: []Arm{{"x", f.Dial()}},
		}
		r, err := Run(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		b := r.Policies[0].Blocks[0]
		if b.Errors != 80 || b.Late != 20 || len(b.Latencies) != 120 {
			t.Errorf("%d errors, %d late, %d answers, want 80, 20, 120", b.Errors, b.Late, len(b.Latencies))
		}
		if diff := cmp.Diff(map[string]int{"OVERLOADED": 20, "DEADLINE_HOPELESS": 20}, b.Refused); diff != "" {
			t.Errorf("refused (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(map[string]report.Class{"critical": {Calls: 200, OK: 120}}, b.Classes); diff != "" {
			t.Errorf("classes (-want +got):\n%s", diff)
		}
	})
	// One that was made here.
	if got := refusal(&outcome.Refusal{Cause: refused, Code: codes.Unavailable, Reason: "THROTTLED"}); got != "THROTTLED" {
		t.Errorf("reason %q, want THROTTLED", got)
	}
	if got := refusal(context.Canceled); got != "" {
		t.Errorf("reason %q of no status", got)
	}
}
