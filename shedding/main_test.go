package shedding

import (
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const ms = time.Millisecond

// checkRefusal holds what every refusal is.
func checkRefusal(t *testing.T, err error, reason, method string, after time.Duration) {
	t.Helper()
	if !outcome.IsRefusal(err) || status.Code(err) != codes.ResourceExhausted {
		t.Errorf("%v, want a refusal by RESOURCE_EXHAUSTED", err)
	}
	var info *errdetails.ErrorInfo
	for _, d := range status.Convert(err).Details() {
		if i, ok := d.(*errdetails.ErrorInfo); ok {
			info = i
		}
	}
	if info.GetDomain() != "bobtail" || info.GetReason() != reason || info.GetMetadata()["method"] != method {
		t.Errorf("%v: %v, want reason %s of %q", err, info, reason, method)
	}
	if d, ok := outcome.RetryDelay(err); d != after || ok != (after > 0) {
		t.Errorf("%v: RetryInfo %v, want %v", err, d, after)
	}
}
