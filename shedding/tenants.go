package shedding

import (
	"container/list"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

// TenantsConfig says what each tenant may ask for. A tenant is a value of one key of the
// metadata. Who sets it should be trusted: one who may choose it is as many tenants as it likes, up to Max.
type TenantsConfig struct {
	// MetadataKey is the key, such as "x-tenant-id". Calls without it, or with several of
	// it, are one tenant. No default.
	MetadataKey string

	// PerSecond is how many calls of each tenant are let in in the long run, in [0.001, 1e9].
	// What is beyond is refused with RESOURCE_EXHAUSTED, TENANT_QUOTA. Default 0: there is
	// no quota, only fair shares.
	PerSecond float64

	// Burst is how many may come at once after a pause, in [1, 1e9]. The default, 0, is a
	// tenth of PerSecond, rounded up.
	Burst int

	// Max is how many tenants are told apart, in [1, 1000000]. Default 10000. A tenant takes
	// about 500 bytes. It is forgotten 10 s after its last call, if its bucket is full
	// again by then. Those who come while there are Max are one tenant.
	Max int
}

const (
	maxTenants = 1_000_000
	// minTenantRate is one call in a quarter of an hour. With less, the time until the next
	// call would be longer than a pushback can say (24 days), in the end longer than a Duration.
	minTenantRate = 0.001
	// tenantIdle is how long a tenant is remembered. With Max tenants at once, one who makes up
	// names gets Max/10 new buckets a second, and not one for every call.
	tenantIdle = 10 * time.Second

	// fairLoad is the part of the capacity that is shared. What is within the shares must fit
	// with room to spare, or it would be refused by chance: an Admission lets lanes fill the
	// queue that need less than 0.92, and knows the demand to 3%.
	fairLoad = 0.85
	// fairBurst is how much of a share may come at once, so that one who is inside it is
	// so also if its calls come unevenly.
	fairBurst = 0.5 // s
	fairLeast = 8   // calls; the same for small shares
	// fairGain is that of the control of the share; a window of 0.1 s at 700 calls/s is known
	// to 12%, and 0.3 of the logarithm of that leaves 5%.
	fairGain = 0.3
)

// Validate reports every fault of the configuration, joined.
func (c TenantsConfig) Validate() error {
	var errs []error
	if !validKey(c.MetadataKey) {
		errs = append(errs, fmt.Errorf("shedding: tenants metadataKey %q, want one or more of a-z, 0-9, '-', '_', '.', and not \"grpc-...\"", c.MetadataKey))
	}
	// Written so that NaN is a fault too.
	if !(c.PerSecond == 0 || c.PerSecond >= minTenantRate && c.PerSecond <= maxPerSecond) {
		errs = append(errs, fmt.Errorf("shedding: tenants perSecond %v, want [%v, %d], or 0 for no quota", c.PerSecond, minTenantRate, int(maxPerSecond)))
	}
	if c.Burst < 0 || c.Burst > maxBurst {
		errs = append(errs, fmt.Errorf("shedding: tenants burst %d, want [1, %d], or 0 for the default", c.Burst, maxBurst))
	} else if c.Burst > 0 && c.PerSecond == 0 {
		errs = append(errs, fmt.Errorf("shedding: tenants burst %d without perSecond, want both", c.Burst))
	}
	if c.Max < 0 || c.Max > maxTenants {
		errs = append(errs, fmt.Errorf("shedding: tenants max %d, want [1, %d], or 0 for the default", c.Max, maxTenants))
	}
	return errors.Join(errs...)
}

// validKey tells a key of metadata, whose case does not matter.
func validKey(key string) bool {
	key = strings.ToLower(key)
	for _, c := range key {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return false
		}
	}
	return key != "" && !strings.HasPrefix(key, "grpc-")
}

func (c TenantsConfig) withDefaults() TenantsConfig {
	if c.Burst == 0 {
		c.Burst = max(1, int(math.Ceil(c.PerSecond/10)))
	}
	if c.Max == 0 {
		c.Max = 10_000
	}
	return c
}

func (c TenantsConfig) limit() rate.Limit {
	if c.PerSecond == 0 {
		return rate.Inf
	}
	return rate.Limit(c.PerSecond)
}

// tenants are the quotas of tenants, and their shares. It is a deterministic core, not
// safe for concurrent use.
//
// The fair share w is max-min: that at which all tenants' calls within it come to what the
// server can do, sum of min(demand, w) = fairLoad x capacity. It is found without a look at
// all tenants: every 0.1 s, w is multiplied by a power of what there should be within the
// shares over what there was. A tenant has a bucket that fills at w. Calls that find it
// empty are over the share, and go where the hedges and retries of their class are: in an overload they
// are refused before anybody's calls of that class that are within. Between classes
// nothing changes: the excess of a higher one is served before a lower one.
type tenants struct {
	cfg  TenantsConfig
	byID map[string]*tenant
	used list.List // of *tenant, by when they last called, or were kept; the latest in front
	rest *tenant   // all beyond Max; not in byID

	share  float64   // w, calls/s; 0: not known yet
	start  time.Time // of the window
	within int       // calls in it that were within their shares
	calls  int       // in it
}

// tenant is one of them.
type tenant struct {
	id     string
	bucket *rate.Limiter
	place  *list.Element
	last   time.Time // its latest call
	fair   float64   // calls that it may still make within its share
}

func newTenants(cfg TenantsConfig) *tenants {
	t := &tenants{cfg: cfg.withDefaults(), byID: map[string]*tenant{}}
	t.rest = t.newTenant("")
	return t
}

func (t *tenants) newTenant(id string) *tenant {
	// It may be one that was forgotten, which is not to cost it anything.
	return &tenant{id: id, bucket: rate.NewLimiter(t.cfg.limit(), t.cfg.Burst), fair: t.mostFair()}
}

// mostFair is how many calls may come at once within a share.
func (t *tenants) mostFair() float64 { return max(fairBurst*t.share, fairLeast) }

func (t *tenants) len() int { return len(t.byID) }

// reconfigure changes the quotas. What has been used stays used.
func (t *tenants) reconfigure(now time.Time, cfg TenantsConfig) {
	t.cfg = cfg.withDefaults()
	set := func(e *tenant) {
		e.bucket.SetLimitAt(now, t.cfg.limit())
		e.bucket.SetBurstAt(now, t.cfg.Burst)
	}
	set(t.rest)
	for len(t.byID) > t.cfg.Max {
		t.forget(t.used.Back().Value.(*tenant))
	}
	for _, e := range t.byID {
		set(e)
	}
}

// of returns the tenant of a name. Time must not go back.
func (t *tenants) of(now time.Time, id string) *tenant {
	// Two at a time: as long as any are idle their number falls with every call.
	for range 2 {
		oldest := t.used.Back()
		if oldest == nil {
			break
		}
		e := oldest.Value.(*tenant)
		if now.Sub(e.last) < tenantIdle {
			break
		}
		if e.bucket.TokensAt(now) < float64(t.cfg.Burst) {
			// It is kept, and must not keep those that come behind it.
			t.used.MoveToFront(oldest)
			continue
		}
		t.forget(e)
	}
	e, ok := t.byID[id]
	switch {
	case ok:
		t.used.MoveToFront(e.place)
	case len(t.byID) < t.cfg.Max:
		e = t.newTenant(id)
		e.last = now
		e.place = t.used.PushFront(e)
		t.byID[id] = e
	default:
		e = t.rest
	}
	return e
}

func (t *tenants) forget(e *tenant) {
	t.used.Remove(e.place)
	delete(t.byID, e.id)
}

// take counts a call of a tenant: whether it is within its quota, and if not, how long
// it is until it will be; and whether it is over its share of what the server can do, in
// calls/s (0: not known).
func (t *tenants) take(now time.Time, id string, capacity float64) (e *tenant, ok, over bool, wait time.Duration) {
	e = t.of(now, id)
	if t.share > 0 {
		// Also for a call that is refused: it takes nothing of the share, and the time until
		// it is as good as any.
		e.fair = min(e.fair+t.share*now.Sub(e.last).Seconds(), t.mostFair())
	}
	e.last = now
	if !e.bucket.AllowN(now, 1) {
		missing := (1 - e.bucket.TokensAt(now)) / t.cfg.PerSecond
		return e, false, false, time.Duration(math.Ceil(min(missing, 1/minTenantRate) * float64(time.Second)))
	}
	t.roll(now, capacity)
	t.calls++
	if t.share > 0 {
		if e.fair < 1 {
			return e, true, true, 0
		}
		e.fair--
	}
	t.within++
	return e, true, false, 0
}

// roll ends the window, if it is due.
func (t *tenants) roll(now time.Time, capacity float64) {
	if t.start.IsZero() {
		t.start = now
	}
	took := now.Sub(t.start)
	if took < interval || t.calls < fewArrivals && took < longWindow {
		return
	}
	if there, want := float64(t.within)/took.Seconds(), fairLoad*capacity; want > 0 && there > 0 {
		if t.share == 0 {
			t.share = want
		}
		t.share *= math.Pow(min(max(want/there, 0.1), 10), fairGain)
		t.share = min(max(t.share, want/maxTenants), want)
	}
	t.start, t.within, t.calls = now, 0, 0
}

// giveBack gives a call back that was within the quota and then refused for another
// reason.
func (e *tenant) giveBack(now time.Time) {
	// A bucket that was full again since then stays full: what is above is cut off when
	// time goes on.
	e.bucket.AllowN(now, -1)
}
