package gvisor

import (
	"fmt"
	"strings"
	"time"

	"soulbox.dev/soulbox/sandbox"
)

// kernelMeter decides whether a sentry uses too much memory itself. The sentry keeps most of what it frees for a while, and a save or a
// restore needs as much again for a moment: the guest is not to blame for either. So a sentry over its bound is told to collect its
// garbage, and judged by what is left afterwards.
type kernelMeter struct {
	bound int64 // bytes

	saving  bool
	slack   int64     // what it had after a save, a restore or an adoption, which it may have beyond its bound
	since   time.Time // when it went over its bound; zero while it is below
	asking  bool      // it is being told to collect garbage
	reduced time.Time // when that was last done
}

const (
	// settleTime is how long a sentry may take to give garbage back after collecting it.
	settleTime = 2 * time.Second
	// reduceEvery is the shortest time between two requests to collect garbage. It is longer than giveEvery in gvisor/runsc/main.go, the
	// time between two returns of memory.
	reduceEvery = 5 * time.Second
	// overTime is how long it must have been over its bound before the last request counts.
	overTime = 20 * time.Second
)

// sentryLimit is the soft limit of a sentry's own memory. The sentry collects garbage to stay below it; the memory that is not heap has
// room between it and the bound.
func sentryLimit(bound int64) int64 { return bound / 8 * 7 }

// judge takes a measurement. over is a verdict; ask means that garbage must be collected first.
func (k *kernelMeter) judge(anonymous int64, now time.Time) (over, ask bool) {
	switch {
	case k.saving:
		return false, false
	case anonymous <= k.bound:
		k.since, k.slack = time.Time{}, 0
		return false, false
	case anonymous > 2*k.bound+k.slack: // it grows too fast to be judged
		return true, false
	case k.since.IsZero():
		k.since = now
	}
	if k.reduced.Sub(k.since) > overTime {
		return now.Sub(k.reduced) > settleTime, false
	}
	return false, !k.asking && now.Sub(k.reduced) > reduceEvery
}

// overKernel returns an OverError if a sentry uses more memory itself than it may.
func (m *machine) overKernel(anonymous int64) error {
	m.mu.Lock()
	over, ask := m.kernel.judge(anonymous, time.Now())
	bound := m.kernel.bound
	m.mu.Unlock()
	if ask {
		m.reduce()
	}
	if over {
		return &sandbox.OverError{Kind: sandbox.OverKernel, Used: anonymous, Limit: bound, Detail: "files, connections and other objects"}
	}
	return nil
}

// reduce makes the sentry collect its garbage, in the background. If that fails, the next measurement asks again.
func (m *machine) reduce() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.kernel.asking || m.ctx.Err() != nil {
		return
	}
	m.kernel.asking = true
	m.work.Go(func() {
		var err error
		for range 2 { // an object with a finalizer is freed only by the second
			if err == nil {
				err = m.runtime.control(m.ctx, runDir(m.dir), callReduce, &struct{}{}, &struct{}{})
			}
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		m.kernel.asking = false
		if err == nil {
			m.kernel.reduced = time.Now()
		}
	})
}

// setSaving says whether the sentry is being saved, during which it is not judged.
func (m *machine) setSaving(is bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.kernel.saving = is
}

// recordSlack records the sentry's size as slack, after something made it larger for a while, and has it collect garbage if that is large.
func (m *machine) recordSlack() error {
	for _, p := range m.processes {
		if !p.sentry {
			continue
		}
		s, err := m.runtime.readStatus(p.pid)
		if err != nil && !hasEnded(err) {
			return err
		}
		m.mu.Lock()
		m.kernel.slack = s.anonymous
		large := s.anonymous > m.kernel.bound/2
		m.mu.Unlock()
		if large {
			m.reduce()
		}
	}
	return nil
}

// saveFactor is how many times as much memory a sentry takes while it saves its machine.
const saveFactor = 4

// smallSave is how many bytes a save may take without a look at the host's free memory.
const smallSave = 64 << 20

// checkMemoryToSave refuses a save for which the host has too little memory, because it would end the sentry: while it is saved, a sentry
// takes saveFactor times the memory that it has.
func (m *machine) checkMemoryToSave() error {
	for _, p := range m.processes {
		if !p.sentry {
			continue
		}
		s, err := m.runtime.readStatus(p.pid)
		if err != nil {
			return err
		}
		needed := (saveFactor - 1) * s.anonymous
		if needed <= smallSave {
			return nil
		}
		free, err := m.runtime.freeMemory()
		if err != nil {
			return err
		}
		if needed > free {
			return fmt.Errorf("its kernel has %d MB of files, connections and other objects, and takes %d MB more to save them; %d MB of "+
				"memory are free: %w",
				s.anonymous>>20, needed>>20, free>>20, sandbox.ErrNoRoom)
		}
	}
	return nil
}

// freeMemory returns how much memory of the host is available, in bytes (proc(5), meminfo).
func (r *Runtime) freeMemory() (int64, error) {
	body, err := r.readFile("read meminfo", "/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(body)) {
		if rest, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			return kilobytes(strings.TrimSpace(rest))
		}
	}
	return 0, fmt.Errorf("/proc/meminfo does not tell what is available")
}
