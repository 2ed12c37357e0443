package template

import (
	"archive/tar"
	"bufio"
	"bytes"
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
	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/erofs"
	"soulbox.dev/soulbox/sandbox"
)

// stageRun is a stage that is being built. Its sandbox is made for the first step that is not known.
type stageRun struct {
	*run
	stage
	*result
	index  int
	name   string // in the log
	args   pairs  // in their order, with ENVs: the last of a name counts
	shell  []string
	dirs   []string // of WORKDIRs, that the next step makes
	sb     *sandbox.Sandbox
	client *agent.Client
}

// defaultPath is that of images that say none.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// stage builds a stage.
func (r *run) stage(ctx context.Context, index int) (_ *result, err error) {
	s := &stageRun{run: r, stage: r.plan.stages[index], index: index, name: cmp.Or(r.plan.stages[index].name, "stage-"+strconv.Itoa(index))}
	if s.result, err = r.base(ctx, s.stage); err != nil {
		return nil, err
	}
	if s.shell = s.config.Shell; len(s.shell) == 0 {
		s.shell = []string{"/bin/sh", "-c"}
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
		r.log.line("info", where, fmt.Sprint(cmd))
		if err := s.command(ctx, where, cmd); err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			if e := (*StepError)(nil); errors.As(err, &e) {
				e.Line, e.Command = lineOf(cmd.Location()), fmt.Sprint(cmd)
				return nil, err
			}
			return nil, &StepError{Line: lineOf(cmd.Location()), Command: fmt.Sprint(cmd), Err: err}
		}
	}
	if len(s.dirs) > 0 { // a WORKDIR is the last word
		err = s.change(ctx, s.name, "WORKDIR", func(context.Context) error { return nil })
	}
	return s.result, err
}

// variables are what words are expanded with: ARGs, and ENVs over them.
func (s *stageRun) variables() pairs {
	all := slices.Clone(s.args)
	for _, kv := range s.config.Env {
		k, v, _ := strings.Cut(kv, "=")
		all = append(all, instructions.KeyValuePairOptional{Key: k, Value: &v})
	}
	return all
}

// command carries out one command.
func (s *stageRun) command(ctx context.Context, where string, cmd instructions.Command) error {
	if c, ok := cmd.(instructions.SupportsSingleWordExpansion); ok {
		if err := c.Expand(s.expander()); err != nil {
			return err
		}
	}
	if c, ok := cmd.(instructions.SupportsSingleWordExpansionRaw); ok { // texts in the Dockerfile, whose quotes stay
		lex := shell.NewLex('\\')
		lex.SkipProcessQuotes = true
		err := c.ExpandRaw(func(word string) (string, error) {
			v, _, err := lex.ProcessWord(word, s.variables())
			return v, err
		})
		if err != nil {
			return err
		}
	}
	switch c := cmd.(type) {
	case *instructions.RunCommand:
		return s.runCommand(ctx, where, c)
	case *instructions.CopyCommand:
		return s.copy(ctx, where, copying{SourcesAndDest: c.SourcesAndDest, from: c.From, chown: c.Chown, chmod: c.Chmod})
	case *instructions.AddCommand:
		return s.copy(ctx, where, copying{SourcesAndDest: c.SourcesAndDest, chown: c.Chown, chmod: c.Chmod, unpack: c.Unpack == nil || *c.Unpack})
	case *instructions.WorkdirCommand:
		s.config.WorkingDir = s.absolute(c.Path)
		s.dirs = append(s.dirs, s.config.WorkingDir)
	case *instructions.ArgCommand:
		s.arg(c)
		return nil // its values are in the key
	default:
		if err := s.configure(cmd); err != nil {
			return err
		}
	}
	s.key = hashOf(s.key, fmt.Sprint(cmd), fmt.Sprint(s.config.Env), s.config.WorkingDir, s.config.User)
	return nil
}

// arg declares variables.
func (s *stageRun) arg(c *instructions.ArgCommand) {
	for _, arg := range c.Args {
		if v, ok := s.req.Args[arg.Key]; ok {
			arg.Value = &v
		} else if v, ok := pairs(s.plan.global).Get(arg.Key); arg.Value == nil && ok {
			arg.Value = &v
		}
		s.args = append(s.args, arg)
		s.key = hashOf(s.key, "ARG", arg.Key, arg.ValueString())
	}
}

// configure enters what a command says of the image alone.
func (s *stageRun) configure(cmd instructions.Command) error {
	cfg := &s.config
	switch c := cmd.(type) {
	case *instructions.EnvCommand:
		for _, kv := range c.Env {
			cfg.Env = slices.DeleteFunc(cfg.Env, func(old string) bool { return strings.HasPrefix(old, kv.Key+"=") })
			cfg.Env = append(cfg.Env, kv.Key+"="+kv.Value)
		}
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
		cfg.Cmd = s.words(c.ShellDependantCmdLine)
	case *instructions.EntrypointCommand:
		cfg.Entrypoint = s.words(c.ShellDependantCmdLine)
		cfg.Cmd = nil
	case *instructions.ExposeCommand:
		return s.expose(c)
	case *instructions.VolumeCommand:
		if cfg.Volumes == nil {
			cfg.Volumes = map[string]struct{}{}
		}
		for _, v := range c.Volumes {
			cfg.Volumes[v] = struct{}{}
			s.dirs = append(s.dirs, s.absolute(v))
		}
	case *instructions.StopSignalCommand:
		cfg.StopSignal = c.Signal
	case *instructions.HealthCheckCommand:
		cfg.Healthcheck = &v1.HealthConfig{Test: c.Health.Test, Interval: c.Health.Interval, Timeout: c.Health.Timeout, StartPeriod: c.Health.StartPeriod, Retries: c.Health.Retries}
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
	for _, p := range c.Ports {
		words, err := s.plan.lex.ProcessWords(p, s.variables())
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
				return fmt.Errorf("%q is no port; write a number up to 65535, such as 8080 or 8080/udp", clip(word))
			}
			for n := from; n <= to; n++ {
				s.config.ExposedPorts[fmt.Sprintf("%d/%s", n, protocol)] = struct{}{}
			}
		}
	}
	return nil
}

// words are a command with the shell that it needs.
func (s *stageRun) words(line instructions.ShellDependantCmdLine) []string {
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

// change carries out a step that changes files, or takes what it made when it was carried out before. by stands for all that it depends on.
func (s *stageRun) change(ctx context.Context, where, by string, do func(context.Context) error) error {
	s.key = hashOf(s.key, by, strings.Join(s.dirs, "\x00"))
	unlock, err := s.Store.lock(ctx, "steps", s.key)
	if err != nil {
		return err
	}
	defer unlock()
	if s.sb == nil && !s.req.NoCache {
		if known, ok := s.Store.known(s.key); ok {
			s.cached++
			s.log.line("info", where, "cached")
			s.take(known)
			return nil
		}
	}
	if err := s.begin(ctx); err != nil {
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

// begin boots the sandbox in which the rest of the stage is built.
func (s *stageRun) begin(ctx context.Context) error {
	if s.sb != nil {
		return nil
	}
	image, err := s.Store.image(ctx, s.layers)
	if err != nil {
		return err
	}
	base := &sandbox.Template{Name: "build", ID: chainID(s.layers), Image: image, User: "root", Cwd: "/"}
	times := sandbox.Times{Life: DefaultBuildTime, OnTimeout: sandbox.ActionKill}
	if end, ok := ctx.Deadline(); ok {
		times.Life = time.Until(end) + time.Minute
	}
	s.sb, err = s.Manager.Create(ctx, sandbox.CreateOptions{Owner: s.req.Owner, Base: base, Transient: true, Limits: s.req.Limits, Times: times, Network: s.req.Network,
		Metadata: map[string]string{"build": s.id, "template": s.req.Name}})
	if err != nil {
		return err
	}
	if s.client, err = s.sb.Agent(ctx, "build in"); err != nil {
		return err
	}
	return s.client.MarkFiles(ctx)
}

// makeDir makes a directory of root's, if there is none.
func (s *stageRun) makeDir(ctx context.Context, dir string) error {
	if dir == "/" {
		return nil
	}
	_, err := s.client.Mkdir(ctx, agent.PathRequest{Path: dir, User: "root"})
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// capture keeps what has changed as a layer.
func (s *stageRun) capture(ctx context.Context, by string) (step, error) {
	from, err := s.client.Changes(ctx)
	if err != nil {
		return step{}, fmt.Errorf("keep what has changed: %w", err)
	}
	defer from.Close()
	body := bufio.NewReaderSize(from, 64<<10)
	if head, err := body.Peek(1024); err == nil && !slices.ContainsFunc(head, func(b byte) bool { return b != 0 }) {
		_, err := io.Copy(io.Discard, body)
		return step{}, err // nothing: only the end of a tar
	}
	l, err := s.Store.newLayer(body, s.sb.Info().Limits.Disk+layerSlack, clip(by))
	if err != nil {
		return step{}, fmt.Errorf("keep what has changed: %w", err)
	}
	return step{Layer: &l}, nil
}

// pack writes all files as a tar.
func (f *Files) pack(to io.Writer) error {
	p := packer{files: f, w: tar.NewWriter(to), mode: -1}
	return errors.Join(p.add("/", f.root), p.w.Close())
}

// layerSlack is what a layer may have beside the bytes of its files.
const layerSlack = 1 << 30

// copying is a COPY or ADD.
type copying struct {
	instructions.SourcesAndDest
	from, chown, chmod string
	unpack             bool // archives
}

// picked is a file to copy, with the path that it had.
type picked struct {
	name string
	node *erofs.Node
}

func (s *stageRun) copy(ctx context.Context, where string, c copying) error {
	var files *Files
	var all []picked
	by := []string{"COPY", c.DestPath, c.chown, c.chmod, strconv.FormatBool(c.unpack), strconv.FormatBool(c.from == "")}
	if len(c.SourcePaths) > 0 {
		var err error
		if files, err = s.files(ctx, c.from); err != nil {
			return err
		}
		for _, pattern := range c.SourcePaths {
			found, err := files.find(pattern)
			if err != nil {
				return err
			}
			for _, name := range sortedKeys(found) {
				sum, err := files.digest(ctx, found[name])
				if err != nil {
					return err
				}
				all = append(all, picked{name, found[name]})
				by = append(by, name, sum)
			}
		}
	}
	for _, inline := range c.SourceContents {
		by = append(by, inline.Path, inline.Data)
	}
	return s.change(ctx, where, hashOf(by...), func(ctx context.Context) error { return s.put(ctx, c, files, all) })
}

// put copies files into the sandbox.
func (s *stageRun) put(ctx context.Context, c copying, files *Files, all []picked) error {
	owner, err := s.owner(ctx, c)
	if err != nil {
		return err
	}
	mode := int64(-1)
	if c.chmod != "" {
		if mode, err = strconv.ParseInt(c.chmod, 8, 32); err != nil || mode < 0 || mode > 0o7777 {
			return fmt.Errorf("--chmod=%s is no mode; write it as an octal number, such as 755", clip(c.chmod))
		}
	}
	dest := s.absolute(c.DestPath)
	info, err := s.client.Stat(ctx, dest)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	there := err == nil && (info.Type == agent.TypeDir || info.Type == agent.TypeSymlink && s.isDir(ctx, dest))
	into := there || strings.HasSuffix(c.DestPath, "/") || c.DestPath == "." || len(all)+len(c.SourceContents) > 1
	from, to := io.Pipe()
	defer from.Close()
	go func() {
		p := packer{files: files, w: tar.NewWriter(to), owner: owner, mode: mode, plain: c.from == "", there: there}
		err := p.all(c, dest, into, all)
		_ = to.CloseWithError(errors.Join(err, p.w.Close()))
	}()
	if err := s.client.Unpack(ctx, "/", from); err != nil {
		return err
	}
	for _, f := range all {
		if err := s.unpackArchive(ctx, c, files, f, dest); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return nil
}

// isDir says whether a link leads to a directory.
func (s *stageRun) isDir(ctx context.Context, name string) bool {
	_, err := s.client.Dir(ctx, agent.DirRequest{Path: name})
	return err == nil
}

// ids are an owner and a group by number; nil leaves files to whom they belong.
type ids struct{ uid, gid int }

// packer writes files as a tar.
type packer struct {
	files *Files
	w     *tar.Writer
	owner *ids
	mode  int64 // -1 leaves it
	plain bool  // no program of the caller's files gets somebody's rights by being copied
	there bool  // where a directory is copied to there is one, which stays as it is
}

func (p packer) all(c copying, dest string, into bool, all []picked) error {
	for _, f := range all {
		if c.unpack && p.files.isArchive(f.node) {
			continue
		}
		target := dest
		if into && !f.node.IsDir() {
			target = path.Join(dest, path.Base(f.name))
		}
		if err := p.copied(target, f.node); err != nil {
			return err
		}
	}
	for _, inline := range c.SourceContents {
		target := dest
		if into {
			target = path.Join(dest, path.Base(inline.Path))
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: target[1:], Mode: 0o644, Size: int64(len(inline.Data)), ModTime: time.Now()}
		if err := p.header(h); err != nil {
			return err
		}
		if _, err := io.WriteString(p.w, inline.Data); err != nil {
			return err
		}
	}
	return nil
}

// copied writes what is copied: of a directory what is in it, into one as any other that is made.
func (p packer) copied(target string, n *erofs.Node) error {
	if !n.IsDir() {
		return p.add(target, n)
	}
	if !p.there {
		h := &tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimPrefix(target, "/") + "/", Mode: defaultPerm, ModTime: time.Now()}
		if err := p.header(h); err != nil {
			return err
		}
	}
	for _, base := range n.Names() {
		if err := p.add(path.Join(target, base), n.Children[base]); err != nil {
			return err
		}
	}
	return nil
}

// add writes a file, and all that is in it.
func (p packer) add(name string, n *erofs.Node) error {
	h := &tar.Header{Name: strings.TrimPrefix(name, "/"), Mode: int64(n.Mode & 0o7777), Uid: int(n.UID), Gid: int(n.GID), ModTime: n.Time, Linkname: n.Target}
	switch n.Type() {
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, n.Data.Size
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		return nil // a device is of its machine
	}
	if h.Name != "/" {
		if err := p.header(h); err != nil {
			return err
		}
	}
	if n.Type() == unix.S_IFREG {
		if _, err := io.Copy(p.w, p.files.image.Content(n.Data)); err != nil {
			return err
		}
	}
	for _, base := range n.Names() {
		if err := p.add(path.Join(name, base), n.Children[base]); err != nil {
			return err
		}
	}
	return nil
}

func (p packer) header(h *tar.Header) error {
	if p.owner != nil {
		h.Uid, h.Gid = p.owner.uid, p.owner.gid
	}
	if p.mode >= 0 && h.Typeflag != tar.TypeSymlink && h.Typeflag != tar.TypeDir {
		h.Mode = p.mode
	}
	if p.plain && h.Typeflag == tar.TypeReg {
		h.Mode &^= unix.S_ISUID | unix.S_ISGID
	}
	return p.w.WriteHeader(h)
}

// isArchive says whether ADD unpacks a file: by what is in it, not by its name.
func (f *Files) isArchive(n *erofs.Node) bool {
	if n.Type() != unix.S_IFREG || n.Data.Size == 0 {
		return false
	}
	r, err := uncompressed(f.image.Content(n.Data))
	if err != nil {
		return false
	}
	_, err = tar.NewReader(r).Next()
	return err == nil
}

// unpackArchive unpacks a file that is an archive, if that is asked for.
func (s *stageRun) unpackArchive(ctx context.Context, c copying, files *Files, f picked, dest string) error {
	if !c.unpack || !files.isArchive(f.node) {
		return nil
	}
	r, err := uncompressed(files.image.Content(f.node.Data))
	if err != nil {
		return err
	}
	return s.client.Unpack(ctx, dest, io.LimitReader(r, maxImage))
}

// owner gives the numbers of --chown; the default is root, and for files of other stages and images whose they are there.
func (s *stageRun) owner(ctx context.Context, c copying) (*ids, error) {
	chown := c.chown
	if chown == "" && c.from != "" {
		return nil, nil
	}
	if chown == "" {
		return &ids{}, nil
	}
	user, group, both := strings.Cut(chown, ":")
	uid, gid, err := s.lookup(ctx, "/etc/passwd", user)
	if err != nil {
		return nil, fmt.Errorf("--chown=%s: %w", clip(chown), err)
	}
	if both {
		if gid, _, err = s.lookup(ctx, "/etc/group", group); err != nil {
			return nil, fmt.Errorf("--chown=%s: %w", clip(chown), err)
		}
	} else if gid < 0 {
		gid = uid
	}
	return &ids{uid, gid}, nil
}

// lookup finds a name, or a number, in a file of passwd(5) or group(5): its id, and of a user that of his group, or -1.
func (s *stageRun) lookup(ctx context.Context, file, name string) (id, group int, err error) {
	r, _, err := s.client.ReadFile(ctx, file, 0, 1<<20)
	if err == nil {
		body, rerr := io.ReadAll(r)
		if err := errors.Join(rerr, r.Close()); err != nil {
			return 0, 0, err
		}
		for line := range bytes.Lines(body) {
			f := strings.Split(strings.TrimSpace(string(line)), ":")
			if len(f) < 4 || f[0] != name && f[2] != name {
				continue
			}
			id, err := strconv.Atoi(f[2])
			group, gerr := strconv.Atoi(f[3])
			if gerr != nil {
				group = -1
			}
			return id, group, err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return 0, 0, err
	}
	if id, err = strconv.Atoi(name); err == nil && id >= 0 {
		return id, -1, nil
	}
	return 0, 0, fmt.Errorf("there is no %q in %s", clip(name), file)
}

// passwd reads the lines of a file of passwd(5) of an image.
func (f *Files) passwd(name string) [][]string {
	n, err := walk(f.root, name, true, nil)
	if err != nil || n.Type() != unix.S_IFREG {
		return nil
	}
	var all [][]string
	for lines := bufio.NewScanner(io.LimitReader(f.image.Content(n.Data), 1<<20)); lines.Scan(); {
		if fields := strings.Split(lines.Text(), ":"); len(fields) >= 4 {
			all = append(all, fields)
		}
	}
	return all
}
