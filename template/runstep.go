package template

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
)

// runCommand runs a RUN.
func (s *stageRun) runCommand(ctx context.Context, where string, c *instructions.RunCommand) error {
	args, err := s.runArgs(c)
	if err != nil {
		return err
	}
	by := append([]string{"RUN", s.config.User, s.config.WorkingDir}, args...)
	for _, f := range c.Files {
		by = append(by, f.Name, f.Data)
	}
	for _, m := range instructions.GetMounts(c) {
		plain := *m
		plain.Env, plain.Mode, plain.UID, plain.GID = nil, nil, nil, nil // they are pointers
		by = append(by, fmt.Sprintf("%+v", plain), told(m.Env), told(m.Mode), told(m.UID), told(m.GID))
		if id := secretID(m); m.Type == instructions.MountTypeSecret && m.Required && s.req.Secrets[id] == nil {
			return fmt.Errorf("--mount=type=secret: there is no secret %q; give it with the build", clip(id))
		}
		if m.Type != instructions.MountTypeBind {
			continue
		}
		n, files, err := s.bindSource(ctx, m)
		if err != nil {
			return fmt.Errorf("--mount=type=bind: %w", err)
		}
		sum, err := files.digest(ctx, n)
		if err != nil {
			return err
		}
		by = append(by, sum)
	}
	return s.change(ctx, where, hashOf(by...), func(ctx context.Context) (err error) {
		m, err := s.mount(ctx, c)
		if err == nil {
			err = s.exec(ctx, where, args, m.env)
		}
		return errors.Join(err, m.end(ctx))
	})
}

// told formats a value that may be missing.
func told[T any](v *T) string {
	if v == nil {
		return ""
	}
	return fmt.Sprint("=", *v)
}

// runArgs returns the command of a RUN. A single heredoc is a script for the shell, or for the interpreter that it names; the shell reads
// all other heredocs (Dockerfile reference, "Here-Documents").
func (s *stageRun) runArgs(c *instructions.RunCommand) ([]string, error) {
	if len(c.Files) == 0 {
		return s.commandLine(c.ShellDependantCmdLine), nil
	}
	line := strings.Join(c.CmdLine, " ")
	heredoc, err := parser.ParseHeredoc(line)
	if err != nil {
		return nil, err
	}
	if heredoc == nil || len(c.Files) != 1 {
		var b strings.Builder
		b.WriteString(line)
		for _, f := range c.Files {
			b.WriteString("\n" + f.Data + f.Name)
		}
		return append(slices.Clone(s.shell), b.String()), nil
	}
	data := c.Files[0].Data
	if s.req.Login { // always for the shell, even if it begins with #!
		return append(slices.Clone(s.shell), data), nil
	}
	if c.Files[0].Chomp {
		data = parser.ChompHeredocContent(data)
	}
	if rest, ok := strings.CutPrefix(data, "#!"); ok { // the script names its interpreter, which reads it from a file
		first, _, _ := strings.Cut(rest, "\n")
		words := strings.Fields(first)
		if len(words) == 0 {
			return nil, errors.New("the script names no interpreter in its first line")
		}
		return append(words, scriptArg, data), nil
	}
	return append(slices.Clone(s.shell), data), nil
}

// scriptArg precedes a script that must become a file.
const scriptArg = "\x00script"

// scriptFile is where a script is while it runs; it is not among the changes of the step.
const scriptFile = agent.BuildDir + "/script"

// exec runs a command to its end, and then kills everything that it started.
func (s *stageRun) exec(ctx context.Context, where string, args []string, secret map[string]string) error {
	if n := len(args); n > 2 && args[n-2] == scriptArg {
		if _, err := s.client.WriteFile(ctx, scriptFile, strings.NewReader(args[n-1]),
			agent.WriteOptions{User: "root", Perm: 0o755}); err != nil {
			return err
		}
		args = append(slices.Clone(args[:n-2]), scriptFile)
	}
	user, err := s.userOf(ctx, s.config.User)
	if err != nil {
		return err
	}
	if args, err = s.withShell(ctx, args); err != nil {
		return err
	}
	req := agent.StartRequest{Args: args, Env: s.environment(), User: user, Cwd: cmp.Or(s.config.WorkingDir, "/")}
	maps.Copy(req.Env, secret)
	snap, err := s.client.Start(ctx, req)
	if err != nil {
		return err
	}
	out := newLines(func(text string) { s.log.line("info", where, text) })
	over := make(chan error, 1)
	following, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		over <- s.client.Output(following, snap.Process.ID, 0, true, func(f agent.OutputFrame) error { out.add(f); return nil })
	}()
	p, err := s.wait(ctx, snap.Process.ID)
	// Kill what the command left behind, so that the next step begins with the files alone.
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTime)
	defer cancel()
	if _, kerr := s.client.Kill(ending, snap.Process.ID); kerr != nil && !errors.Is(kerr, agent.ErrEnded) {
		err = errors.Join(err, kerr)
	}
	if err != nil {
		return err
	}
	select {
	case <-over:
	case <-ending.Done():
	}
	stop()
	out.end()
	if p.Dropped > 0 {
		s.log.line("info", where, fmt.Sprintf("%d bytes of output were too many and are not kept", p.Dropped))
	}
	if p.ExitCode == 0 && p.Cause == "" {
		return nil
	}
	tail := out.tail()
	return &StepError{Err: s.ifFull(ctx, howEnded(p), tail), Tail: tail}
}

// environment is that of a step: the arguments of the build that have a value, and above them the variables of the image.
func (s *stageRun) environment() map[string]string {
	env := map[string]string{"PATH": defaultPath}
	for _, kv := range s.args {
		if kv.Value != nil {
			env[kv.Key] = *kv.Value
		}
	}
	for _, kv := range s.config.Env {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	return env
}

// ifFull turns the error of a step into a NoSpaceError if the disk is full, or if the step's output says that it was.
func (s *stageRun) ifFull(ctx context.Context, err error, tail string) error {
	if host := s.Store.ifFull(err); errors.Is(host, sandbox.ErrNoDisk) {
		return host
	}
	u, uerr := s.client.Usage(ctx, nil)
	free := u.DiskTotal - u.DiskUsed
	if uerr != nil || free >= fullDisk && !strings.Contains(strings.ToLower(tail), unix.ENOSPC.Error()) {
		return err
	}
	return &NoSpaceError{Step: u.DiskTotal, Free: free, Err: err}
}

// howEnded says how a failed command ended.
func howEnded(p agent.Process) error {
	switch {
	case p.Cause == agent.CauseOOM:
		return errors.New("it was killed because it exceeded its memory limit; give the build more memory")
	case p.LimitHit:
		return fmt.Errorf("exit code %d; it exceeded its limit of processes", p.ExitCode)
	case p.Signal != "":
		return fmt.Errorf("it was ended by %s", p.Signal)
	}
	return fmt.Errorf("exit code %d", p.ExitCode)
}

// wait waits for the end of a process.
func (s *stageRun) wait(ctx context.Context, id string) (agent.Process, error) {
	for {
		snap, err := s.client.Wait(ctx, agent.WaitRequest{Process: id, WaitMS: waitPart})
		if err != nil || snap.Process.State == agent.StateExited {
			return snap.Process, err
		}
	}
}

// withShell replaces the login shell by plainShell if the image has no bash, as minimal images have none.
func (s *stageRun) withShell(ctx context.Context, args []string) ([]string, error) {
	if n := len(loginShell); !s.req.Login || len(args) < n || !slices.Equal(args[:n], loginShell) {
		return args, nil
	}
	_, err := s.client.Stat(ctx, loginShell[0])
	if errors.Is(err, fs.ErrNotExist) {
		return append(slices.Clone(plainShell), args[len(loginShell):]...), nil
	}
	return args, err
}

// userOf returns the user of a RUN. A number that belongs to no user gets group 0, as with Docker.
func (s *stageRun) userOf(ctx context.Context, configured string) (string, error) {
	user := cmp.Or(configured, "root")
	name, group, both := strings.Cut(user, ":")
	uid, gid, err := s.lookup(ctx, "/etc/passwd", name)
	if err != nil {
		if name == "root" {
			return "root", nil
		}
		if s.req.Login {
			return "", fmt.Errorf("unauthenticated: invalid username: '%s'", clip(user))
		}
		return "", fmt.Errorf("USER %s: %w", clip(user), err)
	}
	if !both {
		if gid < 0 {
			return fmt.Sprintf("%d:0", uid), nil
		}
		return name, nil
	}
	if gid, _, err = s.lookup(ctx, "/etc/group", group); err != nil {
		return "", fmt.Errorf("USER %s: %w", clip(user), err)
	}
	return name + ":" + strconv.Itoa(gid), nil
}

// sortedKeys returns the sorted keys of a map.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// killTime bounds the time to kill what a step left behind; waitPart is the longest single wait for a process, in milliseconds.
const (
	killTime = 10 * time.Second
	waitPart = 60_000
)
