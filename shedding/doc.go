// Package shedding refuses work that there is no room for, before it costs anything.
//
// # The client's side
//
//   - [RateLimit] keeps calls to a rate. A call waits for its turn, and is refused at
//     once when its turn would come too late for its deadline: nobody waits in vain.
//   - [Bulkhead] keeps the number of calls in flight to a bound, so that one slow
//     method cannot take all the memory and goroutines that its callers share.
//
// Both can be used without gRPC; [UnaryClientInterceptor] and [StreamClientInterceptor]
// install them for each method of a connection. They own no goroutine and need no Close.
//
// # The server's side
//
// A [Server] admits calls:
//
//	s, err := shedding.NewServer(shedding.ServerConfig{Queue: &shedding.QueueConfig{}})
//	grpc.NewServer(
//		grpc.ChainUnaryInterceptor(s.UnaryServerInterceptor()),
//		grpc.ChainStreamInterceptor(s.StreamServerInterceptor()),
//		grpc.InTapHandle(s.TapHandle), // may be left out: refusals cost more then
//	)
//
// A call is refused, in this order: by the tap, if its level is below the cursor; if the
// server drains; if its tenant is over its quota; if its deadline will be missed; if its level is
// below the cursor; if there is no room in the queue for it. Else it runs, or waits for its
// turn. [Admission] says how the limit, the queue and the cursor work together, and can be
// used without gRPC, as can [Limiter] and [Queue].
//
// What a client is told:
//
//	UNAVAILABLE         OVERLOADED         no room, or another of a higher class took it
//	UNAVAILABLE         QUEUE_TIMEOUT      it has waited in vain
//	UNAVAILABLE         DRAINING           the server is about to stop
//	DEADLINE_EXCEEDED   DEADLINE_HOPELESS  expected wait and median time exceed what it has left
//	RESOURCE_EXHAUSTED  TENANT_QUOTA       its tenant has no token; RetryInfo says when it will
//
// Each has a google.rpc.ErrorInfo (domain "bobtail", the second column its reason), a
// google.rpc.RetryInfo, and in the trailer grpc-retry-pushback-ms. A refusal by the tap has no
// trailer.
//
// # Who goes first
//
// A call has one of four classes, [Criticality], from metadata ([CriticalityKey]). Of one
// class, hedges and retries are refused before first attempts; of either, one cohort after
// the other, a cohort being a hash of the tenant, or of the trace id in traceparent, that all
// servers agree on for an hour: a third of the pages is refused, not a third of each page.
// Callers can claim a class, and by their choice of a trace id a cohort, so that an edge
// should set MaxCriticality, and a traceparent of its own.
//
// # Tenants
//
// A tenant has a quota, and in an overload a fair share (max-min) of 0.85 of what the server can do. What
// is beyond the share goes where the hedges and retries of its class are, so that a tenant
// inside its share does not pay for one outside it. That is so within a class: one
// that may claim a higher class may take all. The tap does not know the shares, and refuses
// with tenants only what would be refused inside a share.
//
// # Streams
//
// A stream has its slot until its end. Streams that live for long, such as subscriptions, take
// slots that they do not use: name them in Exempt, and bound them with MaxConcurrentStreams or
// by themselves. The times of streams of which the client sends messages are not
// measured; on a server that has no other calls the limit stays at Initial.
package shedding
