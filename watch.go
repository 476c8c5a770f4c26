package bobtail

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// watchEvery is how often a policy file is read. Reading is what works with every file
// system and every way to replace a file, and a policy is no bigger than that a second
// could matter.
const watchEvery = time.Second

// maxPolicyFile bounds what is read of a file that is none of ours. The longest policy of
// a thousand methods is a few hundred KiB.
const maxPolicyFile = 1 << 20

// WatchPolicyFile keeps the policy in force equal to the document in a file: it reads the
// file at once and then every second, and puts what has changed in force by [ParsePolicy]
// and [Client.Update], until ctx ends. It returns ctx.Err() then, and an error before that
// only if path is empty. It runs on the caller's goroutine:
//
//	go client.WatchPolicyFile(ctx, "/etc/bobtail/policy.json")
//
// The file may be written in place, replaced by a rename, or be a symbolic link that is
// swapped, as those of a Kubernetes ConfigMap are. Contents are compared, not times.
//
// While there is no good policy in the file (it is missing, no regular file, over 1 MiB,
// faulty, or differs in what is fixed when a connection is dialed) the one in force stays
// there. The log tells that as an error, once for each content and problem, and once when
// there is a good policy again. A file that a writer is halfway through is told as faulty,
// and read again a second later.
//
// Each watch applies the changes of its own file: of two on one Client, and of a watch and
// a call of Update, the later wins until the other file changes.
func (c *Client) WatchPolicyFile(ctx context.Context, path string) error {
	if path == "" {
		return errors.New(`bobtail: policy file "", want a path`)
	}
	w := policyFile{client: c, path: path}
	ticker := time.NewTicker(watchEvery)
	defer ticker.Stop()
	for ctx.Err() == nil {
		w.look()
		select {
		case <-ticker.C:
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

// policyFile is what a watch remembers of its file.
type policyFile struct {
	client *Client
	path   string

	applied []byte // the content that was put in force last; nil: none yet
	refused []byte // the content that was told to be bad; nil: none, or it was not read
	problem string // that was told; "": none since a good content
}

// look reads the file once and does what is to be done.
func (f *policyFile) look() {
	text, err := readPolicyFile(f.path)
	if err != nil {
		f.keep(nil, err)
		return
	}
	switch {
	case f.applied != nil && bytes.Equal(text, f.applied) && f.problem == "":
		return
	case f.refused != nil && bytes.Equal(text, f.refused):
		return
	default:
		if err := f.apply(text); err != nil {
			f.keep(text, err)
			return
		}
		f.applied = text
	}
	f.refused, f.problem = nil, ""
	f.client.log.Info("bobtail: policy file: in force", "path", f.path)
}

func (f *policyFile) apply(text []byte) error {
	p, err := ParsePolicy(text)
	if err != nil {
		return err
	}
	return f.client.update(p) // look tells of it
}

// keep tells a problem unless it is the one that was told last; text is nil if the file
// could not be read.
func (f *policyFile) keep(text []byte, err error) {
	if text == nil && f.problem == err.Error() {
		return
	}
	f.refused, f.problem = text, err.Error()
	f.client.log.Error("bobtail: policy file: the policy in force is kept", "path", f.path, "error", err)
}

// readPolicyFile returns the content, which is not nil, of whatever file the path leads to
// now.
func readPolicyFile(path string) ([]byte, error) {
	// Before it is opened: to open a named pipe is to wait for its writer.
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("bobtail: policy file of mode %v, want a regular file", info.Mode())
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxPolicyFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxPolicyFile {
		// Without its size: a log file taken for a policy would be told every second.
		return nil, fmt.Errorf("bobtail: policy file over 1 MiB, want at most %d bytes", maxPolicyFile)
	}
	return text, nil
}
