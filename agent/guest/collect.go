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
	"soulbox.dev/soulbox/agent/guest/rawsys"
)

// collector moves the output of all processes into their spools, and tells when processes end. One epoll waits for all pipes and reports
// them in the order in which they became readable: so stdout and stderr of a process keep their order except within bursts of microseconds.
type collector struct {
	epoll *os.File // the Go runtime waits for it like for any file: a thread of its own would occupy a processor and wake late
	done  chan struct{}

	mu    sync.Mutex
	seq   token
	pipes map[token]*outputPipe
	ends  map[token]processEnd
}

// token identifies what is waited for. Descriptors are reused but tokens are not: so a late event cannot be taken for another descriptor's.
type token uint64

// processEnd is a process whose end is awaited.
type processEnd struct {
	pidfd int
	ended func()
}

// outputPipe is the reading end of one stream of a process.
type outputPipe struct {
	token  token
	fd     int
	stream int
	// terminal says that it is our end of a pseudo-terminal.
	terminal bool

	output *spool
	eof    chan struct{} // closed when no process can write any more

	mu      sync.Mutex // held while bytes are between pipe and spool
	over    bool       // it is empty and will stay so
	closed  bool
	stalled bool // it is not read, because a holder of the output is too far behind
	freed   bool // it is read regardless of holders: its process has just ended
}

func newCollector() (*collector, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make epoll: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // os.NewFile checks this
		return nil, errors.Join(fmt.Errorf("make epoll: %w", err), unix.Close(fd))
	}
	c := &collector{epoll: os.NewFile(uintptr(fd), "epoll"), pipes: map[token]*outputPipe{}, ends: map[token]processEnd{},
		done: make(chan struct{})}
	go c.run()
	return c, nil
}

// close ends the collector and closes the remaining pipes.
func (c *collector) close() {
	_ = c.epoll.Close()
	<-c.done
	for _, p := range c.pipes { // no other goroutine uses them any more
		c.finish(p)
	}
}

// add takes over the non-blocking reading end of a pipe, or of a terminal.
func (c *collector) add(fd, stream int, terminal bool, output *spool) *outputPipe {
	p := &outputPipe{fd: fd, stream: stream, terminal: terminal, output: output, eof: make(chan struct{})}
	c.mu.Lock()
	c.seq++
	p.token = c.seq
	c.pipes[p.token] = p
	c.mu.Unlock()
	if err := c.control(unix.EPOLL_CTL_ADD, fd, p.token); err != nil {
		c.finish(p) // no memory for it: the output is lost, but the process runs
	}
	return p
}

// resume continues to read pipes that were stalled.
func (c *collector) resume(pipes ...*outputPipe) {
	for _, p := range pipes {
		p.mu.Lock()
		if p.stalled && !p.closed {
			_ = c.control(unix.EPOLL_CTL_ADD, p.fd, p.token) // as in add
		}
		p.stalled = false
		p.mu.Unlock()
	}
}

// await calls ended once the process behind a pidfd has ended. It takes over the pidfd.
func (c *collector) await(pidfd int, ended func()) {
	c.mu.Lock()
	c.seq++
	t := c.seq
	c.ends[t] = processEnd{pidfd, ended}
	c.mu.Unlock()
	if err := c.control(unix.EPOLL_CTL_ADD, pidfd, t); err != nil {
		if pidfd, ok := c.over(t); ok {
			rawsys.Close(pidfd)
		}
	}
}

// over ends the wait for a process; the caller must then close its pidfd.
func (c *collector) over(t token) (pidfd int, ok bool) {
	c.mu.Lock()
	end, ok := c.ends[t]
	delete(c.ends, t)
	c.mu.Unlock()
	if !ok {
		return -1, false // another caller was first
	}
	end.ended()
	return end.pidfd, true
}

func (c *collector) control(op, fd int, t token) error {
	return control(c.epoll, func(epoll uintptr) error {
		return rawsys.EpollCtl(int(epoll), op, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(t), Pad: int32(t >> 32)})
	})
}

func tokenOf(e unix.EpollEvent) token { return token(uint32(e.Fd)) | token(uint32(e.Pad))<<32 }

// finish closes a pipe, once.
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
	// Closing it is not enough: a child between fork and exec keeps the pipe open for a moment.
	_ = c.control(unix.EPOLL_CTL_DEL, p.fd, p.token)
	rawsys.Close(p.fd)
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
			runtime.Gosched() // let other goroutines run: the calls of rawsys do not tell the scheduler
			if round%16 == 0 {
				_, _, _ = syscall.Syscall(unix.SYS_GETPID, 0, 0, 0) // an ordinary call, after which the runtime's monitor looks around
			}
		}
		return false
	})
}

// poll moves the output that is available, in the order in which it came, and returns how many descriptors had an event. Several goroutines
// may call it at once: each pipe is read under its lock. It reports the end of a process before it closes the process's pipes.
func (c *collector) poll(epoll int, events []unix.EpollEvent, buf []byte) int {
	n := rawsys.Poll(epoll, events)
	var over []*outputPipe
	var ended []token
	for _, e := range events[:n] {
		c.mu.Lock()
		p := c.pipes[tokenOf(e)]
		c.mu.Unlock()
		switch {
		case p == nil:
			ended = append(ended, tokenOf(e))
		case e.Events&unix.EPOLLIN == 0: // it is empty and has no writer
			p.dry()
			over = append(over, p)
		case p.read(c, buf):
			over = append(over, p)
		}
	}
	for _, t := range ended {
		if pidfd, ok := c.over(t); ok {
			runtime.Gosched() // the goroutines that wait for the end of the process run before the cleanup
			_ = c.control(unix.EPOLL_CTL_DEL, pidfd, t)
			rawsys.Close(pidfd)
		}
	}
	for _, p := range over {
		c.finish(p)
	}
	return n
}

// drain moves what a process wrote before its end. It does not wait for the collector, which may be late on a busy machine. A child that
// continues to write cannot delay it: a pipe holds 1 MiB at most (pipe(7)), and drain moves no more than that in the order of epoll, and no
// more than that of each pipe by itself.
func (c *collector) drain(pipes ...*outputPipe) {
	for _, p := range pipes {
		p.mu.Lock()
		p.freed = true
		p.mu.Unlock()
	}
	c.resume(pipes...)
	defer func() { // output of children waits for holders again
		for _, p := range pipes {
			p.mu.Lock()
			p.freed = false
			p.mu.Unlock()
		}
	}()
	full := func() bool { return slices.ContainsFunc(pipes, func(p *outputPipe) bool { return !p.empty() }) }
	if !full() {
		return
	}
	events, buf := make([]unix.EpollEvent, 16), make([]byte, drainPart)
	for rounds := (1 << 20) / drainPart; rounds > 0 && full(); rounds-- {
		n := 0
		_ = control(c.epoll, func(epoll uintptr) error {
			n = c.poll(int(epoll), events, buf)
			return nil
		})
		if n == 0 {
			break
		}
	}
	// Epoll reports nothing of a pipe whose event the collector has taken and not acted on yet, or that is behind many other processes.
	for _, p := range pipes {
		for rest := (1 << 20) / drainPart; rest > 0 && !p.empty(); rest-- {
			if p.read(c, buf) {
				c.finish(p)
			}
		}
	}
}

// readPart is how many bytes of a pipe are read at once.
const readPart = 64 << 10

// drainPart is how many bytes drain reads at once.
const drainPart = 16 << 10

// read moves up to len(buf) available bytes, and reports whether the pipe is at its end.
func (p *outputPipe) read(c *collector, buf []byte) (end bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	if !p.freed && p.output.stall(p) {
		p.stalled = true
		_ = c.control(unix.EPOLL_CTL_DEL, p.fd, p.token) // otherwise epoll would report it without end
		return false
	}
	n, err := rawsys.Read(p.fd, buf)
	if n > 0 {
		p.output.append(p.stream, buf[:n])
	}
	end = n == 0 || err != nil && err != unix.EAGAIN && err != unix.EINTR
	p.over = end
	return end
}

// dry notes that nothing is left to read: what another goroutine has just read is in the spool by then.
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
	n, err := rawsys.Pending(p.fd)
	if n == 0 && err == nil && p.terminal { // Linux passes its output on later; poll(2) waits for that (n_tty.c:n_tty_poll)
		ready := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
		_, _ = unix.Poll(ready, 0) // after an error it looks empty
		return ready[0].Revents&unix.POLLIN == 0
	}
	return err != nil || n == 0
}
