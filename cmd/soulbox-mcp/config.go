package main

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/gvisor"
	"soulbox.dev/soulbox/internal/durable"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
	"soulbox.dev/soulbox/tools"
)

// config is what the flags that all commands share, and their environment, say.
type config struct {
	runsc    string
	agent    string
	stateDir string
	logFile  string
	logLevel slog.Level
	times    sandbox.Times
	protect  sandbox.Protect
	saving   saving
	limits   sandbox.Limits
	budget   int64 // bytes
	// templateBudget is the disk space for all templates, in bytes; 0 is the store's default.
	templateBudget int64
	perOwner       int
	onExit         string
	toolsets       string
	readOnly       bool
	// noNetwork denies sandboxes a network, whatever they ask for; contextDirs are the directories of the host that builds may read.
	noNetwork   bool
	allowPull   bool // builds may start from images of registries
	contextDirs []string
	registries  []string // registries in private networks that builds may pull from
	gateway     *url.URL // where sandboxes' ports are reached by name; nil if they are not
	insecure    bool     // see api.Gateway
	own         *url.URL // the server's URL; nil if it is not reached by URLs
}

// saving is what the operator allows to be saved on disk.
type saving struct {
	paused  time.Duration // how long a paused sandbox is kept
	budget  int64         // bytes; 0 is all that the disk has
	reclaim string        // never or oldest
}

// parseConfig parses the flags that all commands have.
func parseConfig(name string, args []string, getenv func(string) string, stderr io.Writer) (config, error) {
	c := config{onExit: "kill"}
	return c, c.parse(name, args, getenv, stderr)
}

// parse parses the flags that all commands have, and those that more adds. Values set before are the defaults.
func (c *config) parse(name string, args []string, getenv func(string) string, stderr io.Writer, more ...func(*flag.FlagSet)) error {
	flags := flag.NewFlagSet("soulbox-mcp "+name, flag.ContinueOnError)
	c.placeFlags(flags, getenv)
	c.timeFlags(flags)
	var a amounts
	a.flags(flags)
	flags.IntVar(&c.perOwner, "max-sandboxes", 0, "living sandboxes of one owner; default 100")
	for _, add := range more {
		add(flags)
	}
	if err := parseFlags(flags, args, stderr); err != nil {
		return err
	}
	if err := c.checkValues(a); err != nil {
		return usageError{err}
	}
	c.limits = sandbox.Limits{CPU: a.cpu, Memory: a.memory << 20, Disk: a.disk << 20, Processes: a.pids}
	c.budget, c.saving.budget, c.templateBudget = a.budget<<20, a.saved<<20, a.templates<<20
	c.findPrograms()
	return c.findStateDir(getenv)
}

// placeFlags adds the flags that say where things are.
func (c *config) placeFlags(flags *flag.FlagSet, getenv func(string) string) {
	flags.StringVar(&c.runsc, "runsc", getenv("SOULBOX_RUNSC"),
		"`path` of runsc; default beside this program, then in PATH (SOULBOX_RUNSC)")
	flags.StringVar(&c.agent, "agent", getenv("SOULBOX_AGENT"), "`path` of soulbox-agent; default beside this program (SOULBOX_AGENT)")
	flags.StringVar(&c.stateDir, "state-dir", getenv("SOULBOX_STATE_DIR"),
		"`directory` of all state; default $XDG_STATE_HOME/soulbox, as root /var/lib/soulbox (SOULBOX_STATE_DIR)")
	flags.StringVar(&c.logFile, "log-file", getenv("SOULBOX_LOG_FILE"), "`path` of the log; default stderr (SOULBOX_LOG_FILE)")
	flags.TextVar(&c.logLevel, "log-level", slog.LevelInfo, "`level`: debug, info, warn or error")
}

// timeFlags adds the flags that say how long sandboxes live, and what is saved of them.
func (c *config) timeFlags(flags *flag.FlagSet) {
	c.times.OnTimeout = sandbox.ActionPause // a timeout must not lose anything by default
	flags.DurationVar(&c.times.Life, "lifetime", sandbox.DefaultLifetime, "life time of sandboxes that ask for none")
	flags.DurationVar(&c.times.Idle, "idle", 0, "`time` after which an unused sandbox is paused or killed; default never")
	flags.DurationVar(&c.saving.paused, "paused-for", 7*24*time.Hour, "`time` for which a paused sandbox is kept")
	flags.DurationVar(&c.protect.Every, "protect", 0,
		"`time` between two copies of a running sandbox, from which it is resumed if it fails; default no copies")
	flags.BoolVar(&c.protect.Memory, "protect-memory", false, "with --protect: copy memory and processes too, not files alone")
	flags.StringVar(&c.saving.reclaim, "reclaim", "never",
		"when --disk-budget-mb is used up: `never` (save nothing more) or oldest (end the sandboxes longest on disk)")
}

// amounts are what flags say about sizes, in MB, and about numbers. 0 is the default of each.
type amounts struct {
	memory, disk, pids       int64 // of a sandbox
	cpu                      float64
	budget, saved, templates int64 // of all together
}

func (a *amounts) flags(flags *flag.FlagSet) {
	flags.Int64Var(&a.memory, "memory-mb", 0, "memory of sandboxes that ask for none, in MB; default 1024")
	flags.Int64Var(&a.disk, "disk-mb", 0, "disk of sandboxes that ask for none, in MB; default 10240")
	flags.Int64Var(&a.pids, "pids", 0, "processes of sandboxes that ask for no number; default 512")
	flags.Float64Var(&a.cpu, "cpu", 0, "cores of sandboxes that ask for no number; default 2")
	flags.Int64Var(&a.budget, "memory-budget-mb", 0, "memory of all sandboxes together, in MB; default 80 % of the machine")
	flags.Int64Var(&a.saved, "disk-budget-mb", 0,
		"disk of all paused sandboxes and snapshots together, in MB; default all of the disk but 512")
	flags.Int64Var(&a.templates, "template-budget-mb", 0, "disk of all templates, in MB; default a tenth of the disk, from 4096 to 20480")
}

// checkValues refuses values that package flag cannot know to be wrong.
func (c *config) checkValues(a amounts) error {
	if c.onExit != "pause" && c.onExit != "keep" && c.onExit != "kill" {
		return fmt.Errorf("--on-exit is pause, keep or kill, not %q", c.onExit)
	}
	if c.saving.reclaim != "never" && c.saving.reclaim != "oldest" {
		return fmt.Errorf("--reclaim is never or oldest, not %q", c.saving.reclaim)
	}
	if err := tools.CheckToolsets(c.sets()); err != nil {
		return fmt.Errorf("--toolsets: %w", err)
	}
	least := min(a.memory, a.disk, a.pids, a.budget, a.saved, a.templates, int64(c.times.Idle), int64(c.protect.Every),
		int64(c.perOwner))
	if least < 0 || !(a.cpu >= 0) || c.times.Life <= 0 || c.saving.paused <= 0 {
		return errors.New("limits and times must be positive")
	}
	if max(a.memory, a.disk, a.budget, a.saved, a.templates) > maxAmount {
		return fmt.Errorf("limits are in MB, and at most %d", maxAmount)
	}
	return nil
}

// maxAmount bounds sizes in MB, so that they can be counted in bytes.
const maxAmount = 1 << 40

// sets are the toolsets to offer; none means all.
func (c config) sets() []string {
	if c.toolsets == "" {
		return nil
	}
	return strings.Split(c.toolsets, ",")
}

// findStateDir makes the name of the state directory absolute.
func (c *config) findStateDir(getenv func(string) string) (err error) {
	if c.stateDir == "" {
		c.stateDir = defaultStateDir(getenv)
	}
	if c.stateDir, err = filepath.Abs(c.stateDir); err != nil {
		return err
	}
	if strings.ContainsAny(c.stateDir, ":,") {
		return usageError{fmt.Errorf("the state directory %s has a ':' or ',' in its name, which runsc cannot take; name another by "+
			"--state-dir", c.stateDir)}
	}
	return nil
}

// defaultStateDir follows XDG; for root it is a directory that the sandboxes' unprivileged user can reach.
func defaultStateDir(getenv func(string) string) string {
	if os.Geteuid() == 0 {
		return "/var/lib/soulbox"
	}
	return filepath.Join(cmp.Or(getenv("XDG_STATE_HOME"), filepath.Join(getenv("HOME"), ".local/state")), "soulbox")
}

// findPrograms looks for programs that were not named. The name of one that is not found stays empty, which is an error when it is needed.
func (c *config) findPrograms() {
	if self, err := os.Executable(); err == nil {
		beside := func(name string) string {
			path := filepath.Join(filepath.Dir(self), name)
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
				return path
			}
			return ""
		}
		c.runsc = cmp.Or(c.runsc, beside("runsc"))
		c.agent = cmp.Or(c.agent, beside("soulbox-agent"))
	}
	if c.runsc == "" {
		c.runsc, _ = exec.LookPath("runsc") // "" becomes an error later
	}
}

// openLog opens the log. It never writes to stdout, which belongs to the protocol.
func (c config) openLog(stderr io.Writer) (*slog.Logger, func() error, error) {
	out, closeLog := stderr, func() error { return nil }
	if c.logFile != "" {
		f, err := os.OpenFile(c.logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return nil, nil, fmt.Errorf("open log: %w", err)
		}
		out, closeLog = f, f.Close
	}
	return slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: c.logLevel})), closeLog, nil
}

// serving adds the flags of the commands that serve clients.
func (c *config) serving(flags *flag.FlagSet) {
	flags.StringVar(&c.onExit, "on-exit", c.onExit,
		"what happens to sandboxes when the server ends: `pause` (to disk), keep (they run on) or kill; the next server adopts paused and "+
			"kept ones")
	flags.StringVar(&c.toolsets, "toolsets", "", "`names` of the tools that are offered, of "+strings.Join(tools.Toolsets(), ",")+
		"; default all")
	flags.BoolVar(&c.readOnly, "read-only", false, "offer only tools that change nothing")
	flags.BoolVar(&c.noNetwork, "no-network", false, "no sandbox has a network, whatever it asks for")
	flags.BoolVar(&c.allowPull, "templates-allow-pull", false,
		"builds may begin FROM images of registries, with the credentials of this server's user")
	flags.Func("templates-registries",
		"`host:port` of a registry in a private network or on this machine that builds may pull from; may be given several times",
		func(host string) error {
			c.registries = append(c.registries, host)
			return nil
		})
	flags.Func("build-contexts", "`directory` of this machine that builds of templates may read; may be given several times",
		func(dir string) error {
			real, err := filepath.Abs(dir)
			if err == nil {
				real, err = filepath.EvalSymlinks(real)
			}
			c.contextDirs = append(c.contextDirs, real)
			return err
		})
}

// newManager connects the domain to gVisor and the templates.
func (c config) newManager(log *slog.Logger, watch func(*sandbox.Options)) (*sandbox.Manager, *template.Store, error) {
	templates, err := c.newStore()
	if err != nil {
		return nil, nil, err
	}
	templates.Accounts, templates.Log = accounts(), log
	runtime := &gvisor.Runtime{Runsc: c.runsc, Log: log}
	if c.agent != "" {
		if runtime.Agent, err = installAgent(c.agent, filepath.Join(c.stateDir, "agent")); err != nil {
			return nil, nil, fmt.Errorf("install agent: %w", err)
		}
	}
	o := sandbox.Options{
		Dir: c.stateDir, Runtime: runtime, Templates: templates, Log: log, Version: version, Times: c.times, Defaults: c.limits,
		MemoryBudget: c.budget, MaxPerOwner: c.perOwner, Keep: c.onExit != "kill", PauseOnExit: c.onExit == "pause",
		Accounts: templates.Accounts, Protect: c.protect,
		NoNetwork: c.noNetwork, PausedFor: c.saving.paused, DiskBudget: c.saving.budget, Reclaim: c.saving.reclaim == "oldest",
	}
	if watch != nil {
		watch(&o)
	}
	manager, err := sandbox.NewManager(o)
	return manager, templates, err
}

// promised is how many sandboxes a server may promise: as many as one owner may have, but no more than fit into memory.
func (c config) promised() (int, error) {
	budget := c.budget
	if budget == 0 {
		total, err := machineMemory()
		if err != nil {
			return 0, err
		}
		budget = total / 10 * 8
	}
	return int(min(budget/cmp.Or(c.limits.Memory, sandbox.DefaultLimits().Memory), int64(cmp.Or(c.perOwner, 100)))), nil
}

// machineMemory is the memory of this machine in bytes.
func machineMemory() (int64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, fmt.Errorf("ask for the machine's memory: %w", err)
	}
	return int64(info.Totalram) * int64(info.Unit), nil
}

// newStore makes the store of templates.
func (c config) newStore() (*template.Store, error) {
	// Sandboxes may run as another user, who must be able to walk through; what is inside has permissions of its own.
	if err := os.MkdirAll(c.stateDir, 0o711); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	s := &template.Store{Dir: filepath.Join(c.stateDir, "templates"), Budget: c.templateBudget}
	if os.Geteuid() == 0 {
		s.UID, s.GID = gvisor.Owner()
	}
	return s, nil
}

func (c config) newBuilder(store *template.Store, manager *sandbox.Manager, log *slog.Logger) *template.Builder {
	b := &template.Builder{Store: store, Manager: manager, NoNetwork: c.noNetwork, Log: log}
	if c.allowPull {
		b.Pull = store.Puller(c.registries)
	}
	return b
}

// installAgent copies the agent to a directory named by its content, so that an upgrade does not affect running sandboxes.
func installAgent(from, dir string) (string, error) {
	body, err := os.ReadFile(from)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(body)
	home, err := durable.Install(dir, hex.EncodeToString(sum[:8]), func(temp string) error {
		return os.WriteFile(filepath.Join(temp, agentName), body, 0o755)
	})
	return filepath.Join(home, agentName), err
}

const agentName = "soulbox-agent"
