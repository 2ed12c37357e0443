package main

import (
	queue "container/list"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// descriptorBudget bounds how many file descriptors connections may use. It keeps a part free for what sandboxes need: runsc, pipes, state
// files. When connections would take more, it closes idle ones: first those of clients that have not shown a key, the oldest first. If none
// can be closed, it accepts no more. The Go runtime has raised the soft limit to the hard one before main, and child processes get the
// original one.
type descriptorBudget struct {
	log *slog.Logger
	dir *os.File // /proc/self/fd, opened while there are descriptors

	mu        sync.Mutex
	limit     int // when last checked: it can be changed while we run
	others    int // descriptors that are not accepted connections, when last counted
	countedAt time.Time
	total     int // accepted connections
	raw       int // those of them that lead to ports of sandboxes
	strangers *queue.List
	known     *queue.List
	from      map[netip.Addr]int // strangers by address
	short     bool               // the warning about too few descriptors was logged
}

const (
	countEvery    = 100 * time.Millisecond
	relieveEvery  = time.Second
	perSandbox    = 4  // descriptors of the server per running sandbox; TestDescriptorsOfSandbox counts them
	ownNeed       = 32 // descriptors of a server without sandboxes and connections
	leastReserve  = 16
	mostReserve   = 1024
	leastServed   = 64 // connections that a server should be able to have at once
	reserveShares = 4  // a quarter is kept
)

func newDescriptorBudget(log *slog.Logger) (*descriptorBudget, error) {
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return nil, fmt.Errorf("count descriptors: %w", err)
	}
	d := &descriptorBudget{log: log, dir: dir, strangers: queue.New(), known: queue.New(), from: map[netip.Addr]int{}}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.count()
	return d, nil
}

// open starts to enforce the bounds, until end is called.
func (d *descriptorBudget) open() (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() {
		defer close(over)
		d.relieve(ctx)
	}()
	return func() {
		cancel()
		<-over
		_ = d.dir.Close() // it was only read
	}
}

// reserve is the part of a limit that is not for connections.
func reserve(limit int) int { return min(max(limit/reserveShares, leastReserve), mostReserve) }

// descriptorsFor is the limit that a server needs for this many sandboxes.
func descriptorsFor(sandboxes int) int {
	need := ownNeed + leastServed + sandboxes*perSandbox
	return max(need*reserveShares/(reserveShares-1), need+leastReserve)
}

// enoughDescriptors checks that the limit is enough for this many sandboxes.
func enoughDescriptors(sandboxes int) (found string, err error) {
	limit, err := softLimit()
	if err != nil {
		return "", err
	}
	if need := descriptorsFor(sandboxes); limit < need {
		return "", fmt.Errorf("the server may have %d file descriptors; %d sandboxes, as many as it promises, and their clients need %d",
			limit, sandboxes, need)
	}
	connections := limit - reserve(limit) - ownNeed - sandboxes*perSandbox
	return fmt.Sprintf("%d, enough for %d sandboxes and %d connections", limit, sandboxes, connections), nil
}

// softLimit is the number of descriptors that this process may have.
func softLimit() (int, error) {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0, fmt.Errorf("ask for the limit of descriptors: %w", err)
	}
	return int(min(r.Cur, 1<<30)), nil
}

// count counts the descriptors. A figure that cannot be read keeps its last value. d.mu is held.
func (d *descriptorBudget) count() {
	d.countedAt = time.Now()
	if limit, err := softLimit(); err == nil {
		d.limit = limit
	}
	if used, err := entries(d.dir); err == nil {
		d.others = max(used-d.total, 0)
	}
}

// entries counts the entries of an open directory without reading their names.
func entries(dir *os.File) (n int, err error) {
	if _, err := dir.Seek(0, 0); err != nil {
		return 0, err
	}
	raw, err := dir.SyscallConn()
	if err != nil {
		return 0, err
	}
	var buf [16 << 10]byte
	cerr := raw.Control(func(fd uintptr) {
		for {
			var size int
			if size, err = unix.ReadDirent(int(fd), buf[:]); err != nil || size <= 0 {
				return
			}
			for at := 0; at+18 <= size; n++ {
				at += int(binary.NativeEndian.Uint16(buf[at+16:])) // d_reclen of struct linux_dirent64 (getdents(2))
			}
		}
	})
	if err == nil {
		err = cerr
	}
	return n - 2, err // . and ..
}

// capacity is how many connections there may be. d.mu is held.
func (d *descriptorBudget) capacity() int {
	if time.Since(d.countedAt) > countEvery {
		d.count()
	}
	return d.limit - reserve(d.limit) - d.others
}

// kind is what is at the other end of a connection.
type kind int

const (
	stranger kind = iota // a client that has not shown a key yet
	friend               // this machine's user
	port                 // anyone; it leads to a sandbox, so the server cannot tell whether it is idle
)

// mayAccept reports whether one more connection is possible, if necessary in place of an idle one.
func (d *descriptorBudget) mayAccept(k kind) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	capacity := d.capacity()
	if k == port {
		return d.raw < capacity/2 && d.total < capacity
	}
	return d.total < capacity || d.strangers.Len()+d.known.Len() > 0
}

// add adds a connection, and closes those that are then too many.
func (d *descriptorBudget) add(c net.Conn, k kind) *accepted {
	a := &accepted{Conn: c, d: d, kind: k, proven: k == friend, opened: time.Now()}
	if tcp, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		a.from = tcp.AddrPort().Addr().Unmap()
	}
	d.mu.Lock()
	d.total++
	if k == port {
		d.raw++
	} else {
		d.rest(a)
	}
	victims := d.tooMany(a)
	d.mu.Unlock()
	for _, v := range victims {
		_ = v.Close() // the client sees that it ends
	}
	return a
}

// tooMany takes those connections off the lists that must be closed. The latest one stays if any other can go. d.mu is held.
func (d *descriptorBudget) tooMany(latest *accepted) (victims []*accepted) {
	capacity := d.capacity()
	take := func(from *queue.List, of func(*accepted) bool) bool {
		for e := from.Front(); e != nil; e = e.Next() {
			if a := e.Value.(*accepted); a != latest && of(a) {
				d.wake(a)
				victims = append(victims, a)
				return true
			}
		}
		return false
	}
	anybody := func(*accepted) bool { return true }
	if latest != nil && !latest.from.IsLoopback() && d.from[latest.from] > max(capacity*3/8, 1) {
		take(d.strangers, func(a *accepted) bool { return a.from == latest.from })
	}
	for d.total-len(victims) > max(capacity, 0) || d.strangers.Len() > max(capacity*3/4, 1) {
		if !take(d.strangers, anybody) && (d.total-len(victims) <= capacity || !take(d.known, anybody)) {
			break
		}
	}
	return victims
}

// relieve closes surplus connections when others have taken descriptors or the limit was lowered, until ctx ends.
func (d *descriptorBudget) relieve(ctx context.Context) {
	ticker := time.NewTicker(relieveEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			d.relieveOnce()
		}
	}
}

func (d *descriptorBudget) relieveOnce() {
	d.mu.Lock()
	d.count()
	victims := d.tooMany(nil)
	free := d.limit - d.others - d.total + len(victims)
	tell := free < reserve(d.limit)/2 && !d.short
	d.short = free < reserve(d.limit)/2
	limit, others, total := d.limit, d.others, d.total
	d.mu.Unlock()
	if tell {
		d.log.Warn("the server has few file descriptors left: start it with a higher limit (ulimit -n, LimitNOFILE=)",
			"limit", limit, "connections", total, "others", others)
	}
	for _, v := range victims {
		_ = v.Close() // the client sees that it ends
	}
}

// rest adds an idle connection to the lists. d.mu is held.
func (d *descriptorBudget) rest(a *accepted) {
	if a.proven {
		a.at = d.known.PushBack(a)
		return
	}
	a.at = d.strangers.PushBack(a)
	d.from[a.from]++
}

// wake takes a connection off the lists. d.mu is held.
func (d *descriptorBudget) wake(a *accepted) {
	if a.at == nil {
		return
	}
	if a.proven {
		d.known.Remove(a.at)
	} else {
		d.strangers.Remove(a.at)
		if d.from[a.from]--; d.from[a.from] == 0 {
			delete(d.from, a.from)
		}
	}
	a.at = nil
}

// descriptorState is what metrics report about descriptors.
type descriptorState struct{ used, limit, reserve, connections int }

func (d *descriptorBudget) state() descriptorState {
	d.mu.Lock()
	defer d.mu.Unlock()
	if time.Since(d.countedAt) > countEvery {
		d.count()
	}
	return descriptorState{d.others + d.total, d.limit, reserve(d.limit), d.total}
}
