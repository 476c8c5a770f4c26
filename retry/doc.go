// Package retry holds what bounds extra attempts: hedges and retries alike.
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
// The rest of the package, retryPolicy itself (backoff with jitter, which
// failures are retryable, the interceptors), comes with the next release.
package retry
