package agent

import (
	"fmt"
	"os"
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

func (c *collector) finish(p *outputPipe) {
	c.mu.Lock()
	delete(c.pipes, int32(p.fd))
	c.mu.Unlock()
	p.mu.Lock()
	p.closed = true
	// Not by closing alone: a child between fork and exec holds the pipe for a moment.
	_ = unix.EpollCtl(c.epoll, unix.EPOLL_CTL_DEL, p.fd, nil)
	_ = unix.Close(p.fd)
	p.mu.Unlock()
	close(p.eof)
}

func (c *collector) run(wake *os.File) {
	defer close(c.done)
	defer unix.Close(c.epoll)
	defer wake.Close()
	events := make([]unix.EpollEvent, 64)
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.EpollWait(c.epoll, events, -1)
		if err != nil && err != unix.EINTR {
			return
		}
		for _, e := range events[:max(n, 0)] {
			c.mu.Lock()
			p := c.pipes[e.Fd]
			c.mu.Unlock()
			if e.Fd == int32(wake.Fd()) {
				return
			}
			if p == nil {
				continue
			}
			if _, end := p.read(buf); end {
				c.finish(p)
			}
		}
	}
}

// read moves what is there, up to the size of buf, and tells how much that was, and whether the pipe is at its end.
func (p *outputPipe) read(buf []byte) (n int, end bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0, true
	}
	n, err := unix.Read(p.fd, buf)
	if n > 0 {
		p.output.append(p.stream, buf[:n])
	}
	return max(n, 0), n == 0 || err != nil && err != unix.EAGAIN && err != unix.EINTR
}

// drain moves what the leader wrote before its end, which is at most what a pipe can hold: a child that goes on writing does not hold
// it up. It does not wait for the collector, which may be late on a busy machine.
func (p *outputPipe) drain() {
	buf := make([]byte, 8<<10)
	for left := pipeCapacity; left > 0; {
		n, _ := p.read(buf)
		if n == 0 {
			return
		}
		left -= n
	}
}

// pipeCapacity is the most a pipe can hold in bytes (pipe(7), /proc/sys/fs/pipe-max-size).
const pipeCapacity = 1 << 20
