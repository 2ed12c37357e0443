package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"sync"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

// Sizes of a spool in bytes. The first spoolHead bytes always stay in memory. The last bytes are in a ring: spoolRing bytes in a file, or
// spoolFallback bytes in memory if the disk is full.
const (
	spoolHead     = 16 << 10
	spoolRing     = 16<<20 - spoolHead
	spoolFallback = 64 << 10
	spoolRuns     = 16 << 10 // remembered changes between stdout and stderr
)

// spool keeps the first and the last bytes of a process's output. It is safe for concurrent use.
type spool struct {
	dir string // where the file of the ring is created, then unlinked

	mu      sync.Mutex
	head    []byte
	ring    ring
	start   int64   // oldest offset in the ring; everything from there to end is kept
	end     int64   // bytes written so far
	runs    []int64 // offset<<1 | stream, for each change of the stream
	closed  bool    // no more output will come
	holders map[*holder]bool
	stalled []*outputPipe // not read, because a holder is too far behind
	changed chan struct{}
}

// ring keeps the last bytes of a sequence. Offsets (at) count from the start of the output.
type ring interface {
	size() int64
	writeAt(p []byte, at int64) error
	readAt(p []byte, at int64) error
	close()
}

func newSpool(dir string) *spool {
	return &spool{dir: dir, start: spoolHead, changed: make(chan struct{})}
}

// append adds output. It never fails: if the disk is full, less is kept.
func (s *spool) append(stream int, p []byte) {
	if len(p) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mark(stream)
	if room := spoolHead - len(s.head); room > 0 {
		n := min(room, len(p))
		s.head = append(s.head, p[:n]...)
		s.end += int64(n)
		p = p[n:]
	}
	if len(p) > 0 {
		s.keep(p)
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

// mark records that stream writes from the current end on.
func (s *spool) mark(stream int) {
	if n := len(s.runs); n > 0 && s.runs[n-1]&1 == int64(stream) {
		return
	}
	if len(s.runs) >= spoolRuns {
		// Drop the older half of the marks after the head, with their bytes, so that no byte is shown as the wrong stream.
		cut := len(s.runs) / 2
		keep := sort.Search(len(s.runs), func(i int) bool { return s.runs[i]>>1 >= spoolHead })
		if keep >= cut {
			return // the head has too many changes: what follows is shown as one stream
		}
		s.start = max(s.start, s.runs[cut]>>1)
		s.runs = append(s.runs[:keep], s.runs[cut:]...)
	}
	s.runs = append(s.runs, s.end<<1|int64(stream))
}

// keep writes p to the ring, and creates the ring if there is none.
func (s *spool) keep(p []byte) {
	if s.ring == nil {
		file, err := newFileRing(s.dir)
		if err != nil {
			s.ring = &memoryRing{}
		} else {
			s.ring = file
		}
	}
	for len(p) > 0 {
		n := min(len(p), int(s.ring.size()))
		if err := s.ring.writeAt(p[:n], s.end); err != nil {
			s.shrink()
			continue
		}
		s.end += int64(n)
		p = p[n:]
		s.start = max(s.start, s.end-s.ring.size())
	}
}

// shrink moves the last bytes from a ring on a full disk to a ring in memory.
func (s *spool) shrink() {
	small := &memoryRing{}
	from := max(s.start, s.end-small.size())
	last := make([]byte, s.end-from)
	if err := s.ring.readAt(last, from); err == nil {
		_ = small.writeAt(last, from) // cannot fail: it is memory
		s.start = from
	} else {
		s.start = s.end
	}
	s.ring.close()
	s.ring = small
}

// holdRoom is how many bytes a holder may be behind: together with the content of a pipe they fit into the ring.
const holdRoom = 8 << 20

// holder is a reader for whom output is kept: processes that write wait for this reader.
type holder struct{ at int64 }

// hold keeps the output from an offset on until advance says that it was read.
func (s *spool) hold(at int64) *holder {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := &holder{at}
	if s.holders == nil {
		s.holders = map[*holder]bool{}
	}
	s.holders[h] = true
	return h
}

// advance records how far a holder has read, or with over that it reads no more, and returns the pipes that may be read again.
func (s *spool) advance(h *holder, at int64, over bool) (resumed []*outputPipe) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h.at = at
	if over {
		delete(s.holders, h)
	}
	if len(s.stalled) > 0 && !s.isHeld() {
		resumed, s.stalled = s.stalled, nil
	}
	return resumed
}

// stall reports whether a pipe must wait for a holder. If so, advance returns the pipe when it may be read again.
func (s *spool) stall(p *outputPipe) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.isHeld() {
		return false
	}
	s.stalled = append(s.stalled, p)
	return true
}

// isHeld reports whether one more read could drop what a holder has not read: bytes, or changes of the stream, half of which are dropped
// when there are too many.
func (s *spool) isHeld() bool {
	room := int64(holdRoom)
	if s.ring != nil {
		room = min(room, s.ring.size()-readPart)
	}
	for h := range s.holders {
		if s.end-h.at > room {
			return true
		}
		if len(s.runs) > spoolRuns/2 && len(s.runs)-sort.Search(len(s.runs),
			func(i int) bool { return s.runs[i]>>1 >= h.at }) > spoolRuns/4 {
			return true
		}
	}
	return false
}

// finish records that no more output will come.
func (s *spool) finish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		close(s.changed)
		s.changed = make(chan struct{})
	}
}

// discard frees the spool.
func (s *spool) discard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ring != nil {
		s.ring.close()
		s.ring = nil
	}
	s.head, s.start = nil, s.end
}

// sizes returns how many bytes were written, and how many of them are no longer kept.
func (s *spool) sizes() (written, dropped int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end, s.lost(0, s.end)
}

// progress returns how many bytes were written, and a channel that is closed when that changes.
func (s *spool) progress() (written int64, changed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end, s.changed
}

// lost counts the bytes in [from, to) that are no longer kept.
func (s *spool) lost(from, to int64) int64 {
	return max(0, min(to, s.start)-max(from, int64(len(s.head))))
}

// next returns up to len(p) kept bytes of one stream at or after offset, with their actual offset and stream. If n is 0, nothing is
// available yet: wait is closed at the next change, and ended reports whether no more will come.
func (s *spool) next(p []byte, offset int64) (n int, at int64, stream int, wait <-chan struct{}, ended bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at = max(offset, 0)
	if at >= int64(len(s.head)) {
		at = max(at, min(s.start, s.end))
	}
	if at >= s.end {
		return 0, max(at, s.end), 0, s.changed, s.closed, nil
	}
	stop := s.end
	if at < int64(len(s.head)) {
		stop = int64(len(s.head))
	}
	i := sort.Search(len(s.runs), func(i int) bool { return s.runs[i]>>1 > at }) - 1
	if i >= 0 {
		stream = int(s.runs[i] & 1)
	}
	if i+1 < len(s.runs) {
		stop = min(stop, s.runs[i+1]>>1)
	}
	p = p[:min(int64(len(p)), stop-at)]
	if at < int64(len(s.head)) {
		copy(p, s.head[at:])
	} else if err := s.ring.readAt(p, at); err != nil {
		return 0, at, 0, nil, false, fmt.Errorf("read output: %w", err)
	}
	return len(p), at, stream, nil, false, nil
}

// window returns the output that w selects.
func (s *spool) window(w agent.Window) (agent.Output, error) {
	head, tail := min(max(w.Head, 0), agent.MaxWindow), min(max(w.Tail, 0), agent.MaxWindow)
	end, _ := s.sizes()
	from := max(w.Offset, 0)
	out := agent.Output{HeadEnd: from, TailStart: max(from, end), End: max(from, end)}
	if from >= end {
		return out, nil
	}
	out.Dropped = func() int64 { s.mu.Lock(); defer s.mu.Unlock(); return s.lost(from, end) }()
	var err error
	if out.Head, out.HeadEnd, err = s.collect(from, end, head, w.Stream); err != nil {
		return out, err
	}
	if out.HeadEnd >= end {
		out.HeadEnd, out.TailStart = end, end
		return out, nil
	}
	out.TailStart = max(out.HeadEnd, end-int64(tail))
	out.Tail, _, err = s.collect(out.TailStart, end, tail, w.Stream)
	return out, err
}

// collect returns up to limit bytes of a stream ("" means both) from [from, to), and the offset after the last one.
func (s *spool) collect(from, to int64, limit int, stream string) ([]byte, int64, error) {
	var all []byte
	buf := make([]byte, min(int64(limit), to-from, 32<<10))
	for at := from; at < to; {
		if len(all) >= limit {
			return all, at, nil
		}
		n, found, on, _, _, err := s.next(buf[:min(len(buf), limit-len(all))], at)
		if err != nil || n == 0 {
			return all, to, err
		}
		if found > at && len(all) > 0 {
			return all, at, nil // the bytes between are no longer kept: do not join what they separated
		}
		if stream == "" || stream == agent.StreamName(on) {
			all = append(all, buf[:n]...)
		}
		at = found + int64(n)
	}
	return all, to, nil
}

// fileRing is a ring in an unlinked file: no program can open it, and it disappears when the agent ends.
type fileRing struct{ file *os.File }

func newFileRing(dir string) (*fileRing, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	file, err := os.CreateTemp(dir, "output-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(filepath.Join(dir, filepath.Base(file.Name()))); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &fileRing{file}, nil
}

func (r *fileRing) size() int64 { return spoolRing }

func (r *fileRing) writeAt(p []byte, at int64) error {
	return wrap(p, at, spoolRing, func(p []byte, at int64) error { _, err := r.file.WriteAt(p, at); return err })
}

func (r *fileRing) readAt(p []byte, at int64) error {
	return wrap(p, at, spoolRing, func(p []byte, at int64) error { _, err := r.file.ReadAt(p, at); return err })
}

func (r *fileRing) close() {
	// Free the space even if a reader still holds the file.
	_ = unix.Ftruncate(int(r.file.Fd()), 0)
	_ = r.file.Close()
}

// memoryRing is the ring that is used when the disk is full.
type memoryRing struct{ buf [spoolFallback]byte }

func (r *memoryRing) size() int64 { return spoolFallback }

func (r *memoryRing) writeAt(p []byte, at int64) error {
	return wrap(p, at, spoolFallback, func(p []byte, at int64) error { copy(r.buf[at:], p); return nil })
}

func (r *memoryRing) readAt(p []byte, at int64) error {
	return wrap(p, at, spoolFallback, func(p []byte, at int64) error { copy(p, r.buf[at:]); return nil })
}

func (r *memoryRing) close() {}

// wrap performs an operation on a ring of the given size, in at most two parts.
func wrap(p []byte, at, size int64, do func([]byte, int64) error) error {
	for len(p) > 0 {
		pos := at % size
		n := min(int64(len(p)), size-pos)
		if err := do(p[:n], pos); err != nil {
			return err
		}
		p, at = p[n:], at+n
	}
	return nil
}
