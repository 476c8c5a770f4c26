// Package breaker refuses calls that would probably fail, so that they fail fast here
// and leave a server in trouble alone.
//
// It has two ways of doing so, each for the calls of one method to one target:
//
//   - [Breaker] is a circuit breaker. When half of the calls fail it refuses all of them
//     for some seconds, then lets a few probes through, and closes when these succeed.
//   - [Throttle] is the adaptive client throttle of Google's SRE book. It refuses a
//     growing share of the calls as the share that the server accepts falls, and is never
//     all or nothing.
//
// [UnaryClientInterceptor] and the others install them in one line each; both work
// without gRPC as well. Neither owns a goroutine or a timer.
//
// # Which one
//
// Take the throttle against overload: a server that turns away two calls of three, because
// it has no more to give, should go on serving the third. A breaker would make an outage
// of its own of that: nothing, then too much, then nothing.
//
// Take the breaker against calls that cost the caller more than the server: those that
// hang until their deadline, or whose answers come too late to be worth anything
// (SlowCallDuration), where there is something else to do at once: a cache, a default. It
// also gives a server that is starting again silence first, and then a ramp. It is the
// wrong tool for outages shorter than its Window, which it makes longer by its OpenFor.
//
// Both together do no harm if the breaker is asked first, as package bobtail does: what it
// refuses counts for nothing in the throttle. The other way round the throttle goes on
// counting its own refusals while the breaker is open and nobody can tell it otherwise.
//
// # Why for each target and method, not for each backend
//
// To take one bad backend out of rotation is the balancer's work: it can send the call
// elsewhere. A breaker for each backend would do the same once more, without an elsewhere.
// A breaker for a method of the whole target answers the question that is left: is it worth
// calling at all? One bad backend of n fails 1/n of the calls, which trips nothing, unless
// it is one of two or draws the traffic by failing fast; then the balancer's ejection is
// what is missing. And a method that is broken, by a bad release or a locked table, does
// not take the others of its server with it.
//
// # What counts
//
// UNAVAILABLE, DEADLINE_EXCEEDED, INTERNAL, UNKNOWN and DATA_LOSS are failures; an error
// without a gRPC status is UNKNOWN. CANCELLED counts for nothing: the caller has left, and
// nobody knows. Neither does a refusal made in this process. RESOURCE_EXHAUSTED is a
// failure for the throttle, which exists to heed it, and nothing for the breaker: one
// caller over its quota must not cut off the others. Likewise the refusals of an overloaded
// bobtail server, which it marks as such: OVERLOADED, QUEUE_TIMEOUT, DEADLINE_HOPELESS,
// TENANT_QUOTA and DRAINING. They are UNAVAILABLE and the like, but no call of them reached its handler,
// and the server goes on serving as many as it can. All else is success, NOT_FOUND and
// INVALID_ARGUMENT too: an answer proves that the server works, and a half-open breaker
// must be able to close on answers like these.
//
// # Refusals
//
// A refused call fails with UNAVAILABLE, before anything of it was sent, and carries a
// google.rpc.ErrorInfo of the domain "bobtail" with the reason BREAKER_OPEN or THROTTLED.
// That of an open breaker also has a google.rpc.RetryInfo, which says when the first probe
// is due; of a half-open one nobody knows that. errors.Is finds [ErrOpen] or [ErrThrottled].
//
// This package always refuses. In mode shadow of package bobtail nobody is refused: that is
// bobtail's doing, which asks, reports the answer and calls all the same.
package breaker
