package breaker

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"github.com/bobtail-rpc/bobtail/internal/outcome"
	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// epoch0 has no monotonic reading, so every time in these tests is exact.
var epoch0 = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

func at(d time.Duration) time.Time { return epoch0.Add(d) }

func newThrottle(t testing.TB, cfg ThrottleConfig) *Throttle {
	t.Helper()
	th, err := NewThrottle(cfg, epoch0)
	if err != nil {
		t.Fatal(err)
	}
	return th
}

// spread is a sequence in [0, 1) that is spread more evenly than random numbers are, and
// always the same: that of the golden ratio.
type spread float64

func (s *spread) next() float64 {
	*s = spread(math.Mod(float64(*s)+math.Phi, 1))
	return float64(*s)
}

func TestThrottleFaults(t *testing.T) {
	for _, tc := range []struct {
		cfg  ThrottleConfig
		want string
	}{
		{ThrottleConfig{}, ""},
		{ThrottleConfig{K: 1.1, Window: sec}, ""},
		{ThrottleConfig{K: 100, Window: time.Hour}, ""},
		{ThrottleConfig{K: 1}, "breaker: throttle k 1, want [1.1, 100]"},
		{ThrottleConfig{K: math.NaN()}, "breaker: throttle k NaN, want [1.1, 100]"},
		{ThrottleConfig{K: math.Inf(1), Window: 1}, "breaker: throttle k +Inf, want [1.1, 100]\nbreaker: throttle window 1ns, want [1s, 1h0m0s]"},
		{ThrottleConfig{Window: time.Hour + 1}, "breaker: throttle window 1h0m0.000000001s, want [1s, 1h0m0s]"},
		{ThrottleConfig{Window: -1}, "breaker: throttle window -1ns, want [1s, 1h0m0s]"},
	} {
		th, err := NewThrottle(tc.cfg, epoch0)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != tc.want || (th == nil) != (err != nil) {
			t.Errorf("%+v: %q, want %q", tc.cfg, got, tc.want)
		}
	}
}

// What counts as a request, and what as an accepted one.
func TestThrottleCounts(t *testing.T) {
	quota := &outcome.Refusal{Cause: errors.New("elsewhere"), Code: codes.ResourceExhausted}
	for _, tc := range []struct {
		name string
		err  error
		want tally
	}{
		{"success", nil, tally{1, 1}},
		{"NOT_FOUND is an answer", ends['n'], tally{1, 1}},
		{"INVALID_ARGUMENT is an answer", ends['a'], tally{1, 1}},
		{"UNAVAILABLE", ends['f'], tally{1, 0}},
		{"DEADLINE_EXCEEDED", ends['d'], tally{1, 0}},
		{"RESOURCE_EXHAUSTED: the server has had enough", ends['q'], tally{1, 0}},
		{"no status is UNKNOWN", ends['p'], tally{1, 0}},
		{"CANCELLED", ends['c'], tally{}},
		{"a refusal made here", ends['l'], tally{}},
		{"that of a rate limit, wrapped", fmt.Errorf("w: %w", quota), tally{}},
	} {
		th := newThrottle(t, ThrottleConfig{})
		th.Record(at(sec), tc.err)
		if th.sum != tc.want {
			t.Errorf("%s: counts %+v, want %+v", tc.name, th.sum, tc.want)
		}
	}
}

// The life of one throttle: K 2, a window of 60 s, so slots of 1 s.
func TestThrottleSteps(t *testing.T) {
	th := newThrottle(t, ThrottleConfig{Window: time.Minute})
	p := func(d time.Duration, want float64) {
		t.Helper()
		if got := th.Probability(at(d)); got != want {
			t.Errorf("at %v: probability %v, want %v", d, got, want)
		}
	}
	record := func(d time.Duration, n int, letter rune) {
		for range n {
			th.Record(at(d), ends[letter])
		}
	}
	admit := func(d time.Duration, u float64, want bool) {
		t.Helper()
		if err := th.Admit(at(d), u); (err == nil) != want {
			t.Errorf("at %v, u %v: %v, want let in %v", d, u, err, want)
		}
	}
	p(0, 0)
	record(0, 99, 'f')
	p(0, 0) // of so few it says nothing
	admit(0, 0, true)
	record(0, 100, 's')
	record(0, 1, 'f')
	p(0, 0) // a server that accepts 1/K is sent everything
	admit(0, 0, true)
	record(100*ms, 99, 'f')
	p(100*ms, 99.0/300)
	admit(200*ms, 0.33, true) // u < p refuses
	admit(300*ms, 0.32, false)
	p(300*ms, 100.0/301) // what it refused is a request, too
	admit(1100*ms, 0.33, false)
	admit(1199*ms, 0, false)
	admit(1200*ms, 0, true) // a second after the last was let in
	admit(1201*ms, 0, false)
	record(2*sec, 10000, 'f')
	p(2*sec, 0.95)
	admit(2100*ms, 0.95, true)
	admit(2100*ms, 0.949, false)
	// Time forgets: a slot after the other, each a minute after it began.
	p(61*sec, 0.95)
	p(62*sec-1, 0.95)
	p(62*sec, 0)
	if th.sum != (tally{}) {
		t.Errorf("%+v counted after the window", th.sum)
	}
	admit(62*sec, 0, true)
	// A clock that goes back counts in the newest slot; so does one before the start.
	record(30*sec, 99, 'f')
	record(-time.Hour, 1, 'f')
	p(62*sec, 0.95)
	// A pause of years.
	p(10*365*24*time.Hour, 0)
	admit(10*365*24*time.Hour, 0, true)
}

// A call takes no lock while p is 0, in every slot anew: time alone may change p.
func TestThrottleCalm(t *testing.T) {
	th := newThrottle(t, ThrottleConfig{Window: time.Minute})
	calm := func(when string, until time.Duration) {
		t.Helper()
		if got := time.Duration(th.calmUntil.Load()); got != until {
			t.Errorf("%s: calm until %v, want %v", when, got, until)
		}
	}
	for range 100 {
		th.Record(at(0), nil)
	}
	calm("after successes", sec)
	th.Admit(at(5*sec), 0)
	calm("a call in a later slot", 6*sec)
	for range 100 {
		th.Record(at(30*sec), ends['f'])
	}
	calm("half of the requests accepted", 31*sec)
	th.Admit(at(60*sec-1), 0)
	calm("a moment before the successes are forgotten", 60*sec)
	th.Admit(at(60*sec), 0) // let in, for none was for a second
	if err := th.Admit(at(60*sec+1), 0); err == nil {
		t.Error("let in though the accepted requests have left the window")
	}
	calm("refusing", 0)
}

// Requests in flight are no requests yet: a slow server is not throttled for being slow.
func TestThrottleInFlight(t *testing.T) {
	th := newThrottle(t, ThrottleConfig{K: 1.1})
	for i := range 1000 {
		if err := th.Admit(at(time.Duration(i)*ms), 0); err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
	}
	if p := th.Probability(at(sec)); p != 0 {
		t.Errorf("probability %v with all calls in flight, want 0", p)
	}
}

// What is recent may take p down, never up.
func TestThrottleRecent(t *testing.T) {
	fill := func(early, late rune, n int) *Throttle {
		th := newThrottle(t, ThrottleConfig{Window: time.Minute})
		for i := range 50 * sec / (10 * ms) {
			th.Record(at(i*10*ms), ends[early])
		}
		for range n {
			th.Record(at(54*sec), ends[late])
		}
		return th
	}
	// 5000 failures, then successes: of the newest 100 requests, in 5 slots or more.
	if p := fill('f', 's', 99).Probability(at(54 * sec)); p != 1.0/200 {
		t.Errorf("99 late successes: probability %v, want %v: with the slot before them", p, 1.0/200)
	}
	if p := fill('f', 's', 100).Probability(at(54 * sec)); p != 0 {
		t.Errorf("100 late successes: probability %v, want 0", p)
	}
	if p := fill('f', 's', 100).Probability(at(53 * sec)); p != 0 {
		t.Errorf("the clock going back: probability %v, want 0", p)
	}
	// They must be recent for 5 slots: with those of 50s, one slot before, there are failures.
	th := newThrottle(t, ThrottleConfig{Window: time.Minute})
	for range 150 {
		th.Record(at(50*sec), ends['f'])
	}
	for range 100 {
		th.Record(at(54*sec), ends['s'])
	}
	if p := th.Probability(at(54 * sec)); p != 50.0/251 {
		t.Errorf("failures 4 slots ago: probability %v, want %v", p, 50.0/251)
	}
	if p := th.Probability(at(55 * sec)); p != 0 {
		t.Errorf("failures 5 slots ago: probability %v, want 0", p)
	}
	if p := fill('s', 'f', 2000).Probability(at(54 * sec)); p != 0 {
		t.Errorf("2000 late failures after 5000 successes: probability %v, want 0", p)
	}
}

// Against a model that remembers every event: what is let in, and with what probability.
func TestThrottleModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k := rapid.Float64Range(1.1, 4).Draw(t, "k")
		gap := rapid.SampledFrom([]time.Duration{5 * ms, 50 * ms, sec}).Draw(t, "gap")
		weights := rapid.SliceOfN(rapid.IntRange(0, 3), 1, 6).Draw(t, "weights") // what calls do, by turns
		th, err := NewThrottle(ThrottleConfig{K: k, Window: time.Minute}, epoch0)
		if err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		type event struct {
			slot     int64
			accepted bool
		}
		var log []event
		formula := func(from int64) (p float64, n int) {
			accepts := 0
			for i := len(log) - 1; i >= 0 && log[i].slot >= from; i-- {
				n++
				if log[i].accepted {
					accepts++
				}
			}
			return min(max(0, (float64(n)-k*float64(accepts))/float64(n+1)), 0.95), n
		}
		now, let := time.Duration(0), time.Duration(0)
		refused := 0
		for i := range 400 {
			now += time.Duration(rng.ExpFloat64() * float64(gap))
			if rng.IntN(200) == 0 {
				now += time.Duration(rng.IntN(70)) * sec
			}
			slot := int64(now / sec)
			p, all := formula(slot - 59)
			if all < 100 {
				p = 0
			}
			for back := int64(4); back < 60 && p > 0; back++ {
				if recent, n := formula(slot - back); n >= 100 {
					p = min(p, recent)
					break
				}
			}
			u := rng.Float64()
			want := p == 0 || u >= p || now-let >= sec
			if rng.IntN(4) > 0 { // asking must change nothing
				if got := th.Probability(at(now)); got != p {
					t.Fatalf("event %d at %v: probability %v, want %v", i, now, got, p)
				}
			}
			if got := th.Admit(at(now), u) == nil; got != want {
				t.Fatalf("event %d at %v: let in %v, want %v: u %v, probability %v, last let in %v ago", i, now, got, want, u, p, now-let)
			}
			if !want {
				refused++
				log = append(log, event{slot, false})
				continue
			}
			if p > 0 {
				let = now
			}
			switch weights[i*len(weights)/400] {
			case 0:
				th.Record(at(now), nil)
				log = append(log, event{slot, true})
			case 1, 2:
				letter := []rune("fq")[rng.IntN(2)]
				th.Record(at(now), ends[letter])
				log = append(log, event{slot, false})
			default:
				th.Record(at(now), ends['c'])
			}
		}
	})
}

// server is one that can do a number of calls a second, evenly, and turns away the rest.
type server struct{ perSecond, credit, last float64 }

func (s *server) serve(now time.Duration) error {
	s.credit = min(s.credit+s.perSecond*(now.Seconds()-s.last), 2)
	s.last = now.Seconds()
	if s.credit >= 1 {
		s.credit--
		return nil
	}
	return ends['q']
}

// The figures of the SRE book: wanted ten times as much as it can do, a server refuses one
// request for each that it accepts with K 2, one for ten with K 1.1; and however much it is
// wanted.
func TestThrottleOverload(t *testing.T) {
	for _, tc := range []struct {
		k, offered, refused float64
	}{{2, 500, 1}, {1.1, 500, 0.1}, {2, 1000, 1}, {2, 150, 1}} {
		th, s, u := newThrottle(t, ThrottleConfig{K: tc.k}), server{perSecond: 50}, spread(0)
		var accepted, refused float64
		for i := range int(tc.offered) * 300 {
			now := time.Duration(float64(i) / tc.offered * float64(sec))
			if th.Admit(at(now), u.next()) != nil {
				continue
			}
			err := s.serve(now)
			th.Record(at(now), err)
			if now < 200*sec {
				continue // it takes a while to settle
			}
			if err == nil {
				accepted++
			} else {
				refused++
			}
		}
		t.Logf("K %v, %v/s offered: accepted %.1f/s, %.3f refused for each", tc.k, tc.offered, accepted/100, refused/accepted)
		if r := refused / accepted; math.Abs(r-tc.refused) > 0.1*tc.refused {
			t.Errorf("K %v, %v/s offered: %.3f refused for each accepted, want %v", tc.k, tc.offered, r, tc.refused)
		}
		// The throttle takes next to nothing from what the server can do: K 1.1 leaves it with so
		// little to refuse that it idles now and then.
		if accepted < 0.96*50*100 {
			t.Errorf("K %v, %v/s offered: %.1f/s accepted, want 50", tc.k, tc.offered, accepted/100)
		}
	}
}

// How long after a total outage, at 100 calls/s, the last call is refused: the figures in the
// documentation of [Throttle].
func TestThrottleRecovery(t *testing.T) {
	for _, tc := range []struct {
		k      float64
		outage time.Duration
		want   time.Duration // rounded to seconds; 0 is that nobody was refused
	}{
		{2, 59 * sec, 0},
		{2, 2 * time.Minute, 20 * sec},
		{2, 10 * time.Minute, 20 * sec},
		{1.1, 10 * sec, 0},
		{1.1, 10 * time.Minute, 138 * sec},
	} {
		th, u := newThrottle(t, ThrottleConfig{K: tc.k}), spread(0)
		const healthy = 10 * time.Minute
		healed := healthy + tc.outage
		last := healed
		sent, refused := 0, 0
		for now := time.Duration(0); now < healed+5*time.Minute; now += 10 * ms {
			if th.Admit(at(now), u.next()) != nil {
				refused++
				last = max(last, now)
				continue
			}
			var err error
			if now >= healthy && now < healed {
				err = ends['f']
				sent++
			}
			th.Record(at(now), err)
		}
		back := last - healed
		t.Logf("K %v, an outage of %v: %d of %d calls were sent into it; the last was refused %v after it", tc.k, tc.outage, sent, tc.outage/(10*ms), back)
		if back.Round(sec) != tc.want || (tc.want == 0) != (refused == 0) {
			t.Errorf("K %v, an outage of %v: the last of %d calls was refused %v after it, want %v", tc.k, tc.outage, refused, back, tc.want)
		}
	}
}

// A quiet client: one call a second gets through whatever p is, and one that calls less is
// never refused.
func TestThrottleFloor(t *testing.T) {
	th := newThrottle(t, ThrottleConfig{})
	let := 0
	for now := time.Duration(0); now < 10*time.Minute; now += 100 * ms {
		if th.Admit(at(now), 0) == nil { // the unluckiest of all
			th.Record(at(now), ends['f'])
			if now >= 5*time.Minute {
				let++
			}
		}
	}
	if let != 300 {
		t.Errorf("%d calls let in in 300 s, want 300", let)
	}
	for now := 10 * time.Minute; now < 20*time.Minute; now += sec {
		if err := th.Admit(at(now), 0); err != nil {
			t.Fatalf("one call a second: %v", err)
		}
		th.Record(at(now), ends['f'])
	}
}

func TestThrottleRefusal(t *testing.T) {
	th := newThrottle(t, ThrottleConfig{Method: "/kv.KV/Get"})
	for range 100 {
		th.Record(at(0), ends['f'])
	}
	err := th.Admit(at(ms), 0)
	if !errors.Is(err, ErrThrottled) || errors.Is(err, ErrOpen) || status.Code(err) != codes.Unavailable || !outcome.IsRefusal(err) {
		t.Fatal(err)
	}
	details := status.Convert(err).Details()
	if len(details) != 1 {
		t.Fatalf("details %v, want one", details)
	}
	info, _ := details[0].(*errdetails.ErrorInfo)
	if info.GetDomain() != "bobtail" || info.GetReason() != "THROTTLED" || info.GetMetadata()["method"] != "/kv.KV/Get" {
		t.Errorf("ErrorInfo %v", info)
	}
}

// Many at once: nothing is lost, and the race detector looks on.
func TestThrottleConcurrent(t *testing.T) {
	th := newThrottle(t, ThrottleConfig{})
	var wg sync.WaitGroup
	const n, each = 8, 2000
	for g := range n {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 0))
			for i := range each {
				now := at(time.Duration(i) * ms)
				if th.Admit(now, rng.Float64()) == nil {
					th.Record(now, ends['f'])
				}
				th.Probability(now)
			}
		})
	}
	wg.Wait()
	if th.sum != (tally{requests: n * each}) {
		t.Errorf("%+v counted, want %d requests", th.sum, n*each)
	}
}

func TestThrottleAllocatesNothing(t *testing.T) {
	for _, end := range "sf" {
		th := newThrottle(t, ThrottleConfig{})
		now := epoch0
		if n := testenv.Allocs(1000, func() {
			now = now.Add(10 * ms)
			if th.Admit(now, 0.5) == nil {
				th.Record(now, ends[end])
			}
		}); n != 0 {
			t.Errorf("calls that end %q: %v allocations, want none", end, n)
		}
	}
}

// A client that meets an outage first knows nothing better: it is back as soon as one that
// has been served for long. One call that fails is no outage.
func TestThrottleNoPast(t *testing.T) {
	th := newThrottle(t, ThrottleConfig{})
	th.Record(at(10*ms), ends['f'])
	if err := th.Admit(at(20*ms), 0); err != nil {
		t.Errorf("the second call is refused because the first failed: %v", err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	var last time.Duration
	for now := 30 * ms; now < 2*time.Minute; now += 10 * ms {
		if th.Admit(at(now), rng.Float64()) != nil {
			last = now
			continue
		}
		if now < 5*sec {
			th.Record(at(now), ends['f'])
		} else {
			th.Record(at(now), nil)
		}
	}
	if back := last - 5*sec; back > 25*sec || back < 0 {
		t.Errorf("the last call is refused %v after the server is back, want about 20s", back)
	}
}
