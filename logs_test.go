package bobtail

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// A record of a kind and key is told once in 10 s; the next one tells how many were not.
func TestQuieter(t *testing.T) {
	begin := time.Unix(1_000_000, 0)
	var q quieter
	for _, step := range []struct {
		at         time.Duration
		kind, key  string
		tell       bool
		suppressed int
	}{
		{0, "open", "a", true, 0},
		{1 * time.Second, "open", "a", false, 0},
		{1 * time.Second, "open", "b", true, 0},
		{2 * time.Second, "closed", "a", true, 0},
		{9999 * time.Millisecond, "open", "a", false, 0},
		{10 * time.Second, "open", "a", true, 2},
		{11 * time.Second, "open", "b", true, 0},
		{12 * time.Second, "open", "a", false, 0},
		{60 * time.Second, "open", "a", true, 1},
		{70 * time.Second, "open", "a", true, 0},
	} {
		if tell, n := q.tell(begin.Add(step.at), recordKey{step.kind, step.key}); tell != step.tell || n != step.suppressed {
			t.Errorf("%v, %s %s: %v with %d suppressed, want %v with %d", step.at, step.kind, step.key, tell, n, step.tell, step.suppressed)
		}
	}
}

// However many keys there are, no more are remembered, nor told, than the bound; and those
// that have been quiet make room.
func TestQuieterBound(t *testing.T) {
	var q quieter
	now := time.Unix(1_000_000, 0)
	for round := range 3 {
		told := 0
		for i := range 3 * maxQuiet {
			if tell, _ := q.tell(now, recordKey{"ejected", fmt.Sprint(round, i)}); tell {
				told++
			}
		}
		if told != maxQuiet || len(q.recent) != maxQuiet {
			t.Errorf("round %d: %d told, %d remembered, want %d", round, told, len(q.recent), maxQuiet)
		}
		now = now.Add(quiet)
	}
	// One key is quiet before the others, and makes room for one.
	q = quieter{}
	for i := range maxQuiet + 1 {
		q.tell(now.Add(time.Duration(min(i, 1))*time.Second), recordKey{"ejected", fmt.Sprint(i)})
	}
	for i, step := range []struct {
		at   time.Duration
		tell bool
	}{{quiet - 1, false}, {quiet, true}, {quiet, false}, {quiet + time.Second, true}} {
		if tell, _ := q.tell(now.Add(step.at), recordKey{"ejected", fmt.Sprint("more ", i)}); tell != step.tell {
			t.Errorf("full, after %v: %v, want %v", step.at, tell, step.tell)
		}
	}
}

// The log of a client: changes by what they are about, each with its source and what was
// suppressed; what has a level that nobody takes counts for nothing.
func TestLoggerLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		l := newLogger(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{AddSource: true, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			switch a.Key {
			case slog.TimeKey:
				return slog.Attr{}
			case slog.SourceKey:
				source := a.Value.Any().(*slog.Source).File
				return slog.String(a.Key, source[strings.LastIndexByte(source, '/')+1:])
			}
			return a
		}})))
		ctx := context.Background()
		for i := range 3 {
			l.Log(ctx, slog.LevelInfo, "ejected", "target", "t", "endpoint", "a", "reason", i) // the reason is no key
			l.Log(ctx, slog.LevelInfo, "ejected", "target", "t", "endpoint", "b", "reason", i)
			l.Log(ctx, slog.LevelDebug, "ejected", "target", "t", "endpoint", "c")
			time.Sleep(4 * time.Second)
		}
		l.Log(ctx, slog.LevelInfo, "ejected", "target", "t", "endpoint", "a", "reason", 3)
		l.Info("once")
		l.Info("once")
		const want = `level=INFO source=logs_test.go msg=ejected target=t endpoint=a reason=0
level=INFO source=logs_test.go msg=ejected target=t endpoint=b reason=0
level=INFO source=logs_test.go msg=ejected target=t endpoint=a reason=3 suppressed=2
level=INFO source=logs_test.go msg=once
level=INFO source=logs_test.go msg=once
`
		if got := log.String(); got != want {
			t.Errorf("got\n%swant\n%s", got, want)
		}
		if n := len(l.recent.recent); n != 2 {
			t.Errorf("%d records are remembered, want 2", n)
		}
	})
}

// A fall of the limit to less than half of its highest in a minute is told once.
func TestLimitFall(t *testing.T) {
	begin := time.Unix(1_000_000, 0)
	var f limitFall
	limit := 20
	for _, step := range []struct {
		at, to  int // s
		highest int // told; 0: nothing is
	}{
		{0, 100, 0},
		{5, 50, 0}, // half is not less than half
		{6, 49, 100},
		{7, 10, 0},
		{8, 60, 0}, // up again
		{9, 30, 100},
		{60, 31, 0},   // the 100 is in the window still
		{70, 29, 0},   // the highest is 31: no fall any more
		{200, 14, 29}, // it stood at 29 all the time
		{400, 13, 0},
		{390, 6, 14}, // told late, and counted as if it were now
	} {
		highest, fell := f.moved(begin.Add(time.Duration(step.at)*time.Second), limit, step.to)
		limit = step.to
		if fell != (step.highest > 0) || fell && highest != step.highest {
			t.Errorf("at %d s to %d: highest %d, fell %v; want %d", step.at, step.to, highest, fell, step.highest)
		}
	}
	if n := testenv.Allocs(100, func() { f.moved(begin, 10, 9) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
