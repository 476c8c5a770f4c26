package loadbalance

import (
	"errors"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
)

// Every fault of a configuration, as it is told.
func TestParseRendezvousConfig(t *testing.T) {
	const charset = `, want a name of lower-case letters, digits and any of "-_."`
	for _, tc := range []struct {
		js   string
		want rendezvousConfig
		errs []string // lines of the error
	}{
		{js: `{}`, want: rendezvousConfig{eps: .25}},
		{js: `{"header": "x-user_id.2", "eps": 10}`, want: rendezvousConfig{header: "x-user_id.2", eps: 10}},
		{js: `{"eps": 1e-9}`, want: rendezvousConfig{eps: 1e-9}},
		{js: `{"eps": 0}`, errs: []string{`eps: 0, want a number in (0, 10]`}},
		{js: `{"eps": -0.25}`, errs: []string{`eps: -0.25, want a number in (0, 10]`}},
		{js: `{"eps": 10.01}`, errs: []string{`eps: 10.01, want a number in (0, 10]`}},
		{js: `{"eps": 1e999}`, errs: []string{`eps: 1e999, want a number in (0, 10]`}},
		{js: `{"eps": "0.25"}`, errs: []string{`eps: "0.25", want a number in (0, 10]`}},
		{js: `{"eps": null}`, errs: []string{`eps: null, want a value or no such key`}},
		{js: `{"header": ""}`, errs: []string{`header: ""` + charset}},
		{js: `{"header": "X-User-Id"}`, errs: []string{`header: "X-User-Id"` + charset}},
		{js: `{"header": "x user"}`, errs: []string{`header: "x user"` + charset}},
		{js: `{"header": ":path"}`, errs: []string{`header: ":path"` + charset}},
		{js: `{"header": "x-\u00fc"}`, errs: []string{`header: "x-ü"` + charset}},
		{js: `{"header": 1}`, errs: []string{`header: number 1, want the name of a header`}},
		{js: `{"header": "key-bin"}`, errs: []string{`header: "key-bin", want a header of text, not -bin`}},
		{js: `{"header": "grpc-x"}`, errs: []string{`header: "grpc-x", want a header of the application's, not one of gRPC's own`}},
		{js: `{"eps": 0, "header": "A", "Eps": 1, "key": 1, "eps": 1}`, errs: []string{
			`eps: given twice`, `header: "A"` + charset, `eps: 0, want a number in (0, 10]`, `Eps: unknown key, did you mean "eps"?`,
			`key: unknown key, want one of maxInFlight, slowStart, ejection, subset, zone, header, eps`}},
		{js: `{"consistentHash": 1}`, errs: []string{`consistentHash: unknown key, want one of maxInFlight, slowStart, ejection, subset, zone, header, eps`}},
		{js: `[]`, errs: []string{`document: a list, want an object`}},
		{js: ``, errs: []string{`document: not valid JSON at byte 0: unexpected EOF`}},
	} {
		c, err := rendezvousBuilder{}.ParseConfig([]byte(tc.js))
		switch {
		case len(tc.errs) == 0 && err != nil:
			t.Errorf("%s: %v", tc.js, err)
		case len(tc.errs) == 0:
			tc.want.options = defaultOptions()
			tc.want.js = tc.js
			if got := *c.(*rendezvousConfig); got != tc.want {
				t.Errorf("%s: %+v, want %+v", tc.js, got, tc.want)
			}
		default:
			const prefix = "loadbalance: bobtail_rendezvous: "
			if want := prefix + strings.Join(tc.errs, "\n"+prefix); err == nil || err.Error() != want {
				t.Errorf("%s:\n%v\nwant\n%s", tc.js, err, want)
			}
		}
	}
	if _, err := grpc.NewClient("passthrough:///x", grpc.WithDefaultServiceConfig(
		`{"loadBalancingConfig":[{"bobtail_rendezvous":{"eps":0}}]}`)); err == nil {
		t.Error("no error for a faulty configuration")
	}
	var b rendezvousBalancer
	if err := b.UpdateClientConnState(balancer.ClientConnState{BalancerConfig: &p2cConfig{}}); !errors.Is(err, balancer.ErrBadResolverState) {
		t.Errorf("got %v, want ErrBadResolverState", err)
	}
}

func FuzzParseRendezvousConfig(f *testing.F) {
	f.Add(`{"header": "x-user-id", "eps": 0.25}`)
	f.Add(`{"header": "a-bin", "eps": 1e309, "eps": null}`)
	f.Fuzz(func(t *testing.T, js string) {
		c, err := rendezvousBuilder{}.ParseConfig([]byte(js))
		if err != nil {
			return
		}
		got := c.(*rendezvousConfig)
		if !(got.eps > 0 && got.eps <= maxEps) || strings.ToLower(got.header) != got.header || strings.HasSuffix(got.header, "-bin") {
			t.Errorf("%s: %+v", js, got)
		}
	})
}
