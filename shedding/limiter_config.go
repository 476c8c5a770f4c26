package shedding

import (
	"errors"
	"fmt"
)

// Algorithm is how a [Limiter] finds its limit.
type Algorithm string

// The algorithms. For what they do, see [Limiter].
const (
	Gradient Algorithm = "gradient"
	Vegas    Algorithm = "vegas"
	AIMD     Algorithm = "aimd"
	Static   Algorithm = "static"
)

// maxLimit is where a limit stops to be one.
const maxLimit = 1_000_000

// LimiterConfig says how many handlers may run at once. In each field, 0 is the default.
type LimiterConfig struct {
	// Algorithm is how the limit is found. Default Gradient.
	Algorithm Algorithm

	// Initial is the limit to begin with, in [Min, Max]. Default 20, moved into that range.
	Initial int

	// Min is the least limit, in [1, 1000000]. Default 1.
	Min int

	// Max is the greatest limit, in [Min, 1000000]. Default 1000, or Min if that is more.
	Max int

	// Limit is the limit of the Static algorithm, in [1, 1000000]; it has no default, and
	// the three fields above have no meaning there. With another algorithm it must be 0.
	Limit int
}

// Validate reports every fault of the configuration, joined.
func (c LimiterConfig) Validate() error {
	var errs []error
	fault := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("shedding: limiter "+format, args...))
	}
	switch c.Algorithm {
	case "", Gradient, Vegas, AIMD:
		if c.Limit != 0 {
			fault("limit %d, want it with algorithm %q only", c.Limit, Static)
		}
	case Static:
		if c.Limit < 1 || c.Limit > maxLimit {
			fault("limit %d, want [1, %d]", c.Limit, maxLimit)
		}
		for _, f := range []struct {
			name  string
			value int
		}{{"initial", c.Initial}, {"min", c.Min}, {"max", c.Max}} {
			if f.value != 0 {
				fault("%s %d, want none with algorithm %q", f.name, f.value, Static)
			}
		}
		return errors.Join(errs...)
	default:
		fault("algorithm %q, want %q, %q, %q or %q", c.Algorithm, Gradient, Vegas, AIMD, Static)
	}
	d := c.withDefaults()
	if d.Min < 1 || d.Min > maxLimit {
		fault("min %d, want [1, %d], or 0 for the default", c.Min, maxLimit)
	} else if d.Max < d.Min || d.Max > maxLimit {
		fault("max %d, want [min %d, %d], or 0 for the default", c.Max, d.Min, maxLimit)
	} else if d.Initial < d.Min || d.Initial > d.Max {
		fault("initial %d, want [min %d, max %d], or 0 for the default", c.Initial, d.Min, d.Max)
	}
	return errors.Join(errs...)
}

func (c LimiterConfig) withDefaults() LimiterConfig {
	if c.Algorithm == Static {
		c.Initial, c.Min, c.Max = c.Limit, c.Limit, c.Limit
		return c
	}
	if c.Algorithm == "" {
		c.Algorithm = Gradient
	}
	if c.Min == 0 {
		c.Min = 1
	}
	if c.Max == 0 {
		c.Max = max(1000, c.Min)
	}
	if c.Initial == 0 {
		c.Initial = min(max(20, c.Min), c.Max)
	}
	return c
}
