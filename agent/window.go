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

// connWindow is how many bytes of a connection, or of another stream that is narrow, wait in the host's memory for whoever reads them.
// yamux would keep four times as much, and connections are many. It ends a little before a power of two, at which yamux' buffer would
// double.
const connWindow = 63 << 10

// ConnBuffers is how much of the host's memory one connection takes at most, from Dial or Accept: what waits for its reader, in a buffer
// that may be twice as large, and copies on the way.
const ConnBuffers = 256 << 10

// StreamBuffers is the same of a stream of output or changes, FileBuffers of a transfer of a file, of which yamux keeps more.
const (
	StreamBuffers = 128 << 10
	FileBuffers   = 512 << 10
)

// yamuxWindow is what each side of a stream may send before it is told of more (yamux' specification).
const yamuxWindow = 256 << 10

// errWindow says that the guest sends more than it may.
var errWindow = errors.New("the guest sent more on a connection than it may")

// windows keep narrow streams to connWindow: the guest is told of a smaller window when a stream is opened, and of what was read
// since then by us in place of yamux. A guest that sends more is at its end. It is safe for concurrent use.
type windows struct {
	frames *frameWriter

	mu   sync.Mutex
	byID map[uint32]*window
}

// window is what is on its way in one stream.
type window struct {
	waiting int64 // bytes that nobody has read
	owed    int64 // bytes that were read, and that the guest was not told of
	ended   bool  // the guest sends no more
	over    bool  // the host wants no more: what comes is dropped
	forget  *time.Timer
}

func newWindows(frames *frameWriter) *windows {
	w := &windows{frames: frames, byID: map[uint32]*window{}}
	frames.windows = w
	return w
}

// narrow begins to keep a stream on which the guest has not been asked for anything. Its window is made smaller by telling it of what makes
// a sum modulo 2³² less.
func (w *windows) narrow(stream *yamux.Stream) error {
	w.mu.Lock()
	w.byID[stream.StreamID()] = &window{}
	w.mu.Unlock()
	less := int64(connWindow - yamuxWindow)
	return w.grant(stream.StreamID(), uint32(less))
}

// grant tells the guest that it may send more.
func (w *windows) grant(id, n uint32) error {
	frame := make([]byte, frameHead)
	frame[1] = frameWindow
	binary.BigEndian.PutUint32(frame[4:], id)
	binary.BigEndian.PutUint32(frame[8:], n)
	_, err := w.frames.whole(frame)
	return err
}

// keep says whether a stream is kept: then yamux is not to tell of its window.
func (w *windows) keep(id uint32) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.byID[id] != nil
}

// comes counts what the guest sends on a stream, and says whether it is to be dropped.
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

// took counts what was read of a stream, and tells the guest of it now and then.
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

// ended is told that the guest sends no more on a stream.
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

// drop has what still comes on a stream dropped, until the guest has ended it, too, or yamux has forgotten it.
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

// narrow are the streams that are kept: those that may be open for long, and whose reader may not read.
var narrow = map[string]bool{StreamDial: true, StreamAccept: true, StreamOutput: true, StreamWatch: true}

// narrowStream is a stream of which little waits to be read.
type narrowStream struct {
	*yamux.Stream
	windows *windows
}

// Read implements io.Reader.
func (s narrowStream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	if n > 0 {
		err = errors.Join(err, s.windows.took(s.StreamID(), n))
	}
	return n, err
}

// letGo has nothing more of the stream kept.
func (s narrowStream) letGo() {
	s.windows.drop(s.StreamID())
	_ = s.SetReadDeadline(time.Unix(1, 0))
	_, _ = io.Copy(io.Discard, s.Stream) // what waits; then comes the deadline
	s.Shrink()
}

var _ net.Conn = narrowStream{}
