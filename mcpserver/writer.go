package mcpserver

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// writer writes whole messages, one after the other, one per line.
type writer struct {
	mu     sync.Mutex // stays held while a client does not read
	w      io.Writer
	failed atomic.Pointer[error] // the first write error; nothing is written after it
	stuck  atomic.Int64          // when the write in progress began, in Unix nanoseconds; 0 if there is none
	left   atomic.Int64          // when the client was found to have closed its end, in Unix nanoseconds; 0 if it has not
}

func (w *writer) err() error {
	if e := w.failed.Load(); e != nil {
		return *e
	}
	return nil
}

var errEncode = errors.New("encode message")

const (
	partSize   = 64 << 10 // bytes per write: each part that is taken is a sign of life
	unreadTime = 5 * time.Second
	unreadLook = 500 * time.Millisecond
)

// errUnread is the error for a client that has closed its end and does not read.
var errUnread = errors.New("the client has closed its end and does not read")

func (w *writer) write(v any) error {
	line, err := encode(v)
	if err != nil {
		return errors.Join(errEncode, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	defer w.stuck.Store(0)
	for len(line) > 0 && w.err() == nil {
		w.stuck.Store(time.Now().UnixNano())
		n, err := w.w.Write(line[:min(len(line), partSize)])
		if line = line[n:]; err != nil {
			w.failed.CompareAndSwap(nil, &err)
		}
	}
	return w.err()
}

// leave notes that the client has closed its end.
func (w *writer) leave() { w.left.CompareAndSwap(0, time.Now().UnixNano()) }

// watch returns a context that ends when the client has closed its end and reads nothing more, since a writer would then wait forever. The
// stuck writer may also block the reader of in, so that the end of in is not read; if in is a pipe, the kernel is asked instead. watch runs
// until ctx ends.
func (w *writer) watch(ctx context.Context, in io.Reader) (givenUp context.Context) {
	givenUp, giveUp := context.WithCancel(context.Background())
	go func() {
		ticker := time.NewTicker(unreadLook)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				giveUp() // the caller is done; this only frees the context
				return
			case <-ticker.C:
			}
			stuck := w.stuck.Load()
			if stuck == 0 {
				continue
			}
			if w.left.Load() == 0 && hungUp(in) {
				w.leave()
			}
			if left := w.left.Load(); left != 0 && time.Since(time.Unix(0, max(stuck, left))) > unreadTime {
				err := error(errUnread)
				w.failed.CompareAndSwap(nil, &err)
				giveUp()
				return
			}
		}
	}()
	return givenUp
}

// hungUp reports whether the other end of a pipe or socket is closed, even if there is still something to read (poll(2)).
func hungUp(in io.Reader) bool {
	f, ok := in.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return false
	}
	hung := false
	err = raw.Control(func(fd uintptr) {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, perr := unix.Poll(poll, 0)
		hung = perr == nil && n > 0 && poll[0].Revents&(unix.POLLHUP|unix.POLLRDHUP|unix.POLLERR) != 0
	})
	return err == nil && hung
}
