package agent

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// connWindow is how many unread bytes of a narrow stream, such as a connection, the host keeps in memory. yamux would keep four times as
// much, and there are many connections. It is a little less than a power of two, at which yamux's buffer would double.
const connWindow = 63 << 10

// ConnBuffers is how much of the host's memory one connection from Dial or Accept takes at most: the unread bytes, in a buffer that may be
// twice as large, and copies on the way.
const ConnBuffers = 256 << 10

// StreamBuffers is the same for a stream of output or changes, FileBuffers for the transfer of a file, of which yamux keeps more.
const (
	StreamBuffers = 128 << 10
	FileBuffers   = 512 << 10
)

// yamuxWindow is how much each side of a stream may send before a window update allows more (yamux's specification).
const yamuxWindow = 256 << 10

// errWindow means that the guest sends more than it may.
var errWindow = errors.New("the guest sent more on a connection than it may")

// windows limits narrow streams to connWindow. It gives the guest a smaller window when a stream is opened, and sends the later window
// updates in place of yamux. The session of a guest that sends more ends. It is safe for concurrent use.
type windows struct {
	frames *frameWriter

	mu   sync.Mutex
	byID map[uint32]*window
}

// window is the state of one narrow stream.
type window struct {
	waiting int64 // bytes that were received but not read
	owed    int64 // bytes that were read but not granted to the guest again
	ended   bool  // the guest sends no more
	over    bool  // the host needs no more: what still arrives is dropped
	forget  *time.Timer
}

func newWindows(frames *frameWriter) *windows {
	w := &windows{frames: frames, byID: map[uint32]*window{}}
	frames.windows = w
	return w
}

// narrow begins to manage a stream before the guest is asked for anything on it. Window updates can only add, so to make the window smaller
// it grants a number that makes the sum modulo 2³² less.
func (w *windows) narrow(stream *yamux.Stream) error {
	w.mu.Lock()
	w.byID[stream.StreamID()] = &window{}
	w.mu.Unlock()
	less := int64(connWindow - yamuxWindow)
	return w.grant(stream.StreamID(), uint32(less))
}

// grant allows the guest to send n more bytes.
func (w *windows) grant(id, n uint32) error {
	frame := make([]byte, frameHead)
	frame[1] = frameWindow
	binary.BigEndian.PutUint32(frame[4:], id)
	binary.BigEndian.PutUint32(frame[8:], n)
	_, err := w.frames.whole(frame)
	return err
}

// keep reports whether a stream is managed here: then yamux must not send its window updates.
func (w *windows) keep(id uint32) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.byID[id] != nil
}

// comes counts what the guest sends on a stream, and reports whether it is to be dropped.
func (w *windows) comes(id uint32, n int64) (drop bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	in := w.byID[id]
	if in == nil || in.over {
		return in != nil, nil
	}
	if in.waiting += n; in.waiting > connWindow {
		return false, errWindow
	}
	return false, nil
}

// took counts what was read from a stream, and from time to time grants it to the guest again.
func (w *windows) took(id uint32, n int) error {
	w.mu.Lock()
	in := w.byID[id]
	if in == nil || in.over {
		w.mu.Unlock()
		return nil
	}
	in.waiting -= int64(n)
	in.owed += int64(n)
	owed := in.owed
	if owed < connWindow/2 {
		w.mu.Unlock()
		return nil
	}
	in.owed = 0
	w.mu.Unlock()
	return w.grant(id, uint32(owed))
}

// ended notes that the guest sends no more on a stream.
func (w *windows) ended(id uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if in := w.byID[id]; in != nil {
		if in.ended = true; in.over {
			in.forget.Stop()
			delete(w.byID, id)
		}
	}
}

// drop makes further data on a stream dropped, until the guest has also ended the stream or yamux has forgotten it.
func (w *windows) drop(id uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	in := w.byID[id]
	switch {
	case in == nil || in.over:
	case in.ended:
		delete(w.byID, id)
	default:
		in.over = true
		in.forget = time.AfterFunc(closeTimeout+time.Minute, func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			delete(w.byID, id)
		})
	}
}

// narrow are the kinds of streams that windows manages: those that may be open for long without being read.
var narrow = map[string]bool{StreamDial: true, StreamAccept: true, StreamOutput: true, StreamWatch: true}

// narrowStream is a stream, of which only connWindow bytes may be unread if it has windows. Copies of it are the same stream.
type narrowStream struct {
	*yamux.Stream
	windows *windows    // nil if yamux' own window is enough
	reading *sync.Mutex // two reads of one yamux stream at the same time can lock each other out for good
}

func newNarrowStream(s *yamux.Stream, w *windows) narrowStream {
	return narrowStream{s, w, new(sync.Mutex)}
}

// Read implements io.Reader.
func (s narrowStream) Read(p []byte) (int, error) {
	s.reading.Lock()
	defer s.reading.Unlock()
	n, err := s.Stream.Read(p)
	if n > 0 && s.windows != nil {
		err = errors.Join(err, s.windows.took(s.StreamID(), n))
	}
	return n, err
}

// letGo frees everything that is kept of the stream.
func (s narrowStream) letGo() {
	s.windows.drop(s.StreamID())
	_ = s.SetReadDeadline(time.Unix(1, 0)) // it ends a read that waits, too
	s.reading.Lock()
	defer s.reading.Unlock()
	_, _ = io.Copy(io.Discard, s.Stream) // reads what was received, until the deadline ends it
	s.Shrink()
}

var _ net.Conn = narrowStream{}
