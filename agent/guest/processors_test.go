package guest

import (
	"runtime"
	"sync"
	"testing"
)

// TestProcessors runs long and short work at once: there is a second processor while work lasts, and for a while longer.
func TestProcessors(t *testing.T) {
	before := runtime.GOMAXPROCS(2)
	defer runtime.GOMAXPROCS(before)
	a := &activity{}
	p := newProcessors(a)
	p.hold()() // soon done
	if got := runtime.GOMAXPROCS(0); got != 1 {
		t.Fatalf("%d processors for nothing", got)
	}
	first, second := p.hold(), p.hold()
	eventually(t, "two processors", func() bool { return runtime.GOMAXPROCS(0) == 2 })
	if busy, _ := a.now(); !busy {
		t.Error("what lasts is no work")
	}
	first()
	var short sync.WaitGroup
	for range 100 { // its end and the timer coincide, in either order
		short.Go(p.giveBack)
		short.Go(p.take)
	}
	short.Wait()
	if got := runtime.GOMAXPROCS(0); got != 2 {
		t.Fatalf("%d processors while something lasts", got)
	}
	second()
	eventually(t, "one processor", func() bool { return runtime.GOMAXPROCS(0) == 1 })
	if busy, _ := a.now(); busy {
		t.Error("nothing is work")
	}
	eventually(t, "nothing at work", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.busy == 0
	})
	(*processors)(nil).hold()()
}
