package tools

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

func (s *Toolbox) templateTools() []tool {
	return []tool{
		define(s, "template_build",
			"Make a template from a Dockerfile. Takes minutes; steps done before are cached.",
			hints{title: "Build a template", slow: true}, s.templateBuild),
		define(s, "template_list", "List templates and your snapshots.",
			hints{title: "List templates and snapshots", readOnly: true, idempotent: true}, s.templateList),
		define(s, "template_delete", "Delete a template or snapshot of yours; sandboxes made from it stay.",
			hints{title: "Delete a template or snapshot", destructive: true}, s.templateDelete),
	}
}

type templateBuildInput struct {
	Name        string            `json:"name" jsonschema:"name or name:tag"`
	Dockerfile  string            `json:"dockerfile" jsonschema:"its text; FROM a template or an image"`
	Files       map[string]string `json:"files,omitempty" jsonschema:"texts by path, for COPY"`
	ContextPath filename          `json:"context_path,omitempty" jsonschema:"instead of files: a directory in the sandbox"`
	HostPath    string            `json:"host_path,omitempty" jsonschema:"or one of the host, if the operator allows it"`
	target
	Stage    string            `json:"stage,omitempty" jsonschema:"default the last"`
	Args     map[string]string `json:"args,omitempty" jsonschema:"values for ARG"`
	NoCache  bool              `json:"no_cache,omitempty"`
	Network  string            `json:"network,omitempty" jsonschema:"as in sandbox_create; default full"`
	StartCmd string            `json:"start_cmd,omitempty" jsonschema:"a service to run in its sandboxes"`
	ReadyCmd string            `json:"ready_cmd,omitempty" jsonschema:"succeeds once it is ready"`
	CPU      float64           `json:"cpu,omitempty"`
	MemoryMB int64             `json:"memory_mb,omitempty"`
}

type templateBuildOutput struct {
	Name    string `json:"name"`
	BuildID string `json:"build_id"`
	SizeMB  int64  `json:"size_mb"`
	Steps   int    `json:"steps"`
	Cached  int    `json:"cached"`
	TookMS  int64  `json:"took_ms"`
}

func (o templateBuildOutput) text() string {
	return fmt.Sprintf("Template %s is built: %d steps, %d of them cached, %d MB, %.1f s.\n[sandbox_create with template %s begins from "+
		"it; its log is template://%s/builds/%s/log]", o.Name, o.Steps, o.Cached,
		o.SizeMB, float64(o.TookMS)/1000, o.Name, o.Name, o.BuildID)
}

func (s *Toolbox) templateBuild(ctx context.Context, in templateBuildInput) (_ templateBuildOutput, err error) {
	who, err := caller(ctx)
	if err != nil {
		return templateBuildOutput{}, err
	}
	if s.Builds == nil {
		return templateBuildOutput{}, badArgument("This server builds no templates.")
	}
	if in.MemoryMB > maxNumber || in.MemoryMB < 0 {
		return templateBuildOutput{}, badArgument("The argument \"memory_mb\" must be from 0 to %d.", maxNumber)
	}
	req := template.BuildRequest{
		Owner: who.Owner(), Name: in.Name, Dockerfile: in.Dockerfile, Target: in.Stage, Args: in.Args, NoCache: in.NoCache,
		Network: parseNetwork(in.Network), StartCmd: in.StartCmd, ReadyCmd: in.ReadyCmd,
		Limits: sandbox.Limits{CPU: in.CPU, Memory: in.MemoryMB << 20},
	}
	if in.ContextPath != "" { // before any progress of the build is reported
		if _, err := s.sandbox(ctx, in.SandboxID); err != nil {
			return templateBuildOutput{}, err
		}
	}
	var files *template.Files
	req.Open = func(ctx context.Context, req *template.BuildRequest) (err error) {
		files, err = s.buildContext(ctx, req.Owner, in)
		req.Context = files
		return err
	}
	defer func() {
		if files != nil {
			err = errors.Join(err, files.Close())
		}
	}()
	p := newProgress(ctx)
	built, err := s.Builds.Run(ctx, req, func(l template.Line) {
		p.tell(strings.TrimSpace(l.Step + " " + renderLine(l.Text)))
	})
	if err != nil {
		return templateBuildOutput{}, err
	}
	return templateBuildOutput{built.Name, built.ID, built.Size >> 20, built.Steps, built.Cached, built.Took.Milliseconds()}, nil
}

// buildContext returns the files of a build.
func (s *Toolbox) buildContext(ctx context.Context, owner string, in templateBuildInput) (*template.Files, error) {
	given := 0
	for _, is := range []bool{len(in.Files) > 0, in.ContextPath != "", in.HostPath != ""} {
		if is {
			given++
		}
	}
	if given > 1 {
		return nil, badArgument("Give only one of \"files\", \"context_path\" and \"host_path\".")
	}
	switch {
	case in.HostPath != "":
		dir, err := s.hostDir(in.HostPath)
		if err != nil {
			return nil, err
		}
		return s.Store.ContextDir(ctx, owner, dir)
	case in.ContextPath != "":
		_, client, err := s.agent(ctx, in.target, "read the files of a build in")
		if err != nil {
			return nil, err
		}
		return s.contextIn(ctx, owner, client, string(in.ContextPath))
	}
	return s.Store.ContextFiles(ctx, owner, in.Files)
}

// hostDir returns the real path (symlinks resolved) of a host directory that the operator allows.
func (s *Toolbox) hostDir(name string) (string, error) {
	real, err := filepath.EvalSymlinks(name)
	if err == nil && filepath.IsAbs(name) {
		for _, allowed := range s.ContextDirs {
			if rel, err := filepath.Rel(allowed, real); err == nil && filepath.IsLocal(rel) {
				return real, nil
			}
		}
	}
	return "", badArgument("The directory %q of the host is not one that builds may read. The operator allows some by --build-contexts.",
		shorten(name, 200))
}

// contextIn reads a directory of a sandbox, or an archive that is a file in it.
func (s *Toolbox) contextIn(ctx context.Context, owner string, client *agent.Client, name string) (*template.Files, error) {
	info, err := client.Stat(ctx, name)
	if err != nil {
		return nil, err
	}
	if info.Type == agent.TypeFile {
		r, _, err := client.ReadFile(ctx, name, 0, -1)
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return s.Store.ReadContext(ctx, owner, r)
	}
	r, err := client.Pack(ctx, name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return s.Store.ReadContext(ctx, owner, r)
}

// parseNetwork parses the argument "network": none, full, or the entries of an allowlist.
func parseNetwork(text string) sandbox.Network {
	switch text {
	case "", sandbox.NetworkNone, sandbox.NetworkFull:
		return sandbox.Network{Mode: text}
	}
	n := sandbox.Network{Mode: sandbox.NetworkAllowlist}
	for entry := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == ',' || r == ' ' }) {
		n.Allow = append(n.Allow, entry)
	}
	return n
}

type templateListInput struct{}

type templateListOutput struct {
	Templates []snapshotInfo `json:"templates"`
	// DiskMB is what all templates of this server take, including what builds keep; DiskBudgetMB is the limit.
	DiskMB       int64 `json:"disk_mb,omitempty"`
	DiskBudgetMB int64 `json:"disk_budget_mb,omitempty"`
}

func (o templateListOutput) text() string {
	var lines []string
	for _, t := range o.Templates {
		lines = append(lines, t.text())
	}
	if o.DiskMB > 0 {
		lines = append(lines, fmt.Sprintf("[all templates of this server take %d of %d MB of disk]", o.DiskMB, o.DiskBudgetMB))
	}
	return strings.Join(lines, "\n")
}

func (s *Toolbox) templateList(ctx context.Context, _ templateListInput) (templateListOutput, error) {
	who, err := caller(ctx)
	if err != nil {
		return templateListOutput{}, err
	}
	out := templateListOutput{Templates: []snapshotInfo{{Name: template.HostName, Kind: "template"}}}
	if s.Store != nil {
		all, err := s.Store.List(who.Owner())
		if err != nil {
			return out, err
		}
		for _, m := range all {
			out.Templates = append(out.Templates, snapshotInfo{Name: m.Name, Kind: "template",
				CreatedAt: m.Created.UTC().Format(time.RFC3339), SizeMB: m.Size >> 20})
		}
		d, err := s.Store.Disk()
		if err != nil {
			return out, err
		}
		out.DiskMB, out.DiskBudgetMB = d.Used>>20, d.Budget>>20
	}
	snaps, err := s.Manager.Snapshots(who.Owner())
	for _, snap := range snaps {
		out.Templates = append(out.Templates, describeSnapshot(snap))
	}
	return out, err
}

type templateDeleteInput struct {
	Name string `json:"name" jsonschema:"from template_list"`
}

type templateDeleteOutput struct {
	Name string `json:"name"`
}

func (o templateDeleteOutput) text() string { return o.Name + " is deleted." }

func (s *Toolbox) templateDelete(ctx context.Context, in templateDeleteInput) (templateDeleteOutput, error) {
	who, err := caller(ctx)
	if err != nil {
		return templateDeleteOutput{}, err
	}
	if in.Name == template.HostName {
		return templateDeleteOutput{}, badArgument("%q is a template of this server and cannot be deleted. template_list shows what can.",
			in.Name)
	}
	if s.Store != nil {
		err := s.Store.Delete(who.Owner(), in.Name)
		if err == nil || !errors.Is(err, sandbox.ErrNoTemplate) {
			return templateDeleteOutput(in), err
		}
		all, err := s.Store.List(who.Owner())
		if err != nil {
			return templateDeleteOutput{}, err
		}
		if slices.ContainsFunc(all, func(m template.Manifest) bool { return m.Name == in.Name }) {
			return templateDeleteOutput{},
				badArgument("%q is a template of this server's operator and cannot be deleted. template_list shows what can.",
					shorten(in.Name, 60))
		}
	}
	return templateDeleteOutput(in), s.Manager.DeleteSnapshot(who.Owner(), in.Name)
}
