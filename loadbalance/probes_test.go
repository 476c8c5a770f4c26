package loadbalance

import (
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/balancer"
)

// A client of few calls probes an ejected endpoint though the rotation changes each
// second, as it does during a slow start.
func TestProbesOutliveRotations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, sh, _ := configured(t, P2CName, 5, `{"slowStart": {"window": "3600s"}}`)
		b := shardsOf(sh)
		for i := range 5 {
			b.met(i, 2*ms, answered)
		}
		b.met(1, 100*ms, answered)
		judged(b)
		if es := judged(b); len(es) != 1 {
			t.Fatalf("%+v", es)
		}
		for _, sc := range cc.conns {
			if sc.addr == "10.0.0.2:443" {
				sc.step(restart...)
			}
		}
		e, probes := b.endpoints["10.0.0.1:443"], 0
		for range 500 { // 50 a second
			res, err := cc.state.Picker.Pick(balancer.PickInfo{FullMethodName: "/kv.KV/Get", Ctx: t.Context()})
			if err != nil {
				t.Fatal(err)
			}
			if at(e.endpoint) > 0 {
				probes++
			}
			time.Sleep(20 * ms)
			res.Done(got)
		}
		if probes < 2 {
			t.Errorf("%d probes in 500 calls and 10s, want about one in 2s", probes)
		}
	})
}
