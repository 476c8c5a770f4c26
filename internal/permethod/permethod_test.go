package permethod_test

import (
	"fmt"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/bobtail-rpc/bobtail/internal/permethod"
)

// One value a method and target, the same each time; beyond the bound one for all.
func TestMap(t *testing.T) {
	cc, err := grpc.NewClient("passthrough:///a", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	built := 0
	m := permethod.New(func(method string) *string { built++; return &method })
	a, b, other := m.Of(nil, "/s/a"), m.Of(nil, "/s/b"), m.Of(cc, "/s/a")
	if a == b || *a != "/s/a" || m.Of(nil, "/s/a") != a || other == a || m.Of(cc, "/s/a") != other {
		t.Error("want one value for each method of each target")
	}
	for i := range 2 * permethod.Max {
		m.Of(nil, fmt.Sprint(i))
	}
	rest := m.Of(nil, "one more")
	if *rest != "" || m.Of(cc, "another") != rest || m.Of(nil, "/s/a") != a {
		t.Error("want one value for all methods beyond the bound")
	}
	if built != permethod.Max+1 {
		t.Errorf("%d values built, want %d and one", built, permethod.Max)
	}
}

// Whoever comes first, all get the same value.
func TestMapConcurrent(t *testing.T) {
	m := permethod.New(func(method string) *string { return &method })
	var wg sync.WaitGroup
	var got [8]*string
	for i := range got {
		wg.Go(func() {
			for k := range 100 {
				m.Of(nil, fmt.Sprint(k))
			}
			got[i] = m.Of(nil, "7")
		})
	}
	wg.Wait()
	for _, v := range got {
		if v != got[0] {
			t.Fatal("two values for one method")
		}
	}
}
