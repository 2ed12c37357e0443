package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"runtime/debug"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

const templateUsage = `soulbox-mcp template makes and shows the root file systems of sandboxes. The operator's are for everyone.

Usage:
  soulbox-mcp template base [--variant node|python] [flags]
                               make the template for everyday work, from the packages of this machine's distribution
  soulbox-mcp template list    show the templates
  soulbox-mcp template delete NAME
                               remove a template; its sandboxes keep running
  soulbox-mcp template copy NAME NEW
                               give a template a second name, perhaps with a :tag; the first one stays
  soulbox-mcp template pull IMAGE NAME
                               make a template from an image of a registry
  soulbox-mcp template push NAME IMAGE
                               push a template to a registry
  soulbox-mcp template import FILE NAME
                               make a template from an OCI layout, from the output of docker save, or from a tar of a file system
  soulbox-mcp template export NAME FILE
                               write a template as an OCI layout in a directory, or for docker load if FILE ends in .tar
`

// runTemplate makes and shows templates.
func runTemplate(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	debug.SetMemoryLimit(math.MaxInt64) // an index of packages is large, and this process is short-lived
	command := ""
	if len(args) > 0 {
		command, args = args[0], args[1:]
	}
	switch command {
	case "", "help", "--help", "-h":
		_, err := fmt.Fprint(stdout, templateUsage)
		return err
	}
	want, known := map[string]int{"base": 0, "list": 0, "delete": 1, "copy": 2, "pull": 2, "push": 2, "import": 2, "export": 2}[command]
	if !known {
		return noCommand("template "+command, "soulbox-mcp template help")
	}
	var names []string
	for ; len(names) < want && len(args) > 0 && !strings.HasPrefix(args[0], "-"); args = args[1:] {
		names = append(names, args[0])
	}
	if asksHelp := len(args) > 0 && (args[0] == "-h" || args[0] == "--help"); len(names) < want && !asksHelp {
		return usageError{fmt.Errorf("template %s needs %d arguments, with flags after them; 'soulbox-mcp template help' shows them",
			command, want)}
	}
	var base template.BaseOptions
	c := config{onExit: "kill"}
	err := c.parse("template "+command, args, getenv, stderr, func(flags *flag.FlagSet) {
		if command != "base" {
			return
		}
		flags.StringVar(&base.Name, "name", "", "`name` of the template; default base, or the variant")
		flags.StringVar(&base.Variant, "variant", "", "more packages: `node` or python")
		flags.StringVar(&base.Mirror, "mirror", "",
			"`URL` of the archive of packages, such as https://deb.debian.org/debian; default those of this machine's apt")
		flags.StringVar(&base.Suite, "suite", "", "`codename` of the distribution, such as bookworm; default this machine's")
		flags.StringVar(&base.Keyring, "keyring", "", "`file` with the keys of the archive; default this machine's")
	})
	if err != nil {
		return err
	}
	switch command {
	case "base":
		if err := template.CheckVariant(base.Variant); err != nil {
			return usageError{fmt.Errorf("--variant: %w", err)}
		}
		return c.buildBase(ctx, base, stdout, stderr)
	case "list":
		return c.listTemplates(stdout)
	}
	return c.moveTemplate(ctx, command, names, stdout)
}

func (c config) buildBase(ctx context.Context, o template.BaseOptions, stdout, stderr io.Writer) (err error) {
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: max(c.logLevel, slog.LevelWarn)}))
	manager, store, err := c.newManager(log, nil)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := manager.Close(); err == nil {
			err = cerr
		}
	}()
	store.InUse = manager.Images
	shown := newProgress(stderr)
	o.Say = shown.say
	built, err := c.newBuilder(store, manager, log).BuildBase(ctx, o)
	shown.end()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "%s is built: %d MB in %.0f s. Sandboxes that name no template begin from %q.\n", built.Name,
		built.Size>>20, shown.took().Seconds(), template.BaseName)
	return err
}

// moveTemplate carries out the commands that concern one template.
func (c config) moveTemplate(ctx context.Context, command string, names []string, stdout io.Writer) error {
	store, err := c.newStore()
	if err != nil {
		return err
	}
	var m template.Manifest
	switch command {
	case "delete":
		return store.Delete("", names[0])
	case "copy":
		if m, err = store.Copy("", names[0], names[1]); err != nil {
			return err
		}
	case "pull":
		if m, err = store.Pull(ctx, template.Manifest{Name: names[1]}, names[0]); err != nil {
			return err
		}
	case "import":
		if m, err = store.ImportFile(ctx, template.Manifest{Name: names[1]}, names[0]); err != nil {
			return err
		}
	default:
		if m, err = store.Get("", names[0]); err != nil {
			return err
		}
		if command == "export" {
			return store.Export(m, names[1])
		}
		digest, err := store.Push(ctx, m, names[1])
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(stdout, "%s is %s@%s\n", m.Name, names[1], digest)
		return err
	}
	_, err = fmt.Fprintf(stdout, "%s is there: %d MB\n", m.Name, m.Size>>20)
	return err
}

func (c config) listTemplates(stdout io.Writer) error {
	store, err := c.newStore()
	if err != nil {
		return err
	}
	list, err := store.List("")
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tSIZE\tCREATED\tFROM")
	for _, m := range list {
		fmt.Fprintf(w, "%s\t%d MB\t%s\t%s\n", m.Name, m.Size>>20, m.Created.Format(time.DateTime), m.Parent)
	}
	host := "the programs of this machine"
	if _, err := store.Get("", template.BaseName); errors.Is(err, sandbox.ErrNoTemplate) {
		host += fmt.Sprintf("; %q, too, until that is made by 'soulbox-mcp template base'", template.BaseName)
	}
	fmt.Fprintf(w, "%s\t-\t-\t%s\n", template.HostName, host)
	d, err := store.Disk()
	if err := errors.Join(err, w.Flush()); err != nil {
		return err
	}
	_, err = fmt.Fprintln(stdout, "\n"+describeDisk(d))
	return err
}

// describeDisk says how much disk the templates of all owners take.
func describeDisk(d template.Disk) string {
	return fmt.Sprintf("All templates, with what builds keep, take %d of %d MB of disk (--template-budget-mb).", d.Used>>20, d.Budget>>20)
}

// progress shows lines as they come; on a terminal only the last one, in place.
type progress struct {
	to    io.Writer
	began time.Time
	width int // columns of the terminal; 0 if there is none
}

func newProgress(to io.Writer) *progress {
	p := &progress{to: to, began: time.Now()}
	if f, ok := to.(*os.File); ok {
		if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
			p.width = max(int(size.Col), 20)
		}
	}
	return p
}

func (p *progress) took() time.Duration { return time.Since(p.began) }

func (p *progress) say(format string, args ...any) {
	text := fmt.Sprintf("[%3.0f s] ", p.took().Seconds()) + strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", " ")
	if p.width == 0 {
		fmt.Fprintln(p.to, text)
		return
	}
	if r := []rune(text); len(r) >= p.width {
		text = string(r[:p.width-1])
	}
	fmt.Fprintf(p.to, "\r\x1b[K%s", text)
}

func (p *progress) end() {
	if p.width > 0 {
		fmt.Fprint(p.to, "\r\x1b[K")
	}
}
