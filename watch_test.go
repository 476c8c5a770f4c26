package bobtail

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// watched is a client that watches a file for the length of a test, in virtual time.
type watched struct {
	*testing.T
	client *Client
	path   string

	mu  sync.Mutex // guards log, which the watch writes
	log bytes.Buffer
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(p)
}

// timed is a policy that gives all calls a timeout of n seconds.
func timed(n int) string {
	return fmt.Sprintf(`{"methodConfig": [{"name": [{}], "timeout": "%ds"}]}`, n)
}

const faulty = `{"methodConfig": [{"name": [{}], "timeout": "-1s"}], "hedge": true}`

// watch begins to watch a file of the given content, "" for none, under a policy of 1 s.
func watch(t *testing.T, content string) *watched {
	t.Helper()
	w := &watched{T: t, path: filepath.Join(t.TempDir(), "policy.json")}
	p, err := ParsePolicy([]byte(timed(1)))
	if err != nil {
		t.Fatal(err)
	}
	logger := slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	if w.client, err = NewClient(p, WithLogger(logger)); err != nil {
		t.Fatal(err)
	}
	if content != "" {
		w.write(content)
	}
	w.start(w.path)
	return w
}

// start watches a path until the test ends.
func (w *watched) start(path string) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := w.client.WatchPolicyFile(ctx, path); err != context.Canceled {
			w.Errorf("%v, want context.Canceled", err)
		}
	}()
	w.Cleanup(func() { cancel(); <-done })
	synctest.Wait()
}

func (w *watched) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// write writes the file in place.
func (w *watched) write(content string) {
	w.Helper()
	w.must(os.WriteFile(w.path, []byte(content), 0o600))
}

// pass lets virtual time pass, and the watch do what it does then.
func (w *watched) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// inForce says which policy is in force, and what was told since it was last asked for:
// the number of records of each level, and parts of them.
func (w *watched) inForce(timeout int, errors, infos int, parts ...string) {
	w.Helper()
	synctest.Wait()
	if e, _ := w.client.current.Load().lookup("/kv.KV/Get"); e == nil || e.timeout != time.Duration(timeout)*time.Second {
		w.Errorf("in force: %+v, want a timeout of %ds", e, timeout)
	}
	w.mu.Lock()
	told := w.log.String()
	w.log.Reset()
	w.mu.Unlock()
	if e, i := strings.Count(told, "level=ERROR"), strings.Count(told, "level=INFO"); e != errors || i != infos {
		w.Errorf("told %d errors and %d infos, want %d and %d:\n%s", e, i, errors, infos, told)
	}
	for _, part := range parts {
		if !strings.Contains(told, part) {
			w.Errorf("told:\n%swant %s in it", told, part)
		}
	}
}

func TestWatchFirstLoadAndChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, timed(2))
		w.inForce(2, 0, 1, `level=INFO msg="bobtail: policy file: in force" path=`+w.path+"\n")
		was := w.client.current.Load()
		w.pass(time.Minute)
		w.inForce(2, 0, 0)
		w.write(timed(2)) // touched
		w.pass(time.Minute)
		w.inForce(2, 0, 0)
		if w.client.current.Load() != was {
			t.Error("an identical content was applied again")
		}
		w.write(timed(3))
		w.pass(999 * time.Millisecond)
		w.inForce(2, 0, 0)
		w.pass(time.Millisecond)
		w.inForce(3, 0, 1)

		// By rename, with the time and the size of the one before.
		info, err := os.Stat(w.path)
		w.must(err)
		next := w.path + ".next"
		w.must(os.WriteFile(next, []byte(timed(4)), 0o600))
		w.must(os.Chtimes(next, info.ModTime(), info.ModTime()))
		w.must(os.Rename(next, w.path))
		w.pass(time.Second)
		w.inForce(4, 0, 1)
	})
}

// As a ConfigMap is mounted: the file is a link into ..data, which is a link to a folder,
// and is swapped.
func TestWatchSymlinkSwap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, "")
		w.inForce(1, 1, 0)
		dir := filepath.Dir(w.path)
		swap := func(version, content string) {
			w.must(os.Mkdir(filepath.Join(dir, version), 0o700))
			w.must(os.WriteFile(filepath.Join(dir, version, "policy.json"), []byte(content), 0o600))
			w.must(os.Symlink(version, filepath.Join(dir, "..tmp")))
			w.must(os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")))
		}
		w.must(os.Symlink("..data/policy.json", w.path))
		for i := 2; i < 5; i++ {
			swap(fmt.Sprint("..", i), timed(i))
			w.pass(time.Second)
			w.inForce(i, 0, 1)
		}
		w.must(os.RemoveAll(filepath.Join(dir, "..4"))) // a link to nowhere
		w.pass(time.Second)
		w.inForce(4, 1, 0, "no such file")
	})
}

// What is bad keeps the policy in force and is told once, with all its faults; each other
// problem is told again, and a good file once.
func TestWatchBadFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, timed(2))
		w.inForce(2, 0, 1)
		was := w.client.current.Load()

		w.write(faulty)
		w.pass(time.Minute)
		w.inForce(2, 1, 0, `level=ERROR msg="bobtail: policy file: the policy in force is kept" path=`+w.path+` error=`, "timeout", "hedge")
		w.write(faulty + "\n") // another content, with the same faults
		w.pass(time.Minute)
		w.inForce(2, 1, 0, "timeout", "hedge")
		w.must(os.Remove(w.path))
		w.pass(time.Minute)
		w.inForce(2, 1, 0, "no such file")
		w.write(faulty)
		w.pass(time.Minute)
		w.inForce(2, 1, 0, "timeout", "hedge")
		w.must(os.Remove(w.path))
		w.pass(time.Minute)
		w.inForce(2, 1, 0, "no such file")

		// Back to what was put in force last: told, and put in force again, for an Update
		// may have come between.
		if err := w.client.Update(Policy{}); err != nil {
			t.Fatal(err)
		}
		w.write(timed(2))
		w.pass(time.Minute)
		w.inForce(2, 0, 2, "policy updated", "in force")
		if w.client.current.Load() == was {
			t.Error("the content is not in force again")
		}
		for range 2 { // the same again, each time it changes
			w.write(faulty)
			w.pass(time.Minute)
			w.inForce(2, 1, 0)
			w.write(timed(2))
			w.pass(time.Minute)
			w.inForce(2, 0, 1)
		}
		w.write(faulty)
		w.pass(time.Second)
		w.inForce(2, 1, 0)
		w.write(timed(3))
		w.pass(time.Minute)
		w.inForce(3, 0, 1)
	})
}

func TestWatchMissingThenAppears(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, "")
		w.pass(time.Minute)
		w.inForce(1, 1, 0, "no such file")
		w.write("") // and is empty
		w.pass(time.Minute)
		w.inForce(1, 1, 0)
		w.write(timed(2))
		w.pass(time.Second)
		w.inForce(2, 0, 1)
	})
}

func TestWatchTooLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fill := func(size int) string { return timed(3) + strings.Repeat(" ", size-len(timed(3))) }
		w := watch(t, timed(2))
		w.write(fill(maxPolicyFile + 1))
		w.pass(time.Minute)
		w.inForce(2, 1, 1, "want at most 1048576 bytes")
		w.write(fill(5 * maxPolicyFile)) // it grows
		w.pass(time.Minute)
		w.inForce(2, 0, 0)
		w.write(fill(maxPolicyFile))
		w.pass(time.Second)
		w.inForce(3, 0, 1)
	})
}

func TestWatchNotAFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, "")
		w.inForce(1, 1, 0)
		w.must(os.Mkdir(w.path, 0o700))
		w.pass(time.Minute)
		w.inForce(1, 1, 0, "want a regular file")
		w.must(os.Remove(w.path))
		w.write(timed(2))
		w.pass(time.Second)
		w.inForce(2, 0, 1)
	})
}

// What is fixed when a connection is dialed does not change, and the rest of such a
// document neither.
func TestWatchFixedAtDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, timed(2))
		w.inForce(2, 0, 1)
		w.write(`{"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [{"name": [{}], "timeout": "3s"}]}`)
		w.pass(time.Minute)
		w.inForce(2, 1, 0, "loadBalancingConfig", "round_robin")
		w.write(`{"loadBalancingConfig": [{"bobtail_p2c": {}}], "methodConfig": [{"name": [{}], "timeout": "4s"}]}`)
		w.pass(time.Second)
		w.inForce(4, 0, 1)
	})
}

// A writer that does not rename is caught in the middle, twice: after it has emptied the
// file and after a part of its text.
func TestWatchTornWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, timed(2))
		w.inForce(2, 0, 1)
		file, err := os.OpenFile(w.path, os.O_WRONLY|os.O_TRUNC, 0)
		w.must(err)
		w.pass(time.Second)
		w.inForce(2, 1, 0)
		text := timed(3)
		_, err = file.WriteString(text[:len(text)/2])
		w.must(err)
		w.pass(time.Second)
		w.inForce(2, 1, 0)
		_, err = file.WriteString(text[len(text)/2:])
		w.must(errors.Join(err, file.Close()))
		w.pass(time.Second)
		w.inForce(3, 0, 1)
	})
}

// The later of two watches wins, and of a watch and an Update, until the file of the
// other changes.
func TestWatchLastWriterWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, timed(2))
		other := w.path + ".other"
		w.must(os.WriteFile(other, []byte(timed(3)), 0o600))
		w.start(other)
		w.pass(time.Minute)
		w.inForce(3, 0, 2)
		w.write(timed(4))
		w.pass(time.Minute)
		w.inForce(4, 0, 1)
		p, err := ParsePolicy([]byte(timed(5)))
		w.must(err)
		w.must(w.client.Update(p))
		w.pass(time.Minute)
		w.inForce(5, 0, 1, "policy updated")
	})
}

func TestWatchEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, timed(2))
		w.inForce(2, 0, 1)

		// Between two readings.
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		begin := time.Now()
		err := w.client.WatchPolicyFile(ctx, w.path)
		if err != context.DeadlineExceeded || time.Since(begin) != 1500*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		w.inForce(2, 0, 1)

		// Before the first.
		ended, end := context.WithCancelCause(t.Context())
		end(errors.New("its own reason"))
		if err := w.client.WatchPolicyFile(ended, w.path); err != context.Canceled {
			t.Errorf("%v, want context.Canceled", err)
		}
		w.inForce(2, 0, 0)

		if err := w.client.WatchPolicyFile(t.Context(), ""); err == nil || err.Error() != `bobtail: policy file "", want a path` {
			t.Errorf("no path: %v", err)
		}
	})
}
