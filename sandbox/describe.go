package sandbox

import (
	"cmp"
	"strings"
	"time"
)

// Description is a sandbox as JSON, with texts for its schema, so that all who show it show the same. Times are RFC 3339, sizes MiB,
// durations ms.
type Description struct {
	SandboxID string            `json:"sandbox_id"`
	State     string            `json:"state"`
	Cause     string            `json:"cause,omitempty" jsonschema:"why it ended or is paused"`
	Template  string            `json:"template"`
	Parent    string            `json:"parent,omitempty" jsonschema:"the snapshot or sandbox that it began from"`
	Metadata  map[string]string `json:"metadata,omitempty"`
	CreatedAt string            `json:"created_at"`
	EndsAt    string            `json:"ends_at,omitempty"`
	OnTimeout string            `json:"on_timeout,omitempty"`
	PausedAt  string            `json:"paused_at,omitempty"`
	EndedAt   string            `json:"ended_at,omitempty"`
	RemoveAt  string            `json:"removed_at,omitempty" jsonschema:"until then it can be resumed"`
	OnDisk    bool              `json:"on_disk,omitempty"`
	Resumes   bool              `json:"auto_resume,omitempty"`
	LeftMS    int64             `json:"life_left_ms,omitempty"`
	IdleMS    int64             `json:"idle_timeout_ms,omitempty"`
	MaxMS     int64             `json:"max_lifetime_ms,omitempty"`
	GraceMS   int64             `json:"grace_ms,omitempty"`
	ReadyAt   string            `json:"ready_at,omitempty"`
	UpdatedAt string            `json:"updated_at,omitempty"`
	CPU       float64           `json:"cpu"`
	MemoryMB  int64             `json:"memory_mb"`
	DiskMB    int64             `json:"disk_mb"`
	Pids      int64             `json:"pids"`
	Network   string            `json:"network,omitempty"`
	Protect   *Protection       `json:"protect,omitempty"`
	SavedAt   string            `json:"saved_at,omitempty" jsonschema:"what it is resumed from if it fails"`
	SavedS    *int64            `json:"saved_age_s,omitempty" jsonschema:"since when changes are not saved"`
	FilesOnly bool              `json:"saved_files_only,omitempty"`
	Notice    string            `json:"notice,omitempty" jsonschema:"what was lost when it was resumed"`
}

// Protection is Protect as JSON.
type Protection struct {
	Every  string `json:"every" jsonschema:"such as 5m, or off"`
	Memory bool   `json:"memory,omitempty" jsonschema:"processes too"`
}

// Describe describes a sandbox.
func (i Info) Describe() Description {
	d := Description{
		SandboxID: i.ID, State: string(i.State), Cause: i.Cause, Template: i.Template, Parent: i.Parent, Metadata: i.Metadata,
		CreatedAt: stamp(i.Created), ReadyAt: stamp(i.Ready), UpdatedAt: stamp(i.Updated), Notice: i.Notice,
		CPU: i.Limits.CPU, MemoryMB: i.Limits.Memory >> 20, DiskMB: i.Limits.Disk >> 20, Pids: i.Limits.Processes,
	}
	if i.Network.On() {
		d.Network = cmp.Or(strings.Join(i.Network.Allow, ","), i.Network.Mode)
	}
	d.saved(i)
	if !i.State.Ended() {
		t := i.Times
		d.OnTimeout, d.IdleMS, d.MaxMS, d.GraceMS = string(t.OnTimeout), t.Idle.Milliseconds(), t.Max.Milliseconds(), t.Grace.Milliseconds()
	}
	switch {
	case i.State.Ended():
		d.EndedAt, d.OnDisk = stamp(i.Changed), i.OnDisk
	case i.State == Paused:
		d.PausedAt, d.OnDisk, d.Resumes = stamp(i.Changed), i.OnDisk, i.AutoResume
	default:
		d.EndsAt = stamp(i.ExpiresAt)
	}
	if i.State == Paused || i.State.Ended() && i.OnDisk {
		d.RemoveAt, d.LeftMS = stamp(i.RemoveAt), i.Left.Milliseconds()
	}
	return d
}

// saved tells what a sandbox can be resumed from if it fails.
func (d *Description) saved(i Info) {
	if i.Protect.Every > 0 {
		d.Protect = &Protection{Every: i.Protect.Every.String(), Memory: i.Protect.Memory}
	}
	if i.Saved.IsZero() {
		return
	}
	d.SavedAt, d.FilesOnly = stamp(i.Saved), i.SavedFiles
	if i.State == Running {
		last := i.Saved
		if i.Current.After(last) {
			last = i.Current
		}
		age := int64(time.Since(last).Seconds())
		d.SavedS = &age
	}
}

// stamp formats a time; the zero time is "".
func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}
