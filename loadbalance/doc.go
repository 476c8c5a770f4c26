// Package loadbalance has gRPC balancers that know the latency of each endpoint,
// and where the other attempts of a call are.
//
// Importing the package registers them. One is chosen by the service config:
//
//	grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"bobtail_p2c": {}}]}`)
//
// bobtail_p2c is for servers that are all alike to a call; bobtail_prequal for those
// whose load many clients make, and that tell it; bobtail_rendezvous for servers that
// remember: caches, sessions, shards. What they have in common, ejection, slow start,
// weights, subsets and zones, is below.
//
// # bobtail_p2c
//
// It sends each attempt to the better of two endpoints drawn at
// random: the one with the lower product of expected latency and attempts in
// flight; and draws on, up to eight times, while even the better one is busy with this
// client's own attempts. It measures latency itself and needs nothing from the servers. Its
// own key is
//
//   - "decayTime", in (0s, 3600s], because an endpoint changes over minutes while
//     its stragglers come within seconds; the default is "10s". An endpoint that
//     is slow gets one probe in twice this time, and one that recovers is back
//     within three times.
//
// # bobtail_rendezvous
//
// It sends calls of one key to one endpoint, so that what a server has cached or
// opened for a key serves the next call too. Every client ranks the endpoints alike for
// a key, by weighted rendezvous hashing, without any state: one endpoint more or less
// among n moves about 1/n of the keys, those that it wins or had, and no others. A
// hedge or a retry goes to the key's next rank, which therefore is the one other
// endpoint that may know the key too. Only endpoints that are ready have a rank,
// so keys wander until a client has connected to all. A call has its key from [WithKey], or from a header:
//
//	{"loadBalancingConfig": [{"bobtail_rendezvous": {"header": "x-user-id"}}]}
//
// A call that has neither goes where bobtail_p2c would send it. An endpoint's share of the keys is
// proportional to its weight. The configuration's own keys are
//
//   - "header", the name of an outgoing header of text, in lower case; there is none by
//     default. The key of the context wins. Of several values the key is
//     these joined with commas; an empty one is no key. It costs one more allocation
//     than [WithKey], which hashes the key once for all attempts.
//   - "eps", in (0, 10], because one hot key must not bury its endpoint; the default is
//     0.25. An endpoint has room for (1+eps) times its share of the attempts that this
//     client has in flight, rounded up; when it is full, the call goes to its key's
//     next rank.
//
// So a hot key has as many endpoints as it needs, always the same ones in the same
// order: with four endpoints, one that makes up all the load has 31% of it at each of
// three and 6% at the fourth. Keys that are not hot pay for it too, the more the fewer
// attempts are in flight for each endpoint, because chance alone fills some. Of calls with
// keys of equal weight over 10 endpoints, there went elsewhere
//
//	in flight    eps 0.25   eps 1    eps 4
//	        3         29%     21%     2.3%
//	       10         35%     12%     0.1%
//	       30         27%    2.9%      0%
//	      100         12%    0.1%      0%
//	     1000        0.1%      0%      0%
//
// A client with few calls in flight, or whose cache misses are dear, wants an eps of 1
// to 4. Hedges and retries keep to the bound only as long as it leaves them an endpoint that
// their call has not tried. The ranking passes over all endpoints: with
// 1,000 of them a pick takes 3 to 5 us, with 100 less than one.
//
// # bobtail_prequal
//
// It asks random endpoints for their load ahead of the calls, and sends an attempt to the fastest of
// those whose requests in flight are not high among the fleet (Prequal, NSDI'24). Many
// clients of one fleet need that: none of them sees what the others send. The servers take part by
// an interceptor and a service:
//
//	s := grpc.NewServer(grpc.ChainUnaryInterceptor(loadbalance.UnaryServerInterceptor()))
//	loadbalance.RegisterLoadReport(s)
//
// (package bobtail's Server does both). While any endpoint has never answered a probe, and while
// most of the load is this client's own, it is bobtail_p2c. It wants probes that take less time
// than calls: with few servers and reports that are some service times old all clients go to
// where the last report was good. Its own keys are
//
//   - "probesPerPick", in [0.1, 16]; default 3.
//   - "maxProbesPerSecond", in [1, 100000]; default 300. Without picks there are none.
//   - "probeTimeout", in [0.001s, 1s]; default "0.050s".
//   - "qRif", in [0, 1]: the quantile of the reported requests in flight above which an endpoint
//     is avoided; default 0.9.
//   - "decayTime", that of bobtail_p2c, for the picks that go by it.
//
// # What all have in common
//
// Weights are those of grpc's package experimental/balancer/weight, which xDS sets too; 0,
// and none, is 1. Each balancer takes these keys:
//
//   - "ejection", an object: when an endpoint leaves the rotation. By default it does when its
//     latency exceeds 5 ms, three times the median of its peers, and what their spread explains;
//     or when it fails a fifth of its calls and three times as many as its peers. At most 34%
//     of the endpoints are out at once, and none while fewer than half would be left. An
//     ejected endpoint gets at most one call in 100, and one in 2 s, as probes (and hedges and
//     retries that have no other untried place); it comes back after
//     10 s at the earliest (20 s the second time, and so on up to 100 s), when three probes in
//     a row were good. Keys: "latencyFactor" 3, "latencyFloor" "0.005s", "failureRatio" 0.2,
//     "minimumCalls" 20, "baseEjectionTime" "10s", "maxEjectionPercent" 34 (0 ejects nobody),
//     "panicThreshold" 50, "probeEvery" 100. See [WithEventHandler] for who is told. What the caller gave
//     up counts as neither slow nor failed.
//   - "slowStart", an object: "window" "10s", in which the weight of an endpoint rises to its
//     own from a tenth of it, if it comes to others that serve already, or back to them from
//     an ejection or a broken connection; "aggression" 1 bends the ramp.
//   - "maxInFlight", by default none: how many attempts of this client may be in flight at
//     one endpoint. If there is no room anywhere the call fails with RESOURCE_EXHAUSTED and
//     the reason BULKHEAD_FULL.
//   - "subset", an object: "size", how many of the endpoints this client uses at least; with
//     "clientIndex" of "clientCount" clients they load the endpoints evenly, without them each
//     draws a random subset. With a zone these are as many of it, and as many others for it to
//     spill to, where there are; the clients to count are those of the same zone.
//   - "zone", an object: "local", the caller's zone. Its endpoints are preferred until too
//     few are healthy (below 72%), or they take "overload" 2 times their usual latency and
//     others are faster. Resolvers tell zones by [SetZone]. xDS's localities do not arrive here,
//     as grpc (1.85) keeps them under a key of its own that no other package can read: there, its
//     priority and wrr_locality policies choose among them.
//
// # Attempts of one call
//
// Opened by package hedging or retry, an attempt never goes to an endpoint where
// another of the same call is in flight. It goes to one that none has tried, if
// one is ready, ejected or not; else to one whose attempt has ended; else nowhere: it ends at
// once, wait-for-ready or not, with UNAVAILABLE and the reason NOT_SENT, and is
// marked as never sent. With maxInFlight, an endpoint without room counts as not ready here.
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
// connection of its own, or it will make its endpoint look slow. Of an endpoint where more
// than 2,000 attempts a second end, 500 to 2,000 a second are measured, and one in 256 at least; those
// that fail or are cancelled are all seen, and count as much less (not so for bobtail_prequal). A method
// whose descriptor is not linked into the program counts as unary.
//
// # What outlives what
//
// An endpoint is the set of its addresses. What is known of it, and how many
// attempts are in flight there, outlives its connections, and changes of the
// resolver's mind: an endpoint that the resolver removes is remembered for 5
// minutes, the newest 1024 of them. It does not outlive the idleness of the whole
// ClientConn (30 minutes without a call, by default), when grpc builds the balancer anew.
package loadbalance
