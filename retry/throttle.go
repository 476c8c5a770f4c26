package retry

import (
	"errors"
	"fmt"
	"math"
	"sync/atomic"
)

// maxMaxTokens is gRFC A6's: maxTokens "must be in the range (0, 1000]".
const maxMaxTokens = 1000

// ThrottleConfig is the retryThrottling of a gRPC service config. Both values
// count to a thousandth: "Decimal places beyond 3 are ignored" - A6.
type ThrottleConfig struct {
	// MaxTokens is the number of tokens to begin with and the most there can be,
	// in (0, 1000]. Half of it in failures, none of them made good by successes,
	// stops extra attempts. No default.
	MaxTokens float64

	// TokenRatio is the number of tokens that a success brings, at least 0.001
	// (A6 wants more than 0; what is cut to 0 could never recover). At 0.1 ten successes
	// make good for one failure. No default.
	TokenRatio float64
}

// Throttle stops extra attempts while failures outweigh successes. It is the
// throttling of gRFC A6: a token count starts at MaxTokens and stays within [0,
// MaxTokens]; a failure takes 1, a success brings TokenRatio; extra attempts are
// allowed while the count is above MaxTokens/2. So they go on as long as failures
// are rarer than TokenRatio to one success, and stop after MaxTokens/2 more of them.
//
// First attempts are never throttled, and always counted: [Throttle.Success] and
// [Throttle.Failure] are called for every attempt that ends by itself. A failure
// is a retryable (non-fatal) status code, or any with a pushback that says not to
// retry; cancelled attempts are neither.
//
// A Throttle is made by [NewThrottle] and is safe for concurrent use.
//
// Source: https://github.com/grpc/proposal/blob/master/A6-client-retries.md#throttling-retry-attempts-and-hedged-rpcs
type Throttle struct {
	limit, ratio int64 // thousandths of a token
	// tokens is in thousandths, as in grpc-java, so that a thousand successes at
	// 0.001 are exactly one token. An atomic because every RPC ends here.
	tokens atomic.Int64
}

// NewThrottle returns a throttle with all its tokens. All faults of cfg are
// reported together.
func NewThrottle(cfg ThrottleConfig) (*Throttle, error) {
	var faults []error
	t := &Throttle{limit: floorThousandths(cfg.MaxTokens), ratio: floorThousandths(cfg.TokenRatio)}
	switch {
	case !(cfg.MaxTokens > 0 && cfg.MaxTokens <= maxMaxTokens):
		faults = append(faults, fmt.Errorf("retry: throttle maxTokens %v, want (0, %d]", cfg.MaxTokens, maxMaxTokens))
	case t.limit == 0:
		faults = append(faults, fmt.Errorf("retry: throttle maxTokens %v, want at least 0.001", cfg.MaxTokens))
	}
	switch {
	case !(cfg.TokenRatio > 0) || math.IsInf(cfg.TokenRatio, 1):
		faults = append(faults, fmt.Errorf("retry: throttle tokenRatio %v, want (0, +Inf)", cfg.TokenRatio))
	case t.ratio == 0:
		faults = append(faults, fmt.Errorf("retry: throttle tokenRatio %v, want at least 0.001", cfg.TokenRatio))
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	t.tokens.Store(t.limit)
	return t, nil
}

// floorThousandths cuts x to three decimals. A ratio above maxMaxTokens fills the
// count in one success, whatever it is.
func floorThousandths(x float64) int64 {
	if !(x > 0) {
		return 0
	}
	// The slack forgives decimals that float64 holds a hair too low: 1.001.
	return int64(math.Floor(min(x, maxMaxTokens)*1000 + 1e-7))
}

// Allow reports whether an extra attempt may be sent now.
func (t *Throttle) Allow() bool {
	// "If token_count is less than or equal to the threshold, defined to be
	// (maxTokens / 2), then RPCs will not be retried" - A6.
	return 2*t.tokens.Load() > t.limit
}

// Success counts an attempt that succeeded.
func (t *Throttle) Success() { t.add(t.ratio) }

// Failure counts an attempt that failed.
func (t *Throttle) Failure() { t.add(-1000) }

func (t *Throttle) add(n int64) {
	for {
		old := t.tokens.Load()
		next := min(max(old+n, 0), t.limit)
		// All is well most of the time, and then nothing is written.
		if next == old || t.tokens.CompareAndSwap(old, next) {
			return
		}
	}
}

// Tokens is the token count, in [0, MaxTokens].
func (t *Throttle) Tokens() float64 { return float64(t.tokens.Load()) / 1000 }
