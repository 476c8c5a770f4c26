package retry_test

import (
	"fmt"
	"strings"
	"time"

	"github.com/bobtail-rpc/bobtail/retry"
)

func ExampleBudget() {
	now := time.Now()
	budget, err := retry.NewBudget(retry.BudgetConfig{Max: 0.05, Window: 10 * time.Second}, now)
	if err != nil {
		fmt.Println(err)
		return
	}
	// 5 calls/s for 10 s: 50 first attempts pay for 2.5 extra ones, and 1 is free.
	for range 50 {
		now = now.Add(200 * time.Millisecond)
		budget.Deposit(now)
	}
	// Then a backend stalls, and every call would like to be hedged.
	var hedged []string
	for range 10 {
		if budget.TryWithdraw(now) {
			hedged = append(hedged, "hedge")
		} else {
			hedged = append(hedged, "wait")
		}
	}
	fmt.Println(strings.Join(hedged, " "))
	// Output: hedge hedge hedge wait wait wait wait wait wait wait
}
