package hedging

import (
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// isMessage reports whether v can be cloned.
func isMessage(v any) bool {
	switch v.(type) {
	case proto.Message, protoadapt.MessageV1:
		return true
	}
	return false
}

// kindOf returns the type of m, by which a hedge makes a message of its own. It is
// asked for before any attempt decodes into m, since even ProtoReflect reads what
// decoding writes; and it is asked of the message, never of package reflect: a
// dynamicpb message made by reflect.New has no descriptor and crashes.
func kindOf(m proto.Message) protoreflect.MessageType { return m.ProtoReflect().Type() }

// move makes dst equal to src and leaves both sharing src's parts, so src must
// not be used again. It costs one Set for each field, whatever their size; at
// 64 KiB, proto.Merge takes about ninety times as long.
func move(dst, src proto.Message) {
	proto.Reset(dst)
	d, s := dst.ProtoReflect(), src.ProtoReflect()
	s.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		d.Set(fd, v)
		return true
	})
	if u := s.GetUnknown(); len(u) > 0 {
		d.SetUnknown(u)
	}
}
