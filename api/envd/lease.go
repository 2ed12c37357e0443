package envd

import (
	"context"
	"net/http"
	"strconv"
	"sync"
	"time"

	"soulbox.dev/soulbox/api/client"
)

// leases end processes that need followers: when the last follower has gone and no other has come for a while, the process is killed. E2B's
// clients do not ask for this. Only this server knows its leases: after another server has adopted the sandbox, the process runs on until
// its starter has reconnected and left again. The zero value is ready, and safe for concurrent use.
type leases struct {
	mu  sync.Mutex
	all map[leaseKey]*lease
}

type leaseKey struct{ sandbox, process string }

type lease struct {
	linger    time.Duration // 0 sets no limit
	followers int
	timer     *time.Timer // runs while there are no followers
}

const (
	maxLinger = time.Hour
	killTime  = 10 * time.Second
)

// follow counts one more follower of a process until gone is called with the error of following it. If the process has a lease, the
// follower's linger replaces the earlier one.
func (l *leases) follow(p *scope, process string, h http.Header) (gone func(error)) {
	linger := lingerOf(h)
	key := leaseKey{p.Sandbox.ID(), process}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil {
		l.all = map[leaseKey]*lease{}
	}
	one := l.all[key]
	if one == nil {
		if linger == 0 {
			return func(error) {}
		}
		one = &lease{}
		l.all[key] = one
	}
	if one.linger = linger; one.timer != nil {
		one.timer.Stop()
		one.timer = nil
	}
	one.followers++
	return func(err error) { l.leave(p, key, one, err) }
}

// lingerOf returns how long a client lets a process run without followers; 0 sets no limit.
func lingerOf(h http.Header) time.Duration {
	ms, err := strconv.ParseInt(h.Get(client.LingerHeader), 10, 64)
	if err != nil || ms <= 0 || ms > maxLinger.Milliseconds() {
		return 0
	}
	return time.Duration(ms) * time.Millisecond
}

// leave counts one follower less. After the last one, it starts the timer that kills the process, except when the process needs no
// follower, when following ended without an error, as it usually does with the process, or when the sandbox is paused: there everything
// stays.
func (l *leases) leave(p *scope, key leaseKey, one *lease, gone error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if one.followers--; one.followers > 0 {
		return
	}
	if _, err := p.Sandbox.Look("follow a process in"); one.linger == 0 || gone == nil || err != nil {
		delete(l.all, key)
		return
	}
	one.timer = time.AfterFunc(one.linger, func() { l.kill(p, key, one) })
}

// kill ends a process without followers. While its sandbox is paused, kill waits for it to be resumed.
func (l *leases) kill(p *scope, key leaseKey, one *lease) {
	ctx, cancel := context.WithTimeout(context.Background(), killTime)
	defer cancel()
	client, err := p.Sandbox.Look("end a process in")
	l.mu.Lock()
	if l.all[key] != one || one.followers > 0 || one.timer == nil {
		l.mu.Unlock()
		return
	}
	if err != nil && !p.Sandbox.Info().State.Ended() {
		one.timer = time.AfterFunc(one.linger, func() { l.kill(p, key, one) })
		l.mu.Unlock()
		return
	}
	delete(l.all, key)
	l.mu.Unlock()
	if err == nil {
		_, _ = client.Kill(ctx, key.process) // it may have ended already
	}
}
