package shedding

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"pgregory.net/rapid"
)

func TestHand(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		shards := rapid.IntRange(1, maxShards).Draw(t, "shards")
		c := QueueConfig{Shards: shards, Hand: rapid.IntRange(1, min(maxHand, shards)).Draw(t, "hand")}
		flow := rapid.Uint64().Draw(t, "flow")
		var hand, again []int
		c.hand(flow, func(s int) { hand = append(hand, s) })
		c.hand(flow, func(s int) { again = append(again, s) })
		if !slices.Equal(hand, again) {
			t.Fatalf("%v, then %v", hand, again)
		}
		slices.Sort(hand)
		if len(slices.Compact(hand)) != c.Hand || hand[0] < 0 || hand[len(hand)-1] >= shards {
			t.Fatalf("%v, want %d of %d", hand, c.Hand, shards)
		}
	})
}

// The arithmetic of QueueConfig.Shards, by dealing.
func TestHandArithmetic(t *testing.T) {
	hand := func(c QueueConfig, flow uint64) []int {
		var all []int
		c.hand(mix(flow), func(s int) { all = append(all, s) })
		return all
	}
	for _, c := range []struct {
		shards, hand, others int
		want                 float64
	}{
		{8, 2, 1, 1.0 / 28}, {16, 3, 1, 1.0 / 560},
		{64, 4, 4, 0.0027}, {64, 4, 16, 0.17}, {256, 8, 16, 0.0006},
	} {
		cfg := QueueConfig{Shards: c.shards, Hand: c.hand}
		approx := math.Pow(1-math.Pow(1-float64(c.hand)/float64(c.shards), float64(c.others)), float64(c.hand))
		const tries = 40_000
		covered, flow := 0, uint64(0)
		for range tries {
			full := map[int]bool{}
			for range c.others {
				flow++
				for _, s := range hand(cfg, flow) {
					full[s] = true
				}
			}
			flow++
			if !slices.ContainsFunc(hand(cfg, flow), func(s int) bool { return !full[s] }) {
				covered++
			}
		}
		got, noise := float64(covered)/tries, 4*math.Sqrt(c.want/tries)
		t.Logf("%d of %d, %d others: %.5f, by the formula %.5f", c.hand, c.shards, c.others, got, approx)
		if math.Abs(got-c.want) > noise+0.1*c.want {
			t.Errorf("%d of %d shared with %d others: %v, want %v", c.hand, c.shards, c.others, got, c.want)
		}
	}
	if n := 64 * 63 * 62 * 61 / 24; n != 635_376 {
		t.Errorf("C(64, 4) = %d", n)
	}
}

func TestShardsValidate(t *testing.T) {
	for _, c := range []struct {
		cfg  QueueConfig
		want string
	}{
		{QueueConfig{Shards: 64}, "<nil>"},
		{QueueConfig{Shards: 3}, "<nil>"}, // of which the hand is 3
		{QueueConfig{Shards: 256, Hand: 8}, "<nil>"},
		{QueueConfig{Shards: -1}, "shedding: queue shards -1, want [1, 256], or 0 for the default"},
		{QueueConfig{Shards: 257}, "shedding: queue shards 257, want [1, 256], or 0 for the default"},
		{QueueConfig{Shards: 64, Hand: 9}, "shedding: queue hand 9, want [1, 8], or 0 for the default"},
		{QueueConfig{Shards: 4, Hand: 5}, "shedding: queue hand 5, want [1, 4], or 0 for the default"},
		{QueueConfig{Hand: -1}, "shedding: queue hand -1, want [1, 1], or 0 for the default"},
	} {
		if got := fmt.Sprint(c.cfg.Validate()); got != c.want {
			t.Errorf("%+v: %s, want %s", c.cfg, got, c.want)
		}
	}
}

// One who fills his hand is passed by whoever has a queue to himself, is the one who has to
// go, and makes room when there is none.
func TestShards(t *testing.T) {
	for _, newestFirst := range []bool{false, true} {
		q := newQueue(t, QueueConfig{MaxLength: 100, Shards: 64})
		q.NewestFirst(newestFirst)
		l := level(Critical, false)
		for i := range 100 {
			if _, ok := q.Push(at(i/10), l, 1, time.Time{}, "heavy"); !ok {
				t.Fatal("full")
			}
		}
		if n := q.Ahead(l, 1); n != 100 && !newestFirst {
			t.Errorf("%d are ahead of one more of the same, want 100", n)
		}
		if n := q.Ahead(l, 2); n > 4 {
			t.Errorf("%d are ahead of another, want one in each of 4 queues at most", n)
		}
		if _, ok := q.Displace(l, 1, levels); ok != newestFirst {
			t.Errorf("newest first %v: one of the same takes a place: %v", newestFirst, ok)
		}
		if w, ok := q.Displace(l, 2, levels); !ok || w.Owner != "heavy" {
			t.Errorf("%v, %v: another gets no place", w.Owner, ok)
		}
		q.Push(at(11), l, 2, time.Time{}, "light")
		served := 0
		for w, ok := q.Pop(); ok; w, ok = q.Pop() {
			served++
			if w.Owner == "light" {
				break
			}
		}
		if served > 5 {
			t.Errorf("newest first %v: served as number %d", newestFirst, served)
		}
		q.Push(at(12), l, 2, time.Time{}, "light")
		if w, _ := q.Shed(levels); w.Owner != "heavy" {
			t.Errorf("%v has to go", w.Owner)
		}
	}
}

// Shards say whose turn it is in a lane, not which lane is served: the newest first attempts
// go before extra ones that are older, in whichever shard they wait.
func TestShardsAcrossLanes(t *testing.T) {
	q := newQueue(t, QueueConfig{Shards: 64})
	q.NewestFirst(true)
	first, extra := level(Critical, false), level(Critical, true)
	q.Push(at(0), first, 1, time.Time{}, "old")
	for i := range 5 {
		q.Push(at(1+i), extra, 2, time.Time{}, "extra")
	}
	for i := range 5 {
		q.Push(at(6+i), first, uint64(10+i), time.Time{}, "new")
	}
	var got []string
	for w, ok := q.Pop(); ok; w, ok = q.Pop() {
		got = append(got, w.Owner.(string))
	}
	// The old one has its turn among the first attempts, wherever in the row that is.
	if at := slices.Index(got, "extra"); at < 5 {
		t.Errorf("%v: an extra attempt goes before newer first ones", got)
	}
}

// Whatever happens, each is in one shard of its lane, the same as in the lane's list, and
// leaves once.
func TestShardsModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		q, err := NewQueue(QueueConfig{MaxLength: 30, Shards: 5, Hand: 2})
		if err != nil {
			t.Fatal(err)
		}
		waiting := map[int]Ticket{}
		gone := func(w Waiter, ok bool) {
			if !ok {
				return
			}
			if _, there := waiting[w.Owner.(int)]; !there {
				t.Fatalf("%v leaves, who is not there", w.Owner)
			}
			delete(waiting, w.Owner.(int))
		}
		now := simEpoch
		for id := range rapid.IntRange(1, 150).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(0, 5).Draw(t, "ms")) * ms)
			l := Level(rapid.IntRange(0, levels-1).Draw(t, "level"))
			flow := uint64(rapid.IntRange(1, 6).Draw(t, "flow"))
			switch rapid.IntRange(0, 9).Draw(t, "op") {
			case 0, 1, 2, 3:
				if ticket, ok := q.Push(now, l, flow, time.Time{}, id); ok {
					waiting[id] = ticket
				}
			case 4, 5:
				gone(q.Pop())
			case 6:
				gone(q.Displace(l, flow, levels))
				gone(q.Shed(l))
			case 7:
				for who, ticket := range waiting {
					gone(q.Remove(ticket))
					_ = who
					break
				}
			case 8:
				gone(q.Expire(now))
				q.NewestFirst(id%2 == 0)
			case 9:
				q.configure(QueueConfig{MaxLength: 30, Shards: rapid.IntRange(1, 7).Draw(t, "shards")})
			}
			if q.Len() != len(waiting) {
				t.Fatalf("%d wait, want %d", q.Len(), len(waiting))
			}
			for i := range q.lanes {
				l := &q.lanes[i]
				if l.shards == nil {
					if q.sharded() {
						t.Fatal("no shards")
					}
					continue
				}
				in := map[uint32]bool{}
				for k := range l.shards {
					s, n, last := &l.shards[k], 0, uint32(0)
					for p := s.oldest; p != 0; p = q.places[p].shardNewer {
						if in[p] || int(q.places[p].shard) != k || q.places[p].shardOlder != last || q.places[p].Level.lane() != i {
							t.Fatalf("place %d in shard %d of lane %d: %+v", p, k, i, q.places[p])
						}
						in[p], last = true, p
						n++
					}
					if n != s.n || last != s.newest {
						t.Fatalf("shard %d has %d and ends with %d: %+v", k, n, last, s)
					}
				}
				if len(in) != l.n {
					t.Fatalf("%d in the shards of lane %d, which has %d", len(in), i, l.n)
				}
			}
		}
		for w, ok := q.Pop(); ok; w, ok = q.Pop() {
			gone(w, ok)
		}
		if len(waiting) > 0 {
			t.Fatalf("%v are never served", waiting)
		}
	})
}

// Of a tenant who sends twice what the server can do, the others notice next to nothing.
func TestShardsIsolate(t *testing.T) {
	served := map[int][2]float64{}
	for _, shards := range []int{1, 64} {
		cfg := static(10, 200)
		cfg.Queue.Shards = shards
		a := newAdmission(t, cfg)
		now := simEpoch
		var running []time.Time
		var offered, done [2]float64 // the light ones and the heavy one
		var waits []time.Duration
		light := func(flow int) int { return b2i(flow == 0) }
		settle := func() {
			for _, st := range a.Settled() {
				if st.Verb == Admitted {
					running = append(running, now)
					who := light(st.Owner.(int))
					done[who]++
					if who == 0 {
						waits = append(waits, st.Wait)
					}
				}
			}
		}
		arrive := func(flow int) {
			offered[light(flow)]++
			if a.Arrive(now, Request{Flow: uint64(flow), Owner: flow}).Verb == Admitted {
				running = append(running, now)
				done[light(flow)]++
			}
			settle()
		}
		for i := range 20_000 { // 20 s of 10 slots of 10 ms
			for len(running) > 0 && now.Sub(running[0]) >= 10*ms {
				a.Done(now, 10*ms, Served)
				running = running[1:]
				settle()
			}
			arrive(0)
			arrive(0)
			if i%4 == 0 {
				arrive(1 + i/4%20)
			}
			now = now.Add(ms)
			a.Tick(now)
			settle()
		}
		served[shards] = [2]float64{done[0] / offered[0], done[1] / offered[1]}
		t.Logf("%d shards: %.4f of the light tenants' calls served, p99 of their waits %v; %.4f of the heavy one's", shards, done[0]/offered[0], p99(waits), done[1]/offered[1])
	}
	if one, many := served[1][0], served[64][0]; one > 0.7 || many < 0.8 || many < 1.5*one {
		t.Errorf("%.3f of the light tenants' calls served without shards, %.3f with", one, many)
	}
}

// A server deals by the tenant's name: one call of another does not wait behind fifty of one.
func TestServerShards(t *testing.T) {
	if _, err := NewServer(ServerConfig{Queue: &QueueConfig{Shards: 64}}); err == nil ||
		err.Error() != "shedding: queue shards 64 without tenants, want both: it is tenants that are dealt queues" {
		t.Error(err)
	}
	for _, shards := range []int{1, 64} {
		synctest.Test(t, func(t *testing.T) {
			cfg := staticServer(1, 100)
			cfg.Queue.Shards, cfg.Queue.MaxWait, cfg.Queue.Target = shards, 10*time.Second, 10*time.Second
			cfg.Tenants = &TenantsConfig{MetadataKey: "x-tenant"}
			u := newServer(t, cfg).UnaryServerInterceptor()
			var order []string
			call := func(tenant string) {
				ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("x-tenant", tenant))
				_, err := u(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/kv.KV/Get"}, func(context.Context, any) (any, error) {
					order = append(order, tenant)
					time.Sleep(10 * ms)
					return nil, nil
				})
				if err != nil {
					t.Error(err)
				}
			}
			var all sync.WaitGroup
			for range 50 {
				all.Go(func() { call("heavy") })
				synctest.Wait()
			}
			all.Go(func() { call("light") })
			all.Wait()
			switch at := slices.Index(order, "light"); {
			case shards == 1 && at != 50:
				t.Errorf("without shards the last to come is served as number %d", at)
			case shards > 1 && at > 6:
				t.Errorf("served as number %d, behind those of another", at)
			}
		})
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}
