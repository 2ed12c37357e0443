package template

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/sandbox"
)

// Builder makes templates from Dockerfiles. All commands of a Dockerfile run in a sandbox. It is safe for concurrent use.
type Builder struct {
	Store   *Store
	Manager *sandbox.Manager
	// Pull fetches an image that is not a template. If it is nil, such images are refused.
	Pull Puller
	// NoNetwork says that sandboxes have no network.
	NoNetwork bool
	Log       *slog.Logger
}

// maxTemplates bounds the number of an owner's templates.
const maxTemplates = 200

// MayName returns nil if an owner may have templates with these names in addition to those that exist.
func (b *Builder) MayName(owner string, names ...string) error {
	list, err := b.Store.List(owner)
	if err != nil {
		return err
	}
	mine := slices.DeleteFunc(list, func(m Manifest) bool { return m.Owner != owner || slices.Contains(names, m.Name) })
	if len(mine)+len(names) > maxTemplates {
		return fmt.Errorf("you have %d templates, which is the limit; delete one: %w", len(mine), sandbox.ErrTooMany)
	}
	return nil
}

// Name gives a template further names. It checks all names before it stores the first.
func (b *Builder) Name(m Manifest, names ...string) (err error) {
	names = slices.Clone(names)
	for i, name := range names {
		if names[i], err = CheckName(name); err != nil {
			return err
		}
	}
	if err := b.MayName(m.Owner, names...); err != nil {
		return err
	}
	for _, m.Name = range names {
		if err := b.Store.Put(m); err != nil {
			return err
		}
	}
	return nil
}

// BuildRequest describes a build.
type BuildRequest struct {
	ID          string // default one of NewBuildID
	Owner, Name string
	Dockerfile  string
	Context     *Files            // nil means none; the caller closes it
	Files       map[string]*Files // further sources, by the name that --from gives; the caller closes them
	Filtered    bool              // the sender of Context has already left out the ignored files
	// Open, if not nil, opens Context and Files when it is the build's turn, so that a waiting build holds none. It also closes them.
	Open    func(context.Context, *BuildRequest) error
	Target  string            // a stage; default the last one
	Args    map[string]string // values of ARG
	Secrets map[string][]byte // of RUN --mount=type=secret, by id
	NoCache bool
	// Login is set for a Dockerfile of FromSteps, as E2B's clients expect: bash runs RUN as a login shell, variables have the values of
	// root's login unless the steps set them, and WORKDIR creates its directory for the user.
	Login bool
	// Limits apply to the build itself, and to sandboxes of the template that ask for none. Zero values are the server's.
	Limits sandbox.Limits
	// Protect applies to sandboxes of the template that ask for none.
	Protect sandbox.Protect
	// Network is the network of the build's RUNs; the default is NetworkFull if the operator provides one. It is also the network that the
	// template's service has while it starts; there the default is none.
	Network            sandbox.Network
	StartCmd, ReadyCmd string
	Timeout            time.Duration // of the whole build; default DefaultBuildTime
	Shown              []Shown       // the steps as the client has written them

	each func(Line) // for Builds.Run
}

// DefaultBuildTime is how long a build may take that sets no Timeout.
const DefaultBuildTime = 30 * time.Minute

// Line is a line of a build's log.
type Line struct {
	Time  time.Time `json:"time"`
	Level string    `json:"level"`          // info or error
	Step  string    `json:"step,omitempty"` // such as "builder 2/7"; "" is the build as a whole
	Text  string    `json:"text"`
}

// Built is the result of a build.
type Built struct {
	Manifest
	ID            string
	Steps, Cached int
	Took          time.Duration
}

// StepError is the failure of a step.
type StepError struct {
	Line    int
	Command string
	Err     error
	Tail    string // the last lines of its output
}

// Error implements error.
func (e *StepError) Error() string {
	text := fmt.Sprintf("Dockerfile, line %d: %s: %v", e.Line, clip(e.Command), e.Err)
	if e.Tail != "" {
		text += "\nThe last lines of its output:\n" + e.Tail
	}
	return text
}

// Unwrap returns the cause.
func (e *StepError) Unwrap() error { return e.Err }

// buildRun is a build in progress.
type buildRun struct {
	*Builder
	job    *job
	req    BuildRequest
	id     string
	plan   *plan
	log    *buildLog
	done   map[int]*result // by stage
	opened map[string]*Files
	steps  int
	cached int
}

// result is what a stage has made.
type result struct {
	layers []Layer
	config v1.Config
	key    string
	parent string
}

// Build runs a build. It calls each, if not nil, with every line of the log. A build that fails names no template, but the steps that
// succeeded are kept and not run again.
func (b *Builder) Build(ctx context.Context, req BuildRequest, each func(Line)) (_ Built, err error) {
	began := time.Now()
	if req.Name, err = CheckName(req.Name); err != nil {
		return Built{}, err
	}
	if err := b.MayName(req.Owner, req.Name); err != nil {
		return Built{}, fmt.Errorf("build %s: %w", req.Name, err)
	}
	j := b.Store.begin(req.Owner)
	defer j.end()
	done, err := j.wait(ctx, access.Builds, 1)
	if err != nil {
		return Built{}, fmt.Errorf("build %s: wait for its turn: %w", req.Name, err)
	}
	defer done()
	plan, err := j.parse(ctx, req)
	if err != nil {
		return Built{}, err
	}
	service := req.Network
	if req.Network.Mode == "" && !b.NoNetwork {
		req.Network.Mode = sandbox.NetworkFull
	}
	limit := cmp.Or(req.Timeout, DefaultBuildTime)
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the build took longer than %s", limit))
	defer cancel()
	r := &buildRun{Builder: b, job: j, req: req, id: cmp.Or(req.ID, NewBuildID()), plan: plan, done: map[int]*result{},
		opened: map[string]*Files{}}
	if r.log, err = b.Store.newLog(r.id, req.Owner, req.Name, each); err != nil {
		return Built{}, err
	}
	defer func() { err = r.finish(err) }()
	r.log.line("info", "", fmt.Sprintf("build %s of %s begins", r.id, req.Name))
	if req.Open != nil {
		if err := req.Open(ctx, &r.req); err != nil {
			return Built{}, err
		}
	}
	if r.req.Context != nil && !req.Filtered {
		if err := r.req.Context.leaveOut(); err != nil {
			return Built{}, fmt.Errorf("build context: %w", err)
		}
	}
	return r.runStages(ctx, service, began)
}

// runStages runs every stage that the target needs and names the result.
func (r *buildRun) runStages(ctx context.Context, service sandbox.Network, began time.Time) (built Built, err error) {
	built.ID = r.id
	for _, i := range r.plan.needed() {
		if r.done[i], err = r.buildStage(ctx, i); err != nil {
			return built, err
		}
	}
	of := r.done[r.plan.target]
	built.Manifest, err = r.job.prepare(ctx, Manifest{Name: r.req.Name, Owner: r.req.Owner, Layers: of.layers, Config: of.config,
		Limits: r.req.Limits, Protect: r.req.Protect,
		StartCmd: r.req.StartCmd, ReadyCmd: r.req.ReadyCmd, Parent: of.parent, Build: r.id})
	if err == nil && built.StartCmd != "" {
		built.Started, err = r.startUp(ctx, built.Manifest, service)
	}
	if err == nil {
		err = r.Store.Put(built.Manifest)
	}
	if err != nil {
		return built, err
	}
	built.Steps, built.Cached, built.Took = r.steps, r.cached, time.Since(began)
	r.log.line("info", "", fmt.Sprintf("built %s in %.1f s: %d steps, %d of them cached", r.req.Name, built.Took.Seconds(), r.steps,
		r.cached))
	return built, nil
}

// finish ends a build, with or without an error.
func (r *buildRun) finish(err error) error {
	for _, f := range r.opened {
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		err = r.Store.asNoSpace(err)
		r.log.line("error", "", err.Error())
		err = &BuildError{ID: r.id, Err: err}
	}
	err = errors.Join(err, r.log.close())
	r.job.end() // what it made has a name by now, or is not needed
	if cerr := r.Store.Collect(); cerr != nil {
		r.Log.Error("collect what builds have left", "error", cerr)
	}
	return err
}

// parse reads the Dockerfile of a build.
func (j *job) parse(ctx context.Context, req BuildRequest) (*plan, error) {
	free, err := j.wait(ctx, access.Work, 1)
	if err != nil {
		return nil, err
	}
	defer free()
	p, err := parse(req.Dockerfile, req.Target, req.Args)
	if err != nil {
		return nil, fmt.Errorf("%w (%w)", err, sandbox.ErrInvalid)
	}
	return p, nil
}

// BuildError is the failure of a build that has a log.
type BuildError struct {
	ID  string
	Err error
}

// Error implements error.
func (e *BuildError) Error() string { return fmt.Sprintf("build %s: %v", e.ID, e.Err) }

// Unwrap returns the cause.
func (e *BuildError) Unwrap() error { return e.Err }

// startUp starts the service of a template and saves the sandbox once it is ready. If the sandbox cannot be saved, the log says so, and
// every sandbox of the template starts its own service.
func (r *buildRun) startUp(ctx context.Context, m Manifest, network sandbox.Network) (*Started, error) {
	image, err := r.job.image(ctx, m.Layers)
	if err != nil {
		return nil, err
	}
	base := r.Store.template(ctx, m, image)
	start := *base.Start
	base.Start = nil
	began := time.Now()
	r.log.line("info", "start", start.Command)
	sb, err := r.Manager.Create(ctx, sandbox.CreateOptions{Owner: r.req.Owner, Base: &base, Transient: true, Limits: r.req.Limits,
		Network:  network,
		Times:    sandbox.Times{Life: DefaultBuildTime, OnTimeout: sandbox.ActionKill},
		Metadata: map[string]string{"build": r.id, "template": m.Name}})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", m.Name, err)
	}
	defer func() { _ = sb.Kill(errors.New("the build is done with it")) }() // Kill logs what it could not end
	out := newLines(func(text string) { r.log.line("info", "start", text) })
	err = sb.RunStartCommand(ctx, start, out.add)
	if out.end(); err != nil {
		return nil, fmt.Errorf("start %s: %w", m.Name, err)
	}
	r.log.line("info", "start", fmt.Sprintf("ready after %.1f s", time.Since(began).Seconds()))
	started := &Started{Name: r.id, Limits: sb.Info().Limits, Network: network.On()}
	dir := r.Store.file("started", started.Name)
	if err := errors.Join(r.Store.makeKind("started"), r.job.need(ctx, dir)); err != nil {
		return nil, err
	}
	if err := sb.SaveTo(ctx, dir); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		r.log.line("info", "start", fmt.Sprintf("it cannot be saved, so every sandbox starts its own: %v", err))
		return nil, nil
	}
	return started, nil
}

// healthCommand turns a HEALTHCHECK into a shell command.
func healthCommand(test []string) string {
	if test[0] == "CMD-SHELL" {
		return strings.Join(test[1:], " ")
	}
	words := slices.Clone(test[1:])
	for i, w := range words {
		words[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
	}
	return strings.Join(words, " ")
}

// defaultUser returns the user of processes that name none: the image's user, otherwise "user" if it exists, otherwise root.
func defaultUser(image, configured string) (string, error) {
	files, err := openFiles(image)
	if err != nil {
		return "", err
	}
	defer files.image.Close()
	if configured != "" {
		return files.numbered(configured), nil
	}
	if entryOf(files.passwd("/etc/passwd"), "user") != nil {
		return "", nil
	}
	return "root", nil
}

// numbered returns the user of an image's config. It replaces the name of a group by its number, and adds group 0, as Docker does, if the
// user is a number without an entry in /etc/passwd.
func (f *Files) numbered(user string) string {
	name, group, both := strings.Cut(user, ":")
	if both {
		if g := entryOf(f.passwd("/etc/group"), group); g != nil {
			return name + ":" + g[2]
		}
		return user
	}
	if _, err := strconv.ParseUint(name, 10, 32); err == nil && entryOf(f.passwd("/etc/passwd"), name) == nil {
		return name + ":0"
	}
	return user
}

// base finds the layers and the config that a stage begins with.
func (r *buildRun) base(ctx context.Context, s stage) (*result, error) {
	if s.from >= 0 {
		of := r.done[s.from]
		return &result{layers: slices.Clone(of.layers), config: *of.config.DeepCopy(), key: of.key, parent: of.parent}, nil
	}
	if strings.EqualFold(s.base, scratch) {
		return &result{parent: scratch, key: r.firstKey(scratch, "")}, nil
	}
	m, err := r.named(ctx, s.base)
	if err != nil {
		return nil, &StepError{Line: s.line, Command: "FROM " + s.base, Err: err}
	}
	config, err := json.Marshal(m.Config)
	if err != nil {
		return nil, err
	}
	if err := r.job.needLayers(ctx, m.Layers); err != nil {
		return nil, err
	}
	return &result{layers: slices.Clone(m.Layers), config: *m.Config.DeepCopy(), parent: s.base, key: r.firstKey(m.Image, string(config))},
		nil
}

// firstKey is the part of the key that all steps depend on. It includes the owner: an owner can reach into the sandboxes of their builds,
// so no other owner uses what these builds made.
func (r *buildRun) firstKey(image, config string) string {
	return hashOf("FROM", r.req.Owner, r.req.Network.Mode, strings.Join(r.req.Network.Allow, ","), image, config)
}

// named finds a template, or pulls an image from a registry.
func (r *buildRun) named(ctx context.Context, name string) (Manifest, error) {
	m, err := r.Store.Get(r.req.Owner, name)
	if err == nil || !errors.Is(err, sandbox.ErrNoTemplate) {
		return m, err
	}
	if name == HostName {
		return m, fmt.Errorf("the template %q is this machine's own programs and cannot be built on; build on %q, which "+
			"'soulbox-mcp template base' makes: %w", HostName, BaseName, sandbox.ErrInvalid)
	}
	if name == BaseName {
		return m, fmt.Errorf("there is no template %q yet: 'soulbox-mcp template base' makes it, in some minutes: %w", BaseName,
			sandbox.ErrNoTemplate)
	}
	if r.Pull == nil {
		return m, fmt.Errorf("there is no template %q, and this server does not pull images (--templates-allow-pull): %w", clip(name),
			sandbox.ErrNoTemplate)
	}
	r.log.line("info", "", "pulling "+name)
	return r.Pull(ctx, r.job, name)
}

// hashOf hashes texts in their order.
func hashOf(parts ...string) string {
	sum := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(sum, "%d:%s", len(p), p)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// files opens the files that --from names.
func (r *buildRun) files(ctx context.Context, from string) (*Files, error) {
	if from == "" {
		if r.req.Context == nil {
			return nil, errors.New("the build has no files to copy from; give it a context")
		}
		return r.req.Context, nil
	}
	if f := r.req.Files[from]; f != nil {
		return f, nil
	}
	if f := r.opened[from]; f != nil {
		return f, nil
	}
	var layers []Layer
	if n := r.plan.stageFrom(from); n >= 0 && r.done[n] != nil {
		layers = r.done[n].layers
	} else {
		m, err := r.named(ctx, from)
		if err != nil {
			return nil, err
		}
		layers = m.Layers
	}
	image, err := r.job.image(ctx, layers)
	if err != nil {
		return nil, err
	}
	f, err := openFiles(image)
	if err == nil {
		r.opened[from] = f
	}
	return f, err
}
