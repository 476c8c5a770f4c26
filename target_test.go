package bobtail

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/bobtail-rpc/bobtail/internal/testenv"
)

// Whatever method names and policies arrive, what a Client keeps is bounded, and a
// method beyond the bound costs no copy of the others.
func TestMemoryIsBounded(t *testing.T) {
	p, err := ParsePolicy([]byte(`{"methodConfig": [{"name": [{}], "timeout": "1s", "hedgingPolicy": {"maxAttempts": 2}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	c, err := NewClient(p, WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
	if err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		for i := range maxMethods {
			c.method(nil, fmt.Sprintf("/s%d/%d", round, i))
		}
		if m := c.method(nil, "/one/more"); m.timeout == 0 || m.hedger != nil {
			t.Errorf("beyond the bound: %+v, want the timeout and no hedging", m)
		}
		if n := len(c.target(nil).table.Load().methods); n > maxMethods {
			t.Errorf("%d methods are kept, want at most %d", n, maxMethods)
		}
		q := p
		if err := c.Update(q); err != nil { // the table starts anew
			t.Fatal(err)
		}
	}
	if n := len(c.told); n > maxMethods {
		t.Errorf("%d warnings are remembered, want at most %d", n, maxMethods)
	}
	if n := strings.Count(log.String(), "level=WARN"); n > maxMethods {
		t.Errorf("%d warnings were logged, want at most %d", n, maxMethods)
	}
	for i := range maxMethods {
		c.method(nil, fmt.Sprintf("/full/%d", i))
	}
	if n := testenv.Allocs(100, func() { c.method(nil, "/one/more") }); n > 3 {
		t.Errorf("%v allocations for a method beyond the bound, want no copy of the table", n)
	}
}

// However many methods were called before, those that are called now keep what they have
// learned over an Update that leaves them as they are.
func TestKeptIsForThoseInUse(t *testing.T) {
	c, err := NewClient(DefaultPolicy(), WithLogger(nil))
	if err != nil {
		t.Fatal(err)
	}
	update := func() {
		if err := c.Update(DefaultPolicy()); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 2 * maxMethods {
		c.method(nil, fmt.Sprintf("/old.S/M%d", i))
	}
	update()
	first := c.method(nil, "/new.S/M")
	update()
	if again := c.method(nil, "/new.S/M"); again.guard.throttle != first.guard.throttle {
		t.Error("the throttle of a method in use begins anew")
	}
	if n := len(c.target(nil).kept); n > maxMethods {
		t.Errorf("%d methods kept, want at most %d", n, maxMethods)
	}
}
