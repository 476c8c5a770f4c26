package hedging

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/bobtail-rpc/bobtail/internal/attempt"
	"github.com/bobtail-rpc/bobtail/internal/outcome"
)

// race is one call under way. It owns what core does not: goroutines, the timer,
// contexts and locks.
//
// The first attempt runs on the caller's goroutine, and so does every later one
// that starts because that goroutine has nothing else to do; a hedge that is due
// while it is busy runs on the goroutine of the timer. A call that is not hedged
// starts no goroutine. It does allocate a race, which therefore keeps what only
// hedges need elsewhere.
type race struct {
	h     *Hedger
	ctx   context.Context // the caller's
	op    operation
	begun time.Time // the zero of core's time
	// single is set when what is sent or received is no proto message, and so can be
	// neither sent nor received twice.
	single bool
	tied   bool // its attempts are marked, see tied.go

	mu      sync.Mutex // guards everything below until the race is decided
	core    core
	timer   *time.Timer
	decided *branch // whose result is the call's; nil if the context ended it
	rare    *rare   // nil until needed

	// settled is core.over for the caller's goroutine, which looks at it twice in
	// every call: an atomic because it does so without the lock.
	settled atomic.Bool

	attempts attempt.Call
	first    branch
}

// rare is what few races come to have.
type rare struct {
	hedges     []*branch // all attempts but the first
	suppressed Reason
	notAt      time.Duration // when that was
	leader     *branch       // for whose sake others were withdrawn
	woken      chan struct{} // closed when the race is decided, if the caller waits
}

// needs returns the rare part, made if need be. The lock is held.
func (r *race) needs() *rare {
	if r.rare == nil {
		r.rare = &rare{}
	}
	return r.rare
}

// suppress notes why a hedge that was due at now was not sent. The lock is held.
func (r *race) suppress(why Reason, now time.Duration) {
	n := r.needs()
	n.suppressed, n.notAt = why, now
}

// operation is the part of a race that differs between unary calls, streams and
// plain functions.
type operation interface {
	// prepare makes a hedge ready to run beside the caller. It is called under
	// the race's lock, while the caller cannot have returned.
	prepare(b *branch)
	// try runs an attempt to its end, or to the first message of its stream.
	try(b *branch) error
	// code is the status code of an error that try returned.
	code(err error) codes.Code
}

// branch is one attempt of a race and the context that it runs under.
type branch struct {
	context.Context
	cancel  context.CancelFunc
	attempt attempt.Attempt
	started time.Duration // since the race began
	// begun is set when the server has said that the handler of this tied attempt has
	// started. An atomic because the connection's reader sets it before it has the lock.
	begun  atomic.Bool
	inline bool // runs on the caller's goroutine
	// ended and withdrawn are guarded by the race's lock: its end is known, or it was
	// cancelled because a sibling's handler had started.
	ended, withdrawn bool
	// unmeasured is set when the time of this attempt is not the server's alone.
	unmeasured bool

	err     error
	trailer metadata.MD // for pushback, and for the caller if this attempt wins
	*own                // nil in the first attempt of a unary call
}

// own is what an attempt other than a unary call's first has to itself.
type own struct {
	header   metadata.MD
	peer     peer.Peer
	req      any
	reply    any
	stream   grpc.ClientStream
	panicked any
	// overGRPC is set in the hedges of calls of gRPC.
	overGRPC bool
}

// Value answers the picker that asks which attempt this is.
func (b *branch) Value(key any) any {
	if _, ok := key.(attempt.Key); ok {
		return &b.attempt
	}
	return b.Context.Value(key)
}

// begin makes the first attempt's context; run may follow later.
func (r *race) begin(now time.Time) {
	r.begun = now
	r.first.inline = true
	r.open(&r.first, 0, 1, attempt.First)
}

// run makes the call: it returns when the race is decided and no attempt runs on
// the caller's goroutine any more.
func (r *race) run(now time.Time) {
	r.core = core{max: int16(r.h.attempts), deadline: noTime}
	if r.tied {
		r.core.delay = r.h.tieDelay()
	} else {
		r.core.delay = r.h.delay(now)
	}
	if r.single {
		r.core.max = 1
	}
	if d, ok := r.ctx.Deadline(); ok {
		r.core.deadline = d.Sub(r.begun)
	}
	// A panic in an interceptor below us leaves no context and no hedge behind.
	defer r.close()

	since := now.Sub(r.begun)
	r.mu.Lock()
	s := r.core.start(since, r)
	for k := int16(2); k <= s.launch; k++ {
		go r.drive(r.openHedge(since, k, false))
	}
	r.arm(s, since)
	r.mu.Unlock()

	for b := &r.first; b != nil; {
		b = r.attempt(b)
	}
	r.wait()
}

// close decides the race in favour of nobody, unless it is decided.
func (r *race) close() {
	if r.settled.Load() {
		return
	}
	r.mu.Lock()
	if !r.core.over {
		r.core.finish(0)
		r.settle()
	}
	r.mu.Unlock()
}

// fire is the timer's: an attempt may be due.
func (r *race) fire() {
	now := time.Since(r.begun)
	r.mu.Lock()
	b := r.follow(r.core.tick(now, r), now, false)
	r.mu.Unlock()
	r.drive(b)
}

// drive runs an attempt, and those that its failure calls for, on a goroutine of
// its own.
func (r *race) drive(b *branch) {
	for b != nil {
		b = r.attempt(b)
	}
}

// attempt runs b and returns the attempt that is to follow it on the same
// goroutine, if any.
func (r *race) attempt(b *branch) *branch {
	if b.inline {
		b.err = r.op.try(b)
	} else {
		r.tryRecovered(b)
	}
	now := time.Since(r.begun) // cheaper than time.Now, and all that is needed
	b.attempt.End()
	code := r.op.code(b.err)

	r.mu.Lock()
	defer r.mu.Unlock()
	b.ended = true
	superseded := r.core.over
	unsent := b.err != nil && (b.attempt.Unsent() || b.nowhere(code))
	switch {
	case unsent && b.withdrawn:
		r.retract(b, now)
		return nil
	case unsent:
		return r.takeBack(b, now)
	case b.withdrawn:
		return r.afterAll(b, now, code)
	}
	if superseded && b.err != nil {
		code = codes.Canceled // whatever it says, it was cut off
	}
	if b.err != nil && (superseded || r.left(now)) {
		r.reclaim(b, now)
	}
	if !b.unmeasured {
		r.h.record(r.begun.Add(now), now-b.started, code)
	}
	if superseded {
		return nil
	}
	res := r.judge(b, code, now)
	if t := r.h.cfg.Throttle; t != nil {
		switch {
		case res.class == success:
			t.Success()
		case res.class == nonFatal || res.stop:
			t.Failure()
		}
	}
	return r.follow(r.core.end(now, b.number(), res, r), now, b.inline)
}

// nowhere reports whether a hedge over a balancer that is not ours, which cannot mark
// it unsent, found no backend ready: it failed fast, and nobody was at the other end.
func (b *branch) nowhere(code codes.Code) bool {
	return b.own != nil && b.overGRPC && code == codes.Unavailable &&
		b.stream == nil && b.peer.Addr == nil && b.header == nil
}

func (b *branch) number() int16 { return int16(b.attempt.Number) }

// left reports whether the caller waits no longer. The server knows the deadline too, and
// may say that it has passed before our own timer does.
func (r *race) left(now time.Duration) bool { return r.ctx.Err() != nil || now >= r.core.deadline }

// judge says what the end of an attempt at now means to the call.
func (r *race) judge(b *branch, code codes.Code, now time.Duration) result {
	res := result{class: r.h.class(code)}
	if res.class == success {
		return res
	}
	// What ends because the caller's own context has ended is the caller's doing,
	// whatever the policy says of its code.
	if r.left(now) {
		res.class = fatal
	} else if res.class == fatal && r.core.running > 1 && outcome.Overloaded(b.err) {
		// One server had no room for it, an extra attempt least of all. That says nothing
		// of the sibling in flight elsewhere, only that there should be no further one.
		return result{class: nonFatal, stop: true}
	}
	p := outcome.ReadPushback(b.trailer)
	res.stop, res.hasWait, res.wait = p.Stop, p.Given && !p.Stop, p.Delay
	if !p.Given && res.class == nonFatal {
		// A refusal that came before there was a stream has no trailer to push back by.
		res.wait, res.hasWait = outcome.RetryDelay(b.err)
	}
	if p.Stop && res.class == nonFatal {
		r.suppress(Pushback, now)
	}
	return res
}

// takeBack treats b, which the picker sent nowhere, as never launched.
func (r *race) takeBack(b *branch, now time.Duration) *branch {
	if b != &r.first && r.h.cfg.Budget != nil {
		r.h.cfg.Budget.GiveBack(r.begun.Add(b.started))
	}
	if !r.core.over {
		r.suppress(NoBackend, now)
	}
	return r.follow(r.core.unsent(now, b.number(), r), now, b.inline)
}

func (r *race) tryRecovered(b *branch) {
	defer func() {
		if p := recover(); p != nil {
			// Nobody above us can recover a panic on this goroutine. It becomes
			// the caller's if this attempt decides the call, as it would have been
			// without hedging.
			b.panicked = p
			b.err = status.Error(codes.Internal, fmt.Sprintf("hedging: attempt %d panicked: %v", b.attempt.Number, p))
		}
	}()
	b.err = r.op.try(b)
}

// follow does what a step says. It returns the attempt that is to run on the
// goroutine that asks, the caller's if inline; others get goroutines of their own.
func (r *race) follow(s step, now time.Duration, inline bool) *branch {
	if s.winner != 0 {
		r.decided = r.branch(s.winner)
		r.settle()
		return nil
	}
	r.arm(s, now)
	var b *branch
	for i := range s.launch {
		k := r.core.number - s.launch + 1 + i
		if i == 0 {
			b = r.openHedge(now, k, inline)
		} else {
			go r.drive(r.openHedge(now, k, false))
		}
	}
	return b
}

// branch returns attempt number k: the newest, since an unsent attempt gives its
// number back.
func (r *race) branch(k int16) *branch {
	if r.rare == nil {
		return &r.first
	}
	for _, b := range slices.Backward(r.rare.hedges) {
		if b.number() == k {
			return b
		}
	}
	return &r.first
}

func (r *race) arm(s step, now time.Duration) {
	switch {
	case s.wake == noTime:
	case r.timer == nil:
		r.timer = time.AfterFunc(s.wake-now, r.fire)
	default:
		r.timer.Reset(s.wake - now)
	}
}

// settle cancels the losers and wakes the caller. The winner's context is left to
// the operation: a stream goes on under it.
func (r *race) settle() {
	r.settled.Store(true)
	if r.timer != nil {
		r.timer.Stop()
	}
	if r.decided != &r.first {
		r.first.supersede(r.decided)
	}
	if r.rare == nil {
		return
	}
	for _, b := range r.rare.hedges {
		if b != r.decided {
			b.supersede(r.decided)
		}
	}
	if r.rare.woken != nil {
		close(r.rare.woken)
		r.rare.woken = nil
	}
}

// supersede cancels a loser of the race; winner is nil if there is none, because the
// caller has left.
func (b *branch) supersede(winner *branch) {
	if winner != nil {
		b.attempt.Supersede()
	}
	b.cancel()
}

// wait blocks the caller, who has nothing to run, until the race is decided.
func (r *race) wait() {
	if r.settled.Load() {
		return
	}
	r.mu.Lock()
	if r.core.over {
		r.mu.Unlock()
		return
	}
	woken := make(chan struct{})
	r.needs().woken = woken
	r.mu.Unlock()
	select {
	case <-woken:
	case <-r.ctx.Done():
		// The attempts in flight end on their own account; nobody waits for them.
		r.close()
	}
}

// open makes attempt number k.
func (r *race) open(b *branch, now time.Duration, k int16, kind attempt.Kind) {
	b.Context, b.cancel = context.WithCancel(r.ctx)
	if r.tied {
		b.Context = &tiedContext{Context: b.Context, race: r, branch: b}
	}
	b.attempt.Init(&r.attempts, int(k), kind)
	b.started = now
}

func (r *race) openHedge(now time.Duration, k int16, inline bool) *branch {
	b := &branch{inline: inline, own: &own{}}
	r.open(b, now, k, attempt.Hedge)
	b.attempt.Streaming = r.first.attempt.Streaming
	b.Context = b.attempt.Outgoing(b.Context)
	r.needs().hedges = append(r.rare.hedges, b)
	r.op.prepare(b)
	return b
}

// permit implements gate.
func (r *race) permit(now time.Duration, first bool) verdict {
	cfg := &r.h.cfg
	switch {
	case attempt.IsExtra(r.ctx):
		r.suppress(Nested, now)
	case r.h.pointless(r.begun.Add(now), r.core.deadline-now):
		r.suppress(NoTime, now)
	case cfg.Throttle != nil && !cfg.Throttle.Allow():
		// A6: "The hedged request is cancelled, and if there are no other
		// already-sent hedged RPCs the failure is returned".
		r.suppress(Throttled, now)
	case cfg.Shadow:
		r.suppress(InShadow, now)
	case r.h.afford(r.begun.Add(now), first):
		return send
	default:
		r.suppress(NoBudget, now)
		return later
	}
	return never
}

// report tells the configuration's hook what became of the call.
func (r *race) report() {
	if r.h.cfg.Report == nil {
		return
	}
	r.mu.Lock()
	rep := Report{Method: r.attempts.Method, Attempts: int(r.core.sent) + int(r.core.withdrawn),
		Withdrawn: int(r.core.withdrawn), Delay: r.core.delay}
	if r.rare != nil {
		if rep.Suppressed = r.rare.suppressed; rep.Suppressed != "" {
			rep.SuppressedAt = r.begun.Add(r.rare.notAt)
		}
	}
	if r.decided != nil {
		rep.Winner = r.decided.attempt.Number
	}
	r.mu.Unlock()
	r.h.cfg.Report(r.ctx, rep)
}
