package guest

import (
	"cmp"
	"crypto/rand"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/agent/guest/rawsys"

	_ "embed"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Bounds of what shells remember.
const (
	maxShells     = 64
	maxShellState = 256 << 10 // bytes, in total
	maxShellDump  = 1 << 20   // bytes that a shell may report about itself
	envPart       = 100 << 10 // bytes of one variable: Linux allows 128 KiB
)

// shells is what bash remembers from one command to the next. Each command runs in its own bash, which gets the state that earlier commands
// left and reports its own state at its end: so no command can break the shell of the next one. It is safe for concurrent use. Commands
// that run at the same time keep each other's changes, because only what each of them has changed is stored.
type shells struct {
	dir string // where bash writes its reports

	mu   sync.Mutex
	seq  int
	byID map[shellID]*shellEntry
}

// shellID identifies a shell: each user has separate ones.
type shellID struct{ name, user string }

type shellEntry struct {
	state *shellState
	used  int
}

// shellState is what a shell remembers. It is never changed, only replaced.
type shellState struct {
	cwd    string
	env    map[string]string // exported variables that differ from the process's given environment
	unset  map[string]bool   // variables of that environment that the shell has removed
	decls  map[string]string // all other variables: the declaration of each
	umask  string            // the command that sets it; "" is the default
	alias  string            // the commands that define the aliases
	funcs  string            // the definitions of the functions
	names  []string          // of the functions, sorted
	public []string          // of these, the exported ones
	set    []string          // options of set that differ from the default: "+o" or "-o", and the name
	shopt  []string          // options of shopt that differ: "-s" or "-u", and the name
	args   []string          // positional parameters
}

// shellRun is one command of a shell.
type shellRun struct {
	shells *shells
	id     shellID
	file   string            // where bash writes its report; "" if it makes none
	begin  *shellState       // the state it began with
	base   map[string]string // the environment without the shell's changes
	env    map[string]string // the environment it began with
	given  map[string]string // the part of it that is for this command only
	cwd    string
	gone   string // the shell's directory, if that does not exist any more
}

func newShells(dir string) *shells { return &shells{dir: dir, byID: map[shellID]*shellEntry{}} }

// get returns what a shell remembers.
func (s *shells) get(id shellID) *shellState {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.byID[id]; e != nil {
		s.seq++
		e.used = s.seq
		return e.state
	}
	return &shellState{}
}

// update changes what a shell remembers. A new shell replaces the one that was unused for longest if there are too many.
func (s *shells) update(id shellID, change func(*shellState) *shellState) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := &shellState{}
	if e := s.byID[id]; e != nil {
		old = e.state
	}
	next := change(old)
	if next.size() > maxShellState {
		return errShellLarge
	}
	s.seq++
	s.byID[id] = &shellEntry{next, s.seq}
	if len(s.byID) > maxShells {
		oldest := id
		for other, e := range s.byID {
			if e.used < s.byID[oldest].used {
				oldest = other
			}
		}
		delete(s.byID, oldest)
	}
	return nil
}

var errShellLarge = errors.New("what the shell would have to remember is too large")

func (s *shellState) size() int {
	n := len(s.cwd) + len(s.umask) + len(s.alias) + len(s.funcs)
	for _, m := range []map[string]string{s.env, s.decls} {
		for k, v := range m {
			n += len(k) + len(v) + 16
		}
	}
	for k := range s.unset {
		n += len(k)
	}
	for _, list := range [][]string{s.names, s.public, s.set, s.shopt, s.args} {
		for _, v := range list {
			n += len(v) + 8
		}
	}
	return n
}

// plain reports whether a command that needs no shell can run without one.
func (s *shellState) plain() bool {
	return len(s.decls) == 0 && s.umask == "" && s.alias == "" && s.funcs == "" && len(s.set)+len(s.shopt)+len(s.args) == 0
}

// environment returns the environment of a process: base with the shell's changes.
func (s *shellState) environment(base map[string]string) map[string]string {
	env := maps.Clone(base)
	maps.Copy(env, s.env)
	for name := range s.unset {
		delete(env, name)
	}
	return env
}

// existing returns the directory of the shell or, if that is gone, the nearest existing directory above it.
func (s *shellState) existing(home string) (dir, gone string) {
	if s.cwd == "" {
		return home, ""
	}
	for dir = s.cwd; !rawsys.IsDir(dir) && dir != "/"; dir = path.Dir(dir) {
		gone = s.cwd
	}
	return dir, gone
}

//go:embed shell.bash
var saveShell string

// script returns what bash runs before the command, to restore the state that earlier commands left.
func (s *shellState) script(file string, given map[string]string) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	own := func(name string) bool { _, ok := given[name]; return !ok }
	line(`unset "${!%s@}"`, ownPrefix) // the variables that carried this script
	line("__soulbox_command=$1 __soulbox_fo=$SHELLOPTS __soulbox_fb=$BASHOPTS")
	line("set -- %s", quoteAll(s.args))
	line("unset -v -- %s", quoteAll(slices.DeleteFunc(slices.Sorted(maps.Keys(s.unset)), func(name string) bool { return !own(name) })))
	for _, name := range slices.Sorted(maps.Keys(s.decls)) {
		if own(name) {
			line("%s", s.decls[name])
		}
	}
	line("%s", s.umask)
	// Functions may need a shopt option to be parsed, and may replace any builtin once defined; aliases and options of set have an effect
	// at once.
	for _, o := range s.shopt {
		if o != expandAliases {
			line("shopt %s", o)
		}
	}
	line("%s", s.alias)
	line("%s", s.funcs)
	if len(s.public) > 0 { // without names it would list them
		line(`\builtin declare -fx -- %s`, quoteAll(s.public))
	}
	if file != "" { // after the user's functions, one of which may have this name
		line(`\builtin unset -f %ssave`, ownPrefix)
		line("__soulbox_file=%s", quoteShell(file))
		line("%s", saveShell)
	}
	if slices.Contains(s.shopt, expandAliases) {
		line(`\builtin shopt %s`, expandAliases)
	}
	for _, o := range s.set {
		line(`\builtin set %s`, o)
	}
	return b.String()
}

const expandAliases = "-s expand_aliases"

func quoteAll(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = quoteShell(w)
	}
	return strings.Join(quoted, " ")
}

// quoteShell quotes s as one word for any POSIX shell.
func quoteShell(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// wrap returns the argument list and the environment with which bash runs a command. The environment carries the script, in parts: this
// needs no file, so it also works on a full disk. bash removes it from there before anything else runs.
func (r *shellRun) wrap(bash, command string) (args, env []string) {
	script := r.begin.script(r.file, r.given)
	var restore strings.Builder
	for i := 0; len(script) > 0; i++ {
		part := script[:min(len(script), envPart)]
		script = script[len(part):]
		name := fmt.Sprintf("__soulbox_%d", i)
		env = append(env, name+"="+part)
		restore.WriteString("$" + name)
	}
	line := fmt.Sprintf(`{ eval "%s"; } 2>/dev/null; builtin eval "$__soulbox_command"`, restore.String())
	if r.file != "" {
		line += `; __soulbox_status=$?; { __soulbox_save "$@"; } 2>/dev/null; builtin exit "$__soulbox_status"`
	}
	return []string{bash, "-c", line, "bash", command}, env
}

// begin begins a command of a shell.
func (s *shells) begin(id shellID) *shellRun { return &shellRun{shells: s, id: id, begin: s.get(id)} }

// report makes the command report its changes at its end.
func (r *shellRun) report() {
	dir := r.shells.dir
	// Everyone may create a file in it, but not see or remove the files of others: their names are random.
	err := os.Mkdir(dir, 0o733)
	if errors.Is(err, os.ErrNotExist) {
		err = os.MkdirAll(dir, 0o733)
	}
	if err == nil {
		_ = os.Chmod(dir, 0o733|os.ModeSticky) // the umask may have removed bits: then less is remembered, and no more is visible
	}
	r.file = filepath.Join(dir, rand.Text())
}

// needed reports whether even a command of plain words must run in the shell.
func (r *shellRun) needed() bool { return r != nil && !r.begin.plain() }

// end stores what an ended command has reported, and returns the shell's new directory if that has changed. A command that was killed or
// has replaced its shell reports nothing, and changes nothing.
func (r *shellRun) end() (cwd string, err error) {
	if r == nil || r.file == "" {
		return "", nil
	}
	dump, err := readDump(r.file)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	end, err := parseShell(dump)
	if err != nil {
		return "", err
	}
	err = r.shells.update(r.id, func(now *shellState) *shellState {
		return r.merge(now, end)
	})
	if err != nil || end.cwd == r.cwd {
		return "", err
	}
	return end.cwd, nil
}

// readDump reads and removes a file that a process of the guest made. It may contain anything.
func readDump(name string) ([]byte, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		if err == unix.ENOENT {
			return nil, os.ErrNotExist
		}
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	_ = os.Remove(name) // no other file in this directory has its name
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("the shell's report is not a regular file: %w", syscall.EINVAL)
	}
	body, err := io.ReadAll(io.LimitReader(f, maxShellDump+1))
	if len(body) > maxShellDump {
		return nil, errShellLarge
	}
	return body, err
}

// merge returns the shell's current state with the changes of one command.
func (r *shellRun) merge(now *shellState, end *shellState) *shellState {
	next := *now
	if end.cwd != r.cwd || r.gone != "" {
		next.cwd = end.cwd
	}
	next.env, next.unset, next.decls = cloned(now.env), cloned(now.unset), cloned(now.decls)
	// A variable that was given for this command, and still has that value, is not part of the shell's state.
	own := func(name string) bool { v, given := r.given[name]; return !given || end.env[name] != v }
	if end.env == nil {
		end.env, end.decls, end.args = r.env, r.begin.decls, r.begin.args
	}
	for name, value := range end.env {
		if old, ok := r.env[name]; !ok || old != value {
			next.env[name] = value
			delete(next.unset, name)
			delete(next.decls, name)
		}
	}
	for name := range r.env {
		if _, ok := end.env[name]; !ok && !shellOwn(name) && isName(name) {
			delete(next.env, name)
			if _, given := r.base[name]; given {
				next.unset[name] = true
			}
		}
	}
	for name, decl := range end.decls {
		if r.begin.decls[name] != decl {
			next.decls[name] = decl
		}
	}
	for name := range r.begin.decls {
		if _, ok := end.decls[name]; !ok && own(name) {
			delete(next.decls, name)
		}
	}
	change(&next.umask, r.begin.umask, end.umask)
	change(&next.alias, r.begin.alias, end.alias)
	if r.begin.funcs != end.funcs || !slices.Equal(r.begin.public, end.public) {
		next.funcs, next.names, next.public = end.funcs, end.names, end.public
	}
	for _, list := range []struct {
		now        *[]string
		begin, end []string
	}{{&next.set, r.begin.set, end.set}, {&next.shopt, r.begin.shopt, end.shopt}, {&next.args, r.begin.args, end.args}} {
		if !slices.Equal(list.begin, list.end) {
			*list.now = list.end
		}
	}
	return &next
}

func change(now *string, begin, end string) {
	if begin != end {
		*now = end
	}
}

// cloned returns a copy that is never nil.
func cloned[K comparable, V any](m map[K]V) map[K]V {
	c := make(map[K]V, len(m))
	maps.Copy(c, m)
	return c
}

// describeShell returns what a shell remembers.
func (s *Server) describeShell(r agent.ShellRequest) (agent.ShellInfo, error) {
	user, err := s.lookup(r.User)
	if err != nil {
		return agent.ShellInfo{}, err
	}
	state := s.shells.get(shellID{r.Shell, user.name})
	info := agent.ShellInfo{Cwd: cmp.Or(state.cwd, user.home), Functions: state.names, Options: slices.Concat(state.set, state.shopt)}
	info.Env = slices.Sorted(maps.Keys(state.env))
	info.Unset = slices.Sorted(maps.Keys(state.unset))
	info.Variables = slices.Sorted(maps.Keys(state.decls))
	for line := range strings.Lines(state.alias) {
		if name, _, ok := strings.Cut(strings.TrimPrefix(line, "alias "), "="); ok && isName(name) {
			info.Aliases = append(info.Aliases, name)
		}
	}
	info.Bound()
	return info, nil
}
