package api

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/api/envd"
	"soulbox.dev/soulbox/internal/names"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

// ownRoutes returns the routes that this server has in addition to E2B's API, for the command line. All are below /v1.
func (c *Control) ownRoutes() map[string]func(*call) error {
	return map[string]func(*call) error{
		"GET /v1/server":                           c.describeServer,
		"GET /v1/sandboxes":                        c.listAll,
		"POST /v1/sandboxes":                       c.createOwn,
		"GET /v1/sandboxes/{id}":                   c.describe,
		"PATCH /v1/sandboxes/{id}":                 c.change,
		"POST /v1/sandboxes/{id}/pause":            c.pauseWithOptions,
		"POST /v1/sandboxes/{id}/resume":           c.resumeWithOptions,
		"POST /v1/sandboxes/{id}/snapshots":        c.snapshotOwn,
		"GET /v1/sandboxes/{id}/processes":         c.processes,
		"GET /v1/sandboxes/{id}/envd/{path...}":    c.inside,
		"POST /v1/sandboxes/{id}/envd/{path...}":   c.inside,
		"GET /v1/sandboxes/{id}/ports":             c.listPorts,
		"PUT /v1/sandboxes/{id}/ports/{port}":      c.exposePort,
		"DELETE /v1/sandboxes/{id}/ports/{port}":   c.closePort,
		"POST /v1/sandboxes/{id}/url":              c.fileURL,
		"GET /v1/templates":                        c.listOwnTemplates,
		"PUT /v1/templates/{name}":                 c.pullTemplate,
		"POST /v1/templates/{name}/push":           c.pushTemplate,
		"POST /v1/templates/{name}/copy":           c.copyTemplate,
		"POST /v1/templates/{name}/builds/{bid}":   c.buildDockerfile,
		"GET /v1/templates/{name}/builds/last":     c.lastBuild,
		"PUT /v1/templates/{name}/context/{hash}":  c.sendContext,
		"HEAD /v1/templates/{name}/context/{hash}": c.hasContext,
	}
}

func (c *Control) describeServer(r *call) error {
	s := c.Self
	s.API, s.Oldest = client.API, client.Oldest
	if !c.Local {
		s.PID, s.State = 0, ""
	}
	return r.answer(http.StatusOK, s)
}

// described describes a sandbox in the form of /v1.
func (c *Control) described(i sandbox.Info, ports []sandbox.Port) client.Sandbox {
	out := client.Sandbox{ID: i.ID, Template: templateOf(i), State: string(i.State), Cause: i.Cause, Parent: i.Parent, Metadata: i.Metadata,
		CPU:      i.Limits.CPU,
		MemoryMB: i.Limits.Memory >> 20, DiskMB: i.Limits.Disk >> 20, Processes: i.Limits.Processes, Created: i.Created, Changed: i.Changed,
		OnTimeout:  string(i.Times.OnTimeout),
		AutoResume: !i.Times.NoAutoResume, OnDisk: i.OnDisk,
		Network: client.Network{Mode: cmp.Or(i.Network.Mode, sandbox.NetworkNone), Allow: i.Network.Allow, Deny: i.Network.Deny}}
	if i.Protect.Every > 0 {
		out.Protect = &client.Protect{EveryS: int64(i.Protect.Every.Seconds()), Memory: i.Protect.Memory}
	}
	out.SavedAt, out.SavedFilesOnly, out.Notice = i.Saved, i.SavedFiles, i.Notice
	switch {
	case i.State == sandbox.Running:
		out.ExpiresAt = i.ExpiresAt
	case i.State == sandbox.Paused || i.OnDisk:
		out.LeftS, out.RemoveAt, out.AutoResume = int64(i.Left.Seconds()), i.RemoveAt, i.AutoResume
	}
	for _, p := range ports {
		out.Ports = append(out.Ports, client.Port{Port: p.Port, Public: p.Public})
	}
	return out
}

// listAll lists sandboxes, the newest first; ended ones only if the query asks for their state.
func (c *Control) listAll(r *call) error {
	q := r.URL.Query()
	metadata, err := metadataQuery(q.Get("metadata"))
	if err != nil {
		return err
	}
	states := map[string]bool{}
	for _, s := range strings.Split(cmp.Or(q.Get("state"), "creating,running,paused"), ",") {
		if !slices.Contains(sandbox.States(), sandbox.State(s)) {
			return refuse(http.StatusBadRequest, "there is no state %.40q: the states are %s", s, joined(sandbox.States()))
		}
		states[s] = true
	}
	c.Manager.AwaitSettled(r.Context()) // sandboxes that another server left behind are adopted in a moment
	out := []client.Sandbox{}
	for _, i := range c.Manager.List(sandbox.Filter{Owner: r.owner, Metadata: metadata}) {
		if states[string(i.State)] || q.Get("state") == "" && i.OnDisk { // failed sandboxes that can be resumed
			out = append(out, c.described(i, nil))
		}
	}
	slices.SortFunc(out, func(a, b client.Sandbox) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID))
	})
	return r.answer(http.StatusOK, out)
}

func joined[T ~string](all []T) string {
	texts := make([]string, len(all))
	for i, t := range all {
		texts[i] = string(t)
	}
	return strings.Join(texts, ", ")
}

// createOwn makes a sandbox with the server's defaults. It has no network unless the client asks for one.
func (c *Control) createOwn(r *call) error {
	var body client.NewSandbox
	if err := r.body(&body); err != nil {
		return err
	}
	if body.CPU < 0 || body.MemoryMB < 0 || body.MemoryMB > maxMB || body.DiskMB < 0 || body.DiskMB > maxMB || body.TimeoutS < 0 ||
		body.TimeoutS > maxLife {
		return refuse(http.StatusBadRequest, "limits and times are not negative, and at most %d MB and %d seconds", maxMB, maxLife)
	}
	name := body.Template
	if name != "" {
		name = c.templateName(r.owner, name)
	}
	sb, err := c.Manager.Create(r.Context(), sandbox.CreateOptions{Owner: r.owner, Template: name, Metadata: body.Metadata, Env: body.Env,
		Limits:  sandbox.Limits{CPU: body.CPU, Memory: body.MemoryMB << 20, Disk: body.DiskMB << 20, Processes: body.Processes},
		Times:   sandbox.Times{Life: time.Duration(body.TimeoutS) * time.Second, OnTimeout: sandbox.Action(body.OnTimeout)},
		Network: sandbox.Network{Mode: body.Network.Mode, Allow: body.Network.Allow, Deny: body.Network.Deny},
		Protect: protectOf(body.Protect)})
	if err != nil {
		return err
	}
	return r.answer(http.StatusCreated, c.described(sb.Info(), sb.Ports()))
}

// describe describes a sandbox, also one that has ended.
func (c *Control) describe(r *call) error {
	sb, err := c.anySandbox(r)
	if err != nil {
		return err
	}
	return r.answer(http.StatusOK, c.described(sb.Info(), sb.Ports()))
}

func (c *Control) change(r *call) error {
	var body client.Update
	sb, err := c.bodyOf(r, &body)
	if err != nil {
		return err
	}
	u := sandbox.Update{Metadata: body.Metadata, OnTimeout: sandbox.Action(body.OnTimeout)}
	if body.Protect != nil {
		protect := protectOf(body.Protect)
		u.Protect = &protect
	}
	for from, to := range map[*int64]**time.Duration{body.ExtendS: &u.Extend, body.TimeoutS: &u.Lifetime} {
		if from == nil {
			continue
		}
		d, err := seconds("a time", from, 0, maxLife)
		if err != nil {
			return err
		}
		*to = &d
	}
	i, err := sb.Update(r.Context(), u)
	if err != nil {
		return gone(sb, err)
	}
	return r.answer(http.StatusOK, c.described(i, sb.Ports()))
}

// pauseWithOptions pauses a sandbox as the body says.
func (c *Control) pauseWithOptions(r *call) error {
	var body client.Pause
	sb, err := c.bodyOf(r, &body)
	if err != nil {
		return err
	}
	if body.InMemory && body.FilesOnly {
		return refuse(http.StatusBadRequest, "give either inMemory or filesOnly, not both: a sandbox paused in memory keeps its "+
			"memory")
	}
	err = sb.Pause(r.Context(), sandbox.PauseOptions{ToDisk: !body.InMemory, FilesOnly: body.FilesOnly,
		AutoResume: !sb.Info().Times.NoAutoResume})
	if err != nil {
		return gone(sb, err)
	}
	return r.answer(http.StatusOK, c.described(sb.Info(), sb.Ports()))
}

// protectOf translates a requested protection: nil is the server's default, 0 seconds mean off.
func protectOf(p *client.Protect) sandbox.Protect {
	switch {
	case p == nil:
		return sandbox.Protect{}
	case p.EveryS <= 0:
		return sandbox.Protect{Every: -1}
	}
	return sandbox.Protect{Every: time.Duration(min(p.EveryS, maxLife)) * time.Second, Memory: p.Memory}
}

// resumeWithOptions resumes as the body says a sandbox that is paused, or one that has failed and was saved.
func (c *Control) resumeWithOptions(r *call) error {
	var body client.Resume
	sb, err := c.bodyOf(r, &body)
	if err != nil {
		return err
	}
	if body.MemoryMB < 0 || body.MemoryMB > maxMB {
		return refuse(http.StatusBadRequest, "memoryMB is from 0 to %d", maxMB)
	}
	o := sandbox.ResumeOptions{FilesOnly: body.FilesOnly, Memory: body.MemoryMB << 20}
	if err := sb.ResumeWith(r.Context(), o); err != nil && (sb.Info().State != sandbox.Running || o != sandbox.ResumeOptions{}) {
		return gone(sb, err)
	}
	return r.answer(http.StatusOK, c.described(sb.Info(), sb.Ports()))
}

// processes lists the processes of a sandbox, also ended ones that are still known. It does not wake a paused sandbox.
func (c *Control) processes(r *call) error {
	sb, err := c.liveSandbox(r)
	if err != nil {
		return err
	}
	inside, err := sb.Look("list the processes of")
	if err != nil {
		return gone(sb, err)
	}
	list, err := inside.List(r.Context(), agent.ListRequest{})
	if err != nil {
		return gone(sb, err)
	}
	out := []client.Process{}
	for _, p := range list {
		out = append(out, client.Process{ID: p.ID, PID: p.PID, Tag: p.Tag, State: p.State,
			Command: cmp.Or(p.Command, strings.Join(p.Args, " ")), User: p.User, Cwd: cmp.Or(p.ShellCwd, p.Cwd),
			Started: p.Started, Ended: p.Ended, ExitCode: p.ExitCode, Signal: p.Signal, Cause: p.Cause, CPUMS: p.CPUMS, Memory: p.Memory,
			Output:   p.Output,
			Terminal: p.Terminal != nil, StdinOpen: p.StdinOpen})
	}
	return r.answer(http.StatusOK, out)
}

// inside serves envd's services to the sandbox's owner, without a token of the sandbox. A call wakes a paused sandbox if it may.
func (c *Control) inside(r *call) error {
	sb, err := c.liveSandbox(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	inner := r.Clone(ctx)
	inner.URL.Path, inner.URL.RawPath = "/"+r.PathValue("path"), ""
	inner.Body = r.whole
	r.w.Header().Set("Content-Security-Policy", "sandbox") // content of a sandbox must not run at the server's own name
	c.Gateway.inside.Serve(asAttachment{r.w}, inner, envd.Target{Sandbox: sb})
	return nil
}

func (c *Control) port(r *call) (*sandbox.Sandbox, int, error) {
	sb, err := c.liveSandbox(r)
	if err != nil {
		return nil, 0, err
	}
	port, err := strconv.Atoi(r.PathValue("port"))
	if err != nil || strconv.Itoa(port) != r.PathValue("port") || port < 1 || port > 65535 {
		return nil, 0, refuse(http.StatusBadRequest, "a port is a number from 1 to 65535, not %.40q", r.PathValue("port"))
	}
	return sb, port, nil
}

func (c *Control) portOf(sb *sandbox.Sandbox, p sandbox.Port) client.Port {
	out := client.Port{Port: p.Port, Public: p.Public, URL: "http://" + p.Address()}
	if c.Gateway != nil && c.Gateway.Base != nil {
		out.URL = c.Gateway.URL(sb, p)
	}
	return out
}

// listPorts lists the ports that are exposed, and those on which something listens.
func (c *Control) listPorts(r *call) error {
	sb, err := c.liveSandbox(r)
	if err != nil {
		return err
	}
	out := []client.Port{}
	listening, err := sb.Listening(r.Context())
	if err != nil && !errors.Is(err, sandbox.ErrState) { // in a paused sandbox it is unknown what listens
		return gone(sb, err)
	}
	exposed := map[int]bool{}
	for _, p := range sb.Ports() {
		one := c.portOf(sb, p)
		one.Listening, exposed[p.Port] = slices.Contains(listening, p.Port), true
		out = append(out, one)
	}
	for _, n := range listening {
		if !exposed[n] {
			out = append(out, client.Port{Port: n, Listening: true})
		}
	}
	slices.SortFunc(out, func(a, b client.Port) int { return a.Port - b.Port })
	return r.answer(http.StatusOK, out)
}

// maxPortWait is how long a call waits until something listens, as MCP's port_expose does.
const maxPortWait = 50 * time.Second

// exposePort makes a port reachable, and says whether something listens there, now or after a while.
func (c *Control) exposePort(r *call) error {
	var body struct {
		Public bool  `json:"public"`
		WaitMS int64 `json:"waitMs"`
	}
	if err := r.body(&body); err != nil {
		return err
	}
	sb, port, err := c.port(r)
	if err != nil {
		return err
	}
	if body.WaitMS < 0 || body.WaitMS > maxPortWait.Milliseconds() {
		return refuse(http.StatusBadRequest, "waitMs is from 0 to %d", maxPortWait.Milliseconds())
	}
	p, err := sb.Expose(port, body.Public)
	if err != nil {
		return gone(sb, err)
	}
	out := c.portOf(sb, p)
	if out.Listening, err = sb.AwaitPort(r.Context(), port, time.Duration(body.WaitMS)*time.Millisecond); err != nil {
		return gone(sb, err)
	}
	return r.answer(http.StatusOK, out)
}

func (c *Control) closePort(r *call) error {
	sb, port, err := c.port(r)
	if err != nil {
		return err
	}
	if err := sb.Unexpose(port); err != nil {
		return gone(sb, err)
	}
	return r.done(http.StatusNoContent)
}

const maxURLLife = 7 * 24 * 3600 // seconds

// fileURL signs a URL for one file; everyone who has the URL can use it.
func (c *Control) fileURL(r *call) error {
	var body struct {
		Path      string `json:"path"`
		Operation string `json:"operation"`
		Seconds   *int64 `json:"seconds"`
	}
	sb, err := c.bodyOf(r, &body)
	if err != nil {
		return err
	}
	if body.Operation = cmp.Or(body.Operation, envd.OpRead); body.Operation != envd.OpRead && body.Operation != envd.OpWrite ||
		body.Path == "" {
		return refuse(http.StatusBadRequest, "give a path, and as operation read or write")
	}
	life, err := seconds("seconds", body.Seconds, 3600, maxURLLife)
	if err != nil {
		return err
	}
	if c.Gateway.Base == nil && c.Gateway.Own == nil {
		return refuse(http.StatusConflict, "this server has only a socket, so it has no URLs: start 'soulbox-mcp http'")
	}
	return r.answer(http.StatusOK, map[string]string{"url": c.Gateway.FileURL(sb, names.Parse(body.Path), body.Operation,
		time.Now().Add(life))})
}

func (c *Control) describedTemplate(m template.Manifest) client.Template {
	l := c.Manager.Limits(m.Limits)
	return client.Template{Name: m.Name, Build: m.Build, SizeMB: m.Size >> 20, Created: m.Created, Shared: m.Owner == "", CPU: l.CPU,
		MemoryMB: l.Memory >> 20, DiskMB: l.Disk >> 20, StartCmd: m.StartCmd}
}

func (c *Control) listOwnTemplates(r *call) error {
	all, err := c.Store.List(r.owner)
	if err != nil {
		return err
	}
	out := []client.Template{}
	for _, m := range all {
		out = append(out, c.describedTemplate(m))
	}
	host := c.describedTemplate(template.Manifest{Name: template.HostName})
	if c.templateName(r.owner, template.BaseName) == "" {
		host.Aliases = []string{template.BaseName}
	}
	return r.answer(http.StatusOK, append(out, host))
}

// copyTemplate stores a template that the caller sees under another name, as the caller's own.
func (c *Control) copyTemplate(r *call) error {
	var body struct {
		To string `json:"to"`
	}
	if err := r.body(&body); err != nil {
		return err
	}
	to, err := template.CheckName(plainName(r.owner, body.To))
	if err != nil {
		return err
	}
	if err := c.Builds.MayName(r.owner, to); err != nil {
		return err
	}
	m, err := c.Store.Copy(r.owner, plainName(r.owner, r.PathValue("name")), to)
	if err != nil {
		return err
	}
	return r.answer(http.StatusCreated, c.describedTemplate(m))
}

// registry reads the reference of an image in a registry. It is for the operator only, because registries get the operator's credentials.
func (c *Control) registry(r *call) (reference string, err error) {
	var body struct {
		Reference string `json:"reference"`
	}
	if err := r.body(&body); err != nil {
		return "", err
	}
	if r.owner != "" || !c.Local {
		return "", refuse(http.StatusForbidden,
			"registries get the operator's credentials: only the operator can pull and push, on the machine of the server")
	}
	if body.Reference == "" {
		return "", refuse(http.StatusBadRequest, "reference is missing, such as docker.io/library/alpine:3")
	}
	return body.Reference, nil
}

func (c *Control) pullTemplate(r *call) error {
	reference, err := c.registry(r)
	if err != nil {
		return err
	}
	m, err := c.Store.Pull(r.Context(), template.Manifest{Name: r.PathValue("name")}, reference)
	if err != nil {
		return err
	}
	return r.answer(http.StatusOK, c.describedTemplate(m))
}

func (c *Control) pushTemplate(r *call) error {
	reference, err := c.registry(r)
	if err != nil {
		return err
	}
	m, err := c.Store.Get(r.owner, plainName(r.owner, r.PathValue("name")))
	if err != nil {
		return err
	}
	out := c.describedTemplate(m)
	if out.Digest, err = c.Store.Push(r.Context(), m, reference); err != nil {
		return err
	}
	return r.answer(http.StatusOK, out)
}
