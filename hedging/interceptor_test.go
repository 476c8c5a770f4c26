package hedging

import (
	"fmt"
	"testing"
)

// However many methods are called, the memory is bounded; those beyond the bound
// are hedged all the same.
func TestMethodsAreBounded(t *testing.T) {
	m := newMethods(Config{MaxAttempts: 2})
	first := m.hedger(nil, "/s/0")
	for i := range maxMethods + 100 {
		if m.hedger(nil, fmt.Sprintf("/s/%d", i)) == nil {
			t.Fatalf("method %d has no hedger", i)
		}
	}
	if n := len(*m.known.Load()); n != maxMethods {
		t.Errorf("%d methods are known, want %d", n, maxMethods)
	}
	if m.hedger(nil, "/s/0") != first {
		t.Error("a known method was forgotten")
	}
	if m.hedger(nil, "/s/beyond") != m.any {
		t.Error("a method beyond the bound has a hedger of its own")
	}
}
