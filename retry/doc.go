// Package retry tries failed calls again, and bounds what that costs.
//
// A [Retrier] has the retries of gRFC A6 for the calls of one method: a capped
// exponential backoff with jitter ([Backoff]), which failures are retryable, the server's
// pushback obeyed to the letter, and what A6 lacks: google.rpc.RetryInfo as a minimum, a
// timeout for each attempt, no wait that leaves less than half of the answers time, and
// retries of what provably never reached a server whatever the code list says.
// [UnaryClientInterceptor] and [StreamClientInterceptor] install it in one line; [Do]
// needs no gRPC.
//
// Two things bound extra attempts, hedges and retries alike:
//
//   - [Budget] bounds load. Each first attempt pays in a fraction, each extra
//     attempt takes out one, and two bounds hold exactly at any rate of calls.
//   - [Throttle] reacts to failure. It is the retryThrottling of gRFC A6: when
//     failures outweigh successes, no extra attempts until they no longer do.
//
// Both are kept per target, are safe for concurrent use, start no goroutine and
// read no clock. They stand beside each other: the budget alone would let
// 5% of extra load onto a server that is down, the throttle alone lets a slow
// but successful server be hedged without limit.
//
// # Across layers
//
// Layers that each make 3 attempts multiply: 9 at the second, 243 at the fifth. So a call
// made under the context of a server that serves an extra attempt, as its incoming
// metadata says, gets no extra attempts of its own. Attempts after the first carry
// grpc-previous-rpc-attempts (A6) and bobtail-attempt: retry.
//
// # Defaults
//
// There are hardly any: MaxAttempts, the backoff and the codes say what a service can bear,
// which nobody else knows. The jitter is full, because by the simulation that the field
// refers to (see [Jitter]) it makes the fewest attempts.
package retry
