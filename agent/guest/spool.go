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

// Sizes of a spool in bytes: the first spoolHead bytes are kept for ever in memory, the last ones in a ring: of
// spoolRing bytes in a file, or of spoolFallback bytes in memory where the disk is full.
const (
	spoolHead     = 16 << 10
	spoolRing     = 16<<20 - spoolHead
	spoolFallback = 64 << 10
	spoolRuns     = 16 << 10 // changes between stdout and stderr that are remembered
)

// spool keeps the output of one process: the first bytes and the last ones. It is safe for concurrent use.
type spool struct {
	dir string // where the ring file is made, then unlinked

	mu      sync.Mutex
	head    []byte
	ring    ring
	start   int64   // oldest offset that the ring keeps; everything from here to end is kept
	end     int64   // bytes written so far
	runs    []int64 // offset<<1 | stream, where the stream changes
	closed  bool    // no more output will come
	holders map[*holder]bool
	stalled []*outputPipe // that are not read because a holder is too far behind
	changed chan struct{}
}

// ring keeps the last bytes of a sequence. at is the offset of the first byte behind the head.
type ring interface {
	size() int64
	writeAt(p []byte, at int64) error
	readAt(p []byte, at int64) error
	close()
}

func newSpool(dir string) *spool {
	return &spool{dir: dir, start: spoolHead, changed: make(chan struct{})}
}

// append adds output. It never fails: where the disk is full, less is kept.
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

// mark remembers that stream writes from the current end on.
func (s *spool) mark(stream int) {
	if n := len(s.runs); n > 0 && s.runs[n-1]&1 == int64(stream) {
		return
	}
	if len(s.runs) >= spoolRuns {
		// Give up the older half behind the head: its bytes go with its marks, so that no byte is shown as the wrong stream.
		cut := len(s.runs) / 2
		keep := sort.Search(len(s.runs), func(i int) bool { return s.runs[i]>>1 >= spoolHead })
		if keep >= cut {
			return // the head alone is that ragged: its tail is shown as one stream
		}
		s.start = max(s.start, s.runs[cut]>>1)
		s.runs = append(s.runs[:keep], s.runs[cut:]...)
	}
	s.runs = append(s.runs, s.end<<1|int64(stream))
}

// keep writes p to the ring, which it makes first where there is none.
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

// shrink moves the last bytes from a ring on a full disk to one in memory.
func (s *spool) shrink() {
	small := &memoryRing{}
	from := max(s.start, s.end-small.size())
	last := make([]byte, s.end-from)
	if err := s.ring.readAt(last, from); err == nil {
		_ = small.writeAt(last, from) // memory: cannot fail
		s.start = from
	} else {
		s.start = s.end
	}
	s.ring.close()
	s.ring = small
}

// holdRoom is how far a holder may be behind, in bytes: with what a pipe holds besides that fits the ring.
const holdRoom = 8 << 20

// holder is a reader for whom output is kept: what writes waits for him.
type holder struct{ at int64 }

// hold keeps what is behind an offset until it is told that it was read.
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

// advance says how far a holder has read, or that he reads no more, and gives the pipes that may be read again.
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

// stall says whether a pipe must wait for a holder, who then has it read again.
func (s *spool) stall(p *outputPipe) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.isHeld() {
		return false
	}
	s.stalled = append(s.stalled, p)
	return true
}

// isHeld says whether what one more read brings could cost a holder what he has not read: bytes, or changes of the stream, of which half
// are given up when there are too many.
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

// finish says that no more output will come.
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

// sizes tells how much was written and how much of that is no longer kept.
func (s *spool) sizes() (written, dropped int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end, s.lost(0, s.end)
}

// progress tells how much was written, and what is closed when that changes.
func (s *spool) progress() (written int64, changed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end, s.changed
}

// lost counts the bytes in [from, to) that are no longer kept.
func (s *spool) lost(from, to int64) int64 {
	return max(0, min(to, s.start)-max(from, int64(len(s.head))))
}

// next returns up to len(p) kept bytes at or behind offset that belong to one stream, their true offset and stream. n == 0 means
// that nothing is there yet; then wait is closed at the next change, and ended says whether any will come.
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

// window collects what w asks for.
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

// collect returns up to limit bytes of a stream ("" is both) from [from, to), and the offset behind the last one.
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
			return all, at, nil // what lies between is no longer kept: do not join what it has parted
		}
		if stream == "" || stream == agent.StreamName(on) {
			all = append(all, buf[:n]...)
		}
		at = found + int64(n)
	}
	return all, to, nil
}

// fileRing is a ring in an unlinked file: nothing can open it, and nothing is left of it when the agent ends.
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
	// Give the space back even where a reader still holds the file.
	_ = unix.Ftruncate(int(r.file.Fd()), 0)
	_ = r.file.Close()
}

// memoryRing is the ring for a full disk.
type memoryRing struct{ buf [spoolFallback]byte }

func (r *memoryRing) size() int64 { return spoolFallback }

func (r *memoryRing) writeAt(p []byte, at int64) error {
	return wrap(p, at, spoolFallback, func(p []byte, at int64) error { copy(r.buf[at:], p); return nil })
}

func (r *memoryRing) readAt(p []byte, at int64) error {
	return wrap(p, at, spoolFallback, func(p []byte, at int64) error { copy(p, r.buf[at:]); return nil })
}

func (r *memoryRing) close() {}

// wrap does an operation on a ring of the given size in at most two pieces.
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
