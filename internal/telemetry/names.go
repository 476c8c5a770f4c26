package telemetry

import (
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
)

// Scope is the name of the instrumentation scope of all that bobtail records.
const Scope = "github.com/bobtail-rpc/bobtail"

// Every name that the telemetry uses stands in this file, with its unit, its
// labels and its meaning. docs/telemetry.md is checked against it.

// The labels of metrics. Method and target are those of gRFC A66.
const (
	labelMethod  = "grpc.method"
	labelTarget  = "grpc.target"
	labelStatus  = "grpc.status"
	labelKind    = "bobtail.attempt.kind"
	labelOutcome = "bobtail.attempt.outcome"
	labelReason  = "bobtail.reason"
	labelShadow  = "bobtail.shadow"
	labelState   = "bobtail.state"
	labelEvent   = "bobtail.event"

	labelEndpoint    = "bobtail.endpoint"
	labelHedged      = "bobtail.hedged"
	labelCriticality = "bobtail.criticality"
)

// The attributes of spans and of their events, beside those of the semantic conventions
// (rpc.system.name, rpc.method, rpc.response.status_code, server.address, server.port,
// error.type), whose keys are those of the semconv package of call.go.
const (
	attrNumber   = "bobtail.attempt.number"
	attrKind     = labelKind
	attrOutcome  = labelOutcome
	attrBackend  = "bobtail.attempt.backend"
	attrDelay    = "bobtail.attempt.delay"
	attrAttempts = "bobtail.call.attempts"
	attrHedging  = "bobtail.hedging.delay"
	attrReason   = labelReason
	attrShadow   = labelShadow
	attrWait     = "bobtail.backoff.wait"

	attrCriticality = labelCriticality
	attrAdmission   = "bobtail.admission"
	attrQueueWait   = "bobtail.queue.wait"
)

// The names of the events of a logical span, and of the span of an attempt.
const (
	eventHedgeSuppressed = "hedge suppressed"
	eventRetrySuppressed = "retry suppressed"
	eventRefused         = "refused"
	eventBackoff         = "backoff"

	spanAttempt = "attempt"
)

// other stands for all methods that nobody has vouched for, and for all that come after
// the bound. gRFC A66 has it.
const other = "other"

// methodOther is rpc.method on the spans of such a call. The semantic conventions have it.
const methodOther = "_OTHER"

// Attribute is an attribute of a span or of an event.
type Attribute struct {
	Name, On, Type, Meaning string
}

// Attributes lists the attributes of spans and events.
func Attributes() []Attribute {
	return []Attribute{
		{"rpc.system.name", "call", "string", "`grpc`."},
		{"rpc.method", "call", "string", "`package.Service/Method`; `_OTHER` for a method that is neither in the linked descriptors nor named in full by the policy."},
		{"rpc.method_original", "call", "string", "The name that was called, where `rpc.method` is `_OTHER`."},
		{"rpc.response.status_code", "call, attempt", "string", "The gRPC status code, such as `DEADLINE_EXCEEDED`."},
		{"error.type", "call, attempt", "string", "The same where it is an error; not on a superseded attempt."},
		{"server.address", "call", "string", "The target of the connection, without its scheme and port."},
		{"server.port", "call", "int", "The port of the target, if it has one."},
		{attrAttempts, "call", "int", "How many attempts had been sent when a hedged or retried call was decided."},
		{attrHedging, "call", "double", "The hedging delay in force, in seconds; absent while it is not known."},
		{attrNumber, "attempt", "int", "1 is the first attempt."},
		{attrKind, "attempt", "string", "`first`, `hedge`, `retry`, or `tied`: an attempt after the first of a tied call."},
		{attrOutcome, "attempt", "string", "`won`; `superseded`: needless because of a sibling; `failed`; `refused`: by the server's admission, by a limit of this process, or for want of another backend."},
		{attrBackend, "attempt", "string", "The addresses of the backend it was sent to; absent if it was sent nowhere, or it is not known."},
		{attrDelay, "attempt", "double", "How long after the beginning of the call it was sent, in seconds."},
		{attrReason, "event, server", "string", "Why, see below. On a server's span, why the call was refused, or in mode `shadow` would have been: `" + strings.Join(admissionReasons[:], "`, `") + "`."},
		{attrShadow, "event `refused`, server", "boolean", "Whether mode `shadow` let the call through all the same."},
		{attrWait, "event `backoff`", "double", "How long the call waited before the next attempt, in seconds."},
		{attrCriticality, "server", "string", "The class of the call, as admission took it: `" + strings.Join(criticalityNames[:], "`, `") + "`."},
		{attrAdmission, "server", "string", "`admitted` or `refused`: what became of it; in mode `shadow` `admitted`, always."},
		{attrQueueWait, "server", "double", "How long it waited for a slot, in seconds; in mode `shadow`, would have. Absent if it did not wait."},
	}
}

// Event is an event of a logical span.
type Event struct {
	Name, Meaning string
	Reasons       []string
}

// Events lists the events of a logical span.
func Events() []Event {
	return []Event{
		{eventHedgeSuppressed, "A hedge was due and was not sent when it was.", hedgeReasons},
		{eventRetrySuppressed, "An attempt failed and was not followed by another.", retryReasons},
		{eventRefused, "The call was refused before anything of it was sent.", refusalReasons},
		{eventBackoff, "The call waits for its next attempt; the time is that of the wait's beginning.", nil},
	}
}

var (
	hedgeReasons   = []string{"budget", "no other backend", "deadline", "pushback", "throttle", "shadow", "nested"}
	retryReasons   = []string{"attempts", "budget", "deadline", "pushback", "throttle", "shadow", "nested"}
	refusalReasons = []string{"BREAKER_OPEN", "THROTTLED", "RATE_LIMITED", "BULKHEAD_FULL"}

	// Of a server.
	admissionReasons = [...]string{"OVERLOADED", "QUEUE_TIMEOUT", "DEADLINE_HOPELESS", "TENANT_QUOTA", "DRAINING", "CLIENT_GONE"}
	criticalityNames = [...]string{"sheddable", "sheddable_plus", "critical", "critical_plus"}
)

// Instrument is a metric: its name, what it is, its unit and labels, and what it means.
type Instrument struct {
	Name    string
	Type    string // "histogram", "counter" or "gauge"
	Unit    string
	Labels  []string
	Meaning string
	Buckets []float64 // of a histogram
}

// latencyBuckets are those that gRFC A66 gives for latencies, in seconds.
var latencyBuckets = []float64{0, 0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002, 0.003,
	0.004, 0.005, 0.006, 0.008, 0.01, 0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13,
	0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1, 2, 5, 10, 20, 50, 100}

// extraBuckets are those that gRFC A96 recommends for retries and hedges.
var extraBuckets = []float64{1, 2, 3, 4, 5}

// The metrics. The first three are those of gRFC A96.
var (
	metricRetries = Instrument{"grpc.client.call.retries", "histogram", "{retry}", perMethod(),
		"Number of retries of a call. A call without any is not reported (A96).", extraBuckets}
	metricHedges = Instrument{"grpc.client.call.hedges", "histogram", "{hedge}", perMethod(),
		"Number of hedges of a call, tied copies among them. A call without any is not reported (A96).", extraBuckets}
	metricRetryDelay = Instrument{"grpc.client.call.retry_delay", "histogram", "s", perMethod(),
		"Time without an active attempt during a call. Calls that were not retried are not reported: theirs is 0.", latencyBuckets}

	metricDuration = Instrument{"bobtail.client.call.duration", "histogram", "s", perMethod(labelStatus),
		"Time from the beginning of a call to its end, as its caller sees it: waits, refusals and all attempts in it. Of a stream, to the end of the stream.", latencyBuckets}
	metricAttempts = Instrument{"bobtail.client.attempts", "counter", "{attempt}", perMethod(labelKind, labelOutcome),
		"Attempts that have ended. Hedges are those of kind `hedge`; wasted attempts those of outcome `superseded`; an attempt that found no other backend is `refused`.", nil}
	metricHedgesSuppressed = Instrument{"bobtail.client.hedges.suppressed", "counter", "{call}", perMethod(labelReason),
		"Calls of which a hedge was due and was not sent when it was, by the last reason. Reason `shadow` counts the calls that would have been hedged.", nil}
	metricRetriesSuppressed = Instrument{"bobtail.client.retries.suppressed", "counter", "{call}", perMethod(labelReason),
		"Calls that failed and were not tried again though the failure was retryable, by the reason. Reason `shadow` counts those that would have been.", nil}
	metricRefusals = Instrument{"bobtail.client.refusals", "counter", "{call}", perMethod(labelReason, labelShadow),
		"Calls refused before anything of them was sent; with `bobtail.shadow` true, those that would have been.", nil}
	metricTransitions = Instrument{"bobtail.client.breaker.transitions", "counter", "{transition}", perMethod(labelState, labelReason),
		"Changes of a circuit breaker to `closed`, `half-open` or `open`, and why.", nil}
	metricRotation = Instrument{"bobtail.client.balancer.transitions", "counter", "{transition}", []string{labelTarget, labelEvent, labelReason},
		"Changes of who is in a balancer's rotation: `ejected`, `readmitted`, `panic began`, `panic ended`, and why.", nil}

	metricBudget = Instrument{"bobtail.client.budget.balance", "gauge", "{attempt}", []string{labelTarget},
		"Extra attempts that `extraLoad` would pay for now.", nil}
	metricDelay = Instrument{"bobtail.client.hedging.delay", "gauge", "s", perMethod(),
		"The hedging delay in force; absent while it is not known.", nil}
	metricBreaker = Instrument{"bobtail.client.breaker.state", "gauge", "1", perMethod(),
		"0 is closed, 1 half-open, 2 open.", nil}
	metricThrottle = Instrument{"bobtail.client.throttle.probability", "gauge", "1", perMethod(),
		"The probability with which adaptive throttling refuses a call now, in [0, 1], of the class of criticality that it refuses most.", nil}
	metricEndpoints = Instrument{"bobtail.client.endpoint.attempts", "counter", "{attempt}", []string{labelTarget, labelEndpoint, labelOutcome},
		"Attempts that have ended, by the endpoint that they were sent to. With `bobtail.WithEndpointMetrics()` only.", nil}
	metricP99 = Instrument{"bobtail.client.hedging.p99", "gauge", "s", perMethod(labelHedged),
		"`false`: the 99th percentile of the attempts, which is that of the calls if none is hedged; `true`: the estimate of what hedging as configured makes of it. Absent while not known.", nil}
)

// The metrics of a server.
var (
	metricServed = Instrument{"bobtail.server.call.duration", "histogram", "s", []string{labelMethod, labelStatus},
		"Time from the arrival of a call at the interceptor to the end of its handler, the wait in the queue in it; of a stream, to the end of the stream. Calls that are refused or exempt are not in it.", latencyBuckets}
	metricQueueWait = Instrument{"bobtail.server.queue.wait", "histogram", "s", []string{labelCriticality},
		"How long calls that had to wait for a slot waited, whatever came of it; in mode `shadow`, would have.", latencyBuckets}
	metricServerRefusals = Instrument{"bobtail.server.refusals", "counter", "{call}", []string{labelMethod, labelReason, labelCriticality, labelShadow},
		"Calls refused, in the tap too; with `bobtail.shadow` true, those that would have been. Reason `CLIENT_GONE` counts those whose client left while they waited.", nil}
	metricOverloads = Instrument{"bobtail.server.overload.transitions", "counter", "{transition}", []string{labelState},
		"Overloads that `began` and `ended`.", nil}
	metricLimit = Instrument{"bobtail.server.limit", "gauge", "{call}", nil,
		"How many handlers may run at once now.", nil}
	metricInFlight = Instrument{"bobtail.server.in_flight", "gauge", "{call}", nil,
		"How many calls hold a slot now.", nil}
	metricQueueLength = Instrument{"bobtail.server.queue.length", "gauge", "{call}", nil,
		"How many calls wait for a slot now.", nil}
	metricTenants = Instrument{"bobtail.server.tenants", "gauge", "{tenant}", nil,
		"How many tenants are remembered now. Absent without `tenants`.", nil}
)

func perMethod(more ...string) []string { return append([]string{labelMethod, labelTarget}, more...) }

// Instruments lists the metrics of a client.
func Instruments() []Instrument {
	return []Instrument{metricRetries, metricHedges, metricRetryDelay, metricDuration, metricAttempts,
		metricHedgesSuppressed, metricRetriesSuppressed, metricRefusals, metricTransitions, metricRotation,
		metricEndpoints, metricBudget, metricDelay, metricP99, metricBreaker, metricThrottle}
}

// ServerInstruments lists the metrics of a server.
func ServerInstruments() []Instrument {
	return []Instrument{metricServed, metricQueueWait, metricServerRefusals, metricOverloads,
		metricLimit, metricInFlight, metricQueueLength, metricTenants}
}

// Table writes what this file says as the tables of docs/telemetry.md.
func Table() string {
	var b strings.Builder
	for _, of := range []struct {
		name string
		list []Instrument
	}{{"Metrics of a client", Instruments()}, {"Metrics of a server", ServerInstruments()}} {
		b.WriteString("### " + of.name + "\n\n| metric | type | unit | labels | meaning |\n|---|---|---|---|---|\n")
		for _, i := range of.list {
			fmt.Fprintf(&b, "| `%s` | %s | `%s` | %s | %s |\n", i.Name, i.Type, i.Unit, quoted(i.Labels), i.Meaning)
		}
		b.WriteString("\n")
	}
	b.WriteString("### Attributes of spans and events\n\n| attribute | on | type | meaning |\n|---|---|---|---|\n")
	for _, a := range Attributes() {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", a.Name, a.On, a.Type, a.Meaning)
	}
	b.WriteString("\n### Events of the call's span\n\n| event | `" + attrReason + "` | meaning |\n|---|---|---|\n")
	for _, e := range Events() {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", e.Name, quoted(e.Reasons), e.Meaning)
	}
	return b.String()
}

// quoted writes names as a list of code.
func quoted(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return "`" + strings.Join(names, "`, `") + "`"
}

// statusNames are the names of the status codes in the specification, by their number.
var statusNames = [...]string{"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
	"ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE",
	"UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"}

// known returns the code, UNKNOWN in place of one that a server has made up, so that the
// codes are bounded.
func known(c codes.Code) codes.Code {
	if int(c) >= len(statusNames) {
		return codes.Unknown
	}
	return c
}

// Kind says why an attempt was made.
type Kind uint8

// The kinds of attempts.
const (
	First Kind = iota
	Hedge
	Retry
	Tied
	kinds
)

var kindNames = [kinds]string{"first", "hedge", "retry", "tied"}

// Outcome is what became of an attempt.
type Outcome uint8

// The outcomes of attempts.
const (
	// Won: it was the first of its call to succeed.
	Won Outcome = iota
	// Superseded: a sibling made it needless.
	Superseded
	// Failed: it failed, or its caller left.
	Failed
	// Refused: it was sent nowhere, or its server had no room for it.
	Refused
	outcomes
)

var outcomeNames = [outcomes]string{"won", "superseded", "failed", "refused"}
