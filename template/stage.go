package template

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/shell"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
)

// stageRun is a stage that is being built. Its sandbox is made for the first step that is not cached.
type stageRun struct {
	*buildRun
	stage
	*result
	index  int
	name   string // in the log
	args   pairs  // in their order, with ENVs: the last value of a name counts
	grown  expansion
	shell  []string
	dirs   []newDir // of WORKDIRs and VOLUMEs, made by the next step
	sb     *sandbox.Sandbox
	client *agent.Client
}

// newDir is a directory to make, with its owner; an existing directory stays as it is.
type newDir struct{ path, owner string }

// plainShell is the default shell of a RUN; loginShell that of a build with BuildRequest.Login, if the image has it.
var (
	plainShell = []string{"/bin/sh", "-c"}
	loginShell = []string{"/bin/bash", "-l", "-c"}
)

// defaultPath is the PATH of images that set none.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// buildStage builds a stage.
func (r *buildRun) buildStage(ctx context.Context, index int) (_ *result, err error) {
	of := r.plan.stages[index]
	s := &stageRun{buildRun: r, stage: of, index: index, name: cmp.Or(of.name, "stage-"+strconv.Itoa(index))}
	if s.result, err = r.base(ctx, s.stage); err != nil {
		return nil, err
	}
	switch s.shell = s.config.Shell; {
	case r.req.Login:
		s.shell = slices.Clone(loginShell)
	case len(s.shell) == 0:
		s.shell = slices.Clone(plainShell)
	}
	defer func() {
		if s.sb != nil {
			err = errors.Join(err, s.sb.Kill(errors.New("the build is done with it")))
		}
	}()
	for i, cmd := range s.commands {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		r.steps++
		where := fmt.Sprintf("%s %d/%d", s.name, i+1, len(s.commands))
		r.log.line("info", where, shown(cmd))
		if err := s.command(ctx, where, cmd); err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			if e := (*StepError)(nil); errors.As(err, &e) {
				e.Err = s.Store.ifFull(e.Err)
				e.Line, e.Command = lineOf(cmd.Location()), shown(cmd)
				return nil, err
			}
			return nil, &StepError{Line: lineOf(cmd.Location()), Command: shown(cmd), Err: s.Store.ifFull(s.Store.asNoSpace(err))}
		}
	}
	if len(s.dirs) > 0 { // the stage ends with directories to make
		err = s.change(ctx, s.name, "WORKDIR", func(context.Context) error { return nil })
	}
	return s.result, err
}

// variables returns the variables for words: ARGs, overridden by ENVs.
func (s *stageRun) variables() pairs {
	var all pairs
	if s.req.Login {
		all = append(all, loginVariables...)
	}
	all = append(all, s.args...)
	for _, kv := range s.config.Env {
		k, v, _ := strings.Cut(kv, "=")
		all = append(all, instructions.KeyValuePairOptional{Key: k, Value: &v})
	}
	return all
}

// command runs one command.
func (s *stageRun) command(ctx context.Context, where string, cmd instructions.Command) error {
	if err := s.expand(ctx, cmd); err != nil {
		return err
	}
	switch c := cmd.(type) {
	case *instructions.RunCommand:
		return s.runCommand(ctx, where, c)
	case *instructions.CopyCommand:
		return s.copy(ctx, where, copying{SourcesAndDest: c.SourcesAndDest, from: c.From, chown: c.Chown, chmod: c.Chmod})
	case *instructions.AddCommand:
		return s.copy(ctx, where, copying{SourcesAndDest: c.SourcesAndDest, chown: c.Chown, chmod: c.Chmod, unpack: c.Unpack == nil ||
			*c.Unpack})
	case *instructions.WorkdirCommand:
		s.config.WorkingDir = s.absolute(c.Path)
		owner := ""
		if s.req.Login {
			owner = s.config.User
		}
		s.dirs = append(s.dirs, newDir{s.config.WorkingDir, cmp.Or(owner, "root")})
	case *instructions.ArgCommand:
		return s.arg(c) // arg adds its values to the key
	default:
		if err := s.configure(cmd); err != nil {
			return err
		}
	}
	s.key = hashOf(s.key, fmt.Sprint(cmd), fmt.Sprint(s.config.Env), s.config.WorkingDir, s.config.User)
	return nil
}

// expand puts the values of variables into the words of a command.
func (s *stageRun) expand(ctx context.Context, cmd instructions.Command) error {
	free, err := s.job.wait(ctx, access.Work, 1)
	if err != nil {
		return err
	}
	defer free()
	vars := s.variables()
	if c, ok := cmd.(instructions.SupportsSingleWordExpansion); ok {
		if err := c.Expand(func(word string) (string, error) { return s.grown.expandWord(s.plan.lex, word, vars) }); err != nil {
			return err
		}
	}
	if c, ok := cmd.(instructions.SupportsSingleWordExpansionRaw); ok { // texts in the Dockerfile, whose quotes stay
		lex := shell.NewLex('\\')
		lex.SkipProcessQuotes = true
		return c.ExpandRaw(func(word string) (string, error) { return s.grown.expandWord(lex, word, vars) })
	}
	return nil
}

// countVariables refuses too many variables.
func (s *stageRun) countVariables() error {
	if n := len(s.args) + len(s.config.Env); n > maxVariables {
		return tooManyVariables(n)
	}
	return nil
}

// arg declares variables.
func (s *stageRun) arg(c *instructions.ArgCommand) error {
	for _, arg := range c.Args {
		if v, ok := s.req.Args[arg.Key]; ok {
			arg.Value = &v
		} else if v, ok := pairs(s.plan.global).Get(arg.Key); arg.Value == nil && ok {
			arg.Value = &v
		}
		s.args = append(s.args, arg)
		s.key = hashOf(s.key, "ARG", arg.Key, arg.ValueString())
	}
	return s.countVariables()
}

// configure records a command that changes only the image's config.
func (s *stageRun) configure(cmd instructions.Command) error {
	cfg := &s.config
	switch c := cmd.(type) {
	case *instructions.EnvCommand:
		for _, kv := range c.Env {
			cfg.Env = slices.DeleteFunc(cfg.Env, func(old string) bool { return strings.HasPrefix(old, kv.Key+"=") })
			cfg.Env = append(cfg.Env, kv.Key+"="+kv.Value)
		}
		return s.countVariables()
	case *instructions.LabelCommand:
		if cfg.Labels == nil {
			cfg.Labels = map[string]string{}
		}
		for _, kv := range c.Labels {
			cfg.Labels[kv.Key] = kv.Value
		}
	case *instructions.UserCommand:
		cfg.User = c.User
	case *instructions.ShellCommand:
		s.shell, cfg.Shell = c.Shell, c.Shell
	case *instructions.CmdCommand:
		cfg.Cmd = s.commandLine(c.ShellDependantCmdLine)
	case *instructions.EntrypointCommand:
		cfg.Entrypoint = s.commandLine(c.ShellDependantCmdLine)
		cfg.Cmd = nil
	case *instructions.ExposeCommand:
		return s.expose(c)
	case *instructions.VolumeCommand:
		if cfg.Volumes == nil {
			cfg.Volumes = map[string]struct{}{}
		}
		for _, v := range c.Volumes {
			cfg.Volumes[v] = struct{}{}
			s.dirs = append(s.dirs, newDir{s.absolute(v), "root"})
		}
	case *instructions.StopSignalCommand:
		cfg.StopSignal = c.Signal
	case *instructions.HealthCheckCommand:
		cfg.Healthcheck = &v1.HealthConfig{Test: c.Health.Test, Interval: c.Health.Interval, Timeout: c.Health.Timeout,
			StartPeriod: c.Health.StartPeriod, Retries: c.Health.Retries}
	case *instructions.MaintainerCommand:
	default:
		return fmt.Errorf("%s is not supported", strings.ToUpper(cmd.Name()))
	}
	return nil
}

func (s *stageRun) expose(c *instructions.ExposeCommand) error {
	if s.config.ExposedPorts == nil {
		s.config.ExposedPorts = map[string]struct{}{}
	}
	vars := s.variables()
	for _, p := range c.Ports {
		words, err := s.grown.expandWords(s.plan.lex, p, vars)
		if err != nil {
			return err
		}
		for _, word := range words {
			port, protocol, ok := strings.Cut(word, "/")
			if !ok {
				protocol = "tcp"
			}
			first, last, _ := strings.Cut(port, "-")
			from, err := strconv.ParseUint(first, 10, 16)
			to, lastErr := strconv.ParseUint(cmp.Or(last, first), 10, 16)
			if err != nil || lastErr != nil || to < from || protocol != "tcp" && protocol != "udp" && protocol != "sctp" {
				return fmt.Errorf("%q is not a port; write a number up to 65535, such as 8080 or 8080/udp", clip(word))
			}
			for n := from; n <= to; n++ {
				s.config.ExposedPorts[fmt.Sprintf("%d/%s", n, protocol)] = struct{}{}
			}
		}
	}
	return nil
}

// commandLine returns a command, with the shell if it needs one.
func (s *stageRun) commandLine(line instructions.ShellDependantCmdLine) []string {
	if line.PrependShell {
		return append(slices.Clone(s.shell), strings.Join(line.CmdLine, " "))
	}
	return line.CmdLine
}

func (s *stageRun) absolute(name string) string {
	if !path.IsAbs(name) {
		name = path.Join(cmp.Or(s.config.WorkingDir, "/"), name)
	}
	return path.Clean(name)
}

// change runs a step that changes files, or takes the layer of an earlier run. by must cover everything that the step depends on.
func (s *stageRun) change(ctx context.Context, where, by string, do func(context.Context) error) error {
	dirs := ""
	for i, d := range s.dirs { // a directory of root adds only its path, so that old keys stay valid
		if i > 0 {
			dirs += "\x00"
		}
		if dirs += d.path; d.owner != "root" {
			dirs += "\x00\x00" + d.owner
		}
	}
	s.key = hashOf(s.key, by, dirs)
	unlock, err := s.Store.lock(ctx, "steps", s.key)
	if err != nil {
		return err
	}
	defer unlock()
	if s.sb == nil && !s.req.NoCache {
		known, ok, err := s.job.known(ctx, s.key)
		if err != nil {
			return err
		}
		if ok {
			s.cached++
			s.log.line("info", where, "cached")
			s.take(known)
			return nil
		}
	}
	if err := s.bootSandbox(ctx); err != nil {
		return err
	}
	for _, dir := range s.dirs {
		if err := s.makeDir(ctx, dir); err != nil {
			return err
		}
	}
	if err := do(ctx); err != nil {
		return err
	}
	made, err := s.capture(ctx, by)
	if err != nil {
		return err
	}
	s.take(made)
	return s.Store.remember(s.key, made)
}

func (s *stageRun) take(made step) {
	s.dirs = nil
	if made.Layer != nil {
		s.layers = append(s.layers, *made.Layer)
	}
}

// bootSandbox boots the sandbox in which the rest of the stage is built.
func (s *stageRun) bootSandbox(ctx context.Context) error {
	if s.sb != nil {
		return nil
	}
	image, err := s.job.image(ctx, s.layers)
	if err != nil {
		return err
	}
	base := &sandbox.Template{Name: "build", ID: chainID(s.layers), Image: image, User: "root", Cwd: "/"}
	times := sandbox.Times{Life: DefaultBuildTime, OnTimeout: sandbox.ActionKill}
	if end, ok := ctx.Deadline(); ok {
		times.Life = time.Until(end) + time.Minute
	}
	s.sb, err = s.Manager.Create(ctx, sandbox.CreateOptions{Owner: s.req.Owner, Base: base, Transient: true, Limits: s.req.Limits,
		Times: times, Network: s.req.Network,
		Metadata: map[string]string{"build": s.id, "template": s.req.Name}})
	if err != nil {
		return err
	}
	if s.client, err = s.sb.Agent(ctx, "build in"); err != nil {
		return err
	}
	return s.client.MarkFiles(ctx)
}

// makeDir makes a directory if it does not exist.
func (s *stageRun) makeDir(ctx context.Context, dir newDir) error {
	if dir.path == "/" {
		return nil
	}
	owner, err := s.userOf(ctx, dir.owner)
	if err != nil {
		return err
	}
	_, err = s.client.Mkdir(ctx, agent.PathRequest{Path: dir.path, User: owner})
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// capture stores the changed files as a layer.
func (s *stageRun) capture(ctx context.Context, by string) (step, error) {
	from, err := s.client.Changes(ctx)
	if err != nil {
		return step{}, fmt.Errorf("keep what has changed: %w", err)
	}
	defer from.Close()
	body := bufio.NewReaderSize(from, 64<<10)
	if head, err := body.Peek(1024); err == nil && !slices.ContainsFunc(head, func(b byte) bool { return b != 0 }) {
		_, err := io.Copy(io.Discard, body)
		return step{}, err // no changes: only the end of a tar
	}
	l, err := s.job.newLayer(ctx, body, s.sb.Info().Limits.Disk+layerSlack, clip(by))
	if err != nil {
		return step{}, fmt.Errorf("keep what has changed: %w", err)
	}
	return step{Layer: &l}, nil
}

// shown formats a command for the log. It shows the texts of here-documents.
func shown(cmd instructions.Command) string {
	text := fmt.Sprint(cmd)
	if run, ok := cmd.(*instructions.RunCommand); ok && len(run.Files) > 0 {
		text = "RUN"
		for _, f := range run.Files {
			text += " " + strings.TrimSpace(f.Data)
		}
	}
	return text
}
