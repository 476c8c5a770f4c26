package shedding

// Criticality is the class of a request: how much it hurts to refuse it. Classes are
// those of the SRE book ("Handling Overload"); a higher one is worth more, and is refused
// later. The zero value is [Critical], the class of a request that does not tell one.
type Criticality int8

// The classes, from the first to be refused to the last.
const (
	Sheddable     Criticality = -2 // partial outages are expected: batch work, prefetching
	SheddablePlus Criticality = -1 // may be refused in an overload, and is retried later
	Critical      Criticality = 0  // a user notices
	CriticalPlus  Criticality = 1  // a user is hurt: reserved for the few
)

// classes is how many there are.
const classes = 4

var criticalityNames = [classes]string{"sheddable", "sheddable_plus", "critical", "critical_plus"}

// ParseCriticality returns the class of a name as it travels in the metadata, such as
// "sheddable_plus". An unknown one is [Critical], and not ok.
func ParseCriticality(name string) (c Criticality, ok bool) {
	for i, n := range criticalityNames {
		if n == name {
			return Sheddable + Criticality(i), true
		}
	}
	return Critical, false
}

// String is the name that [ParseCriticality] knows. What is out of range has that of the
// nearest class.
func (c Criticality) String() string { return criticalityNames[c.rank()] }

// rank is 0 for Sheddable, and 3 for CriticalPlus; what is out of range counts as the
// nearest class.
func (c Criticality) rank() int { return int(min(max(c, Sheddable), CriticalPlus) - Sheddable) }

const (
	// Cohorts is how many groups of users a class is cut into, so that an overload can
	// refuse a part of a class and always the same users: half of all users served well
	// is more than all users served half of their page (DAGOR, SoCC'18, section 4.2, has
	// 128; 64 cut a class to 1.6% of its requests, finer than a load is known in a tenth
	// of a second).
	Cohorts = 64

	lanes  = classes * 2
	levels = lanes * Cohorts
)

// Level orders all requests by what is refused first. A higher class is above a lower
// one; in a class, first attempts are above hedges and retries; in each of these halves,
// cohorts are in the order of their numbers. Levels are in [0, 512).
type Level uint16

// LevelOf returns the level of a request. Of cohort only the remainder by [Cohorts]
// counts, so that it may be a hash of the tenant or the user; the hash should be stable
// for minutes, for the same users to be refused, and seeded anew every hour or so, for
// them not to be the same for ever.
func LevelOf(c Criticality, extra bool, cohort uint32) Level {
	return Level(laneOf(c, extra)*Cohorts + int(cohort%Cohorts))
}

// Criticality is the class that the level is of.
func (l Level) Criticality() Criticality {
	return Sheddable + Criticality(min(int(l)/(2*Cohorts), classes-1))
}

// laneOf is the half of a class that a request waits in.
func laneOf(c Criticality, extra bool) int {
	lane := 2 * c.rank()
	if !extra {
		lane++
	}
	return lane
}
