package fleet

import "github.com/bobtail-rpc/bobtail"

// DefaultPolicy as [Server].Policy is bobtail's default server policy.
const DefaultPolicy = "default"

// CheckPolicy tells what is wrong with a server policy document.
func CheckPolicy(doc string) error {
	_, err := newPolicy(doc)
	return err
}

// newPolicy installs a server policy as any user of the library would. A backend that was
// down comes back with a new one, as a process that was started anew.
func newPolicy(doc string) (*bobtail.Server, error) {
	p := bobtail.DefaultServerPolicy()
	if doc != DefaultPolicy {
		var err error
		if p, err = bobtail.ParseServerPolicy([]byte(doc)); err != nil {
			return nil, err
		}
	}
	return bobtail.NewServer(p, bobtail.WithLogger(nil))
}
