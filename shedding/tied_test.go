package shedding

import (
	"context"
	"errors"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// transport is a stream that notes what is sent on it.
type transport struct {
	grpc.ServerTransportStream
	header, trailer metadata.MD
	sent            bool
	err             error
}

func (s *transport) SetHeader(md metadata.MD) error {
	s.header = metadata.Join(s.header, md)
	return s.err
}

func (s *transport) SendHeader(md metadata.MD) error {
	s.sent = true
	return s.SetHeader(md)
}

func (s *transport) SetTrailer(md metadata.MD) error {
	s.trailer = metadata.Join(s.trailer, md)
	return nil
}

func TestStartTied(t *testing.T) {
	for _, tc := range []struct {
		name  string
		mark  []string
		sent  error // what sending the header comes to
		gone  bool  // the client
		tied  bool
		fails codes.Code
	}{
		{name: "a call like any other"},
		{name: "a tied call", mark: []string{"1"}, tied: true},
		{name: "a mark that means nothing", mark: []string{"", "true", "2"}},
		{name: "a mark among others", mark: []string{"x", "1"}, tied: true},
		{name: "the header is gone already", mark: []string{"1"}, sent: errors.New("illegal write")},
		{name: "the client is gone already", mark: []string{"1"}, sent: errors.New("done"), gone: true, fails: codes.Canceled},
	} {
		s := &transport{err: tc.sent}
		ctx, cancel := context.WithCancel(metadata.NewIncomingContext(t.Context(), metadata.MD{"bobtail-tied": tc.mark}))
		ctx = grpc.NewContextWithServerTransportStream(ctx, s)
		if tc.gone {
			cancel()
		}
		in, err := startTied(ctx)
		if status.Code(err) != tc.fails {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.fails)
		}
		if s.sent != (tc.tied || tc.sent != nil) {
			t.Errorf("%s: a header was sent: %v", tc.name, s.sent)
		}
		if (in != ctx) != tc.tied {
			t.Errorf("%s: the handler has a context of its own: %v", tc.name, in != ctx)
		}
		if tc.tied {
			if !slices.Equal(s.header["bobtail-tied"], []string{"1"}) {
				t.Errorf("%s: header %v", tc.name, s.header)
			}
			must := func(err error) {
				if err != nil {
					t.Errorf("%s: %v", tc.name, err)
				}
			}
			must(grpc.SetHeader(in, metadata.Pairs("a", "1")))
			must(grpc.SendHeader(in, metadata.Pairs("b", "2")))
			must(grpc.SetTrailer(in, metadata.Pairs("c", "3")))
			if s.header.Len() != 1 || len(s.trailer) != 3 {
				t.Errorf("%s: header %v, trailer %v: want what the handler sets in the trailer", tc.name, s.header, s.trailer)
			}
		}
		cancel()
	}
}
