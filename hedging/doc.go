// Package hedging sends a call that takes longer than most once more, takes whichever answer
// comes first, and cancels the other.
//
// A [Hedger] has the hedging of gRFC A6 for the calls of one method: several attempts, the
// delay between them, which failures are fatal, the server's pushback. Beyond A6 the delay can
// be a live percentile of the method's own latency (Dean and Barroso, "The Tail at Scale",
// CACM 2013), what hedges cost is bounded by a [Budget], a hedge goes to another backend or
// nowhere, and copies can be tied: the server that begins one has the other called off.
//
// [UnaryClientInterceptor] and [StreamClientInterceptor] install it in one line; [Do] needs no
// gRPC. [Config].Shadow decides and reports and sends nothing, and [Hedger.Estimate] tells from
// it which p99 hedging would give.
//
// Only calls that are safe to execute more than once may be hedged, and only servers that stop
// when they are cancelled are spared the loser's work.
package hedging
