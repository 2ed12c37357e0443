package agent

import (
	"fmt"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// collector moves what all processes write into their spools. One thread waits for all pipes by epoll, which tells them in the order in
// which they became readable: so stdout and stderr of a process keep their order but for bursts within microseconds.
type collector struct {
	epoll int
	wake  *os.File // closed to end it

	mu    sync.Mutex
	pipes map[int32]*outputPipe // by descriptor
	done  chan struct{}
}

// outputPipe is the reading end of one stream of a process.
type outputPipe struct {
	fd     int
	stream int
	output *spool
	eof    chan struct{} // closed when nobody can write any more

	mu     sync.Mutex // held while bytes are between pipe and spool
	closed bool
}

func newCollector() (*collector, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make epoll: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		_ = unix.Close(epoll)
		return nil, fmt.Errorf("make epoll: %w", err)
	}
	c := &collector{epoll: epoll, wake: w, pipes: map[int32]*outputPipe{}, done: make(chan struct{})}
	if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, int(r.Fd()), &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(r.Fd())}); err != nil {
		return nil, fmt.Errorf("make epoll: %w", err)
	}
	go c.run(r)
	return c, nil
}

// close ends the collector, and with it what is still open.
func (c *collector) close() {
	_ = c.wake.Close()
	<-c.done
	for _, p := range c.pipes { // nobody else is left
		c.finish(p)
	}
}

// add takes over the non-blocking reading end of a pipe.
func (c *collector) add(fd, stream int, output *spool) *outputPipe {
	p := &outputPipe{fd: fd, stream: stream, output: output, eof: make(chan struct{})}
	c.mu.Lock()
	c.pipes[int32(fd)] = p
	c.mu.Unlock()
	if err := unix.EpollCtl(c.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
		c.finish(p) // no memory for it: the output is lost, the process is not
	}
	return p
}

// finish ends a pipe, once.
func (c *collector) finish(p *outputPipe) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	c.mu.Lock()
	delete(c.pipes, int32(p.fd))
	c.mu.Unlock()
	// Not by closing alone: a child between fork and exec holds the pipe for a moment.
	_ = unix.EpollCtl(c.epoll, unix.EPOLL_CTL_DEL, p.fd, nil)
	_ = unix.Close(p.fd)
	close(p.eof)
}

func (c *collector) run(wake *os.File) {
	defer close(c.done)
	defer unix.Close(c.epoll)
	defer wake.Close()
	events := make([]unix.EpollEvent, 64)
	buf := make([]byte, 64<<10)
	for c.poll(events, buf, -1, int32(wake.Fd())) {
	}
}

// poll moves what is there, in the order in which it came, once some is there or the time (milliseconds) is over. It may be called by
// several at once: each pipe is read under its lock. It says false when the collector is to end.
func (c *collector) poll(events []unix.EpollEvent, buf []byte, wait int, wake int32) bool {
	n, err := unix.EpollWait(c.epoll, events, wait)
	if err != nil && err != unix.EINTR {
		return false
	}
	for _, e := range events[:max(n, 0)] {
		if e.Fd == wake {
			return false
		}
		c.mu.Lock()
		p := c.pipes[e.Fd]
		c.mu.Unlock()
		if p != nil && p.read(buf) {
			c.finish(p)
		}
	}
	return true
}

// drain moves what a process wrote before its end. It does not wait for the collector, which may be late on a busy machine. What a child
// goes on writing does not hold it up: a pipe holds 1 MiB at most (pipe(7)), and that much is moved here.
func (c *collector) drain(pipes ...*outputPipe) {
	var events []unix.EpollEvent
	var buf []byte
	for range (1 << 20) / drainPart {
		full := slices.ContainsFunc(pipes, func(p *outputPipe) bool { return !p.empty() })
		if !full {
			return
		}
		if buf == nil {
			events, buf = make([]unix.EpollEvent, 16), make([]byte, drainPart)
		}
		c.poll(events, buf, 0, -1)
	}
}

// drainPart is how many bytes drain reads at once.
const drainPart = 16 << 10

// read moves what is there, up to the size of buf, and says whether that was the end.
func (p *outputPipe) read(buf []byte) (end bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	n, err := unix.Read(p.fd, buf)
	if n > 0 {
		p.output.append(p.stream, buf[:n])
	}
	return n == 0 || err != nil && err != unix.EAGAIN && err != unix.EINTR
}

func (p *outputPipe) empty() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return true
	}
	n, err := unix.IoctlGetInt(p.fd, unix.TIOCINQ)
	return err != nil || n == 0
}
