package guest

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// collector moves what all processes write into their spools, and tells when they end. One epoll waits for all pipes, and tells them in the
// order in which they became readable: so stdout and stderr of a process keep their order but for bursts within microseconds.
type collector struct {
	epoll *os.File // waited for by the Go runtime like any other file: a thread of its own would hold back a processor, and wake late
	done  chan struct{}

	mu    sync.Mutex
	seq   token
	pipes map[token]*outputPipe
	ends  map[token]processEnd
}

// token names what is waited for. No two have the same one, while descriptors are used again: an event that comes late is nobody's.
type token uint64

// processEnd is a process whose end is waited for.
type processEnd struct {
	pidfd int
	ended func()
}

// outputPipe is the reading end of one stream of a process.
type outputPipe struct {
	token  token
	fd     int
	stream int
	output *spool
	eof    chan struct{} // closed when nobody can write any more

	mu      sync.Mutex // held while bytes are between pipe and spool
	over    bool       // nothing is in it any more, nor will be
	closed  bool
	stalled bool // it is not read, as somebody holds the output
	freed   bool // it is read whoever holds the output: its process has just ended
}

func newCollector() (*collector, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make epoll: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // os.NewFile goes by it
		return nil, errors.Join(fmt.Errorf("make epoll: %w", err), unix.Close(fd))
	}
	c := &collector{epoll: os.NewFile(uintptr(fd), "epoll"), pipes: map[token]*outputPipe{}, ends: map[token]processEnd{},
		done: make(chan struct{})}
	go c.run()
	return c, nil
}

// close ends the collector, and with it what is still open.
func (c *collector) close() {
	_ = c.epoll.Close()
	<-c.done
	for _, p := range c.pipes { // nobody else is left
		c.finish(p)
	}
}

// add takes over the non-blocking reading end of a pipe.
func (c *collector) add(fd, stream int, output *spool) *outputPipe {
	p := &outputPipe{fd: fd, stream: stream, output: output, eof: make(chan struct{})}
	c.mu.Lock()
	c.seq++
	p.token = c.seq
	c.pipes[p.token] = p
	c.mu.Unlock()
	if err := c.control(unix.EPOLL_CTL_ADD, fd, p.token); err != nil {
		c.finish(p) // no memory for it: the output is lost, the process is not
	}
	return p
}

// resume reads pipes again that were stalled.
func (c *collector) resume(pipes ...*outputPipe) {
	for _, p := range pipes {
		p.mu.Lock()
		if p.stalled && !p.closed {
			_ = c.control(unix.EPOLL_CTL_ADD, p.fd, p.token) // as at first
		}
		p.stalled = false
		p.mu.Unlock()
	}
}

// await has ended called once the process behind a pidfd, which it takes over, has ended.
func (c *collector) await(pidfd int, ended func()) {
	c.mu.Lock()
	c.seq++
	t := c.seq
	c.ends[t] = processEnd{pidfd, ended}
	c.mu.Unlock()
	if err := c.control(unix.EPOLL_CTL_ADD, pidfd, t); err != nil {
		if pidfd, ok := c.over(t); ok {
			quickClose(pidfd)
		}
	}
}

// over ends the wait for a process, whose pidfd is then to be closed.
func (c *collector) over(t token) (pidfd int, ok bool) {
	c.mu.Lock()
	end, ok := c.ends[t]
	delete(c.ends, t)
	c.mu.Unlock()
	if !ok {
		return -1, false // another one was first
	}
	end.ended()
	return end.pidfd, true
}

func (c *collector) control(op, fd int, t token) error {
	return control(c.epoll, func(epoll uintptr) error {
		return quickEpollCtl(int(epoll), op, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(t), Pad: int32(t >> 32)})
	})
}

func tokenOf(e unix.EpollEvent) token { return token(uint32(e.Fd)) | token(uint32(e.Pad))<<32 }

// finish ends a pipe, once.
func (c *collector) finish(p *outputPipe) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	c.mu.Lock()
	delete(c.pipes, p.token)
	c.mu.Unlock()
	// Not by closing alone: a child between fork and exec holds the pipe for a moment.
	_ = c.control(unix.EPOLL_CTL_DEL, p.fd, p.token)
	quickClose(p.fd)
	close(p.eof)
}

func (c *collector) run() {
	defer close(c.done)
	raw, err := c.epoll.SyscallConn()
	if err != nil {
		return
	}
	events, buf := make([]unix.EpollEvent, 64), make([]byte, readPart)
	// Read returns when the file is closed.
	_ = raw.Read(func(epoll uintptr) (end bool) {
		for round := 1; c.poll(int(epoll), events, buf) > 0; round++ {
			runtime.Gosched() // others are to have a turn, which no call of quick.go tells the scheduler
			if round%16 == 0 {
				_, _, _ = syscall.Syscall(unix.SYS_GETPID, 0, 0, 0) // an ordinary call: now its monitor looks at the rest, too
			}
		}
		return false
	})
}

// poll moves what is there, in the order in which it came, and tells how many descriptors had something. It may be called by several at
// once: each pipe is read under its lock. Who waits for the end of a process hears of it before its pipes are put away.
func (c *collector) poll(epoll int, events []unix.EpollEvent, buf []byte) int {
	n := quickPoll(epoll, events)
	var over []*outputPipe
	var ended []token
	for _, e := range events[:n] {
		c.mu.Lock()
		p := c.pipes[tokenOf(e)]
		c.mu.Unlock()
		switch {
		case p == nil:
			ended = append(ended, tokenOf(e))
		case e.Events&unix.EPOLLIN == 0: // nothing in it, and nobody to write
			p.dry()
			over = append(over, p)
		case p.read(c, buf):
			over = append(over, p)
		}
	}
	for _, t := range ended {
		if pidfd, ok := c.over(t); ok {
			runtime.Gosched() // whoever waits for the end of the process hears of it before everything is put away
			_ = c.control(unix.EPOLL_CTL_DEL, pidfd, t)
			quickClose(pidfd)
		}
	}
	for _, p := range over {
		c.finish(p)
	}
	return n
}

// drain moves what a process wrote before its end. It does not wait for the collector, which may be late on a busy machine. What a child
// goes on writing does not hold it up: a pipe holds 1 MiB at most (pipe(7)), and that much is moved here.
func (c *collector) drain(pipes ...*outputPipe) {
	for _, p := range pipes {
		p.mu.Lock()
		p.freed = true
		p.mu.Unlock()
	}
	c.resume(pipes...)
	defer func() { // what children go on writing waits again for who is behind
		for _, p := range pipes {
			p.mu.Lock()
			p.freed = false
			p.mu.Unlock()
		}
	}()
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
		_ = control(c.epoll, func(epoll uintptr) error {
			c.poll(int(epoll), events, buf)
			return nil
		})
	}
}

// readPart is how many bytes of a pipe are read at once.
const readPart = 64 << 10

// drainPart is how many bytes drain reads at once.
const drainPart = 16 << 10

// read moves what is there, up to the size of buf, and says whether that was the end.
func (p *outputPipe) read(c *collector, buf []byte) (end bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	if !p.freed && p.output.stall(p) {
		p.stalled = true
		_ = c.control(unix.EPOLL_CTL_DEL, p.fd, p.token) // it would be told for ever
		return false
	}
	n, err := quickRead(p.fd, buf)
	if n > 0 {
		p.output.append(p.stream, buf[:n])
	}
	end = n == 0 || err != nil && err != unix.EAGAIN && err != unix.EINTR
	p.over = end
	return end
}

// dry notes that nothing is left to read: what somebody else has just read is in the spool by then.
func (p *outputPipe) dry() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over = true
}

func (p *outputPipe) empty() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over || p.closed {
		return true
	}
	n, err := pendingBytes(p.fd)
	return err != nil || n == 0
}
