package tools

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/cursor"
	"soulbox.dev/soulbox/internal/names"
	"soulbox.dev/soulbox/sandbox"
)

func (s *Toolbox) sandboxTools() []tool {
	return []tool{
		define(s, "sandbox_create",
			"Make another sandbox, an isolated Linux machine. Not needed for the first: exec makes this session's own.",
			hints{title: "Create a sandbox"}, s.sandboxCreate),
		define(s, "sandbox_list", "List sandboxes, newest first.",
			hints{title: "List sandboxes", readOnly: true, idempotent: true}, s.sandboxList),
		define(s, "sandbox_get", "Describe a sandbox: state, end, limits, usage.",
			hints{title: "Describe a sandbox", readOnly: true, idempotent: true}, s.sandboxGet),
		define(s, "sandbox_kill", "End a sandbox. Its files and processes are lost.",
			hints{title: "Kill a sandbox", destructive: true}, s.sandboxKill),
	}
}

type sandboxCreateInput struct {
	Template string `json:"template,omitempty" jsonschema:"or a snapshot; default base, else host: this machine's programs"`

	Metadata      map[string]string `json:"metadata,omitempty" jsonschema:"to find it by"`
	Env           map[string]string `json:"env,omitempty" jsonschema:"environment of all its processes"`
	TimeoutMS     int64             `json:"timeout_ms,omitempty" jsonschema:"life time; default 3600000"`
	MaxLifetimeMS int64             `json:"max_lifetime_ms,omitempty" jsonschema:"bound of all extensions; default none"`
	IdleMS        int64             `json:"idle_timeout_ms,omitempty" jsonschema:"without a call; default none"`
	OnTimeout     string            `json:"on_timeout,omitempty" enum:"pause,kill" jsonschema:"default pause: to disk"`
	GraceMS       int64             `json:"grace_ms,omitempty" jsonschema:"for work to finish at the end"`
	AutoResume    *bool             `json:"auto_resume,omitempty" jsonschema:"calls resume it after a timeout; default true"`
	CPU           float64           `json:"cpu,omitempty" jsonschema:"cores; default 2"`
	MemoryMB      int64             `json:"memory_mb,omitempty" jsonschema:"default 1024"`
	DiskMB        int64             `json:"disk_mb,omitempty" jsonschema:"default 10240"`
	Pids          int64             `json:"pids,omitempty" jsonschema:"processes at once; default 512"`

	Network string `json:"network,omitempty" jsonschema:"by HTTP proxy: none (default), full, or domains and ranges: pypi.org,*.debian.org"`

	Protect      *sandbox.Protection `json:"protect,omitempty" jsonschema:"save it regularly, to resume from if it fails"`
	DiskInMemory bool                `json:"disk_in_memory,omitempty" jsonschema:"half of memory at most; smaller when idle"`
}

// sandboxInfo describes a sandbox in results.
type sandboxInfo struct {
	sandbox.Description
	Default bool `json:"default,omitempty" jsonschema:"it is this session's own"`
}

// parseProtection parses the argument "protect".
func parseProtection(p *sandbox.Protection) (out sandbox.Protect, err error) {
	if p == nil {
		return out, nil
	}
	out.Memory = p.Memory
	if out.Every = -1; p.Every == "off" {
		return out, nil
	}
	if out.Every, err = time.ParseDuration(p.Every); err != nil || out.Every <= 0 {
		return out, badArgument("The argument \"protect\" needs \"every\": a time such as \"5m\", or \"off\".")
	}
	return out, nil
}

func (s *Toolbox) describe(ctx context.Context, i sandbox.Info) sandboxInfo {
	return sandboxInfo{i.Describe(), s.isDefault(ctx, i.ID)}
}

func (i sandboxInfo) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "sandbox %s is %s", i.SandboxID, i.State)
	if i.Cause != "" {
		fmt.Fprintf(&b, " (%s)", i.Cause)
	}
	if i.Default {
		b.WriteString(", this session's own")
	}
	fmt.Fprintf(&b, ": template %s, created %s", i.Template, i.CreatedAt)
	if i.Parent != "" {
		fmt.Fprintf(&b, " from %s", i.Parent)
	}
	i.writeTimes(&b)
	i.writeSaves(&b)
	if i.Notice != "" {
		fmt.Fprintf(&b, ", notice: %s", i.Notice)
	}
	fmt.Fprintf(&b, ", limits: cpu %g, memory %d MB, disk %d MB, %d processes", i.CPU, i.MemoryMB, i.DiskMB, i.Pids)
	if i.Network != "" {
		fmt.Fprintf(&b, ", network: %s", i.Network)
	}
	for _, k := range slices.Sorted(maps.Keys(i.Metadata)) {
		fmt.Fprintf(&b, ", %s=%s", k, i.Metadata[k])
	}
	return b.String()
}

// writeTimes says since when a sandbox is paused, and when it ends.
func (i sandboxInfo) writeTimes(b *strings.Builder) {
	if i.PausedAt != "" {
		where, how := "in memory", "by sandbox_resume"
		if i.OnDisk {
			where = "on disk"
		}
		if i.Resumes {
			how = "by any call"
		}
		fmt.Fprintf(b, ", paused %s since %s, resumed %s", where, i.PausedAt, how)
	}
	for _, at := range []struct{ what, when string }{{"ends", i.EndsAt}, {"ended", i.EndedAt}, {"kept until", i.RemoveAt}} {
		if at.when != "" {
			fmt.Fprintf(b, ", %s %s", at.what, at.when)
		}
	}
	if i.PausedAt != "" {
		return
	}
	if i.OnTimeout == string(sandbox.ActionPause) {
		b.WriteString(" (then paused to disk)")
	}
	if i.IdleMS > 0 {
		fmt.Fprintf(b, ", or when it was idle for %d ms", i.IdleMS)
	}
	if i.MaxMS > 0 {
		fmt.Fprintf(b, ", at most %d ms after its start", i.MaxMS)
	}
}

// writeSaves says what is saved of a sandbox, and how often.
func (i sandboxInfo) writeSaves(b *strings.Builder) {
	what := "memory and files"
	if i.FilesOnly {
		what = "files"
	}
	switch {
	case i.State == string(sandbox.Failed) && i.OnDisk:
		fmt.Fprintf(b, ", its %s saved at %s can be resumed by sandbox_resume", what, i.SavedAt)
	case i.SavedS != nil:
		fmt.Fprintf(b, ", its %s were saved at %s", what, i.SavedAt)
	}
	if i.Protect != nil {
		fmt.Fprintf(b, ", saved every %s", i.Protect.Every)
	}
}

type sandboxCreateOutput struct {
	sandboxInfo
	asked float64 // cores
}

func (o sandboxCreateOutput) text() string {
	if o.asked > o.CPU {
		return fmt.Sprintf("%s. The cpu granted is %g: this server has no more cores.", o.sandboxInfo.text(), o.CPU)
	}
	return o.sandboxInfo.text()
}

func (s *Toolbox) sandboxCreate(ctx context.Context, in sandboxCreateInput) (sandboxCreateOutput, error) {
	times := sandbox.Times{OnTimeout: sandbox.Action(in.OnTimeout), NoAutoResume: in.AutoResume != nil && !*in.AutoResume}
	for _, t := range []struct {
		name string
		ms   int64
		to   *time.Duration
	}{{"timeout_ms", in.TimeoutMS, &times.Life}, {"max_lifetime_ms", in.MaxLifetimeMS, &times.Max},
		{"idle_timeout_ms", in.IdleMS, &times.Idle}, {"grace_ms", in.GraceMS, &times.Grace}} {
		d, err := millis(t.name, &t.ms)
		if err != nil {
			return sandboxCreateOutput{}, err
		}
		*t.to = *d
	}
	if max(in.MemoryMB, in.DiskMB, in.Pids) > maxNumber || min(in.MemoryMB, in.DiskMB, in.Pids) < 0 {
		return sandboxCreateOutput{}, badArgument("The arguments \"memory_mb\", \"disk_mb\" and \"pids\" must be from 0 to %d.", maxNumber)
	}
	p := newProgress(ctx)
	p.tell("starting a sandbox")
	who, err := caller(ctx)
	if err != nil {
		return sandboxCreateOutput{}, err
	}
	protect, err := parseProtection(in.Protect)
	if err != nil {
		return sandboxCreateOutput{}, err
	}
	sb, err := s.Manager.Create(ctx, sandbox.CreateOptions{
		Protect: protect, Owner: who.Owner(), Template: in.Template, Metadata: in.Metadata, Env: in.Env, Times: times,
		Network: parseNetwork(in.Network),
		Limits: sandbox.Limits{CPU: in.CPU, Memory: in.MemoryMB << 20, Disk: in.DiskMB << 20, Processes: in.Pids,
			DiskInMemory: in.DiskInMemory},
	})
	if err != nil {
		return sandboxCreateOutput{}, err
	}
	s.adopt(ctx, sb)
	return sandboxCreateOutput{s.describe(ctx, sb.Info()), in.CPU}, nil
}

type sandboxListInput struct {
	Metadata map[string]string `json:"metadata,omitempty" jsonschema:"all pairs must match"`

	State string `json:"state,omitempty" enum:"creating,running,paused,killed,failed" jsonschema:"default all that have not ended"`

	Template string `json:"template,omitempty"`
	Since    string `json:"since,omitempty" jsonschema:"made since then (RFC 3339), or so long ago"`
	Until    string `json:"until,omitempty" jsonschema:"made before"`
	Limit    int    `json:"limit,omitempty" jsonschema:"default 50"`
	Cursor   string `json:"cursor,omitempty" jsonschema:"next_cursor of the last page"`
}

type sandboxListOutput struct {
	Sandboxes  []sandboxInfo `json:"sandboxes"`
	NextCursor string        `json:"next_cursor,omitempty"`
}

func (o sandboxListOutput) text() string {
	if len(o.Sandboxes) == 0 {
		return "There are no such sandboxes."
	}
	var lines []string
	for _, i := range o.Sandboxes {
		lines = append(lines, i.text())
	}
	if o.NextCursor != "" {
		lines = append(lines, "[more: call sandbox_list with cursor "+o.NextCursor+"]")
	}
	return strings.Join(lines, "\n")
}

func (s *Toolbox) sandboxList(ctx context.Context, in sandboxListInput) (sandboxListOutput, error) {
	if in.Limit <= 0 || in.Limit > 200 {
		in.Limit = 50
	}
	who, err := caller(ctx)
	if err != nil {
		return sandboxListOutput{}, err
	}
	since, err := moment("since", in.Since)
	if err != nil {
		return sandboxListOutput{}, err
	}
	until, err := moment("until", in.Until)
	if err != nil {
		return sandboxListOutput{}, err
	}
	s.Manager.AwaitSettled(ctx)
	list := s.Manager.List(sandbox.Filter{Until: until, Owner: who.Owner(), State: sandbox.State(in.State), Template: in.Template,
		Metadata: in.Metadata, Since: since})
	page, next, err := cursor.Page("sandboxes", in.Cursor, list, in.Limit, true, func(i sandbox.Info) string {
		return cursor.Key(i.Created, i.ID)
	})
	if errors.Is(err, cursor.ErrInvalid) {
		return sandboxListOutput{}, badCursor("sandbox_list", "leave it out to start again")
	}
	if err != nil {
		return sandboxListOutput{}, err
	}
	out := sandboxListOutput{Sandboxes: []sandboxInfo{}, NextCursor: next}
	for _, i := range page {
		out.Sandboxes = append(out.Sandboxes, s.describe(ctx, i))
	}
	return out, nil
}

type sandboxGetInput struct{ target }

type sandboxGetOutput struct {
	sandboxInfo
	Usage     *usageInfo `json:"usage,omitempty"`
	Listening []int      `json:"listening_ports,omitempty" jsonschema:"on which something listens in it; port_expose makes them reachable"`
	Ports     []portInfo `json:"exposed_ports,omitempty"`
	Shell     *shellInfo `json:"shell,omitempty" jsonschema:"what exec remembers for this session; no values"`
}

type shellInfo struct {
	Cwd  string              `json:"cwd"`
	Kept map[string][]string `json:"kept,omitempty" jsonschema:"names by kind"`
}

// text is one clause for each kind of thing that the shell remembers.
func (i *shellInfo) text() string {
	if i == nil {
		return ""
	}
	text := ", the session's shell is in " + i.Cwd
	for _, kind := range slices.Sorted(maps.Keys(i.Kept)) {
		text += fmt.Sprintf(", %s: %s", kind, strings.Join(i.Kept[kind], " "))
	}
	return text
}

// shellOf reports what the shell of a call's session remembers.
func (s *Toolbox) shellOf(ctx context.Context, client *agent.Client) (*shellInfo, error) {
	name, err := s.shell(ctx, false)
	if err != nil {
		return nil, err
	}
	i, err := client.Shell(ctx, agent.ShellRequest{Shell: name})
	if err != nil {
		return nil, err
	}
	info := &shellInfo{Cwd: names.Show(i.Cwd), Kept: map[string][]string{
		"exported": i.Env, "unset": i.Unset, "variables": i.Variables, "functions": i.Functions, "aliases": i.Aliases, "options": i.Options,
	}}
	for kind, list := range info.Kept {
		if len(list) == 0 {
			delete(info.Kept, kind)
		}
		for j, name := range list {
			list[j] = renderLine(name)
		}
	}
	return info, nil
}

type portInfo struct {
	Port int    `json:"port"`
	URL  string `json:"url"`
}

type usageInfo struct {
	MemoryMB     int64 `json:"memory_mb" jsonschema:"of its processes"`
	HostMemoryMB int64 `json:"host_memory_mb" jsonschema:"of the host, all in all"`
	DiskMB       int64 `json:"disk_mb"`
	CPUMS        int64 `json:"cpu_ms"`
	Processes    int64 `json:"processes"`
	OOMKills     int64 `json:"oom_kills,omitempty"`
	AgentMB      int64 `json:"agent_memory_mb"`
}

func (o sandboxGetOutput) text() string {
	if o.Usage == nil {
		return o.sandboxInfo.text()
	}
	u, ports := o.Usage, ""
	if len(o.Listening) > 0 {
		ports = ", listening on ports " + strings.Trim(fmt.Sprint(o.Listening), "[]")
	}
	for _, p := range o.Ports {
		ports += fmt.Sprintf(", port %d is at %s", p.Port, p.URL)
	}
	return fmt.Sprintf("%s, usage: memory %d MB (host %d MB), disk %d MB, cpu %d ms, %d processes, %d oom kills",
		o.sandboxInfo.text(), u.MemoryMB, u.HostMemoryMB, u.DiskMB, u.CPUMS, u.Processes, u.OOMKills) + ports + o.Shell.text()
}

func (s *Toolbox) sandboxGet(ctx context.Context, in sandboxGetInput) (sandboxGetOutput, error) {
	sb, err := s.sandbox(ctx, in.SandboxID)
	if err != nil {
		return sandboxGetOutput{}, err
	}
	out := sandboxGetOutput{sandboxInfo: s.describe(ctx, sb.Info())}
	for _, p := range sb.Ports() {
		out.Ports = append(out.Ports, portInfo{p.Port, s.portURL(sb, p)})
	}
	if out.State != string(sandbox.Running) {
		out.Usage, err = lastUsage(sb)
		return out, err
	}
	err = s.lookInto(ctx, sb, &out)
	if errors.Is(err, sandbox.ErrState) || errors.Is(err, sandbox.ErrUnfit) { // it cannot be asked, or was paused or ended meanwhile
		out.sandboxInfo, err = s.describe(ctx, sb.Info()), nil
	}
	return out, err
}

// lookInto reports what only a running sandbox can tell.
func (s *Toolbox) lookInto(ctx context.Context, sb *sandbox.Sandbox, out *sandboxGetOutput) error {
	inside, outside, err := sb.Usage(ctx)
	if err != nil {
		return err
	}
	if out.Listening, err = sb.Listening(ctx); err != nil {
		return err
	}
	client, err := sb.Look("look into")
	if err != nil {
		return err
	}
	if out.Shell, err = s.shellOf(ctx, client); err != nil {
		return err
	}
	out.Usage = &usageInfo{
		MemoryMB: inside.Memory >> 20, HostMemoryMB: outside.Memory >> 20, DiskMB: inside.DiskUsed >> 20, CPUMS: inside.CPUMS,
		Processes: inside.Processes, OOMKills: inside.OOMKills, AgentMB: inside.AgentMemory >> 20,
	}
	return nil
}

// lastUsage is the last measured usage of a sandbox that does not run.
func lastUsage(sb *sandbox.Sandbox) (*usageInfo, error) {
	samples, err := sb.Samples(time.Time{}, time.Time{})
	if err != nil || len(samples) == 0 {
		return nil, err
	}
	last := samples[len(samples)-1]
	return &usageInfo{MemoryMB: last.Memory >> 20, DiskMB: last.DiskUsed >> 20, CPUMS: last.CPUMS, Processes: last.Processes}, nil
}

const (
	maxNumber = 1 << 30                  // of MB or processes
	maxMillis = 10 * 365 * 24 * 3600_000 // ten years
)

// millis turns an argument into a duration; nil stays nil.
func millis(name string, ms *int64) (*time.Duration, error) {
	if ms == nil {
		return nil, nil
	}
	if *ms < 0 || *ms > maxMillis {
		return nil, badArgument("The argument %q must be from 0 to %d.", name, int64(maxMillis))
	}
	d := time.Duration(*ms) * time.Millisecond
	return &d, nil
}

type sandboxKillInput struct {
	SandboxID string `json:"sandbox_id" header:"Sandbox-Id" jsonschema:"from sandbox_list or an earlier result"`
	Confirm   bool   `json:"confirm,omitempty" jsonschema:"even if processes run in it"`
}

type sandboxKillOutput struct {
	SandboxID string `json:"sandbox_id"`
	State     string `json:"state"`
}

func (o sandboxKillOutput) text() string { return "Sandbox " + o.SandboxID + " is " + o.State + "." }

// sandboxKill asks first if processes still run, because their work is lost. A sandbox that does not answer is killed without asking.
func (s *Toolbox) sandboxKill(ctx context.Context, in sandboxKillInput) (sandboxKillOutput, error) {
	who, err := caller(ctx)
	if err != nil {
		return sandboxKillOutput{}, err
	}
	sb, err := s.Manager.Get(who.Owner(), in.SandboxID)
	if err != nil {
		return sandboxKillOutput{}, err
	}
	if n := running(ctx, sb); n > 0 && !in.Confirm {
		question := fmt.Sprintf("In sandbox %s %s still running; their work and its files are lost when it ends.", sb.ID(),
			pluralAre(n, "process"))
		if err := s.confirm(ctx, "kill "+sb.ID(), question); err != nil {
			return sandboxKillOutput{}, err
		}
	}
	if err := sb.Kill(sandbox.CauseKilled); err != nil {
		return sandboxKillOutput{}, err
	}
	return sandboxKillOutput{SandboxID: sb.ID(), State: string(sb.Info().State)}, nil
}

// running counts the processes that run in a sandbox; 0 if it does not answer soon.
func running(ctx context.Context, sb *sandbox.Sandbox) int {
	client, err := sb.Look("list processes of")
	if err != nil {
		return 0
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	list, err := client.List(ctx, agent.ListRequest{State: agent.StateRunning})
	if err != nil {
		return 0
	}
	return len(list)
}
