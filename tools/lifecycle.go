package tools

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"soulbox.dev/soulbox/sandbox"
)

func (s *Toolbox) lifecycleTools() []tool {
	return []tool{
		define(s, "sandbox_update", "Change metadata, times or protection of a sandbox.",
			hints{title: "Update a sandbox"}, s.sandboxUpdate),
		define(s, "sandbox_pause", "Stop a sandbox as it is, memory and processes too; its life time stands still.",
			hints{title: "Pause a sandbox", idempotent: true}, s.sandboxPause),
		define(s, "sandbox_resume", "Resume a paused sandbox where it was, or a failed one from what was saved.",
			hints{title: "Resume a sandbox", idempotent: true}, s.sandboxResume),
		define(s, "sandbox_snapshot",
			"Save a running sandbox, with its processes, under a name; sandbox_create with template NAME starts from it.",
			hints{title: "Save a snapshot", slow: true}, s.sandboxSnapshot),
		define(s, "sandbox_fork", "Make copies of a sandbox, memory and processes too; it continues.",
			hints{title: "Fork a sandbox", slow: true}, s.sandboxFork),
	}
}

// sandboxAsIs finds a sandbox whose state must not change: the call neither makes nor wakes it.
func (s *Toolbox) sandboxAsIs(ctx context.Context, t target) (*sandbox.Sandbox, error) {
	own, owner, err := s.session(ctx)
	if err != nil {
		return nil, err
	}
	if t.SandboxID != "" {
		return s.Manager.Get(owner, t.SandboxID)
	}
	own.making.Lock()
	defer own.making.Unlock()
	if err := s.inherit(ctx, own, owner); err != nil {
		return nil, err
	}
	if sb := own.current.Load(); sb != nil {
		return sb, nil
	}
	return nil, badArgument("The argument \"sandbox_id\" is missing, and this session has no sandbox of its own yet. Call sandbox_list " +
		"to see the existing ones.")
}

type sandboxPauseInput struct {
	ToDisk     bool `json:"to_disk,omitempty" jsonschema:"frees all memory and survives restarts"`
	FilesOnly  bool `json:"files_only,omitempty" jsonschema:"with to_disk: give up processes; it boots when resumed"`
	AutoResume bool `json:"auto_resume,omitempty" jsonschema:"any later call resumes it"`
	target
}

// sandboxPause succeeds if the sandbox is already paused in the wanted way.
func (s *Toolbox) sandboxPause(ctx context.Context, in sandboxPauseInput) (sandboxInfo, error) {
	sb, err := s.sandboxAsIs(ctx, in.target)
	if err != nil {
		return sandboxInfo{}, err
	}
	err = sb.Pause(ctx, sandbox.PauseOptions{ToDisk: in.ToDisk, FilesOnly: in.FilesOnly, AutoResume: in.AutoResume})
	if info := sb.Info(); err != nil && !(info.State == sandbox.Paused && (info.OnDisk || !in.ToDisk)) {
		return sandboxInfo{}, err
	}
	if info := sb.Info(); info.State == sandbox.Paused && in.AutoResume && !info.AutoResume { // it was already paused
		if _, err := sb.Update(ctx, sandbox.Update{AutoResume: &in.AutoResume}); err != nil {
			return sandboxInfo{}, err
		}
	}
	return s.describe(ctx, sb.Info()), nil
}

type sandboxResumeInput struct {
	FilesOnly bool  `json:"files_only,omitempty" jsonschema:"boot it anew, without its processes"`
	MemoryMB  int64 `json:"memory_mb,omitempty" jsonschema:"more memory"`
	target
}

func (s *Toolbox) sandboxResume(ctx context.Context, in sandboxResumeInput) (sandboxInfo, error) {
	sb, err := s.sandboxAsIs(ctx, in.target)
	if err != nil {
		return sandboxInfo{}, err
	}
	if in.MemoryMB < 0 || in.MemoryMB > maxNumber {
		return sandboxInfo{}, badArgument("The argument \"memory_mb\" must be from 0 to %d.", maxNumber)
	}
	o := sandbox.ResumeOptions{FilesOnly: in.FilesOnly, Memory: in.MemoryMB << 20}
	if err := sb.ResumeWith(ctx, o); err != nil && (sb.Info().State != sandbox.Running || o != sandbox.ResumeOptions{}) {
		return sandboxInfo{}, err
	}
	return s.describe(ctx, sb.Info()), nil
}

type sandboxUpdateInput struct {
	Metadata      map[string]*string  `json:"metadata,omitempty" jsonschema:"pairs to set; null removes one"`
	ExtendMS      *int64              `json:"extend_ms,omitempty" jsonschema:"add to its life time"`
	TimeoutMS     *int64              `json:"timeout_ms,omitempty" jsonschema:"life time from now on; may shorten it"`
	MaxLifetimeMS *int64              `json:"max_lifetime_ms,omitempty" jsonschema:"bound of all extensions, from its start"`
	IdleMS        *int64              `json:"idle_timeout_ms,omitempty"`
	OnTimeout     string              `json:"on_timeout,omitempty" enum:"pause,kill"`
	GraceMS       *int64              `json:"grace_ms,omitempty"`
	AutoResume    *bool               `json:"auto_resume,omitempty"`
	Protect       *sandbox.Protection `json:"protect,omitempty" as:"sandbox_create"`
	target
}

func (s *Toolbox) sandboxUpdate(ctx context.Context, in sandboxUpdateInput) (sandboxInfo, error) {
	if in.Metadata == nil && in.ExtendMS == nil && in.TimeoutMS == nil && in.MaxLifetimeMS == nil && in.IdleMS == nil &&
		in.OnTimeout == "" && in.GraceMS == nil && in.AutoResume == nil && in.Protect == nil {
		return sandboxInfo{},
			badArgument("There is nothing to change: give metadata, extend_ms, timeout_ms, max_lifetime_ms, idle_timeout_ms, on_timeout, " +
				"grace_ms, auto_resume or protect.")
	}
	sb, err := s.sandbox(ctx, in.SandboxID)
	if err != nil {
		return sandboxInfo{}, err
	}
	u := sandbox.Update{Metadata: in.Metadata, OnTimeout: sandbox.Action(in.OnTimeout), AutoResume: in.AutoResume}
	for name, to := range map[string]struct {
		ms *int64
		d  **time.Duration
	}{"extend_ms": {in.ExtendMS, &u.Extend}, "timeout_ms": {in.TimeoutMS, &u.Lifetime},
		"max_lifetime_ms": {in.MaxLifetimeMS, &u.MaxLifetime},
		"idle_timeout_ms": {in.IdleMS, &u.Idle}, "grace_ms": {in.GraceMS, &u.Grace}} {
		if *to.d, err = millis(name, to.ms); err != nil {
			return sandboxInfo{}, err
		}
	}
	if in.Protect != nil {
		protect, err := parseProtection(in.Protect)
		if err != nil {
			return sandboxInfo{}, err
		}
		u.Protect = &protect
	}
	info, err := sb.Update(ctx, u)
	if err != nil {
		return sandboxInfo{}, err
	}
	return s.describe(ctx, info), nil
}

type sandboxSnapshotInput struct {
	Name      string `json:"name" jsonschema:"of the snapshot: lower-case letters, digits, . _ -"`
	FilesOnly bool   `json:"files_only,omitempty" jsonschema:"without memory and processes"`
	target
}

type snapshotInfo struct {
	Name      string `json:"name"`
	Kind      string `json:"kind"`
	SandboxID string `json:"sandbox_id,omitempty"`
	CreatedAt string `json:"created_at,omitempty"`
	SizeMB    int64  `json:"size_mb,omitempty"`
	FilesOnly bool   `json:"files_only,omitempty"`
}

func describeSnapshot(snap sandbox.Snapshot) snapshotInfo {
	return snapshotInfo{Name: snap.Name, Kind: "snapshot", SandboxID: snap.Sandbox, CreatedAt: snap.Created.UTC().Format(time.RFC3339),
		SizeMB: (snap.Size + 1<<20 - 1) >> 20, FilesOnly: snap.FilesOnly}
}

func (i snapshotInfo) text() string {
	if i.Kind == "template" {
		if i.CreatedAt == "" {
			return "template " + i.Name
		}
		return fmt.Sprintf("template %s: %d MB, made at %s", i.Name, i.SizeMB, i.CreatedAt)
	}
	what := "memory and files"
	if i.FilesOnly {
		what = "files"
	}
	return fmt.Sprintf("snapshot %s: %s of sandbox %s at %s, %d MB; sandbox_create with template %s begins there", i.Name, what,
		i.SandboxID, i.CreatedAt, i.SizeMB, i.Name)
}

func (s *Toolbox) sandboxSnapshot(ctx context.Context, in sandboxSnapshotInput) (snapshotInfo, error) {
	sb, err := s.sandboxAsIs(ctx, in.target)
	if err != nil {
		return snapshotInfo{}, err
	}
	snap, err := sb.Snapshot(ctx, sandbox.SnapshotOptions{Name: in.Name, FilesOnly: in.FilesOnly})
	return describeSnapshot(snap), err
}

type sandboxForkInput struct {
	Count    *int              `json:"count,omitempty" least:"1" jsonschema:"up to 100; default 1"`
	Metadata map[string]string `json:"metadata,omitempty" jsonschema:"of the copies; default as the original"`
	target
}

type sandboxForkOutput struct {
	SandboxIDs []string `json:"sandbox_ids"`
	Failed     []string `json:"failed,omitempty"`
}

func (o sandboxForkOutput) text() string {
	text := fmt.Sprintf("made: %s", strings.Join(o.SandboxIDs, ", "))
	for _, f := range o.Failed {
		text += "\nnot made: " + f
	}
	return text + "\n[each has another boot_id, and a higher number in /run/soulbox/generation; the hooks of " + sandbox.HookDir +
		" were run in it, and its log tells of those that failed. Random numbers that a program has drawn ahead are the same in all: " +
		"restart it, or have a hook do it]"
}

// sandboxFork fails as a whole only if no copy could be made.
func (s *Toolbox) sandboxFork(ctx context.Context, in sandboxForkInput) (sandboxForkOutput, error) {
	sb, err := s.sandboxAsIs(ctx, in.target)
	if err != nil {
		return sandboxForkOutput{}, err
	}
	count := 1
	if in.Count != nil {
		count = *in.Count
	}
	copies, failed, err := sb.Fork(ctx, count, in.Metadata)
	if err != nil {
		return sandboxForkOutput{}, err
	}
	out := sandboxForkOutput{SandboxIDs: []string{}}
	for _, c := range copies {
		out.SandboxIDs = append(out.SandboxIDs, c.ID())
	}
	var last error
	same := 0
	for i := range count {
		err := failed[i+1]
		switch {
		case err == nil:
			continue
		case last != nil && errors.Is(err, sandbox.ErrNoRoom) && errors.Is(last, sandbox.ErrNoRoom):
			same++ // one message says it all
		default:
			out.Failed = append(out.Failed, fmt.Sprintf("copy %d: %s", i+1, explain("sandbox_fork", err)))
		}
		last = err
	}
	if same > 0 {
		out.Failed = append(out.Failed, fmt.Sprintf("%d more for the same reason", same))
	}
	if len(copies) == 0 {
		return out, last
	}
	return out, nil
}
