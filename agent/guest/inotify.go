package guest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// inotify is an instance of inotify(7). The package fsnotify does not expose the cookies that tell which two events are one rename.
type inotify struct {
	file *os.File
	buf  []byte
}

// rawEvent is an event of the kernel.
type rawEvent struct {
	wd     int32
	mask   uint32
	cookie uint32
	name   string
}

func (e rawEvent) has(mask uint32) bool { return e.mask&mask != 0 }

const inotifyMask = unix.IN_CREATE | unix.IN_MODIFY | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_ATTRIB |
	unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR | unix.IN_EXCL_UNLINK

func newInotify() (*inotify, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch: %w", err)
	}
	return &inotify{file: os.NewFile(uintptr(fd), "inotify"), buf: make([]byte, 64<<10)}, nil
}

// add watches a directory; it follows a symlink only if follow is set.
func (n *inotify) add(dir string, follow bool) (wd int32, err error) {
	mask := uint32(inotifyMask)
	if !follow {
		mask |= unix.IN_DONT_FOLLOW
	}
	err = control(n.file, func(fd uintptr) error {
		w, err := unix.InotifyAddWatch(int(fd), dir, mask)
		wd = int32(w)
		return err
	})
	return wd, err
}

func (n *inotify) remove(wd int32) {
	_ = control(n.file, func(fd uintptr) error { // an error means that the watch is gone already
		_, err := unix.InotifyRmWatch(int(fd), uint32(wd))
		return err
	})
}

// read waits for events, until the file's deadline or until it is closed.
func (n *inotify) read() ([]rawEvent, error) {
	size, err := n.file.Read(n.buf)
	if err != nil {
		return nil, err
	}
	var events []rawEvent
	for b := n.buf[:size]; len(b) >= unix.SizeofInotifyEvent; {
		length := int(binary.NativeEndian.Uint32(b[12:]))
		if len(b) < unix.SizeofInotifyEvent+length {
			break
		}
		name := b[unix.SizeofInotifyEvent : unix.SizeofInotifyEvent+length]
		if end := bytes.IndexByte(name, 0); end >= 0 {
			name = name[:end]
		}
		events = append(events, rawEvent{int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:]),
			binary.NativeEndian.Uint32(b[8:]), string(name)})
		b = b[unix.SizeofInotifyEvent+length:]
	}
	return events, nil
}
