package shedding

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func newQueue(t testing.TB, cfg QueueConfig) *Queue {
	t.Helper()
	q, err := NewQueue(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func TestNewQueue(t *testing.T) {
	for _, c := range []struct {
		cfg  QueueConfig
		want string
	}{
		{QueueConfig{}, ""},
		{QueueConfig{MaxLength: 100_000, Target: time.Minute, MaxWait: time.Minute}, ""},
		{QueueConfig{MaxWait: ms}, ""}, // the target comes down with it
		{QueueConfig{MaxLength: -1}, "shedding: queue maxLength -1, want [1, 100000], or 0 for the default"},
		{QueueConfig{MaxLength: 100_001}, "shedding: queue maxLength 100001, want [1, 100000], or 0 for the default"},
		{QueueConfig{MaxWait: -1}, "shedding: queue maxWait -1ns, want (0, 1m0s], or 0 for the default"},
		{QueueConfig{MaxWait: time.Hour}, "shedding: queue maxWait 1h0m0s, want (0, 1m0s], or 0 for the default"},
		{QueueConfig{Target: -1}, "shedding: queue target -1ns, want (0, maxWait 100ms], or 0 for the default"},
		{QueueConfig{Target: 101 * ms}, "shedding: queue target 101ms, want (0, maxWait 100ms], or 0 for the default"},
		{QueueConfig{MaxLength: -1, Target: -1}, "shedding: queue maxLength -1, want [1, 100000], or 0 for the default\n" +
			"shedding: queue target -1ns, want (0, maxWait 100ms], or 0 for the default"},
	} {
		_, err := NewQueue(c.cfg)
		if got := fmt.Sprint(err); got != c.want && !(err == nil && c.want == "") {
			t.Errorf("%+v: %v, want %q", c.cfg, err, c.want)
		}
	}
}

// at is a time of the step tables, in milliseconds.
func at(msec int) time.Time { return simEpoch.Add(time.Duration(msec) * ms) }

func level(c Criticality, extra bool) Level { return LevelOf(c, extra, 0) }

func TestQueueOrder(t *testing.T) {
	for _, c := range []struct {
		newestFirst bool
		want        []string
	}{
		{false, []string{"plus", "first", "extra", "second", "low"}},
		{true, []string{"plus", "second", "extra", "first", "low"}},
	} {
		q := newQueue(t, QueueConfig{})
		q.Push(at(0), level(Sheddable, false), 0, time.Time{}, "low")
		q.Push(at(1), level(Critical, false), 0, time.Time{}, "first")
		q.Push(at(2), level(Critical, true), 0, time.Time{}, "extra")
		q.Push(at(3), level(Critical, false), 0, time.Time{}, "second")
		q.Push(at(4), level(CriticalPlus, false), 0, time.Time{}, "plus")
		q.NewestFirst(c.newestFirst)
		var got []string
		for w, ok := q.Pop(); ok; w, ok = q.Pop() {
			got = append(got, w.Owner.(string))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("newest first %v: %v, want %v", c.newestFirst, got, c.want)
		}
	}
	// The sheddable classes may be served as one, and the others never are.
	for _, c := range []struct {
		newestFirst bool
		want        []string
	}{
		{false, []string{"plus", "critical", "low", "less low", "low extra", "less low extra"}},
		{true, []string{"plus", "critical", "less low extra", "low extra", "less low", "low"}},
	} {
		q := newQueue(t, QueueConfig{})
		q.Push(at(0), level(Sheddable, false), 0, time.Time{}, "low")
		q.Push(at(1), level(SheddablePlus, false), 0, time.Time{}, "less low")
		q.Push(at(2), level(Sheddable, true), 0, time.Time{}, "low extra")
		q.Push(at(3), level(SheddablePlus, true), 0, time.Time{}, "less low extra")
		q.Push(at(4), level(Critical, false), 0, time.Time{}, "critical")
		q.Push(at(5), level(CriticalPlus, false), 0, time.Time{}, "plus")
		if n := q.Ahead(level(SheddablePlus, false), 0); n != 4 {
			t.Errorf("%d are ahead of one that is sheddable_plus, want the 4 of its class and above", n)
		}
		q.Together(true)
		q.NewestFirst(c.newestFirst)
		ahead := map[Criticality]int{Sheddable: 6, SheddablePlus: 6, Critical: 2, CriticalPlus: 1}
		if c.newestFirst {
			ahead = map[Criticality]int{Sheddable: 2, SheddablePlus: 2, Critical: 1, CriticalPlus: 0}
		}
		for class, want := range ahead {
			if n := q.Ahead(level(class, false), 0); n != want {
				t.Errorf("newest first %v: %d are ahead of one that is %v, want %d", c.newestFirst, n, class, want)
			}
		}
		if w, _ := q.Shed(levels); w.Owner != "low extra" {
			t.Errorf("%v has to go first, want an extra attempt of the lowest class", w.Owner)
		}
		q.Push(at(2), level(Sheddable, true), 0, time.Time{}, "low extra")
		var got []string
		for w, ok := q.Pop(); ok; w, ok = q.Pop() {
			got = append(got, w.Owner.(string))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("together, newest first %v: %v, want %v", c.newestFirst, got, c.want)
		}
	}
	// Of the same moment, a first attempt goes before an extra one.
	q := newQueue(t, QueueConfig{})
	q.Push(at(0), level(Critical, true), 0, time.Time{}, "extra")
	q.Push(at(0), level(Critical, false), 0, time.Time{}, "first")
	if w, _ := q.Pop(); w.Owner != "first" {
		t.Errorf("%v goes first", w.Owner)
	}
}

func TestQueueDisplace(t *testing.T) {
	fill := func(newestFirst bool) *Queue {
		q := newQueue(t, QueueConfig{MaxLength: 4})
		q.NewestFirst(newestFirst)
		q.Push(at(0), level(Sheddable, false), 0, time.Time{}, "old")
		q.Push(at(1), level(Sheddable, false), 0, time.Time{}, "new")
		q.Push(at(2), level(Critical, true), 0, time.Time{}, "extra")
		q.Push(at(3), level(Critical, false), 0, time.Time{}, "critical")
		return q
	}
	for _, c := range []struct {
		newestFirst  bool
		level, below Level
		want         []any // who goes, one after the other; then nobody
	}{
		{false, level(CriticalPlus, false), levels, []any{"new", "old", "extra", "critical"}},
		{false, level(Critical, false), levels, []any{"new", "old", "extra"}},
		{false, level(Critical, true), levels, []any{"new", "old"}},
		{false, level(Sheddable, false), levels, nil},
		{false, level(CriticalPlus, false), level(Critical, true), []any{"new", "old"}},
		{true, level(Critical, true), levels, []any{"old", "new", "extra"}},
		{true, level(Sheddable, false), levels, []any{"old", "new"}},
		{true, level(Sheddable, true), levels, nil},
	} {
		q := fill(c.newestFirst)
		if _, ok := q.Push(at(4), level(CriticalPlus, false), 0, time.Time{}, nil); ok || !q.Full() {
			t.Fatal("a fifth of four")
		}
		var got []any
		for w, ok := q.Displace(c.level, 0, c.below); ok; w, ok = q.Displace(c.level, 0, c.below) {
			got = append(got, w.Owner)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

func TestQueueEnds(t *testing.T) {
	q := newQueue(t, QueueConfig{})
	q.Push(at(0), level(Critical, false), 0, time.Time{}, "maxWait")
	q.Push(at(1), level(Critical, false), 0, at(50), "deadline")
	q.Push(at(2), level(Sheddable, false), 0, at(500), "low")
	for _, s := range []struct {
		at   int
		next int
		want any // who ends then
	}{{1, 50, nil}, {49, 50, nil}, {50, 100, "deadline"}, {99, 100, nil}, {100, 102, "maxWait"}, {101, 102, nil}} {
		w, _ := q.Expire(at(s.at))
		if end, _ := q.NextEnd(); w.Owner != s.want || !end.Equal(at(s.next)) {
			t.Errorf("at %d: %v ends, next %v", s.at, w.Owner, end.Sub(at(0)))
		}
	}
	q.Push(at(101), level(Critical, false), 0, time.Time{}, "not below")
	q.Bound(10*ms, level(Critical, true))
	if end, _ := q.NextEnd(); !end.Equal(at(12)) {
		t.Errorf("bound: next end %v", end.Sub(at(0)))
	}
	if w, _ := q.Expire(at(101)); w.Owner != "low" {
		t.Errorf("bound: %v ends", w.Owner)
	}
	if end, _ := q.NextEnd(); !end.Equal(at(201)) || q.Wait(at(111)) != 10*ms {
		t.Errorf("next end %v, wait %v", end.Sub(at(0)), q.Wait(at(111)))
	}
}

func TestQueueTickets(t *testing.T) {
	q := newQueue(t, QueueConfig{})
	a, _ := q.Push(at(0), level(Critical, false), 0, time.Time{}, "a")
	if w, ok := q.Remove(a); !ok || w.Owner != "a" || w.Ticket != a {
		t.Fatalf("%+v, %v", w, ok)
	}
	b, _ := q.Push(at(1), level(Critical, false), 0, time.Time{}, "b") // in the same place
	for _, ticket := range []Ticket{a, {}, {place: 99, generation: 1}} {
		if w, ok := q.Remove(ticket); ok {
			t.Errorf("%+v names %v", ticket, w.Owner)
		}
	}
	if _, ok := q.Remove(b); !ok || q.Len() != 0 {
		t.Error("b is not there")
	}
}

// The queue is what a slice is that is searched for the right one.
func TestQueueModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const maxLength = 12
		q, err := NewQueue(QueueConfig{MaxLength: maxLength})
		if err != nil {
			t.Fatal(err)
		}
		type entry struct {
			id      int
			ticket  Ticket
			lane    int
			arrived time.Time
			until   time.Time
		}
		var model []entry // by arrival
		now, id, newestFirst := simEpoch, 0, false
		bound, below := time.Duration(0), 0
		take := func(i int) entry { e := model[i]; model = slices.Delete(model, i, i+1); return e }
		// best is the index of the entry that comes before all others, or -1.
		best := func(keep func(entry) bool, before func(a, b entry) bool) int {
			found := -1
			for i, e := range model {
				if keep(e) && (found < 0 || before(e, model[found])) {
					found = i
				}
			}
			return found
		}
		check := func(what string, w Waiter, ok bool, want int) {
			if ok != (want >= 0) {
				t.Fatalf("%s: %v, want %d of %v", what, ok, want, model)
			}
			if ok {
				if e := take(want); e.id != w.Owner.(int) {
					t.Fatalf("%s: %v, want %v", what, w.Owner, e.id)
				}
			}
		}
		anyone := func(entry) bool { return true }
		for range rapid.IntRange(1, 150).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(1, 20).Draw(t, "ms")) * ms)
			lane := rapid.IntRange(0, lanes-1).Draw(t, "lane")
			l := Level(lane * Cohorts)
			switch rapid.IntRange(0, 7).Draw(t, "op") {
			case 0, 1, 2:
				until := now.Add(time.Duration(rapid.IntRange(1, 150).Draw(t, "until"))*ms + time.Duration(id))
				ticket, ok := q.Push(now, l, 0, until, id)
				if ok != (len(model) < maxLength) {
					t.Fatalf("push: %v of %d", ok, len(model))
				}
				if end := now.Add(100 * ms); end.Before(until) {
					until = end
				}
				if ok {
					model = append(model, entry{id, ticket, lane, now, until})
				}
				id++
			case 3:
				w, ok := q.Pop()
				check("pop", w, ok, best(anyone, func(a, b entry) bool {
					if a.lane/2 != b.lane/2 {
						return a.lane > b.lane
					}
					return newestFirst == a.arrived.After(b.arrived)
				}))
			case 4:
				ends := func(e entry) time.Time {
					if b := e.arrived.Add(bound); e.lane < below && b.Before(e.until) {
						return b
					}
					return e.until
				}
				i := best(anyone, func(a, b entry) bool { return ends(a).Before(ends(b)) })
				if i >= 0 && ends(model[i]).After(now) {
					i = -1
				}
				w, ok := q.Expire(now)
				if ok && i >= 0 && w.Owner.(int) != model[i].id {
					// Two may end at the same time, in any order.
					j := slices.IndexFunc(model, func(e entry) bool { return e.id == w.Owner.(int) })
					if ends(model[j]).Equal(ends(model[i])) {
						i = j
					}
				}
				check("expire", w, ok, i)
			case 5:
				w, ok := q.Displace(l, 0, levels)
				check("displace", w, ok, best(
					func(e entry) bool { return e.lane < lane || newestFirst && e.lane == lane },
					func(a, b entry) bool {
						if a.lane != b.lane {
							return a.lane < b.lane
						}
						return newestFirst == a.arrived.Before(b.arrived)
					}))
			case 6:
				if len(model) == 0 {
					continue
				}
				i := rapid.IntRange(0, len(model)-1).Draw(t, "who")
				w, ok := q.Remove(model[i].ticket)
				check("remove", w, ok, i)
			case 7:
				newestFirst = !newestFirst
				q.NewestFirst(newestFirst)
				bound, below = time.Duration(rapid.IntRange(1, 100).Draw(t, "bound"))*ms, lane
				q.Bound(bound, l)
			}
			wait := time.Duration(0)
			if len(model) > 0 {
				wait = now.Sub(model[0].arrived)
			}
			if q.Len() != len(model) || q.Wait(now) != wait || len(q.places) > maxLength+1 {
				t.Fatalf("length %d, wait %v, %d places; want %d, %v", q.Len(), q.Wait(now), len(q.places), len(model), wait)
			}
		}
	})
}

func BenchmarkQueue(b *testing.B) {
	for _, n := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			q := newQueue(b, QueueConfig{MaxLength: n + 1, MaxWait: time.Minute})
			now := simEpoch
			for i := range n {
				q.Push(now, Level(i*37%levels), 0, now.Add(time.Duration(i*7919%1000)*ms), nil)
			}
			b.ReportAllocs()
			for b.Loop() {
				now = now.Add(time.Microsecond)
				q.Push(now, Level(now.Nanosecond()%levels), 0, now.Add(time.Duration(now.Nanosecond()%1000)*ms), nil)
				q.Pop()
			}
		})
	}
}
