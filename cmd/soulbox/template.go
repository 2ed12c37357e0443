package main

import (
	"archive/tar"
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
	"github.com/spf13/cobra"

	"soulbox.dev/soulbox/api/client"
)

// configName is the name of the file next to a Dockerfile with the settings that a Dockerfile cannot express.
const configName = "soulbox.toml"

// templateConfig is the content of that file.
type templateConfig struct {
	Name       string            `toml:"name"`
	Dockerfile string            `toml:"dockerfile"`
	Start      string            `toml:"start_cmd"`
	Ready      string            `toml:"ready_cmd"`
	CPU        int               `toml:"cpu"`
	MemoryMB   int64             `toml:"memory_mb"`
	DiskMB     int64             `toml:"disk_mb"`
	Protect    string            `toml:"protect"`
	ProtectAll bool              `toml:"protect_memory"`
	Args       map[string]string `toml:"args"`
}

func (a *app) templateCommand() *cobra.Command {
	t := group(&cobra.Command{Use: "template", Short: "Build, list and move templates",
		Long:    "Build, list and move templates: the file systems that sandboxes begin from.",
		Example: "  soulbox template init --name web\n  soulbox template build\n  soulbox sandbox create --template web"})
	t.AddCommand(a.initCommand(), a.buildCommand(), a.templateListCommand(), a.templateDeleteCommand(), a.templateCopyCommand(),
		a.pullCommand(), a.pushCommand(), a.buildLogsCommand())
	return t
}

func (a *app) initCommand() *cobra.Command {
	var conf templateConfig
	var from string
	c := &cobra.Command{Use: "init [DIRECTORY]", Short: "Begin a template", Args: between(0, "DIRECTORY"),
		Long: "Write a commented Dockerfile and soulbox.toml into a directory. What no flag gives is asked for, if there is a " +
			"terminal. Existing files are left alone.",
		Example: "  soulbox template init\n  soulbox template init web --name web --from base --start 'python3 -m http.server'",
		RunE: func(c *cobra.Command, args []string) error {
			dir := "."
			if len(args) > 0 {
				dir = args[0]
			}
			defer context.AfterFunc(c.Context(), func() { os.Exit(128 + int(syscall.SIGINT)) })() // a read of stdin does not end with ctx
			return a.init(dir, conf, from)
		}}
	c.Flags().StringVar(&conf.Name, "name", "", "`name` of the template")
	c.Flags().StringVar(&from, "from", "", "`template` or image to begin from; default base")
	c.Flags().StringVar(&conf.Start, "start", "", "`command` that runs in each of its sandboxes from the beginning")
	return c
}

func (a *app) init(dir string, conf templateConfig, from string) error {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	_, asked := terminalOf(a.stdin)
	in := bufio.NewReader(a.stdin)
	for _, q := range []struct {
		to           *string
		what, unless string
	}{{&conf.Name, "Name of the template", strings.ToLower(filepath.Base(abs))}, {&from, "It begins from", "base"},
		{&conf.Start, "Command that runs in it from the beginning", ""}} {
		if *q.to == "" && asked {
			fmt.Fprintf(a.stderr, "%s [%s]: ", q.what, q.unless) // if stderr fails, no user is at the terminal
			line, err := in.ReadString('\n')
			if err != nil && err != io.EOF {
				return err
			}
			*q.to = strings.TrimSpace(line)
		}
		*q.to = cmp.Or(*q.to, q.unless)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, f := range []struct{ name, text string }{
		{"Dockerfile", fmt.Sprintf(newDockerfile, from)},
		{configName, fmt.Sprintf(newConfig, conf.Name, conf.Start)},
	} {
		file, err := os.OpenFile(filepath.Join(dir, f.name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if errors.Is(err, fs.ErrExist) {
			if err := a.printf("%s exists already, and is left alone.\n", filepath.Join(dir, f.name)); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		_, err = file.WriteString(f.text)
		if err := errors.Join(err, file.Close()); err != nil {
			return err
		}
		if err := a.printf("%s is written.\n", filepath.Join(dir, f.name)); err != nil {
			return err
		}
	}
	return a.printf("Build it with: soulbox template build %s\n", dir)
}

const newDockerfile = `# The files of this template's sandboxes. Build it with 'soulbox template build'.
# A template of the server (soulbox template list), or an image if the server may pull it.
FROM %s

# Packages, as root:
# RUN apt-get update && apt-get install -y --no-install-recommends ripgrep

# Files next to this one; Dockerfile.dockerignore or else .dockerignore names those that are not sent:
# COPY . /home/user/project

# The directory and the user of commands:
# WORKDIR /home/user/project
# USER user
`

const newConfig = `# Settings of 'soulbox template build' that are not in the Dockerfile.
name = %q

# Runs in every sandbox from the beginning: it is started once and saved with its memory, so it is ready at once.
start_cmd = %q
# Succeeds when start_cmd is ready; without it the build waits until something listens on a port.
# ready_cmd = "curl -s localhost:8000"

# Limits of its sandboxes:
# cpu = 2
# memory_mb = 1024
# disk_mb = 10240
# Save them at this interval, to resume them if they fail: their files, and with protect_memory also their processes.
# protect = "5m"
# protect_memory = true

# Values of ARG:
# [args]
# VERSION = "1.2"
`

func (a *app) buildCommand() *cobra.Command {
	var conf templateConfig
	var args []string
	var target, push string
	var noCache bool
	c := &cobra.Command{Use: "build [DIRECTORY]", Short: "Build a template", Args: between(0, "DIRECTORY"),
		Long: "Build a template from the Dockerfile in a directory, with the files next to it, except those in Dockerfile.dockerignore " +
			"or else .dockerignore. The file soulbox.toml there has the other settings.",
		Example: "  soulbox template build\n  soulbox template build web --name web:v2 --no-cache\n  soulbox template build --push " +
			"registry.example.com/team/web:1",
		RunE: func(c *cobra.Command, given []string) error {
			dir := "."
			if len(given) > 0 {
				dir = given[0]
			}
			if conf.CPU < 0 {
				return usageError{errors.New("--cpu is a number of cores, such as 2")}
			}
			conf, err := conf.read(dir)
			if err != nil {
				return err
			}
			more, err := readPairs("--build-arg", args)
			if err != nil {
				return err
			}
			for k, v := range more {
				conf.Args[k] = v
			}
			return a.build(c.Context(), dir, conf, client.NewBuild{Target: target, NoCache: noCache}, push)
		}}
	f := c.Flags()
	f.StringVar(&conf.Name, "name", "", "`name` of the template, perhaps with a :tag")
	f.StringVarP(&conf.Dockerfile, "file", "f", "", "`path` of the Dockerfile, below the directory; default Dockerfile")
	f.StringVar(&conf.Start, "start", "", "`command` that runs in each of its sandboxes from the beginning")
	f.StringVar(&conf.Ready, "ready", "", "`command` that succeeds when the start command is ready")
	f.IntVar(&conf.CPU, "cpu", 0, "`cores` of its sandboxes")
	f.Var(size{&conf.MemoryMB}, "memory", "memory of its sandboxes, in `MB`, or such as 4G")
	f.Var(size{&conf.DiskMB}, "disk", "disk of its sandboxes, in `MB`, or such as 20G")
	f.StringArrayVar(&args, "build-arg", nil, "`KEY=VALUE` of an ARG; may be repeated")
	f.StringVar(&target, "target", "", "`stage` to build; default the last one")
	f.BoolVar(&noCache, "no-cache", false, "run every step again")
	f.StringVar(&push, "push", "", "then push it to a registry, as `REF`")
	return c
}

// read adds the settings of the file in a directory to those of the flags, which come first.
func (flags templateConfig) read(dir string) (templateConfig, error) {
	conf := templateConfig{}
	if there, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) || err == nil && !there.IsDir() {
		return conf, fmt.Errorf("there is no directory %s; 'soulbox template init %s' begins a template there", dir, dir)
	} else if err != nil {
		return conf, err
	}
	meta, err := toml.DecodeFile(filepath.Join(dir, configName), &conf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return conf, fmt.Errorf("%s: %w", filepath.Join(dir, configName), err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return conf, fmt.Errorf("%s: unknown name %s; the names are name, dockerfile, start_cmd, ready_cmd, cpu, memory_mb, disk_mb, "+
			"protect, protect_memory and args", filepath.Join(dir, configName), unknown[0])
	}
	conf.Name, conf.Dockerfile = cmp.Or(flags.Name, conf.Name), cmp.Or(flags.Dockerfile, conf.Dockerfile, "Dockerfile")
	conf.Start, conf.Ready = cmp.Or(flags.Start, conf.Start), cmp.Or(flags.Ready, conf.Ready)
	conf.CPU, conf.MemoryMB, conf.DiskMB = cmp.Or(flags.CPU, conf.CPU), cmp.Or(flags.MemoryMB, conf.MemoryMB),
		cmp.Or(flags.DiskMB, conf.DiskMB)
	if conf.Args == nil {
		conf.Args = map[string]string{}
	}
	if conf.Name == "" {
		return conf, usageError{fmt.Errorf("the template has no name: use --name, or name it in %s", configName)}
	}
	return conf, nil
}

func (a *app) build(ctx context.Context, dir string, conf templateConfig, n client.NewBuild, push string) error {
	text, err := os.ReadFile(filepath.Join(dir, conf.Dockerfile))
	if err != nil {
		return err
	}
	at, err := a.lastingServer(ctx)
	if err != nil {
		return err
	}
	if n.Context, err = a.sendContext(ctx, at.Client, conf, dir); err != nil {
		return err
	}
	name, id, err := at.Announce(ctx, conf.Name, conf.CPU, conf.MemoryMB, conf.DiskMB)
	if err != nil {
		return err
	}
	n.Dockerfile, n.Filtered, n.Args, n.StartCmd, n.ReadyCmd = string(text), true, conf.Args, conf.Start, conf.Ready
	if conf.Protect != "" {
		every, err := time.ParseDuration(conf.Protect)
		if err != nil || every < time.Second {
			return usageError{fmt.Errorf("%s: protect is a time such as \"5m\", not %q", configName, conf.Protect)}
		}
		n.Protect = &client.Protect{EveryS: int64(every.Seconds()), Memory: conf.ProtectAll}
	}
	began := time.Now()
	if err := at.Build(ctx, name, id, n); err != nil {
		return err
	}
	if err := a.followBuild(ctx, at.Client, name, id, true); err != nil {
		return err
	}
	if err := a.printf("%s is built, in %s.\n", conf.Name, time.Since(began).Round(100*time.Millisecond)); err != nil || push == "" {
		return err
	}
	return a.push(ctx, at.Client, conf.Name, push)
}

// sendContext sends the files of a build, unless the server has them, and returns the hash by which the server finds them.
func (a *app) sendContext(ctx context.Context, at *client.Client, conf templateConfig, dir string) (string, error) {
	ignored, err := readIgnored(dir, conf.Dockerfile)
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	total := &counter{}
	if err := writeContext(ctx, io.MultiWriter(sum, total), dir, ignored); err != nil {
		return "", err
	}
	hash := hex.EncodeToString(sum.Sum(nil))
	if has, err := at.HasContext(ctx, conf.Name, hash); err != nil || has {
		return hash, err
	}
	bar := transfer{app: a}.progress(total.n.Load())
	defer bar.Close()
	r, w := io.Pipe()
	defer r.Close()
	go func() { w.CloseWithError(writeContext(ctx, io.MultiWriter(w, bar), dir, ignored)) }()
	return hash, at.SendContext(ctx, conf.Name, hash, r)
}

// readIgnored reads which files are not sent: from DOCKERFILE.dockerignore, named after the Dockerfile, or else from .dockerignore in the
// directory; nil means that all are sent.
func readIgnored(dir, dockerfile string) (*patternmatcher.PatternMatcher, error) {
	for _, name := range []string{dockerfile + ".dockerignore", ".dockerignore"} {
		f, err := os.Open(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		defer f.Close()
		patterns, err := ignorefile.ReadAll(f)
		var m *patternmatcher.PatternMatcher
		if err == nil {
			m, err = patternmatcher.New(patterns)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		return m, nil
	}
	return nil, nil
}

// writeContext writes the files of a build as a tar that is identical for identical files.
func writeContext(ctx context.Context, to io.Writer, dir string, ignored *patternmatcher.PatternMatcher) error {
	out := tar.NewWriter(to)
	_, err := walk(ctx, dir, func(rel string, info fs.FileInfo, link string) error {
		if rel == "." {
			return nil
		}
		if ignored != nil {
			skip, err := ignored.MatchesOrParentMatches(rel)
			if err != nil {
				return err
			}
			if skip && info.IsDir() && !ignored.Exclusions() {
				return fs.SkipDir
			}
			if skip {
				return nil
			}
		}
		return add(out, dir, rel, rel, info, link, io.Discard)
	})
	return errors.Join(err, out.Close())
}

const buildPoll = 200 * time.Millisecond

// followBuild prints the log of a build, to its end if toEnd is set, and returns the build's failure.
func (a *app) followBuild(ctx context.Context, at *client.Client, name, id string, toEnd bool) error {
	step, began := "", time.Now()
	for n := 0; ; {
		s, err := at.BuildStatus(ctx, name, id, n)
		if err != nil {
			if ctx.Err() != nil {
				return fmt.Errorf("the build continues at the server; 'soulbox template logs %s' shows it", id)
			}
			return err
		}
		for _, l := range s.Lines {
			if l.Step != step && l.Step != "" {
				if step = l.Step; a.colours() {
					if err := a.printf("%s %s\n", a.coloured(green, "▸ "+step),
						a.coloured(dim, l.Time.Sub(began).Round(100*time.Millisecond).String())); err != nil {
						return err
					}
				}
			}
			line := printable(l.Message)
			switch {
			case l.Level == "error":
				line = a.coloured(red, line)
			case a.colours():
				line = "  " + line
			case l.Step != "":
				line = "[" + l.Step + "] " + line
			}
			if err := a.printf("%s\n", line); err != nil {
				return err
			}
		}
		n += len(s.Lines)
		switch {
		case len(s.Lines) > 0:
			continue // there may be more
		case s.Status == "error" && toEnd:
			reason := "the server gave no reason"
			if s.Reason != nil {
				reason = strings.TrimSpace(s.Reason.Message)
			}
			return fmt.Errorf("the build has failed: %s", reason)
		case s.Status == "ready" || s.Status == "error" || !toEnd:
			return nil
		}
		if !pause(ctx, buildPoll) {
			return fmt.Errorf("the build continues at the server; 'soulbox template logs %s' shows it", id)
		}
	}
}

func (a *app) buildLogsCommand() *cobra.Command {
	return &cobra.Command{Use: "logs NAME|BUILD", Short: "Show the log of a build", Args: exactly("NAME or BUILD"),
		ValidArgsFunction: a.completeTemplates,
		Long:              "Show the log of the last build of a template, even if it failed, or of any build by its id.",
		Example:           "  soulbox template logs web",
		RunE: func(c *cobra.Command, args []string) error {
			at, err := a.lastingServer(c.Context())
			if err != nil {
				return err
			}
			id, err := lastBuild(c.Context(), at.Client, args[0])
			if err != nil {
				return err
			}
			return a.followBuild(c.Context(), at.Client, args[0], id, false)
		}}
}

func (a *app) templateListCommand() *cobra.Command {
	var out format
	c := &cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List templates", Args: exactly(),
		Long:    "List templates: yours, and the operator's, which all users see.",
		Example: "  soulbox template list\n  soulbox template list -o name",
		RunE: func(c *cobra.Command, _ []string) error {
			at, err := a.lastingServer(c.Context())
			if err != nil {
				return err
			}
			list, err := at.Templates(c.Context())
			if err != nil {
				return err
			}
			switch out {
			case formatJSON:
				return a.json(list)
			case formatName:
				for _, t := range list {
					if err := a.printf("%s\n", t.Name); err != nil {
						return err
					}
				}
				return nil
			}
			t := a.table("NAME", "SIZE", "AGE", "CPU", "MEMORY", "START")
			for _, one := range list {
				name, size, age := one.Name, fmt.Sprintf("%d MB", one.SizeMB), short(time.Since(one.Created))
				if one.Created.IsZero() { // the template of the host's programs has no size and age
					size, age = "-", "-"
				}
				if len(one.Aliases) > 0 {
					name += ", " + strings.Join(one.Aliases, ", ")
				}
				t.row(name, size, age, fmt.Sprint(one.CPU), fmt.Sprintf("%d MB", one.MemoryMB), clip(one.StartCmd, 40))
			}
			return t.flush()
		}}
	out.flag(c, formatTable, formatJSON, formatName)
	return c
}
