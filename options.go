package bobtail

import (
	"context"
	"io"
	"log/slog"

	"github.com/bobtail-rpc/bobtail/hedging"
)

// Option changes how a [Client] is built.
type Option func(*options)

type options struct {
	log     *slog.Logger
	reports func(context.Context, hedging.Report)
}

func newOptions(opts []Option) options {
	o := options{log: slog.Default()}
	for _, f := range opts {
		f(&o)
	}
	return o
}

// WithLogger sends the client's few log records, told once each at a change of
// state, to l. The default is [slog.Default]; nil is none.
func WithLogger(l *slog.Logger) Option {
	return func(o *options) {
		if l == nil {
			l = slog.New(slog.NewTextHandler(io.Discard, nil))
		}
		o.log = l
	}
}

// WithHedgeReports tells f about each call that a hedging policy applies to, once
// it is decided: how many attempts it took, which of them won, and why a hedge
// that was due was not sent. In mode shadow that is where to see what would have
// been done. f runs on the caller's goroutine, before the call returns; it must
// be quick, safe for concurrent use, and must not keep the context.
func WithHedgeReports(f func(context.Context, hedging.Report)) Option {
	return func(o *options) { o.reports = f }
}
