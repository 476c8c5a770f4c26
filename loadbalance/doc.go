// Package loadbalance has gRPC balancers that know the latency of each endpoint,
// and where the other attempts of a call are.
//
// Importing the package registers them. One is chosen by the service config:
//
//	grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"bobtail_p2c": {}}]}`)
//
// bobtail_p2c sends each attempt to the better of two endpoints drawn at
// random: the one with the lower product of expected latency and attempts in
// flight. It measures latency itself and needs nothing from the servers. Its
// one key is
//
//   - "decayTime", in (0s, 3600s], because an endpoint changes over minutes while
//     its stragglers come within seconds; the default is "10s". An endpoint that
//     is slow gets one probe in twice this time, and one that recovers is back
//     within three times.
//
// # Attempts of one call
//
// Opened by package hedging or retry, an attempt never goes to an endpoint where
// another of the same call is in flight. It goes to one that none has tried, if
// one is ready; else to one whose attempt has ended; else nowhere: it ends at
// once, wait-for-ready or not, with UNAVAILABLE and the reason NOT_SENT, and is
// marked as never sent.
//
// # What is measured
//
// A unary attempt that came to an answer gives its latency; the application's own
// errors, such as NOT_FOUND, are answers. One that was cancelled shows that the
// latency is no less than the time it was out, and one that failed
// (UNAVAILABLE, DEADLINE_EXCEEDED, INTERNAL, UNKNOWN, DATA_LOSS, and
// RESOURCE_EXHAUSTED) raises the estimate as if the time had been spent in vain. A stream
// counts while it is open; its length says nothing, its failure counts. A unary
// call that waits long for its answer by design (a long poll) should have a
// connection of its own, or it will make its endpoint look slow.
//
// # What outlives what
//
// An endpoint is the set of its addresses. What is known of it, and how many
// attempts are in flight there, outlives its connections, and changes of the
// resolver's mind: an endpoint that the resolver removes is remembered for 5
// minutes, the newest 1024 of them. It does not outlive the idleness of the whole
// ClientConn (30 minutes without a call, by default), when grpc builds the balancer anew.
package loadbalance
