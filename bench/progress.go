package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/bobtail-rpc/bobtail/bench/experiment"
)

// progress shows how far the run is: a bar on a terminal, else a line every few
// seconds. It writes to standard error, so the report can be piped.
type progress struct {
	w    io.Writer
	name string
	now  atomic.Value // string: what is being done; atomic because the bar draws by itself

	bars *mpb.Progress // nil: lines
	bar  *mpb.Bar

	every       time.Duration // between two lines
	began, last time.Time

	mu sync.Mutex // guards w where there is no bar: others tell something too
}

// lineEvery is how often a line is written where there is no terminal: seldom
// enough for a log, often enough to see that it lives. progressEnv overrides it.
const (
	lineEvery   = 5 * time.Second
	progressEnv = "BENCH_PROGRESS_EVERY"
)

func newProgress(w io.Writer, name string) *progress {
	p := &progress{w: w, name: name, every: lineEvery, began: time.Now(), last: time.Now()}
	if d, err := time.ParseDuration(os.Getenv(progressEnv)); err == nil {
		p.every = d
	}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p.bars = mpb.New(mpb.WithOutput(w), mpb.WithWidth(40), mpb.WithRefreshRate(250*time.Millisecond))
		p.bar = p.bars.AddBar(0,
			mpb.BarRemoveOnComplete(),
			mpb.PrependDecorators(decor.Any(func(decor.Statistics) string { return p.title() + " " })),
			mpb.AppendDecorators(decor.CountersNoUnit("%d / %d requests "), decor.Elapsed(decor.ET_STYLE_MMSS)),
		)
	}
	return p
}

// at tells what is being done from now on.
func (p *progress) at(what string) { p.now.Store(what) }

func (p *progress) title() string {
	if now, ok := p.now.Load().(string); ok {
		return p.name + " " + now
	}
	return p.name
}

// update is called from one goroutine, once per block.
func (p *progress) update(at experiment.Progress) {
	if p.bar != nil {
		p.bar.SetTotal(int64(max(at.Total, at.Sent+1)), false) // only close completes it
		p.bar.SetCurrent(int64(at.Sent))
		return
	}
	if now := time.Now(); now.Sub(p.last) >= p.every {
		p.last = now
		p.tell(fmt.Sprintf("%s: %d of about %d requests, %v", p.title(), at.Sent, at.Total, now.Sub(p.began).Round(time.Second)))
	}
}

// tell writes a line, above the bar if there is one. It may be called from any goroutine.
func (p *progress) tell(what string) {
	line := []byte("bench: " + what + "\n")
	if p.bars != nil {
		if _, err := p.bars.Write(line); err == nil {
			return
		} // else the bar is gone
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	_, _ = p.w.Write(line) // of no use where nobody can read it
}

// close takes the bar away.
func (p *progress) close() {
	if p.bar != nil {
		p.bar.Abort(true)
		p.bars.Wait()
	}
}
