package loadbalance

import (
	"strings"
	"sync"
	"sync/atomic"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// maxMethods is how many methods are remembered to be streaming or not. A
// client that calls more of them looks the others up each time, at 300 ns.
const maxMethods = 1024

// methods remembers which methods are streaming. The zero value is ready.
type methods struct {
	// last is the method that was asked for twice first: most clients call one more than all
	// others. An atomic because every pick without an attempt reads it.
	last atomic.Pointer[method]
	// known is an atomic for the same reason, and replaced whole when a method is called
	// for the first time.
	known atomic.Pointer[map[string]*method]
	mu    sync.Mutex // orders replacements
}

type method struct {
	name      string
	streaming bool
}

// streaming reports whether a method is known to be streaming, by the descriptors
// linked into the program.
func (m *methods) streaming(fullName string) bool {
	if l := m.last.Load(); l != nil && l.name == fullName {
		return l.streaming
	}
	if known := m.known.Load(); known != nil {
		if one, ok := (*known)[fullName]; ok {
			if m.last.Load() == nil { // not each time: methods that alternate would contend for it
				m.last.Store(one)
			}
			return one.streaming
		}
	}
	return m.learn(fullName)
}

func (m *methods) learn(fullName string) bool {
	s := describedAsStreaming(fullName)
	if known := m.known.Load(); known != nil && len(*known) >= maxMethods {
		return s
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var old map[string]*method
	if p := m.known.Load(); p != nil {
		old = *p
	}
	if len(old) >= maxMethods {
		return s
	}
	next := make(map[string]*method, len(old)+1)
	for k, v := range old {
		next[k] = v
	}
	one := &method{strings.Clone(fullName), s}
	next[one.name] = one
	m.known.Store(&next)
	return s
}

func describedAsStreaming(fullName string) bool {
	name := protoreflect.FullName(strings.ReplaceAll(strings.TrimPrefix(fullName, "/"), "/", "."))
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
	if err != nil {
		return false
	}
	m, ok := d.(protoreflect.MethodDescriptor)
	return ok && (m.IsStreamingClient() || m.IsStreamingServer())
}
