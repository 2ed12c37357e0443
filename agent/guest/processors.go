package guest

import (
	"runtime"
	"sync"
	"time"

	"soulbox.dev/soulbox/agent"
)

// processors gives the agent a second processor while work lasts that keeps one busy. With two processors each step of a call wakes another
// thread, which costs more in gVisor than the step itself: with one, a short command takes half as many system calls. It is safe for
// concurrent use; nil does nothing.
type processors struct {
	mu       sync.Mutex
	busy     int
	off      *time.Timer // takes the second processor away
	activity *activity   // is told when there is such work
}

// Changing the number of processors stops all goroutines for a moment. So short work gets no second processor, and it stays for a while
// after the last use.
const (
	soonDone   = 5 * time.Millisecond
	secondStay = time.Second
)

// newProcessors begins with one processor; it returns nil if there is only one.
func newProcessors(a *activity) *processors {
	if runtime.GOMAXPROCS(0) < 2 {
		return nil
	}
	runtime.GOMAXPROCS(1)
	return &processors{activity: a}
}

// hold gives the agent a second processor until the caller calls release, once.
func (p *processors) hold() (release func()) {
	if p == nil {
		return func() {}
	}
	begun := time.AfterFunc(soonDone, p.take)
	return func() {
		if !begun.Stop() {
			p.giveBack()
		}
	}
}

func (p *processors) take() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.busy++; p.busy == 1 { // 0: the work is over already
		if p.off == nil || !p.off.Stop() {
			p.activity.update(func() { p.activity.own = true })
			runtime.GOMAXPROCS(2)
		}
		p.off = nil
	}
}

func (p *processors) giveBack() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.busy--; p.busy != 0 { // -1: take is about to run
		return
	}
	var off *time.Timer
	off = time.AfterFunc(secondStay, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.off == off {
			p.activity.update(func() { p.activity.own = false })
			runtime.GOMAXPROCS(1)
			p.off = nil
		}
	})
	p.off = off
}

// laborious are the streams that may keep a processor busy. Other streams wait most of the time.
var laborious = map[string]bool{agent.StreamRead: true, agent.StreamWrite: true, agent.StreamOutput: true, agent.StreamStdin: true,
	agent.StreamDial:    true,
	agent.StreamChanges: true, agent.StreamUnpack: true}
