package shedding

import "time"

// Request is what [Admission] has to know of a request.
type Request struct {
	Criticality Criticality
	Extra       bool          // a hedge or a retry: refused before the first attempts of its class
	Cohort      uint32        // a stable hash of the tenant or the user: see LevelOf
	Flow        uint64        // a hash of who shares a hand of queues: see QueueConfig.Shards
	Deadline    time.Time     // zero: none
	Median      time.Duration // of the times of the method's handlers; 0: not known
	Owner       any           // comes back in the Settlement; not looked at
}

// Verb is what becomes of a request.
type Verb uint8

const (
	Refused  Verb = iota // now, for Reason
	Admitted             // its handler runs now: Done when it has ended
	Queued               // it waits; a Settlement will tell, or Leave
)

// Reason is why a request was refused.
type Reason uint8

// The reasons. Several are one to the client: see [Reason.String].
const (
	NotRefused   Reason = iota
	AtLimit             // no slot is free, and there is no queue
	QueueFull           // nobody in the queue is of a lower class
	Displaced           // one of a higher class took its place in the queue
	BelowCursor         // its level is not served in this overload
	QueueTimeout        // it has waited in vain
	Hopeless            // it would not be done by its deadline
)

// String is the reason as the client is told it.
func (r Reason) String() string {
	switch r {
	case NotRefused:
		return ""
	case QueueTimeout:
		return "QUEUE_TIMEOUT"
	case Hopeless:
		return "DEADLINE_HOPELESS"
	case TenantQuota:
		return "TENANT_QUOTA"
	case Draining:
		return "DRAINING"
	case ClientGone:
		return "CLIENT_GONE"
	}
	return "OVERLOADED"
}

// Decision is the answer to a request that arrives.
type Decision struct {
	Verb   Verb
	Ticket Ticket // of one that is Queued
	Reason Reason // of one that is Refused
	// RetryAfter is when it makes sense to come again, of one that is Refused; 0 for
	// Hopeless, whose client has no time left.
	RetryAfter time.Duration
}

// Settlement is the end of a wait. The verb is Admitted or Refused.
type Settlement struct {
	Decision
	Level Level
	Wait  time.Duration // in the queue
	Owner any
}

// EventKind is what an [Event] tells of.
type EventKind uint8

const (
	LimitMoved    EventKind = iota // From and To are limits
	CursorMoved                    // From and To are levels
	OverloadBegan                  // To is how many wait
	OverloadEnded                  // To is how many wait
)

// Event is a change of state, for telemetry.
type Event struct {
	Kind     EventKind
	At       time.Time
	From, To int
	// Probe says of a limit that it was lowered for a moment, to measure.
	Probe bool
}

// maxEvents is how many are kept for one who does not fetch them.
const maxEvents = 64

// Stats is the state of an [Admission], for gauges.
type Stats struct {
	Limit, InFlight, Queued int
	Cursor                  Level // levels below are refused; 0: none
	Overloaded              bool
	Wait                    time.Duration // of the oldest in the queue
	Demand, Capacity        float64       // requests/s, those refused included; handlers/s
}
