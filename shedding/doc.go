// Package shedding refuses work that there is no room for, before it costs anything.
//
// On the client's side:
//
//   - [RateLimit] keeps calls to a rate. A call waits for its turn, and is refused at
//     once when its turn would come too late for its deadline: nobody waits in vain.
//   - [Bulkhead] keeps the number of calls in flight to a bound, so that one slow
//     method cannot take all the memory and goroutines that its callers share.
//
// Both can be used without gRPC; [UnaryClientInterceptor] and [StreamClientInterceptor]
// install them for each method of a connection. They own no goroutine and need no Close.
//
// The server's side, load shedding itself (a limit that follows latency, a queue by
// criticality, quotas of tenants), is to come in this package.
package shedding
