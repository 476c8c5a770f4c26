package loadbalance

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/grpctest/kvpb"
)

// A visit is an attempt as its server saw it.
type visit struct {
	attempt, backend int
	begin            time.Duration // since the diary began
	// first and last are the places of its begin and its end among all events: the
	// bubble's clock stands still while they follow each other. last is 0 till then.
	first, last int
}

// A diary is what servers, connections and events tell, in their order.
type diary struct {
	start  time.Time
	mu     sync.Mutex // guards what follows
	events int
	visits map[uint64][]*visit // by call
	ready  []history           // of each backend: a connection to it is READY
	out    []history           // of each backend: it is ejected
}

// A history says since when something has been so.
type history []change

type change struct {
	at time.Duration
	so bool
}

// throughout reports whether it was so at a time, and whether that very instant changed
// it.
func (h history) throughout(at time.Duration) (so, changed bool) {
	i, exact := slices.BinarySearchFunc(h, at, func(c change, at time.Duration) int { return int(c.at - at) })
	return !exact && i > 0 && h[i-1].so, exact
}

func newDiary(backends int) *diary {
	return &diary{start: time.Now(), visits: make(map[uint64][]*visit), ready: make([]history, backends), out: make([]history, backends)}
}

// note adds to the history of a backend, which its name ends with.
func (d *diary) note(of []history, name string, so bool) {
	i := int(name[len(name)-1] - '0')
	d.mu.Lock()
	defer d.mu.Unlock()
	of[i] = append(of[i], change{time.Since(d.start), so})
}

// enter notes the begin of an attempt; the caller notes its end by leave.
func (d *diary) enter(ctx context.Context, backend int, id uint64) *visit {
	v := &visit{attempt: 1, backend: backend}
	md, _ := metadata.FromIncomingContext(ctx)
	if s := md.Get("grpc-previous-rpc-attempts"); len(s) == 1 {
		before, _ := strconv.Atoi(s[0])
		v.attempt += before
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.events++
	v.begin, v.first = time.Since(d.start), d.events
	d.visits[id] = append(d.visits[id], v)
	return v
}

func (d *diary) leave(v *visit) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.events++
	v.last = d.events
}

// A finding is what a diary says about hedges.
type finding struct {
	hedged    int // calls with more than one attempt
	again     int // attempts at a backend that was tried
	unsure    int // of these, in an instant in which an untried one became ready or ceased to be
	toEjected int // attempts after the first, at an ejected backend
	beside    []string
	tried     []string
}

// read looks for attempts that are beside another of their call, and for those at a
// tried backend while an untried one was ready.
func (d *diary) read() (f finding) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, visits := range d.visits {
		if len(visits) > 1 {
			f.hedged++
		}
		for k, v := range visits { // in the order of their begins
			if so, _ := d.out[v.backend].throughout(v.begin); so && v.attempt > 1 {
				f.toEjected++
			}
			again := false
			for _, w := range visits[:k] {
				if w.backend != v.backend {
					continue
				}
				again = true
				if w.last == 0 || w.last > v.first {
					f.beside = append(f.beside, fmt.Sprintf("call %d: attempt %d at backend %d beside attempt %d", id, v.attempt, v.backend, w.attempt))
				}
			}
			if !again {
				continue
			}
			f.again++
			for u := range d.ready {
				if slices.ContainsFunc(visits, func(w *visit) bool { return w.backend == u && w.begin <= v.begin }) {
					continue
				}
				so, changed := d.ready[u].throughout(v.begin)
				if changed {
					f.unsure++
				}
				if so {
					f.tried = append(f.tried, fmt.Sprintf("call %d: attempt %d at backend %d after %v, which was tried, and %d ready and untried", id, v.attempt, v.backend, v.begin, u))
				}
			}
		}
	}
	return f
}

// A hedge goes where no attempt of its call has been while such a backend is ready,
// though it be ejected, and never beside one.
func TestHedgesGoElsewhereUnderChurn(t *testing.T) {
	const usual = `"ejection": {"baseEjectionTime": "2s", "minimumCalls": 10}, "slowStart": {"window": "1s"}`
	own := map[string]string{P2CName: `"decayTime": "2s", `, RendezvousName: `"eps": 1, `, PrequalName: `"qRif": 0.5, `}
	policies := balancers()
	for k, name := range policies {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const callers, backends = 16, 4
				// Over all policies together: under the race detector 10,000 take 7 s of a processor.
				n := callsUnderChurn() / len(policies)
				// However many calls there are, ejections take their time.
				pause := int64(time.Minute) * callers / int64(n)
				d := newDiary(backends)
				c := newCluster(t, backends, func(ctx context.Context, i int, req *kvpb.Request) (*kvpb.Response, error) {
					v := d.enter(ctx, i, req.Id)
					defer d.leave(v)
					r := rand.New(rand.NewPCG(req.Id, uint64(v.attempt)))
					took, fate := time.Duration(r.Int64N(int64(3*ms))), r.IntN(100)
					// In each 6 s one of them is bad for 4 s.
					bad := int(v.begin/(6*time.Second))%backends == i && v.begin%(6*time.Second) < 4*time.Second
					switch {
					case bad && fate < 95:
						took += 100 * ms
					case fate < 20:
						took *= 20
					}
					select {
					case <-time.After(took):
					case <-ctx.Done():
						return nil, status.FromContextError(ctx.Err()).Err()
					}
					if fate >= 85 {
						return nil, status.Error(codes.Unavailable, "as told")
					}
					return &kvpb.Response{Id: req.Id}, nil
				}, grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: 2 * time.Second, MaxConnectionAgeGrace: time.Minute}))
				var nowhere atomic.Int64
				hedger := hedging.UnaryClientInterceptor(hedging.Config{MaxAttempts: 4, Delay: 5 * ms, NonFatalCodes: []codes.Code{codes.Unavailable},
					Report: func(_ context.Context, r hedging.Report) {
						if r.Suppressed == hedging.NoBackend {
							nowhere.Add(1)
						}
					}})
				spy := &spy{changed: func(addr string, s connectivity.State) { d.note(d.ready, addr, s == connectivity.Ready) }}
				c.watch(spy, name, `{`+usual+`}`)
				client := c.connect(indexes(backends), grpc.WithChainUnaryInterceptor(hedger))
				var ejections atomic.Int64
				ctx := WithEventHandler(t.Context(), func(e Event) {
					if e.Endpoint != "" {
						d.note(d.out, e.Endpoint, e.Kind == Ejected)
					}
					if e.Kind == Ejected {
						ejections.Add(1)
					}
				})
				done := make(chan struct{})
				var callersOver, churnOver sync.WaitGroup
				var failed atomic.Int64
				for caller := range callers {
					callersOver.Go(func() {
						r := rand.New(rand.NewPCG(2, uint64(caller)))
						for i := caller; i < n; i += callers {
							_, err := client.Get(WithKey(ctx, fmt.Sprint(i%97)), &kvpb.Request{Id: uint64(i)})
							switch {
							case status.Code(err) == codes.Unavailable && status.Convert(err).Message() == "as told":
								failed.Add(1)
							case err != nil:
								t.Errorf("call %d: %v", i, err)
							}
							time.Sleep(time.Duration(r.Int64N(pause)))
						}
					})
				}
				day := &churn{cluster: c, r: rand.New(rand.NewPCG(3, uint64(k))), named: indexes(backends), least: 2, pause: 60 * ms,
					configs: []string{`{` + usual + `}`, `{` + own[name] + usual + `}`}}
				time.Sleep(ms)
				churnOver.Go(func() { day.until(done) })
				callersOver.Wait()
				close(done)
				churnOver.Wait()
				time.Sleep(time.Second) // losers hear of it
				synctest.Wait()

				f := d.read()
				t.Logf("in %v: %d of %d calls hedged, %d failed, %d hedges had nowhere to go; %d ejections, %d hedges at ejected backends; %d at tried ones, %d of them unsure; %d removals, %d blinks",
					time.Since(d.start), f.hedged, n, failed.Load(), nowhere.Load(), ejections.Load(), f.toEjected, f.again, f.unsure, day.removed, day.blinked)
				for what, all := range map[string][]string{"beside another": f.beside, "at tried backends": f.tried} {
					if len(all) > 0 {
						t.Errorf("%d attempts %s, want 0: %q", len(all), what, all[:min(5, len(all))])
					}
				}
				// Or nothing was tested.
				if f.hedged < n/5 || f.again < n/500 || f.unsure > f.again/20 || nowhere.Load() < int64(n/1000) {
					t.Errorf("%+v, want a fifth of %d calls hedged, and hedges at tried backends, few of them unsure", f, n)
				}
				if ejections.Load() == 0 || f.toEjected < n/2000 {
					t.Errorf("%d ejections, %d hedges at ejected backends, want more", ejections.Load(), f.toEjected)
				}
			})
		})
	}
}
