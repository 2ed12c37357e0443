package guest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/agent/guest/rawsys"
)

const (
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	maxEnv      = 1 << 20
)

// start starts a process, waits for its end up to the requested time, and describes it.
func (s *Server) start(ctx context.Context, req agent.StartRequest) (agent.Snapshot, error) {
	p, err := s.spawn(req)
	if err != nil {
		return agent.Snapshot{}, err
	}
	return p.wait(ctx, time.Duration(req.WaitMS)*time.Millisecond, nil, req.Window)
}

// starters is how many starts are prepared at a time, so that the memory guard does not wait for hundreds of them.
const starters = 2

// takeSlot waits until one more start may be prepared. The slot is free again before the program is executed, which may take as long as the
// guest wants.
func (s *Server) takeSlot() (done func()) {
	s.starting <- struct{}{}
	s.guard.pass()
	return sync.OnceFunc(func() { <-s.starting })
}

// spawn starts a process and adds it to the table.
func (s *Server) spawn(req agent.StartRequest) (_ *process, err error) {
	done := s.takeSlot()
	defer done()
	p, env, err := s.prepare(req)
	if err != nil {
		return nil, err
	}
	if err := s.addProcess(p); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.removeProcess(p)
		}
	}()
	if s.groups != nil {
		if p.group, err = s.groups.add(); err != nil {
			return nil, err
		}
	}
	p.collector, p.prepared = s.collector, done
	run := s.runOnPipes
	if p.terminal != nil {
		run = s.runOnTerminal
	}
	stdin, err := run(p, env)
	if err != nil {
		p.group.release(false) // the collector sees the end of the pipes by itself
		return nil, err
	}
	s.follow(p, stdin)
	return p, nil
}

// holdTime is how long output is held for a stream that has not opened.
const holdTime = 10 * time.Second

// holdFirst holds the output, if the request asks for it, until a stream holds it.
func (p *process) holdFirst() {
	if !p.req.Hold {
		return
	}
	mine := p.output.hold(0)
	p.release = sync.OnceFunc(func() { p.collector.resume(p.output.advance(mine, 0, true)...) })
	after(holdTime, p.release)
}

// runOnPipes starts a process with pipes, and returns the writing end of its stdin, if it has one.
func (s *Server) runOnPipes(p *process, env []string) (stdin *os.File, err error) {
	made, err := s.takeOutputs(p.user)
	if err != nil {
		return nil, err
	}
	defer made.closeEnds()
	p.output, p.pipes = made.spool, made.pipes
	p.holdFirst()
	stdio := [3]int{s.null, made.ends[0], made.ends[1]}
	if !p.req.KeepStdin && len(p.req.Stdin) == 0 {
		return nil, s.launch(p, env, stdio)
	}
	input, err := rawsys.Pipe(1)
	if err != nil {
		return nil, fmt.Errorf("start: open pipe: %w", err)
	}
	defer rawsys.Close(input[0])
	stdio[0] = input[0]
	err = s.givePipe(input[0], identity{}, p.user)
	if err == nil {
		err = s.launch(p, env, stdio)
	}
	if err != nil {
		rawsys.Close(input[1])
		return nil, err
	}
	return os.NewFile(uintptr(input[1]), "stdin"), nil
}

// runOnTerminal starts a process with a terminal, and returns our end of the terminal.
func (s *Server) runOnTerminal(p *process, env []string) (*os.File, error) {
	child, master, reader, err := s.openTerminal(*p.terminal, p.user)
	if err != nil {
		return nil, err
	}
	defer child.Close()
	p.output = newSpool(s.opts.SpoolDir)
	p.holdFirst()
	p.pipes = []*outputPipe{s.collector.add(reader, agent.OnStdout, true, p.output)}
	var launched error
	if err := control(child, func(fd uintptr) error {
		launched = s.launch(p, env, [3]int{int(fd), int(fd), int(fd)})
		return nil
	}); err != nil || launched != nil {
		return nil, errors.Join(err, launched, master.Close())
	}
	return master, nil
}

// checked returns a valid request with its defaults filled in.
func (s *Server) checked(req agent.StartRequest) (agent.StartRequest, error) {
	if req.Terminal != nil {
		size := agent.Terminal{Rows: cmp.Or(req.Terminal.Rows, defaultRows), Cols: cmp.Or(req.Terminal.Cols, defaultCols)}
		if err := size.Check(); err != nil {
			return req, err
		}
		req.Terminal = &size
		if req.Command == "" && len(req.Args) == 0 {
			req.Args = []string{s.shell, "-il"}
		}
	}
	if (req.Command == "") == (len(req.Args) == 0) {
		return req, agent.Invalid("start: give either a command or args")
	}
	if strings.IndexByte(req.Command, 0) >= 0 || slices.ContainsFunc(req.Args,
		func(a string) bool { return strings.IndexByte(a, 0) >= 0 }) {
		return req, agent.Invalid("start: the command contains a NUL byte")
	}
	if len(req.Command) > agent.MaxCommand {
		return req, fmt.Errorf("start: the command has %d bytes, at most %d are possible: %w", len(req.Command), agent.MaxCommand,
			agent.ErrCommand)
	}
	if len(req.Tag) > 1 && req.Tag[0] == 'p' && strings.Trim(req.Tag[1:], "0123456789") == "" {
		return req, agent.Invalid("start: the tag %q looks like the id of a process", req.Tag)
	}
	if len(req.Tag) > maxTag {
		return req, agent.Invalid("start: the tag has %d bytes, at most %d are allowed", len(req.Tag), maxTag)
	}
	return req, nil
}

// prepare works out everything that a process needs.
func (s *Server) prepare(req agent.StartRequest) (*process, []string, error) {
	req, err := s.checked(req)
	if err != nil {
		return nil, nil, err
	}
	user, err := s.lookup(req.User)
	if err != nil {
		return nil, nil, err
	}
	run, state := (*shellRun)(nil), &shellState{}
	if req.Shell != "" && path.Base(s.shell) == "bash" {
		run = s.shells.begin(shellID{req.Shell, user.name})
		state = run.begin
	}
	s.mu.Lock()
	home, gone := state.existing(cmp.Or(s.config.Cwd, user.home))
	s.mu.Unlock()
	cwd := cmp.Or(req.Cwd, home)
	if !path.IsAbs(cwd) || strings.IndexByte(cwd, 0) >= 0 {
		return nil, nil, agent.Invalid("start in %s: the working directory must be an absolute path", quoted(cwd))
	}
	if !rawsys.IsDir(cwd) {
		if req.Cwd != "" {
			return nil, nil, fmt.Errorf("start in %s: %w", quoted(cwd), agent.ErrCwd)
		}
		cwd = "/"
	}
	base := s.environment(user, req.Terminal != nil)
	vars := state.environment(base)
	vars["PWD"] = cwd
	maps.Copy(vars, req.Env)
	env, err := environ(vars)
	if err != nil {
		return nil, nil, err
	}
	if run != nil {
		run.base, run.env, run.given, run.cwd = base, vars, req.Env, cwd
		if req.Cwd == "" {
			run.gone = gone
		}
	}
	p := &process{shell: run, req: req, terminal: req.Terminal, user: user, cwd: cwd, args: req.Args, done: make(chan struct{}),
		writing: make(chan struct{}, 1)}
	p.req.Env = nil // dropped, since it may be secret
	return p, env, nil
}

// environment returns the variables that every process of a user gets.
func (s *Server) environment(user identity, terminal bool) map[string]string {
	vars := map[string]string{
		"PATH": defaultPath, "HOME": user.home, "USER": user.name, "LOGNAME": user.name, "SHELL": s.shell, "LANG": "C.UTF-8",
	}
	if terminal {
		vars["TERM"] = "xterm-256color"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.Copy(vars, s.config.Env)
	return vars
}

// environ returns the environment in the form that execve takes.
func environ(vars map[string]string) ([]string, error) {
	for k, v := range vars {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.IndexByte(v, 0) >= 0 {
			return nil, agent.Invalid("start: %q is not a name of an environment variable, or its value contains a NUL byte",
				agent.Clip(k, 80))
		}
	}
	env := make([]string, 0, len(vars))
	for k, v := range vars {
		env = append(env, k+"="+v)
	}
	slices.Sort(env)
	size := 0
	for _, kv := range env {
		if size += len(kv) + 1; len(kv) > agent.MaxCommand || size > maxEnv {
			return nil, agent.Invalid("start: the environment is too large: a variable may have %d bytes, all together %d",
				agent.MaxCommand, maxEnv)
		}
	}
	return env, nil
}

// softFiles is how many descriptors a process may have unless it asks for more. The agent's own limit is the maximum, with which programs
// that close every possible descriptor would take seconds.
const softFiles = 4096

// startTime is how long the execution of a program may take before it is killed: it may hang on files that the guest controls.
const startTime = 10 * time.Second

// launch forks and executes. A command of plain words is executed without the shell, which would only execute it in turn.
func (s *Server) launch(p *process, env []string, stdio [3]int) (err error) {
	limit := startTime
	if own := time.Duration(p.req.TimeoutMS) * time.Millisecond; own > 0 {
		limit = min(own, startTime)
	}
	attr := rawsys.Attr{Dir: p.cwd, Env: env, Stdio: stdio, TTY: p.terminal != nil,
		Limit: func(kill func()) func() { return after(limit, kill).stop }}
	if p.group != nil {
		attr.Group = int(p.group.dir.Fd())
	}
	if s.opts.Init {
		attr.User, attr.Files = &rawsys.Credential{UID: p.user.uid, GID: p.user.gid, Groups: p.user.groups}, &s.files
	}
	p.started = time.Now()
	if p.req.Command != "" {
		if words := simpleCommand(p.req.Command, env); words != nil && !p.shell.needed() {
			if name := lookPath(words[0], p.cwd, env); name != "" {
				if p.child, err = s.fork(p, name, words, attr); err == nil || errors.Is(err, syscall.EAGAIN) {
					return explainFork(err)
				}
			}
		}
		p.args = []string{s.shell, "-c", p.req.Command}
		if p.shell != nil {
			forked := p.req.Fork || p.terminal != nil
			if !forked && (p.shell.needed() || !changesNothing(p.req.Command, env)) {
				p.shell.report()
			}
			if p.shell.file != "" || p.shell.needed() {
				var more []string
				p.args, more = p.shell.wrap(s.shell, p.req.Command)
				attr.Env = append(env, more...)
			}
		}
	}
	name := lookPath(p.args[0], p.cwd, env)
	if name == "" {
		if file := p.args[0]; strings.Contains(file, "/") {
			if !path.IsAbs(file) {
				file = path.Join(p.cwd, file)
			}
			if _, err := os.Stat(file); err == nil {
				return fmt.Errorf("start %q: it is not a program: %w", agent.Clip(p.args[0], 200), syscall.EACCES)
			}
		}
		return fmt.Errorf("start %q: command not found: %w", agent.Clip(p.args[0], 200), syscall.ENOENT)
	}
	p.child, err = s.fork(p, name, p.args, attr)
	if errors.Is(err, syscall.EACCES) && p.args[0] == s.shell {
		return fmt.Errorf("start in %s: user %s may not enter it: %w", quoted(p.cwd), p.user.name, syscall.EACCES)
	}
	if err != nil {
		err = fmt.Errorf("start %q: %w", agent.Clip(p.args[0], 200), explainFork(err))
	}
	return err
}

// fork starts a process. If the user may no longer enter the directory that the shell remembers, the process starts in the root directory:
// otherwise no command could leave that directory.
func (s *Server) fork(p *process, name string, args []string, attr rawsys.Attr) (child, error) {
	p.prepared()
	c, err := s.reaper.forkExec(name, args, attr)
	if !errors.Is(err, syscall.EACCES) || p.shell == nil || p.req.Cwd != "" || p.shell.begin.cwd == "" || attr.Dir == "/" {
		return c, err
	}
	again := attr
	env := slices.DeleteFunc(slices.Clone(attr.Env), func(kv string) bool { return strings.HasPrefix(kv, "PWD=") })
	again.Dir, again.Env = "/", append(env, "PWD=/")
	c, err2 := s.reaper.forkExec(name, args, again)
	if err2 != nil {
		return c, err // the directory was not the reason
	}
	p.shell.gone, p.shell.cwd, p.cwd = p.shell.begin.cwd, "/", "/"
	return c, nil
}

// explainFork names the limit that made a fork fail.
func explainFork(err error) error {
	if errors.Is(err, syscall.EAGAIN) {
		return fmt.Errorf("the sandbox has as many processes as it may have: %w", agent.ErrLimit)
	}
	return err
}

// follow starts what a running process needs: its input, its timeout, and the wait for its end.
func (s *Server) follow(p *process, stdin *os.File) {
	if stdin != nil {
		p.mu.Lock()
		p.stdin = stdin
		p.mu.Unlock()
		if input := p.req.Stdin; len(input) > 0 {
			p.req.Stdin = nil
			// The feeder ends with the process at the latest, because finish closes stdin.
			go func() { _, _ = p.writeStdin(s.ctx, bytes.NewReader(input), !p.req.KeepStdin && p.terminal == nil) }()
		}
	}
	if p.req.TimeoutMS > 0 {
		p.stop = after(time.Duration(p.req.TimeoutMS)*time.Millisecond, p.expire)
	}
	p.namesake = nil
	p.ready.Store(true)
	s.noteStart(p)
	s.reaper.await(p.child, func(status exitStatus) {
		reports := p.shell != nil && p.shell.file != ""
		if !reports {
			p.finish(status)
		}
		go func() {
			if reports { // not on the thread that all others wait for: it may take as long as the guest wants, within bounds
				p.finish(status)
			}
			s.noteEnd(p)
			// Children that it left behind may still write: the spool is finished only when none can.
			for _, pipe := range p.pipes {
				<-pipe.eof
			}
			p.output.finish()
			s.forgetEnded(p)
		}()
	})
	if s.guard != nil {
		s.guard.wake()
	}
}

// lookPath finds an executable as execvp does; "" means that there is none.
func lookPath(name, cwd string, env []string) string {
	dirs := []string{""}
	if !strings.Contains(name, "/") {
		dirs = nil
		for _, kv := range env {
			if v, ok := strings.CutPrefix(kv, "PATH="); ok {
				dirs = strings.Split(v, ":")
			}
		}
	}
	for _, dir := range dirs {
		full := name
		if !path.IsAbs(full) {
			if full = path.Join(dir, name); !path.IsAbs(full) {
				full = path.Join(cwd, full)
			}
		}
		if st, err := rawsys.Stat(full); err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Mode&0o111 != 0 {
			return full
		}
	}
	return ""
}
