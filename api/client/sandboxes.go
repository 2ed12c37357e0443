package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"soulbox.dev/soulbox/internal/names"
)

// List selects sandboxes. The zero value selects those that have not ended.
type List struct {
	States   []string
	Metadata map[string]string // all pairs must match
}

// Sandboxes lists sandboxes, the newest first.
func (c *Client) Sandboxes(ctx context.Context, l List) (all []Sandbox, err error) {
	q := url.Values{}
	if len(l.States) > 0 {
		q.Set("state", strings.Join(l.States, ","))
	}
	if len(l.Metadata) > 0 {
		pairs := url.Values{}
		for k, v := range l.Metadata {
			pairs.Set(url.QueryEscape(k), url.QueryEscape(v)) // the query encodes them twice, as E2B's clients do
		}
		q.Set("metadata", pairs.Encode())
	}
	err = c.call(ctx, "GET", "/v1/sandboxes", q, nil, &all)
	return all, err
}

// Create makes a sandbox.
func (c *Client) Create(ctx context.Context, n NewSandbox) (s Sandbox, err error) {
	err = c.call(ctx, "POST", "/v1/sandboxes", nil, n, &s)
	return s, err
}

// Sandbox describes a sandbox, also one that has ended.
func (c *Client) Sandbox(ctx context.Context, id string) (s Sandbox, err error) {
	err = c.call(ctx, "GET", "/v1/sandboxes/"+url.PathEscape(id), nil, nil, &s)
	return s, err
}

// Update changes a sandbox.
func (c *Client) Update(ctx context.Context, id string, u Update) (s Sandbox, err error) {
	err = c.call(ctx, "PATCH", "/v1/sandboxes/"+url.PathEscape(id), nil, u, &s)
	return s, err
}

// Pause pauses a sandbox.
func (c *Client) Pause(ctx context.Context, id string, p Pause) (s Sandbox, err error) {
	err = c.call(ctx, "POST", "/v1/sandboxes/"+url.PathEscape(id)+"/pause", nil, p, &s)
	return s, err
}

// Resume resumes a paused sandbox, which then lives at least for life; 0 leaves its time as it is.
func (c *Client) Resume(ctx context.Context, id string, life time.Duration) error {
	return c.call(ctx, "POST", "/sandboxes/"+url.PathEscape(id)+"/connect", nil, map[string]any{"timeout": int64(life.Seconds())}, nil)
}

// ResumeAs resumes a sandbox that is paused, or one that has failed and was saved.
func (c *Client) ResumeAs(ctx context.Context, id string, r Resume) (s Sandbox, err error) {
	err = c.call(ctx, "POST", "/v1/sandboxes/"+url.PathEscape(id)+"/resume", nil, r, &s)
	return s, err
}

// Kill ends a sandbox.
func (c *Client) Kill(ctx context.Context, id string) error {
	return c.call(ctx, "DELETE", "/sandboxes/"+url.PathEscape(id), nil, nil, nil)
}

// Fork makes copies of a sandbox, each of which lives for life, and returns their ids. err has the errors of the copies that could not be
// made.
func (c *Client) Fork(ctx context.Context, id string, count int, life time.Duration) (ids []string, err error) {
	var out []struct {
		Sandbox *struct{ SandboxID string }
		Error   *Error
	}
	if err := c.call(ctx, "POST", "/sandboxes/"+url.PathEscape(id)+"/fork", nil,
		map[string]any{"count": count, "timeout": int64(life.Seconds())}, &out); err != nil {
		return nil, err
	}
	for _, one := range out {
		if one.Sandbox != nil {
			ids = append(ids, one.Sandbox.SandboxID)
		} else if one.Error != nil {
			err = errors.Join(err, one.Error)
		}
	}
	return ids, err
}

// Snapshot saves a sandbox under a new name and returns the name. If name is "", the server chooses one. If there is a snapshot of that
// name, it fails.
func (c *Client) Snapshot(ctx context.Context, id, name string) (string, error) {
	return c.SnapshotAs(ctx, id, NewSnapshot{Name: name})
}

// SnapshotAs saves a sandbox and returns the name of the snapshot.
func (c *Client) SnapshotAs(ctx context.Context, id string, n NewSnapshot) (string, error) {
	var out struct{ SnapshotID string }
	err := c.call(ctx, "POST", "/v1/sandboxes/"+url.PathEscape(id)+"/snapshots", nil, n, &out)
	return snapshotName(out.SnapshotID), err
}

// snapshotName returns the name by which its owner knows a snapshot. The id also has the owner's name, and the tag that every snapshot has.
func snapshotName(id string) string {
	return strings.TrimSuffix(id[strings.LastIndexByte(id, '/')+1:], ":default")
}

// Snapshots lists the names of snapshots, the newest first.
func (c *Client) Snapshots(ctx context.Context) (names []string, err error) {
	for token := ""; ; {
		var part []struct{ SnapshotID string }
		q := url.Values{}
		if token != "" {
			q.Set("nextToken", token)
		}
		h, err := c.callWith(ctx, "GET", "/snapshots", q, nil, &part)
		if err != nil {
			return nil, err
		}
		for _, s := range part {
			names = append(names, snapshotName(s.SnapshotID))
		}
		if token = h.Get("X-Next-Token"); token == "" {
			return names, nil
		}
	}
}

// Processes lists the processes of a sandbox, also ended ones that are still known.
func (c *Client) Processes(ctx context.Context, id string) (all []Process, err error) {
	err = c.call(ctx, "GET", "/v1/sandboxes/"+url.PathEscape(id)+"/processes", nil, nil, &all)
	return all, err
}

// Ports lists the ports of a sandbox: those that are exposed, and those on which something listens.
func (c *Client) Ports(ctx context.Context, id string) (all []Port, err error) {
	err = c.call(ctx, "GET", "/v1/sandboxes/"+url.PathEscape(id)+"/ports", nil, nil, &all)
	return all, err
}

// Expose makes a port reachable.
func (c *Client) Expose(ctx context.Context, id string, port int, public bool) (p Port, err error) {
	return c.ExposeWithin(ctx, id, port, public, 0)
}

// ExposeWithin makes a port reachable, and waits for so long until something listens there.
func (c *Client) ExposeWithin(ctx context.Context, id string, port int, public bool, wait time.Duration) (p Port, err error) {
	err = c.call(ctx, "PUT", fmt.Sprintf("/v1/sandboxes/%s/ports/%d", url.PathEscape(id), port), nil,
		map[string]any{"public": public, "waitMs": wait.Milliseconds()}, &p)
	return p, err
}

// ClosePort undoes Expose.
func (c *Client) ClosePort(ctx context.Context, id string, port int) error {
	return c.call(ctx, "DELETE", fmt.Sprintf("/v1/sandboxes/%s/ports/%d", url.PathEscape(id), port), nil, nil, nil)
}

// FileURL signs a URL with which anyone can read, or write, a file until valid is over.
func (c *Client) FileURL(ctx context.Context, id, path string, write bool, valid time.Duration) (string, error) {
	operation := "read"
	if write {
		operation = "write"
	}
	var out struct{ URL string }
	err := c.call(ctx, "POST", "/v1/sandboxes/"+url.PathEscape(id)+"/url", nil,
		map[string]any{"path": names.Text(path), "operation": operation, "seconds": int64(valid.Seconds())}, &out)
	return out.URL, err
}

// LogEntry is something that happened to a sandbox.
type LogEntry struct {
	Time    time.Time         `json:"timestamp"`
	Level   string            `json:"level"`
	Message string            `json:"message"`
	Fields  map[string]string `json:"fields"`
}

// LogQuery selects entries of a log.
type LogQuery struct {
	Since  time.Time // zero: the last Limit entries
	Level  string    // this level or a graver one
	Source string    // system, process or build
	Search string
	Limit  int // at most 1000
}

// Logs reads the log of a sandbox, also of one that has ended, in order of time.
func (c *Client) Logs(ctx context.Context, id string, l LogQuery) ([]LogEntry, error) {
	q := url.Values{"limit": {strconv.Itoa(l.Limit)}, "direction": {"backward"}}
	if !l.Since.IsZero() {
		q.Set("direction", "forward")
		q.Set("cursor", strconv.FormatInt(l.Since.UnixMilli(), 10))
	}
	for name, value := range map[string]string{"level": l.Level, "source": l.Source, "search": l.Search} {
		if value != "" {
			q.Set(name, value)
		}
	}
	var out struct{ Logs []LogEntry }
	if err := c.call(ctx, "GET", "/v2/sandboxes/"+url.PathEscape(id)+"/logs", q, nil, &out); err != nil {
		return nil, err
	}
	if l.Since.IsZero() {
		for i, j := 0, len(out.Logs)-1; i < j; i, j = i+1, j-1 {
			out.Logs[i], out.Logs[j] = out.Logs[j], out.Logs[i]
		}
	}
	return out.Logs, nil
}

// Metric is what a sandbox used at one moment.
type Metric struct {
	Time      time.Time `json:"timestamp"`
	CPUCount  int       `json:"cpuCount"`
	CPUPct    float64   `json:"cpuUsedPct"` // of what the sandbox may use
	MemUsed   int64     `json:"memUsed"`    // bytes, as all below
	MemTotal  int64     `json:"memTotal"`
	DiskUsed  int64     `json:"diskUsed"`
	DiskTotal int64     `json:"diskTotal"`
}

// Metrics reads what a sandbox has used since a time.
func (c *Client) Metrics(ctx context.Context, id string, since time.Time) (all []Metric, err error) {
	q := url.Values{}
	if !since.IsZero() {
		q.Set("start", strconv.FormatInt(since.Unix(), 10))
	}
	err = c.call(ctx, "GET", "/sandboxes/"+url.PathEscape(id)+"/metrics", q, nil, &all)
	return all, err
}

// UnmarshalJSON reads the error of one of several items.
func (e *Error) UnmarshalJSON(text []byte) error {
	var told struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	}
	err := json.Unmarshal(text, &told)
	e.Status, e.Message = told.Code, told.Message
	return err
}
