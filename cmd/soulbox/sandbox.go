package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"soulbox.dev/soulbox/api/client"
)

func (a *app) sandboxCommand() *cobra.Command {
	sandbox := group(&cobra.Command{Use: "sandbox", Aliases: []string{"sb"}, Short: "Make, list and control sandboxes",
		Long:    "Make, list and control sandboxes. An ID may be cut short as long as no other sandbox's ID begins with it.",
		Example: "  soulbox sandbox create --template python\n  soulbox sandbox list\n  soulbox sandbox connect ID"})
	sandbox.AddCommand(a.createCommand(), a.listCommand(), a.infoCommand(), a.connectCommand(), a.endCommand(), a.pauseCommand(),
		a.resumeCommand(), a.forkCommand(), a.snapshotCommand(),
		a.extendCommand(), a.logsCommand(), a.metricsCommand())
	return sandbox
}

// createOptions are the flags of create.
type createOptions struct {
	client.NewSandbox
	metadata, env []string
	life, protect time.Duration
	protectMemory bool
}

func (o *createOptions) flags(f *pflag.FlagSet) {
	f.StringVarP(&o.Template, "template", "t", "", "`name` of a template or snapshot to begin from; default that of the server")
	f.StringArrayVarP(&o.metadata, "metadata", "m", nil, "`KEY=VALUE` to find it by; may be repeated")
	f.StringArrayVarP(&o.env, "env", "e", nil, "`KEY=VALUE` that all its processes have; may be repeated")
	f.DurationVar(&o.life, "timeout", 0, "`time` that it lives; default that of the server, one hour")
	f.StringVar(&o.OnTimeout, "on-timeout", "", "what happens at the end of that time: `pause` or kill")
	f.Float64Var(&o.CPU, "cpu", 0, "`cores` that it may use; default 2")
	f.Var(size{&o.MemoryMB}, "memory", "memory in `MB`, or such as 4G; default 1024")
	f.Var(size{&o.DiskMB}, "disk", "disk that it may write, in `MB`, or such as 20G; default 10240")
	f.DurationVar(&o.protect, "protect", 0,
		"save it in the background at this interval of `time`, to resume it if it fails; default that of the server, never")
	f.BoolVar(&o.protectMemory, "protect-memory", false, "with --protect: save its processes too, not only its files")
	f.StringVar(&o.Network.Mode, "network", "", "`mode`: none, full, or allowlist with --allow; default none")
	f.StringArrayVar(&o.Network.Allow, "allow", nil, "`host` or range of addresses that it may reach; may be repeated")
}

// complete checks the flags, and sets what depends on several.
func (o *createOptions) complete() (err error) {
	if o.Metadata, err = readPairs("--metadata", o.metadata); err != nil {
		return err
	}
	if o.Env, err = readPairs("--env", o.env); err != nil {
		return err
	}
	if o.life < 0 || o.life > 0 && o.life < time.Second {
		return usageError{errors.New("--timeout is a second or more, such as 30m")}
	}
	if o.protect < 0 || o.protect > 0 && o.protect < time.Second || o.protectMemory && o.protect == 0 {
		return usageError{errors.New("--protect is a time such as 5m, and --protect-memory goes with it")}
	}
	if o.protect > 0 {
		o.Protect = &client.Protect{EveryS: int64(o.protect.Seconds()), Memory: o.protectMemory}
	}
	if o.TimeoutS = int64(o.life.Seconds()); len(o.Network.Allow) > 0 && o.Network.Mode == "" {
		o.Network.Mode = "allowlist"
	}
	if len(o.Network.Allow) > 0 && o.Network.Mode != "allowlist" {
		return usageError{fmt.Errorf("--allow goes with --network allowlist, not %s", o.Network.Mode)}
	}
	if !(o.CPU >= 0) {
		return usageError{errors.New("--cpu is a number of cores, such as 2 or 0.5")}
	}
	return nil
}

func (a *app) createCommand() *cobra.Command {
	var o createOptions
	var out format
	c := &cobra.Command{Use: "create", Short: "Make a sandbox", Args: exactly(),
		Long: "Make a sandbox, and print its id. It has no network unless you ask for one. At the end of its time it is paused to disk, " +
			"and any command wakes it.",
		Example: "  soulbox sandbox create\n  soulbox sandbox create --template python --metadata project=demo --timeout 2h\n  soulbox " +
			"sandbox create --memory 4096 --cpu 2 --network full\n" +
			"  soulbox sandbox create --allow pypi.org --allow files.pythonhosted.org",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := o.complete(); err != nil {
				return err
			}
			at, err := a.lastingServer(c.Context())
			if err != nil {
				return err
			}
			sb, err := at.Create(c.Context(), o.NewSandbox)
			if err != nil {
				return noTemplate(err)
			}
			if o.CPU > sb.CPU { // if stderr fails, the sandbox is there all the same
				fmt.Fprintf(inertly(a.stderr), "soulbox: the cpu granted is %g: its server has no more cores\n", sb.CPU)
			}
			if out == formatJSON {
				return a.json(sb)
			}
			return a.printf("%s\n", sb.ID)
		}}
	o.flags(c.Flags())
	out.flag(c, formatName, formatJSON)
	check(c.RegisterFlagCompletionFunc("template", a.completeTemplates))
	oneOf(c, "on-timeout", "pause", "kill")
	oneOf(c, "network", "none", "full", "allowlist")
	return c
}

func (a *app) listCommand() *cobra.Command {
	var filter, states []string
	var out format
	var watch bool
	c := &cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List sandboxes", Args: exactly(),
		Long: "List the running and paused sandboxes, newest first. --state also shows ended ones, which are remembered for a " +
			"day.",
		Example: "  soulbox sandbox list\n  soulbox sandbox list --filter project=demo -o wide\n  soulbox sandbox list --state " +
			"killed,failed\n  soulbox sandbox list --watch\n  soulbox sandbox kill $(soulbox sandbox list -o name)",
		RunE: func(c *cobra.Command, _ []string) error {
			l := client.List{States: states}
			var err error
			if l.Metadata, err = readPairs("--filter", filter); err != nil {
				return err
			}
			if !watch {
				return a.list(c.Context(), l, out)
			}
			return a.watchList(c.Context(), l, out)
		}}
	f := c.Flags()
	f.StringArrayVarP(&filter, "filter", "f", nil, "only those with the metadata `KEY=VALUE`; may be repeated")
	f.StringSliceVar(&states, "state", nil, "only those in these `states`: creating, running, paused, killed, failed")
	f.BoolVarP(&watch, "watch", "w", false, "update until Ctrl-C")
	out.flag(c, formatTable, formatWide, formatJSON, formatName)
	oneOf(c, "state", "creating", "running", "paused", "killed", "failed")
	return c
}

func (a *app) list(ctx context.Context, l client.List, out format) error {
	all, err := a.boxes(ctx, l)
	if err != nil {
		return err
	}
	slices.SortStableFunc(all, func(x, y box) int { return cmp.Or(y.Created.Compare(x.Created), cmp.Compare(x.ID, y.ID)) })
	switch out {
	case formatJSON:
		list := []client.Sandbox{}
		for _, b := range all {
			list = append(list, b.Sandbox)
		}
		return a.json(list)
	case formatName:
		for _, b := range all {
			if err := a.printf("%s\n", b.ID); err != nil {
				return err
			}
		}
		return nil
	}
	head := []string{"ID", "TEMPLATE", "STATE", "AGE", "ENDS IN", "METADATA"}
	if out == formatWide {
		head = append(head, "CPU", "MEMORY", "DISK", "NETWORK", "SERVER", "CAUSE")
	}
	t := a.table(head...)
	for _, b := range all {
		ends := until(b.ExpiresAt)
		if b.State == "paused" {
			ends = "" // its clock is stopped
		}
		row := []string{b.ID, b.Template, b.State, short(time.Since(b.Created)), ends, pairs(b.Metadata)}
		if out == formatWide {
			row = append(row, strconv.FormatFloat(b.CPU, 'g', -1, 64), strconv.FormatInt(b.MemoryMB, 10)+" MB",
				strconv.FormatInt(b.DiskMB, 10)+" MB", b.Network.Mode, b.at.Where(), b.Cause)
		}
		t.row(row...)
	}
	return t.flush()
}

const watchEvery = time.Second

// watchList prints the list again whenever it has changed.
func (a *app) watchList(ctx context.Context, l client.List, out format) error {
	last := ""
	for {
		var text bytes.Buffer
		shown := *a
		shown.stdout = &text
		if err := shown.list(ctx, l, out); err != nil && ctx.Err() == nil {
			return err
		}
		if ctx.Err() != nil {
			return nil // Ctrl-C is the usual end
		}
		if text.String() != last {
			last = text.String()
			if err := a.repaint(a.stdout, last, true); err != nil {
				return err
			}
		}
		if !pause(ctx, watchEvery) {
			return nil
		}
	}
}

// pause waits, and reports whether to continue.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

func (a *app) infoCommand() *cobra.Command {
	var out format
	c := &cobra.Command{Use: "info ID", Short: "Describe a sandbox", Args: exactly("ID"), ValidArgsFunction: a.completeSandboxes,
		Long:    "Describe a sandbox. One that has ended is remembered for a day.",
		Example: "  soulbox sandbox info ID\n  soulbox sandbox info ID -o json",
		RunE: func(c *cobra.Command, args []string) error {
			b, err := a.anySandbox(c.Context(), args[0])
			if err != nil {
				return err
			}
			if out == formatJSON {
				return a.json(b.Sandbox)
			}
			return a.describe(b)
		}}
	out.flag(c, formatTable, formatJSON)
	return c
}

func (a *app) describe(b box) error {
	state := b.State
	saved := ""
	if !b.SavedAt.IsZero() {
		if saved = "memory and files, " + ago(b.SavedAt); b.SavedFilesOnly {
			saved = "files, " + ago(b.SavedAt)
		}
	}
	if b.Protect != nil {
		saved += ", every " + short(time.Duration(b.Protect.EveryS)*time.Second)
	}
	switch {
	case b.State == "failed" && b.OnDisk:
		state += ", can be resumed from what was saved"
	case b.State == "paused" && b.OnDisk:
		state += " on disk"
	case b.State == "paused":
		state += " in memory"
	}
	if b.Cause != "" {
		state += ": " + b.Cause
	}
	network := b.Network.Mode
	if len(b.Network.Allow) > 0 {
		network += ": " + strings.Join(b.Network.Allow, ", ")
	}
	var ports []string
	for _, p := range b.Ports {
		ports = append(ports, strconv.Itoa(p.Port))
	}
	left := ""
	if b.LeftS > 0 {
		left = short(time.Duration(b.LeftS) * time.Second)
	}
	t := a.table()
	for _, row := range [][2]string{
		{"ID", b.ID}, {"State", state}, {"Template", b.Template}, {"Made from", b.Parent},
		{"Created", b.Created.Local().Format(time.RFC1123) + ", " + ago(b.Created)},
		{"Ends in", until(b.ExpiresAt)}, {"Time left", left}, {"Then", b.OnTimeout}, {"Kept for", until(b.RemoveAt)},
		{"Metadata", pairs(b.Metadata)},
		{"Saved", strings.TrimPrefix(saved, ", ")}, {"Notice", b.Notice},
		{"Limits", fmt.Sprintf("%g cores, %d MB memory, %d MB disk, %d processes", b.CPU, b.MemoryMB, b.DiskMB, b.Processes)},
		{"Network", network}, {"Ports", strings.Join(ports, ", ")}, {"Server", b.at.Where()},
	} {
		if row[1] != "" {
			t.row(row[0]+":", row[1])
		}
	}
	return t.flush()
}

// each does something with several sandboxes, and returns the errors of those that failed.
func (a *app) each(ctx context.Context, ids []string, do func(context.Context, box) (string, error)) error {
	errs, said := make([]error, len(ids)), make([]string, len(ids))
	var all sync.WaitGroup
	slots := make(chan struct{}, 8)
	for i, id := range ids {
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			b, err := a.liveSandbox(ctx, id)
			if err == nil {
				said[i], err = do(ctx, b)
			}
			errs[i] = err
		})
	}
	all.Wait()
	for _, line := range said {
		if line != "" {
			if err := a.printf("%s\n", line); err != nil {
				return err
			}
		}
	}
	return errors.Join(errs...)
}

func (a *app) endCommand() *cobra.Command {
	return &cobra.Command{Use: "kill ID...", Aliases: []string{"rm"}, Short: "End sandboxes", Args: atLeast("ID"),
		ValidArgsFunction: a.completeSandboxes, Long: "End sandboxes, and delete everything in them.",
		Example: "  soulbox sandbox kill ID\n  soulbox sandbox kill $(soulbox sandbox list -o name)",
		RunE: func(c *cobra.Command, args []string) error {
			return a.each(c.Context(), args, func(ctx context.Context, b box) (string, error) { return b.ID, b.at.Kill(ctx, b.ID) })
		}}
}

func (a *app) pauseCommand() *cobra.Command {
	var p client.Pause
	c := &cobra.Command{Use: "pause ID...", Short: "Pause sandboxes", Args: atLeast("ID"), ValidArgsFunction: a.completeSandboxes,
		Long: "Pause sandboxes: save their memory and files to disk, so that they take no memory and outlive a restart. 'resume' or " +
			"any command resumes them.",
		Example: "  soulbox sandbox pause ID\n  soulbox sandbox pause --in-memory ID",
		RunE: func(c *cobra.Command, args []string) error {
			if p.InMemory && p.FilesOnly {
				return usageError{errors.New("--in-memory saves nothing, so --files-only does not go with it")}
			}
			return a.each(c.Context(), args, func(ctx context.Context, b box) (string, error) {
				_, err := b.at.Pause(ctx, b.ID, p)
				return b.ID, err
			})
		}}
	c.Flags().BoolVar(&p.InMemory, "in-memory", false, "freeze them where they are, which is faster and frees no memory")
	c.Flags().BoolVar(&p.FilesOnly, "files-only", false, "save only their files: their processes end, and they boot again when resumed")
	return c
}

func (a *app) resumeCommand() *cobra.Command {
	var o client.Resume
	c := &cobra.Command{Use: "resume ID...", Short: "Resume sandboxes", Args: atLeast("ID"), ValidArgsFunction: a.completeSandboxes,
		Long: "Resume paused sandboxes where they were, and failed ones from what was saved; what is missing is said on stderr. " +
			"Where no\nserver has them, one is started.",
		Example: "  soulbox sandbox resume ID\n  soulbox sandbox resume --files-only ID",
		RunE: func(c *cobra.Command, args []string) error {
			return a.each(c.Context(), args, func(ctx context.Context, b box) (string, error) {
				if o == (client.Resume{}) && b.State == "paused" {
					return b.ID, b.at.Resume(ctx, b.ID, 0)
				}
				s, err := b.at.ResumeAs(ctx, b.ID, o)
				if s.Notice != "" {
					fmt.Fprintf(inertly(a.stderr), "soulbox: %s: %s\n", b.ID, s.Notice) // the sandbox is resumed all the same
				}
				return b.ID, err
			})
		}}
	c.Flags().BoolVar(&o.FilesOnly, "files-only", false,
		"boot from their files, without the saved processes, if these hang or are damaged")
	c.Flags().Var(size{&o.MemoryMB}, "memory", "a larger memory limit in `MB`, or such as 4G")
	return c
}

func (a *app) forkCommand() *cobra.Command {
	var count int
	var life time.Duration
	c := &cobra.Command{Use: "fork ID", Short: "Make copies of a sandbox", Args: exactly("ID"), ValidArgsFunction: a.completeSandboxes,
		Long:    "Make copies of a running sandbox, each with its memory, files and processes as they are, and print their ids.",
		Example: "  soulbox sandbox fork ID\n  soulbox sandbox fork ID --count 10 --timeout 10m",
		RunE: func(c *cobra.Command, args []string) error {
			if count < 1 || count > maxForks {
				return usageError{fmt.Errorf("--count is a number from 1 to %d", maxForks)}
			}
			if life < 0 || life > 0 && life < time.Second {
				return usageError{errors.New("--timeout is a second or more, such as 30m")}
			}
			b, err := a.liveSandbox(c.Context(), args[0])
			if err != nil {
				return err
			}
			ids, err := b.at.Fork(c.Context(), b.ID, count, life)
			for _, id := range ids {
				err = errors.Join(err, a.printf("%s\n", id))
			}
			return err
		}}
	c.Flags().IntVarP(&count, "count", "n", 1, "`number` of copies, up to 100")
	c.Flags().DurationVar(&life, "timeout", time.Hour, "life `time` of each")
	return c
}

// maxForks is how many copies a server makes at once.
const maxForks = 100

func (a *app) snapshotCommand() *cobra.Command {
	var n client.NewSnapshot
	c := &cobra.Command{Use: "snapshot ID [NAME]", Short: "Save a sandbox under a name", Args: between(1, "ID", "NAME"),
		ValidArgsFunction: a.completeSandboxes,
		Long: "Save a sandbox's memory and files under a name; the sandbox continues to run. 'soulbox sandbox create --template NAME' " +
			"makes sandboxes from it, any number of times.\n" +
			"If there is a snapshot of that name, this fails, unless --replace is given; 'soulbox template delete NAME' removes it.",
		Example: "  soulbox sandbox snapshot ID ready\n  soulbox sandbox create --template ready\n  soulbox sandbox snapshot list",
		RunE: func(c *cobra.Command, args []string) error {
			b, err := a.liveSandbox(c.Context(), args[0])
			if err != nil {
				return err
			}
			if len(args) > 1 {
				n.Name = args[1]
			}
			name, err := b.at.SnapshotAs(c.Context(), b.ID, n)
			if err != nil {
				return err
			}
			return a.printf("%s\n", name)
		}}
	c.Flags().BoolVar(&n.Replace, "replace", false, "take the place of the snapshot that has the name")
	c.AddCommand(&cobra.Command{Use: "list", Short: "List snapshots", Args: exactly(), Example: "  soulbox sandbox snapshot list",
		Long: "List the names of snapshots, newest first.",
		RunE: func(c *cobra.Command, _ []string) error {
			all, err := a.servers(c.Context())
			if err != nil {
				return err
			}
			seen := map[string]bool{}
			for _, s := range all {
				names, err := s.Snapshots(c.Context())
				if err != nil {
					return err
				}
				for _, name := range names {
					if !seen[name] {
						seen[name] = true
						if err := a.printf("%s\n", name); err != nil {
							return err
						}
					}
				}
			}
			return nil
		}})
	return c
}

func (a *app) extendCommand() *cobra.Command {
	return &cobra.Command{Use: "extend ID TIME", Short: "Let a sandbox live longer", Args: exactly("ID", "TIME"),
		ValidArgsFunction: a.completeSandboxes, Long: "Add a time to the remaining life of a sandbox.",
		Example: "  soulbox sandbox extend ID 2h",
		RunE: func(c *cobra.Command, args []string) error {
			d, err := time.ParseDuration(args[1])
			if err != nil || d < time.Second {
				return usageError{fmt.Errorf("%q is not a time such as 90s, 30m or 2h", args[1])}
			}
			b, err := a.liveSandbox(c.Context(), args[0])
			if err != nil {
				return err
			}
			s := int64(d.Seconds())
			sb, err := b.at.Update(c.Context(), b.ID, client.Update{ExtendS: &s})
			if err != nil {
				return err
			}
			if sb.State == "paused" {
				return a.printf("%s will have %s left when it is resumed.\n", sb.ID, short(time.Duration(sb.LeftS)*time.Second))
			}
			return a.printf("%s ends in %s.\n", sb.ID, until(sb.ExpiresAt))
		}}
}
