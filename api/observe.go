package api

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"time"

	"soulbox.dev/soulbox/sandbox"
)

// metric is what a sandbox used at one moment.
type metric struct {
	Timestamp time.Time `json:"timestamp"`
	Unix      int64     `json:"timestampUnix"`
	CPUCount  int       `json:"cpuCount"`
	CPUUsed   float64   `json:"cpuUsedPct"`
	MemUsed   int64     `json:"memUsed"`
	MemTotal  int64     `json:"memTotal"`
	MemCache  int64     `json:"memCache"`
	DiskUsed  int64     `json:"diskUsed"`
	DiskTotal int64     `json:"diskTotal"`
}

// metricOf gives the CPU usage in percent of what the sandbox may use. As for E2B's machines, it includes the sandbox's kernel, so an idle
// sandbox uses some CPU.
func metricOf(s sandbox.Sample, l sandbox.Limits) metric {
	return metric{Timestamp: s.Time, Unix: s.Time.Unix(), CPUCount: max(1, int(l.CPU+0.5)), CPUUsed: max(s.CPU, s.HostCPU) / max(l.CPU, 1),
		MemUsed: max(s.Memory, s.HostMemory), MemTotal: l.Memory, DiskUsed: s.DiskUsed, DiskTotal: l.Disk}
}

const maxSeconds = 1 << 40

// period reads the arguments start and end, in seconds since 1970; 0 is no bound.
func (r *call) period() (from, until int64, err error) {
	if from, err = r.number("start", 0, maxSeconds, 0); err != nil {
		return 0, 0, err
	}
	if until, err = r.number("end", 0, maxSeconds, 0); err != nil {
		return 0, 0, err
	}
	if until != 0 && until < from {
		return 0, 0, refuse(http.StatusBadRequest, "the end is before the start")
	}
	return from, until, nil
}

func (c *Control) metrics(r *call) error {
	sb, err := c.liveSandbox(r)
	if err != nil {
		return err
	}
	from, until, err := r.period()
	if err != nil {
		return err
	}
	sb.Refresh(r.Context())
	samples, err := sb.Samples(unix(from), unix(until))
	if err != nil {
		return err
	}
	out := []metric{}
	for _, s := range samples {
		out = append(out, metricOf(s, sb.Info().Limits))
	}
	return r.answer(http.StatusOK, out)
}

// unix converts Unix seconds; 0 means no time.
func unix(seconds int64) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0)
}

// allMetrics answers with the current usage of some sandboxes. It leaves out sandboxes that are not the caller's.
func (c *Control) allMetrics(r *call) error {
	ids := strings.Split(r.URL.Query().Get("sandbox_ids"), ",")
	if len(ids) > maxPage || ids[0] == "" {
		return refuse(http.StatusBadRequest, "name 1 to %d sandboxes by sandbox_ids", maxPage)
	}
	out := map[string]metric{}
	for _, id := range ids {
		sb, err := c.Manager.Get(r.owner, id)
		if err != nil || sb.Info().State.Ended() {
			continue
		}
		samples, err := sb.Samples(time.Now().Add(-time.Minute), time.Time{})
		if err != nil {
			return err
		}
		if n := len(samples); n > 0 {
			out[id] = metricOf(samples[n-1], sb.Info().Limits)
		}
	}
	return r.answer(http.StatusOK, map[string]any{"sandboxes": out})
}

// logEntry is something that happened to a sandbox.
type logEntry struct {
	Timestamp time.Time         `json:"timestamp"`
	Level     string            `json:"level"`
	Message   string            `json:"message"`
	Fields    map[string]string `json:"fields"`
}

const maxLogs = 1000

func (c *Control) readLogs(r *call, q sandbox.LogQuery) ([]logEntry, error) {
	sb, err := c.anySandbox(r) // the logs of an ended sandbox can still be read
	if err != nil {
		return nil, err
	}
	sb.Refresh(r.Context())
	page, err := sb.Logs(q)
	if err != nil {
		return nil, err
	}
	out := []logEntry{}
	for _, e := range page.Entries {
		out = append(out, logEntry{e.Time, string(e.Level), e.Message, map[string]string{"source": e.Source}})
	}
	return out, nil
}

// oldLogs returns the same log twice: as lines of JSON, which E2B's command line reads, and as entries.
func (c *Control) oldLogs(r *call) error {
	start, err := r.number("start", 0, maxSeconds*1000, 0)
	if err != nil {
		return err
	}
	limit, err := r.number("limit", 0, maxLogs, maxLogs)
	if err != nil {
		return err
	}
	q := sandbox.LogQuery{Limit: int(limit), First: true}
	if start > 0 {
		q.Since = time.UnixMilli(start)
	}
	entries, err := c.readLogs(r, q)
	if err != nil {
		return err
	}
	lines := []map[string]any{}
	for _, e := range entries {
		line, err := json.Marshal(map[string]any{"timestamp": e.Timestamp, "level": e.Level, "logger": e.Fields["source"],
			"message": e.Message})
		if err != nil {
			return err
		}
		lines = append(lines, map[string]any{"timestamp": e.Timestamp, "line": string(line)})
	}
	return r.answer(http.StatusOK, map[string]any{"logs": lines, "logEntries": entries})
}

func (c *Control) logs(r *call) error {
	cursor, err := r.number("cursor", 0, maxSeconds*1000, 0)
	if err != nil {
		return err
	}
	limit, err := r.number("limit", 0, maxLogs, maxLogs)
	if err != nil {
		return err
	}
	q := sandbox.LogQuery{Limit: int(limit), Text: r.URL.Query().Get("search"), Level: sandbox.Level(r.URL.Query().Get("level"))}
	if q.Source = r.URL.Query().Get("source"); q.Source != "" &&
		!slices.Contains([]string{sandbox.SourceSystem, sandbox.SourceProcess, sandbox.SourceBuild}, q.Source) {
		return refuse(http.StatusBadRequest, "source is system, process or build")
	}
	if q.Level != "" && !slices.Contains(sandbox.Levels(), q.Level) || len(q.Text) > 256 {
		return refuse(http.StatusBadRequest, "level is debug, info, warn or error, and search has at most 256 bytes")
	}
	switch direction := r.URL.Query().Get("direction"); direction {
	case "", "forward":
		if q.First = true; cursor > 0 {
			q.Since = time.UnixMilli(cursor)
		}
	case "backward":
		if cursor > 0 {
			q.Until = time.UnixMilli(cursor + 1)
		}
	default:
		return refuse(http.StatusBadRequest, "direction is forward or backward, not %.40q", direction)
	}
	entries, err := c.readLogs(r, q)
	if err != nil {
		return err
	}
	if !q.First {
		slices.Reverse(entries)
	}
	return r.answer(http.StatusOK, map[string]any{"logs": entries})
}
