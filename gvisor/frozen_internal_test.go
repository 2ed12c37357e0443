package gvisor

import "testing"

// TestAllStopped: a task that was woken does not count as stopped, though it still stands where it waited.
func TestAllStopped(t *testing.T) {
	task := func(state string) string {
		return "goroutine 7 [" + state + "]:\nsync.(*Cond).Wait(0x0)\nkernel.(*Task).doStop(0x0)\nkernel.(*Task).run(0x0)"
	}
	other := "goroutine 1 [running]:\nmain.main()"
	for stacks, want := range map[string]bool{
		other:                                   false, // no task: nothing to tell by
		other + "\n\n" + task("sync.Cond.Wait"): true,
		task("sync.Cond.Wait, 3 minutes") + "\n\n" + task("sync.Cond.Wait"): true,
		task("sync.Cond.Wait") + "\n\n" + task("runnable"):                  false,
		task("sync.Mutex.Lock") + "\n\n" + other:                            false,
		"goroutine 7 [select]:\nkernel.(*Task).run(0x0)":                    false,
	} {
		if got := allStopped(stacks); got != want {
			t.Errorf("%v, want %v:\n%s", got, want, stacks)
		}
	}
}
