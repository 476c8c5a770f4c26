package breaker

import (
	"context"
	"testing"
	"time"

	"github.com/sony/gobreaker/v2"
	"google.golang.org/grpc"
)

// both runs a benchmark on one goroutine, and on all.
func both(b *testing.B, name string, call func()) {
	b.Run(name, func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			call()
		}
	})
	b.Run(name+"Parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				call()
			}
		})
	})
}

// BenchmarkBreaker is what a breaker adds to a call, beside gobreaker used as it is meant to
// be, and what a refusal costs.
func BenchmarkBreaker(b *testing.B) {
	admitAndRecord := func(cfg Config) func() {
		r, err := New(cfg)
		if err != nil {
			b.Fatal(err)
		}
		return func() {
			p, _ := r.Admit()
			p.Done(nil)
		}
	}
	both(b, "Closed", admitAndRecord(Config{}))
	both(b, "ClosedSlowCalls", admitAndRecord(Config{SlowCallDuration: time.Hour}))
	closed, _ := New(Config{})
	both(b, "ClosedAdmitOnly", func() { _, _ = closed.Admit() })
	cb := gobreaker.NewCircuitBreaker[struct{}](gobreaker.Settings{Interval: 10 * time.Second, BucketPeriod: time.Second})
	both(b, "GobreakerExecute", func() { _, _ = cb.Execute(good) })
	open, _ := New(Config{MinimumCalls: 1, OpenFor: time.Hour})
	p, _ := open.Admit()
	p.Failure()
	both(b, "Open", func() { _, _ = open.Admit() })
}

func BenchmarkThrottle(b *testing.B) {
	now := epoch0
	healthy := newThrottle(b, ThrottleConfig{})
	both(b, "Healthy", func() {
		if healthy.Admit(now, 0.5) == nil {
			healthy.Record(now, nil)
		}
	})
	admitOnly := newThrottle(b, ThrottleConfig{})
	both(b, "HealthyAdmitOnly", func() { _ = admitOnly.Admit(now, 0.5) })
	refusing := newThrottle(b, ThrottleConfig{})
	for range 1000 {
		refusing.Record(now, ends['f'])
	}
	refusing.let = time.Hour
	both(b, "Refusing", func() { _ = refusing.Admit(now, 0.5) })
}

// BenchmarkUnary is an interceptor over an invoker that does nothing.
func BenchmarkUnary(b *testing.B) {
	invoker := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return nil }
	ctx := context.Background()
	for name, i := range map[string]grpc.UnaryClientInterceptor{
		"Breaker": UnaryClientInterceptor(Config{}), "Throttle": ThrottleUnaryClientInterceptor(ThrottleConfig{}),
	} {
		both(b, name, func() { _ = i(ctx, "/kv.KV/Get", nil, nil, nil, invoker) })
	}
}
