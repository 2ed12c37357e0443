package envd

import (
	"context"
	"net/http"
	"strconv"
	"sync"
	"time"

	"soulbox.dev/soulbox/api/client"
)

// leases end processes that hang on those who follow them: where all of these are gone, and nobody has come for a while, it is killed.
// E2B's clients ask for no such thing. They are of this server alone: a process that it has left to another goes on there until its starter
// has come back, and is gone again. The zero value is ready, and safe for concurrent use.
type leases struct {
	mu  sync.Mutex
	all map[leaseKey]*lease
}

type leaseKey struct{ sandbox, process string }

type lease struct {
	linger    time.Duration // 0 is for ever
	followers int
	timer     *time.Timer // while there are none
}

const (
	maxLinger = time.Hour
	killTime  = 10 * time.Second
)

// follow counts somebody who follows a process, until gone is called. What he says of its end holds from now on, if anybody has asked for
// one.
func (l *leases) follow(ctx context.Context, p *place, process string, h http.Header) (gone func()) {
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
			return func() {}
		}
		one = &lease{}
		l.all[key] = one
	}
	if one.linger = linger; one.timer != nil {
		one.timer.Stop()
		one.timer = nil
	}
	one.followers++
	return func() { l.leave(ctx, p, key, one) }
}

// lingerOf is how long a client wants a process to be there for that nobody follows; 0 is for ever.
func lingerOf(h http.Header) time.Duration {
	ms, err := strconv.ParseInt(h.Get(client.LingerHeader), 10, 64)
	if err != nil || ms <= 0 || ms > maxLinger.Milliseconds() {
		return 0
	}
	return time.Duration(ms) * time.Millisecond
}

// leave counts one less. The call's own end, as that of the process, asks for nothing more, and where the sandbox is paused everything in
// it stays.
func (l *leases) leave(ctx context.Context, p *place, key leaseKey, one *lease) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if one.followers--; one.followers > 0 {
		return
	}
	if _, err := p.Sandbox.Look("follow a process in"); one.linger == 0 || ctx.Err() == nil || err != nil {
		delete(l.all, key)
		return
	}
	one.timer = time.AfterFunc(one.linger, func() { l.kill(p, key, one) })
}

// kill ends a process that nobody follows. Where its sandbox is paused it waits for that to go on.
func (l *leases) kill(p *place, key leaseKey, one *lease) {
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
		_, _ = client.Kill(ctx, key.process) // one that has ended is ended
	}
}
