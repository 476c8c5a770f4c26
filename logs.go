package bobtail

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"time"
)

const (
	// quiet is for how long a record of a change is not followed by another of the same kind
	// and key. What flaps faster than that is one thing to know, not hundreds.
	quiet = 10 * time.Second
	// maxQuiet bounds how many keys are remembered.
	maxQuiet = 1000
)

// logger tells changes of state, few of each kind. Its method Log is for these: a record of
// a kind (the message) and key (the target, method, endpoint and path that it names) is told at
// most once in 10 s, and the next one tells how many were not. The other methods are those
// of slog, for what comes once.
type logger struct {
	*slog.Logger
	mu     sync.Mutex // guards recent
	recent quieter
}

func newLogger(l *slog.Logger) *logger { return &logger{Logger: l} }

// Log tells a change of state, unless the same was told a moment ago.
func (l *logger) Log(ctx context.Context, level slog.Level, msg string, args ...any) {
	if !l.Enabled(ctx, level) {
		return
	}
	now := time.Now()
	l.mu.Lock()
	tell, suppressed := l.recent.tell(now, recordKey{msg, keyOf(args)})
	l.mu.Unlock()
	if !tell {
		return
	}
	// As the documentation of slog has it, for the source to be that of the caller.
	var pc [1]uintptr
	runtime.Callers(2, pc[:])
	r := slog.NewRecord(now, level, msg, pc[0])
	r.Add(args...)
	if suppressed > 0 {
		r.Add("suppressed", suppressed)
	}
	_ = l.Handler().Handle(ctx, r) // as slog does
}

// keyOf picks what a record is about from its arguments, which are keys and values.
func keyOf(args []any) string {
	var b strings.Builder
	for i := 0; i+1 < len(args); i += 2 {
		switch args[i] {
		case "target", "method", "endpoint", "path":
			fmt.Fprintf(&b, "%v\x00", args[i+1])
		}
	}
	return b.String()
}

// recordKey is what records are the same by.
type recordKey struct{ kind, key string }

type recentRecord struct {
	told       time.Time
	suppressed int // since then
}

// quieter decides which records are told. It is deterministic, and the zero value has told
// none.
type quieter struct {
	recent map[recordKey]recentRecord
	full   time.Time // until then there is no room
}

// tell reports whether a record is told now, and how many of the same were not since the
// last that was. Where there is no room for another key, the keys that have been quiet
// for long enough are forgotten, with what they have suppressed; if all are busy, the
// record is not told: that many changes in 10 s nobody reads.
func (q *quieter) tell(now time.Time, k recordKey) (tell bool, suppressed int) {
	r, ok := q.recent[k]
	if ok && now.Sub(r.told) < quiet {
		r.suppressed++
		q.recent[k] = r
		return false, 0
	}
	if !ok && len(q.recent) >= maxQuiet && !q.room(now) {
		return false, 0
	}
	if q.recent == nil {
		q.recent = map[recordKey]recentRecord{}
	}
	q.recent[k] = recentRecord{told: now}
	return true, r.suppressed
}

// room makes room for another key, if there is any to be made.
func (q *quieter) room(now time.Time) bool {
	if now.Before(q.full) {
		return false // as it was found before: to look at all keys takes a while
	}
	q.full = now.Add(quiet)
	for old, r := range q.recent {
		if free := r.told.Add(quiet); !now.Before(free) {
			delete(q.recent, old)
		} else if free.Before(q.full) {
			q.full = free
		}
	}
	if len(q.recent) < maxQuiet {
		q.full = time.Time{}
		return true
	}
	return false
}

// limitFall finds when a limit has fallen to less than half of its highest in the last
// minute. It is deterministic; the zero value has seen no limit.
type limitFall struct {
	highest [fallSpans]int // in each span of the last minute, by the number of the span
	span    int64          // of the last move
	fallen  bool
}

const (
	fallSpan  = 10 * time.Second
	fallSpans = 6
)

// moved is told that the limit has moved. It returns the highest limit of the last minute
// when it falls below half of that: once, until it stands at half or more again, which it
// does by itself a minute after it has stopped falling.
func (f *limitFall) moved(now time.Time, from, to int) (highest int, fell bool) {
	span := max(now.UnixNano()/int64(fallSpan), f.span) // moves may come in the wrong order
	// It stood at from since the last move.
	for s := max(f.span+1, span-fallSpans+1); s <= span; s++ {
		f.highest[s%fallSpans] = from
	}
	f.span = span
	at := &f.highest[span%fallSpans]
	*at = max(*at, from, to)
	for _, h := range f.highest {
		highest = max(highest, h)
	}
	was := f.fallen
	f.fallen = 2*to < highest
	return highest, f.fallen && !was
}
