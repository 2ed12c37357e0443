package sandbox

import (
	"context"
	"encoding/json"
	"log/slog"
	"math"
	"path/filepath"
	"sync"
	"time"

	"soulbox.dev/soulbox/agent"
)

const (
	metricsName = "metrics.jsonl"
	// samplesKept is how many samples are kept at least: one hour's at the default interval. The older file has at most as many.
	samplesKept = 720
	maxSamples  = 2 * samplesKept
)

// Totals are what a sandbox has used in its life. They do not change while it is paused.
type Totals struct {
	RunMS     int64   `json:"run_ms"`
	CPUMS     int64   `json:"cpu_ms"`
	GBSeconds float64 `json:"gb_seconds"` // of its memory limit, in 2^30 bytes
	NetIn     int64   `json:"net_in"`     // bytes that came in through ports
	NetOut    int64   `json:"net_out"`
}

func (t Totals) plus(u Totals) Totals {
	return Totals{RunMS: t.RunMS + u.RunMS, CPUMS: t.CPUMS + u.CPUMS, GBSeconds: t.GBSeconds + u.GBSeconds, NetIn: t.NetIn + u.NetIn,
		NetOut: t.NetOut + u.NetOut}
}

// Sample is what a sandbox used at one moment.
type Sample struct {
	Time        time.Time `json:"time"`
	CPU         float64   `json:"cpu_pct"` // of one core, since the previous sample
	Memory      int64     `json:"memory"`  // bytes
	MemoryPct   float64   `json:"memory_pct"`
	DiskUsed    int64     `json:"disk_used"`
	DiskRead    int64     `json:"disk_read"` // bytes from the host's disk, since the machine was started
	DiskWritten int64     `json:"disk_written"`
	Processes   int64     `json:"processes"`
	// HostMemory is what the whole machine takes on the host, including its kernel and its agent, as last measured; HostCPU is the same for
	// CPU.
	HostMemory int64   `json:"host_memory,omitempty"`
	HostCPU    float64 `json:"host_cpu_pct,omitempty"`
	Totals
	Seen seen `json:"seen"`
}

// seen is how far the agent's counters have been read. They count from the agent's start, so seen restarts with the agent.
type seen struct {
	CPUMS int64 `json:"cpu_ms,omitempty"`
	Event int64 `json:"event,omitempty"`
}

// meter sums what a sandbox uses, and keeps the samples of it. It is safe for concurrent use.
type meter struct {
	store   store
	id      string
	log     *slog.Logger // for the operator
	journal *journal     // of the sandbox

	mu      sync.Mutex
	sum     Totals
	since   time.Time // start of the running time; zero while it does not run
	memory  int64
	traffic time.Time // time of the last bytes on a port, or when a server took it over
	latest  Sample
	lines   int // in the file of samples
	seen    seen
	told    time.Time // when the agent last reported its CPU time
}

// setRunning starts or stops the running time.
func (m *meter) setRunning(running bool, memory int64, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.addRunTime(now)
	m.since, m.memory = time.Time{}, memory
	if running {
		m.since = now
	}
}

// addRunTime adds the running time so far. m.mu is held.
func (m *meter) addRunTime(now time.Time) {
	if m.since.IsZero() || now.Before(m.since) {
		return
	}
	run := now.Sub(m.since).Truncate(time.Millisecond) // the remainder counts the next time
	m.sum.RunMS += run.Milliseconds()
	m.sum.GBSeconds += run.Seconds() * float64(m.memory) / (1 << 30)
	m.since = m.since.Add(run)
}

func (m *meter) totals() Totals {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.addRunTime(time.Now())
	return m.sum
}

// cpu adds the CPU time that the agent reports.
func (m *meter) cpu(told int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	most := time.Since(m.told).Milliseconds()*maxCPU + 1000 // more than is possible is not believed
	if m.told.IsZero() {
		most = math.MaxInt32
	}
	m.sum.CPUMS += min(max(0, told-m.seen.CPUMS), most)
	m.seen.CPUMS, m.told = max(0, told), time.Now()
}

// now returns the latest sample.
func (m *meter) now() Sample {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.latest
}

func (m *meter) haveSeen() seen {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.seen
}

func (m *meter) see(s seen) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seen = s
}

// count adds bytes on a port.
func (m *meter) count(in, out int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sum.NetIn += in
	m.sum.NetOut += out
	m.traffic = time.Now()
}

func (m *meter) lastTraffic() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.traffic
}

// ask asks the agent for its usage and for what happened to processes since the last time.
func (m *meter) ask(ctx context.Context, client *agent.Client) (agent.Usage, error) {
	ctx, cancel := context.WithTimeout(ctx, tellTime)
	defer cancel()
	m.mu.Lock()
	since := m.seen.Event
	m.mu.Unlock()
	usage, err := client.Usage(ctx, &since)
	if err != nil {
		return usage, err
	}
	m.cpu(usage.CPUMS)
	var fresh []agent.Event
	m.mu.Lock()
	m.latest.Memory, m.latest.DiskUsed, m.latest.Processes = usage.Memory, usage.DiskUsed, usage.Processes
	for _, ev := range usage.Events { // two callers may ask at once
		if ev.Seq > m.seen.Event {
			m.seen.Event = ev.Seq
			fresh = append(fresh, ev)
		}
	}
	m.mu.Unlock()
	if len(fresh) > 0 && fresh[0].Seq > since+1 {
		m.journal.note(LevelWarn, "%d starts and ends of processes are missing here: there were too many", fresh[0].Seq-since-1)
	}
	m.journal.noteEvents(fresh)
	return usage, nil
}

// keep stores the latest sample, in its file too.
func (m *meter) keep(sample Sample) error {
	line, err := json.Marshal(sample)
	if err != nil {
		return err
	}
	name := filepath.Join(m.store.path(m.id), metricsName)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.latest = sample
	if m.lines >= samplesKept {
		if err := m.store.Rename(name, name+olderSuffix); err != nil {
			return err
		}
		m.lines = 0
	}
	if err := m.store.Append(name, line); err != nil {
		return err
	}
	m.lines++
	return nil
}

// recall restores the totals and the latest sample as the last server of the sandbox r left them.
func (m *meter) recall(r record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sum, m.seen = r.Totals, r.Seen
	since := r.Changed
	name := filepath.Join(m.store.path(m.id), metricsName)
	for _, name := range []string{name + olderSuffix, name} {
		m.lines = 0
		err := eachLine(name, func(line []byte) error {
			var sample Sample
			if json.Unmarshal(line, &sample) == nil && sample.RunMS >= m.sum.RunMS {
				m.sum, m.seen, m.latest, since = sample.Totals, sample.Seen, sample, sample.Time
			}
			m.lines++
			return nil
		})
		if err != nil {
			m.log.Warn("read the samples of a sandbox", "sandbox", m.id, "error", err) // the state has older totals
		}
	}
	if r.State == Running { // it ran without a server
		m.since, m.memory = since, r.Limits.Memory
	}
	m.traffic = time.Now() // without a server it could not be used
}

// skipPast starts the meter where the agent's counters stand, because this agent has already run in the sandbox that this one was made
// from.
func (m *meter) skipPast(ctx context.Context, client *agent.Client) error {
	var none int64
	usage, err := client.Usage(ctx, &none)
	if err != nil {
		return err
	}
	past := seen{CPUMS: usage.CPUMS}
	for _, ev := range usage.Events {
		past.Event = max(past.Event, ev.Seq)
	}
	m.see(past)
	return nil
}

// sample takes samples as long as the machine runs.
func (c *link) sample(ctx context.Context) {
	s := c.s
	ticker := time.NewTicker(s.m.opts.SampleEvery)
	defer ticker.Stop()
	last, lastCPU := time.Now(), s.meter.totals().CPUMS
	var cpu hostCPU
	if io, err := c.machine.IO(); err == nil { // else the first sample has none
		cpu = hostCPU{last, io.CPUMS}
	}
	var host int64
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-c.client.Done():
			return
		case <-ticker.C:
		}
		if !s.runs() {
			last = time.Now()
			cpu.at = last
			continue
		}
		usage, err := s.meter.ask(ctx, c.client)
		if err != nil {
			continue // ping notices a silent agent
		}
		now := time.Now()
		totals := s.meter.totals()
		used := totals.CPUMS - lastCPU
		limits := s.current().Limits
		sample := Sample{Time: now, CPU: float64(used) / float64(max(1, now.Sub(last).Milliseconds())) * 100, Memory: usage.Memory,
			MemoryPct: float64(usage.Memory) / float64(limits.Memory) * 100, DiskUsed: usage.DiskUsed, Processes: usage.Processes,
			Totals: totals, Seen: s.meter.haveSeen()}
		if io, err := c.machine.IO(); err == nil {
			sample.DiskRead, sample.DiskWritten = io.Read, io.Written
			sample.HostCPU = cpu.percent(now, io.CPUMS)
		} else {
			s.m.log.Debug("read a machine's input and output", "sandbox", s.id, "error", err)
		}
		if n%hostMemoryEvery == 0 { // not every time: the host looks at all of the machine's pages
			if outside, err := c.machine.Usage(ctx); err == nil {
				host = outside.Memory
			} else {
				s.m.log.Debug("measure a machine's memory", "sandbox", s.id, "error", err)
			}
		}
		sample.HostMemory = host
		last, lastCPU = now, totals.CPUMS
		if err := s.meter.keep(sample); err != nil && ctx.Err() == nil {
			s.m.log.Warn("keep a sample", "sandbox", s.id, "error", err)
		}
	}
}

// hostCPU is how long a machine had been on CPUs at a time, in ms.
type hostCPU struct {
	at time.Time
	ms int64
}

// percent returns the use since the last look, in percent of one core, and remembers this look. The first look has nothing to compare with.
func (c *hostCPU) percent(now time.Time, ms int64) (used float64) {
	if c.ms > 0 {
		used = float64(max(0, ms-c.ms)) / float64(max(1, now.Sub(c.at).Milliseconds())) * 100
	}
	c.at, c.ms = now, ms
	return used
}

// hostMemoryEvery is how many samples share one measurement of the machine's memory on the host.
const hostMemoryEvery = 12

// Refresh updates the log with what happened to processes until now, and the meter with what is used. If the sandbox does not run or its
// agent is silent, Refresh changes nothing.
func (s *Sandbox) Refresh(ctx context.Context) {
	s.mu.Lock()
	client, running := s.client, s.rec.State == Running
	s.mu.Unlock()
	if client != nil && running {
		_, _ = s.meter.ask(ctx, client) // ping notices a silent agent
	}
}

// Samples returns the sandbox's samples between two times, the oldest first; zero times are no bounds. For times of which nothing is kept
// there are no samples.
func (s *Sandbox) Samples(from, until time.Time) ([]Sample, error) {
	samples := []Sample{}
	err := s.m.store.eachLine(s.id, metricsName, func(line []byte) error {
		var sample Sample
		if json.Unmarshal(line, &sample) != nil || !from.IsZero() && sample.Time.Before(from) || !until.IsZero() &&
			!sample.Time.Before(until) {
			return nil
		}
		samples = append(samples, sample)
		return nil
	})
	if n := len(samples); n > maxSamples {
		samples = samples[n-maxSamples:]
	}
	return samples, err
}
