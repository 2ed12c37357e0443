package tools

import (
	"context"
	"fmt"
	"strings"
	"time"

	"soulbox.dev/soulbox/internal/cursor"
	"soulbox.dev/soulbox/sandbox"
)

func (s *Toolbox) observeTools() []tool {
	return []tool{
		define(s, "sandbox_logs", "Report what has happened to a sandbox and its processes, until a day after its end.",
			hints{title: "Read a sandbox's log", readOnly: true, idempotent: true}, s.sandboxLogs),
		define(s, "sandbox_metrics", "Report what a sandbox used in the last hour (samples) and in its life.",
			hints{title: "Read a sandbox's metrics", readOnly: true, idempotent: true}, s.sandboxMetrics),
	}
}

// moment parses a time: RFC 3339, or a duration, which means that long ago.
func moment(name, value string) (time.Time, error) {
	if value == "" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.RFC3339, value); err == nil {
		return t, nil
	}
	if d, err := time.ParseDuration(strings.TrimPrefix(value, "-")); err == nil {
		return time.Now().Add(-d), nil
	}
	return time.Time{}, badArgument("The argument %q must be a time such as 2026-01-31T12:00:00Z, or how long ago, such as 10m; got %q.",
		name, shorten(value, 60))
}

type sandboxLogsInput struct {
	Since  string `json:"since,omitempty" jsonschema:"time (RFC 3339), or how long ago, such as 10m"`
	Until  string `json:"until,omitempty"`
	Level  string `json:"level,omitempty" enum:"debug,info,warn,error" jsonschema:"this level and above"`
	Source string `json:"source,omitempty" enum:"system,process,build"`
	Text   string `json:"text,omitempty" jsonschema:"in the message"`
	Limit  int    `json:"limit,omitempty" jsonschema:"default 100: the last, or with cursor the next"`
	Cursor string `json:"cursor,omitempty" jsonschema:"of the last result: only what came since"`
	target
}

type logLine struct {
	Time    string `json:"time"`
	Level   string `json:"level"`
	Source  string `json:"source"`
	Message string `json:"message"`
}

type sandboxLogsOutput struct {
	Lines  []logLine `json:"lines"`
	Cursor string    `json:"cursor"`
	More   bool      `json:"more,omitempty"`
}

func (o sandboxLogsOutput) text() string {
	var b strings.Builder
	for _, l := range o.Lines {
		fmt.Fprintf(&b, "%s %s %s: %s\n", l.Time, l.Level, l.Source, l.Message)
	}
	if len(o.Lines) == 0 {
		b.WriteString("There are no such entries.\n")
	}
	if o.More {
		b.WriteString("[there are more; narrow it down, or ")
	} else {
		b.WriteString("[")
	}
	fmt.Fprintf(&b, "call sandbox_logs with cursor %s for what comes later]", o.Cursor)
	return b.String()
}

func (s *Toolbox) sandboxLogs(ctx context.Context, in sandboxLogsInput) (sandboxLogsOutput, error) {
	q := sandbox.LogQuery{Level: sandbox.Level(in.Level), Source: in.Source, Text: in.Text, Limit: in.Limit}
	var err error
	if q.Since, err = moment("since", in.Since); err != nil {
		return sandboxLogsOutput{}, err
	}
	if q.Until, err = moment("until", in.Until); err != nil {
		return sandboxLogsOutput{}, err
	}
	if in.Cursor != "" {
		if cursor.Decode("logs", in.Cursor, &q.After) != nil {
			return sandboxLogsOutput{}, badCursor("sandbox_logs", "leave it out for the last entries")
		}
	}
	sb, err := s.sandboxAsIs(ctx, in.target)
	if err != nil {
		return sandboxLogsOutput{}, err
	}
	sb.Refresh(ctx)
	page, err := sb.Logs(q)
	if err != nil {
		return sandboxLogsOutput{}, err
	}
	next, err := cursor.Encode("logs", page.Last)
	if err != nil {
		return sandboxLogsOutput{}, err
	}
	out := sandboxLogsOutput{Lines: []logLine{}, Cursor: next, More: page.More}
	for _, e := range page.Entries {
		out.Lines = append(out.Lines, logLine{e.Time.UTC().Format("2006-01-02T15:04:05.000Z"), string(e.Level), e.Source,
			render([]byte(e.Message))})
	}
	return out, nil
}

type sandboxMetricsInput struct {
	Start  string `json:"start,omitempty" jsonschema:"time (RFC 3339), or how long ago; default 1h"`
	End    string `json:"end,omitempty"`
	Points int    `json:"points,omitempty" jsonschema:"samples at most; default 30"`
	target
}

type metricsSample struct {
	Time          string  `json:"time"`
	CPUPct        float64 `json:"cpu_pct"`
	MemoryMB      int64   `json:"memory_mb"`
	MemoryPct     float64 `json:"memory_pct"`
	DiskMB        int64   `json:"disk_mb"`
	DiskReadMB    int64   `json:"disk_read_mb"`
	DiskWrittenMB int64   `json:"disk_written_mb"`
	NetInKB       int64   `json:"net_in_kb"`
	NetOutKB      int64   `json:"net_out_kb"`
	Processes     int64   `json:"processes"`
}

type metricsTotals struct {
	RunningS  float64 `json:"running_s"`
	CPUS      float64 `json:"cpu_s"`
	GBSeconds float64 `json:"gb_seconds"`
	NetInKB   int64   `json:"net_in_kb"`
	NetOutKB  int64   `json:"net_out_kb"`
}

type sandboxMetricsOutput struct {
	Totals  metricsTotals   `json:"totals"`
	Samples []metricsSample `json:"samples"`
}

func (o sandboxMetricsOutput) text() string {
	var b strings.Builder
	t := o.Totals
	fmt.Fprintf(&b, "totals: running %.1f s, cpu %.1f s, %.1f GB-seconds, network %d KB in, %d KB out", t.RunningS, t.CPUS, t.GBSeconds,
		t.NetInKB, t.NetOutKB)
	for _, m := range o.Samples {
		fmt.Fprintf(&b, "\n%s cpu %.1f %%, memory %d MB (%.1f %%), disk %d MB (read %d, written %d), network %d KB in, %d KB out, %d "+
			"processes",
			m.Time, m.CPUPct, m.MemoryMB, m.MemoryPct, m.DiskMB, m.DiskReadMB, m.DiskWrittenMB, m.NetInKB, m.NetOutKB, m.Processes)
	}
	if len(o.Samples) == 0 {
		b.WriteString("\nThere are no samples of that time.")
	}
	return b.String()
}

const maxPoints = 720

func (s *Toolbox) sandboxMetrics(ctx context.Context, in sandboxMetricsInput) (sandboxMetricsOutput, error) {
	from, err := moment("start", in.Start)
	if err != nil {
		return sandboxMetricsOutput{}, err
	}
	until, err := moment("end", in.End)
	if err != nil {
		return sandboxMetricsOutput{}, err
	}
	if in.Start == "" {
		from = time.Now().Add(-time.Hour)
	}
	if in.Points <= 0 || in.Points > maxPoints {
		in.Points = 30
	}
	sb, err := s.sandboxAsIs(ctx, in.target)
	if err != nil {
		return sandboxMetricsOutput{}, err
	}
	samples, err := sb.Samples(from, until)
	if err != nil {
		return sandboxMetricsOutput{}, err
	}
	t := sb.Info().Totals
	out := sandboxMetricsOutput{Samples: []metricsSample{}, Totals: metricsTotals{
		RunningS: round(float64(t.RunMS) / 1000), CPUS: round(float64(t.CPUMS) / 1000), GBSeconds: round(t.GBSeconds),
		NetInKB: t.NetIn >> 10, NetOutKB: t.NetOut >> 10,
	}}
	step := (len(samples) + in.Points - 1) / in.Points
	for i := range samples {
		if (len(samples)-1-i)%max(1, step) != 0 { // the last sample is always included
			continue
		}
		m := samples[i]
		out.Samples = append(out.Samples, metricsSample{Time: m.Time.UTC().Format(time.RFC3339), CPUPct: round(m.CPU),
			MemoryMB: m.Memory >> 20, MemoryPct: round(m.MemoryPct),
			DiskMB: m.DiskUsed >> 20, DiskReadMB: m.DiskRead >> 20, DiskWrittenMB: m.DiskWritten >> 20, NetInKB: m.NetIn >> 10,
			NetOutKB: m.NetOut >> 10, Processes: m.Processes})
	}
	return out, nil
}

// round keeps one decimal.
func round(v float64) float64 { return float64(int64(v*10+0.5)) / 10 }
