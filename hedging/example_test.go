package hedging_test

import (
	"context"
	"fmt"
	"time"

	"github.com/bobtail-rpc/bobtail/hedging"
)

// Without gRPC: a second attempt once 5 ms have passed, at another replica.
func ExampleDo() {
	h, err := hedging.New(hedging.Config{MaxAttempts: 2, Delay: 5 * time.Millisecond})
	if err != nil {
		fmt.Println(err)
		return
	}
	replicas := []string{"slow", "quick"}
	answer, err := hedging.Do(context.Background(), h, func(ctx context.Context) (string, error) {
		replica := replicas[hedging.AttemptNumber(ctx)-1]
		if replica == "slow" {
			<-ctx.Done() // an attempt that is not needed any more is cancelled
			return "", ctx.Err()
		}
		return replica, nil
	})
	fmt.Println(answer, err)
	// Output: quick <nil>
}
