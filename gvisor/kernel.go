package gvisor

import (
	"fmt"
	"strings"
	"time"

	"soulbox.dev/soulbox/sandbox"
)

// kernelMeter judges what a sentry takes for itself. Most of what it frees, it has for a while; and a save or a restore needs as much again
// for a moment: none of that is the guest's need. So one that is over its bound is told to collect its garbage, and judged by what is left
// then.
type kernelMeter struct {
	bound int64 // bytes

	saving  bool
	slack   int64     // that it had beyond its bound after a save, a restore or an adoption
	since   time.Time // that it is over its bound; zero is below
	asking  bool      // to collect garbage
	reduced time.Time // when that was done last
}

const (
	// settleTime is how long after it has collected its garbage a sentry may take to give it back.
	settleTime = 2 * time.Second
	// reduceEvery is how often it is told to. It gives memory back less than twice as often as that (gvisor/runsc/main.go).
	reduceEvery = 5 * time.Second
	// overTime is how long it must have been over its bound before what it was told last counts.
	overTime = 20 * time.Second
)

// sentryLimit is the soft limit of a sentry's own memory: it collects garbage rather than exceed it, and what of its memory is no heap has
// room below the bound.
func sentryLimit(bound int64) int64 { return bound / 8 * 7 }

// judge takes a measurement: over is a verdict, and ask says that garbage is to be collected first.
func (k *kernelMeter) judge(anonymous int64, now time.Time) (over, ask bool) {
	switch {
	case k.saving:
		return false, false
	case anonymous <= k.bound:
		k.since, k.slack = time.Time{}, 0
		return false, false
	case anonymous > 2*k.bound+k.slack: // whatever it is, it grows faster than it can be judged
		return true, false
	case k.since.IsZero():
		k.since = now
	}
	if k.reduced.Sub(k.since) > overTime {
		return now.Sub(k.reduced) > settleTime, false
	}
	return false, !k.asking && now.Sub(k.reduced) > reduceEvery
}

// overKernel says whether what a sentry takes for itself is more than it may.
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

// reduce has the sentry collect its garbage, in the background. Where that fails, the next look at it asks again.
func (m *machine) reduce() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.kernel.asking || m.ctx.Err() != nil {
		return
	}
	m.kernel.asking = true
	m.work.Go(func() {
		var err error
		for range 2 { // what the first finds is free only after the second, if it has a finalizer
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

// setSaving says that the sentry is being saved, which is no time to judge it.
func (m *machine) setSaving(is bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.kernel.saving = is
}

// settle is called after what has made the sentry larger for a while.
func (m *machine) settle() error {
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

// smallSave is what a save may take of the host's memory without asking for it, in bytes.
const smallSave = 64 << 20

// roomToSave refuses a save that the host has no memory for: it would end the sentry. Whatever a sentry has, it has as much several times
// while it is saved.
func (m *machine) roomToSave() error {
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

// freeMemory tells how much memory of the host can be had, in bytes (proc(5), meminfo).
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
