// Package bobtail keeps the tail of gRPC latency short.
//
// A [Client] is made from one policy document and installed with the dial
// options of a connection:
//
//	client, err := bobtail.NewClient(bobtail.DefaultPolicy())
//	...
//	conn, err := grpc.NewClient(target, append(client.DialOptions(), creds)...)
//
// Calls over the connection are then hedged where the policy says so and where
// it is safe: a call that takes longer than most is sent once more, to another
// backend, and whichever attempt answers first wins. What that costs is bounded
// by a budget. Failed calls are tried again under the same budget, methods that fail are
// throttled, and backends chosen by their latency. See [ParsePolicy] for the document,
// [DefaultPolicy] for what is safe anywhere.
//
// A [Server] is made from a document of its own ([ParseServerPolicy], [DefaultServerPolicy]) and
// installed with the options of a grpc.Server. It bounds how many handlers run at once, keeps
// the queue short, and under overload refuses early, the least critical calls first:
//
//	server, err := bobtail.NewServer(bobtail.DefaultServerPolicy())
//	...
//	s := grpc.NewServer(server.ServerOptions()...)
//	server.Register(s)
//
// The parts can be used alone: packages hedging, retry, breaker, shedding, loadbalance.
package bobtail

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"

	"github.com/bobtail-rpc/bobtail/hedging"
	"github.com/bobtail-rpc/bobtail/internal/telemetry"
	"github.com/bobtail-rpc/bobtail/loadbalance"
)

// Client applies a policy to the calls of any number of connections. What belongs
// to a server (latencies, the budget of extra attempts, A6 throttling) is kept for
// each target, as cc.Target() names it. It is safe for concurrent use, owns no
// goroutine and needs no Close.
type Client struct {
	options
	// dialed is what the dial options were made from: it cannot change any more.
	dialed Policy

	// current is swapped by Update. An atomic because every call reads it.
	current atomic.Pointer[Policy]
	// telemetry is nil without; observedEvents takes the balancers' events for it.
	telemetry      *telemetry.Telemetry
	observedEvents func(loadbalance.Event)
	// targets is copied on write, because every call reads it.
	targets atomic.Pointer[map[string]*target]
	mu      sync.Mutex // serialises the writers of targets; guards told
	told    map[string]bool
}

// NewClient returns a Client with the given policy.
func NewClient(p Policy, opts ...Option) (*Client, error) {
	c := &Client{options: newOptions(opts), dialed: p, told: map[string]bool{}}
	c.targets.Store(&map[string]*target{})
	c.current.Store(&p)
	c.observe()
	c.warn(&p)
	return c, nil
}

// warn says what an operator would want to have been told about a policy.
func (c *Client) warn(p *Policy) {
	hedges, retries := false, false
	for i := range p.entries {
		e := &p.entries[i]
		hedges = hedges || e.hedging != nil && e.mode == modeOn
		if e.hedging != nil && e.hedging.Percentile > 0 && e.hedging.Percentile < 1 {
			c.once("a percentile that is a fraction", "bobtail: hedgingPercentile is in percent, and less than 1: nearly every call is due for a hedge",
				"hedgingPercentile", e.hedging.Percentile)
		}
		retries = retries || e.retry != nil && e.mode == modeOn
	}
	if (hedges || retries) && p.extraLoad == nil {
		c.once("no extraLoad", "bobtail: the policy hedges or retries without extraLoad: nothing bounds the extra attempts (gRFC A6)")
	}
	if hedges && !p.ownBalancer {
		c.once("foreign balancer", "bobtail: hedging over a balancer of grpc's own: a hedge may go to the backend that is slow")
	}
}

// once logs a warning the first time that it is given a key. The keys are
// bounded: those beyond are not logged.
func (c *Client) once(key, msg string, args ...any) {
	c.mu.Lock()
	tell := !c.told[key] && len(c.told) < maxMethods
	if tell {
		c.told[key] = true
	}
	c.mu.Unlock()
	if tell {
		c.log.Warn(msg, args...)
	}
}

// DialOptions returns what a connection needs: one unary and one stream
// interceptor, which come after those of options given earlier; the balancer, as
// the default service config; and grpc.WithDisableRetry, because grpc-go's own
// retries below ours would multiply them. The last also silences a retryPolicy
// that the resolver or an xDS server delivers. Where the policy ties a method there is a
// stats handler too, which sees that a server starts a call.
//
// A service config from the resolver replaces the default one, and with it the
// balancer: add grpc.WithDisableServiceConfig() where a resolver sends one
// (etcd's does).
func (c *Client) DialOptions() []grpc.DialOption {
	opts := []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(c.unary),
		grpc.WithChainStreamInterceptor(c.stream),
		grpc.WithDefaultServiceConfig(c.dialed.serviceConfig()),
		grpc.WithDisableRetry(),
	}
	if c.dialed.ties() {
		opts = append(opts, grpc.WithStatsHandler(hedging.StatsHandler()))
	}
	return opts
}

// Update puts another policy in force for every connection at once: calls that
// begin after it returns follow p. What was learned of methods that p treats as
// before is kept. With "mode": "off" it is the kill switch.
//
// What grpc was told when it dialed cannot change. Update returns an error, and
// changes nothing, if p differs in loadBalancingConfig or in a key that is handed
// to grpc (waitForReady, healthCheckConfig and the message size limits), or if it ties a
// method while the policy of [NewClient] tied none.
func (c *Client) Update(p Policy) error {
	if err := c.update(p); err != nil {
		return err
	}
	c.log.Log(context.Background(), slog.LevelInfo, "bobtail: policy updated", "methodConfigs", len(p.entries))
	return nil
}

// update is Update without a record.
func (c *Client) update(p Policy) error {
	var errs []error
	if was, is := c.dialed.balancer(), p.balancer(); was != is {
		errs = append(errs, fmt.Errorf("bobtail: update: loadBalancingConfig %s, want %s: it is fixed when a connection is dialed", is, was))
	}
	if was, is := c.dialed.passed, p.passed; was != is {
		errs = append(errs, fmt.Errorf("bobtail: update: keys handed to grpc %s, want %s: they are fixed when a connection is dialed", orNone(is), orNone(was)))
	}
	if p.ties() && !c.dialed.ties() {
		errs = append(errs, errors.New("bobtail: update: tied true, want false as in the policy that was dialed with: the stats handler that tied calls need is fixed when a connection is dialed"))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	c.current.Store(&p)
	c.warn(&p)
	return nil
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}
