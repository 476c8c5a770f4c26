package shedding

import (
	"errors"
	"fmt"
	"time"
)

// QueueConfig says who may wait for a slot. In each field, 0 is the default.
type QueueConfig struct {
	// MaxLength is how many may wait, in [1, 100000]. Default 1000. One that waits takes
	// about 150 bytes here, and a goroutine with its request in the server.
	MaxLength int

	// Target is the wait that is not yet an overload, in (0, MaxWait]. Default 5 ms, or
	// MaxWait if that is less. A wait that stays over it for 100 ms is one.
	Target time.Duration

	// MaxWait is the longest that anybody waits, in (0, 1 min]. Default 100 ms.
	MaxWait time.Duration

	// Shards is how many queues there are for each class, in [1, 256], served in turn, and
	// Hand how many of them one who asks is dealt, in [1, 8] and at most Shards: he waits in
	// the shortest of these. So one tenant who sends far too much does not keep the others
	// waiting: see [Request].Flow. Default 1, which is no shards; and a Hand of 4 then, or
	// Shards if that is less.
	//
	// Of one other tenant, all of whose hand is full, a tenant shares the whole hand with a
	// probability of 1 in C(Shards, Hand): 1 in 635,376 for 4 of 64. Of k such tenants the
	// probability is about (1 - (1 - Hand/Shards)^k)^Hand: for 4 of 64 it is 0.3% for 4 of
	// them and 17% for 16; for 8 of 256 below 10^-6 for 4, and 0.06% for 16. A large hand
	// is safer against a few of them, and a small one against many.
	Shards, Hand int
}

const (
	maxQueue     = 100_000
	maxQueueWait = time.Minute

	// interval is how long a wait must stay over its target to be no mere burst. CoDel's
	// (Nichols and Jacobson, 2012; RFC 8289, 4.3), and that of its use for RPC queues
	// (Maurer, "Fail at Scale", 2015).
	interval = 100 * time.Millisecond

	// afterglow is for how long after its end an overload is told faster.
	afterglow = 16 * interval
)

// Validate reports every fault of the configuration, joined.
func (c QueueConfig) Validate() error {
	var errs []error
	d := c.withDefaults()
	if d.MaxLength < 1 || d.MaxLength > maxQueue {
		errs = append(errs, fmt.Errorf("shedding: queue maxLength %d, want [1, %d], or 0 for the default", c.MaxLength, maxQueue))
	}
	if d.MaxWait <= 0 || d.MaxWait > maxQueueWait {
		errs = append(errs, fmt.Errorf("shedding: queue maxWait %v, want (0, %v], or 0 for the default", c.MaxWait, maxQueueWait))
	} else if d.Target <= 0 || d.Target > d.MaxWait {
		errs = append(errs, fmt.Errorf("shedding: queue target %v, want (0, maxWait %v], or 0 for the default", c.Target, d.MaxWait))
	}
	if d.Shards < 1 || d.Shards > maxShards {
		errs = append(errs, fmt.Errorf("shedding: queue shards %d, want [1, %d], or 0 for the default", c.Shards, maxShards))
	} else if most := min(maxHand, d.Shards); d.Hand < 1 || d.Hand > most {
		errs = append(errs, fmt.Errorf("shedding: queue hand %d, want [1, %d], or 0 for the default", c.Hand, most))
	}
	return errors.Join(errs...)
}

func (c QueueConfig) withDefaults() QueueConfig {
	if c.MaxLength == 0 {
		c.MaxLength = 1000
	}
	if c.MaxWait == 0 {
		c.MaxWait = 100 * time.Millisecond
	}
	if c.Target == 0 {
		c.Target = min(5*time.Millisecond, c.MaxWait)
	}
	if c.Shards == 0 {
		c.Shards = 1
	}
	if c.Hand == 0 {
		c.Hand = min(4, c.Shards)
	}
	return c
}
