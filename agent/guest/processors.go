package guest

import (
	"runtime"
	"sync"
	"time"

	"soulbox.dev/soulbox/agent"
)

// processors gives the agent a second processor for as long as something is at work that keeps one busy. With a second one each step of a
// call wakes another thread, which costs more in gVisor than the step: a short command takes half as many system calls with one. It is safe
// for concurrent use; nil does nothing.
type processors struct {
	mu   sync.Mutex
	busy int
	off  *time.Timer // takes the second one away again
	work *work       // is told
}

// To change the number stops everything for a moment: so what is soon done gets no second one, and it stays for a while when nothing needs
// it any more.
const (
	soonDone   = 5 * time.Millisecond
	secondStay = time.Second
)

// newProcessors begins with one processor, where there are more.
func newProcessors(w *work) *processors {
	if runtime.GOMAXPROCS(0) < 2 {
		return nil
	}
	runtime.GOMAXPROCS(1)
	return &processors{work: w}
}

// hold has a second processor as long as something lasts whose end is told, once, by what it returns.
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
	if p.busy++; p.busy == 1 { // 0: what it was for is over
		if p.off == nil || !p.off.Stop() {
			p.work.look(func() { p.work.labour = true })
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
			p.work.look(func() { p.work.labour = false })
			runtime.GOMAXPROCS(1)
			p.off = nil
		}
	})
	p.off = off
}

// laborious are the streams that may keep a processor busy. Others wait for most of their time.
var laborious = map[string]bool{agent.StreamRead: true, agent.StreamWrite: true, agent.StreamOutput: true, agent.StreamStdin: true,
	agent.StreamDial:    true,
	agent.StreamChanges: true, agent.StreamUnpack: true}
