package main

import (
	"context"
	"os"
	"path"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"github.com/spf13/pflag"

	"soulbox.dev/soulbox/api/client"
)

// completeTime bounds the requests that a completion makes, since the user waits for it.
const completeTime = 3 * time.Second

// completeSandboxes completes a first argument that is a sandbox's id. It starts no server.
func (a *app) completeSandboxes(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 && !strings.Contains(c.Use, "...") {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.sandboxNames(c.Context()), cobra.ShellCompDirectiveNoFileComp
}

// completeExec completes the id, and our flags behind it, which cobra takes for the command's.
func (a *app) completeExec(c *cobra.Command, args []string, typed string) (flags []string, _ cobra.ShellCompDirective) {
	if len(args) == 0 {
		return a.completeSandboxes(c, args, typed)
	}
	if len(args) == 1 && strings.HasPrefix(typed, "-") {
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if name := "--" + f.Name; strings.HasPrefix(name, typed) && !f.Hidden {
				_, usage := pflag.UnquoteUsage(f)
				flags = append(flags, name+"\t"+usage)
			}
		})
	}
	return flags, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) sandboxNames(ctx context.Context) []string {
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, cancel := context.WithTimeout(ctx, completeTime)
	defer cancel()
	all, err := a.known(ctx)
	if err != nil {
		return nil // a completion cannot show an error
	}
	var names []string
	for _, s := range all {
		list, err := s.Sandboxes(ctx, client.List{})
		if err != nil {
			continue // as above
		}
		for _, sb := range list {
			names = append(names, sb.ID+"\t"+printable(strings.TrimSpace(sb.State+" "+sb.Template+" "+pairs(sb.Metadata))))
		}
	}
	return names
}

// known returns the servers that exist already.
func (a *app) known(ctx context.Context) ([]server, error) {
	if _, _, remote, err := a.chosen(); err != nil || remote {
		return a.servers(ctx)
	}
	return a.running(ctx)
}

func (a *app) completeTemplates(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), completeTime)
	defer cancel()
	all, err := a.known(ctx)
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, s := range all {
		list, err := s.Templates(ctx)
		if err != nil {
			continue // a completion cannot show an error
		}
		for _, t := range list {
			names = append(names, t.Name)
		}
		if snaps, err := s.Snapshots(ctx); err == nil {
			names = append(names, snaps...)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeCopy completes "ID:" and, after it, paths in the sandbox.
func (a *app) completeCopy(c *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
	id, name, ok := remote(typed)
	if !ok {
		var all []string
		for _, line := range a.sandboxNames(c.Context()) {
			one, _, _ := strings.Cut(line, "\t")
			if strings.HasPrefix(one, typed) {
				all = append(all, one+":")
			}
		}
		if typed == "" || len(all) == 0 {
			return all, cobra.ShellCompDirectiveDefault
		}
		return all, cobra.ShellCompDirectiveNoSpace
	}
	ctx, cancel := context.WithTimeout(context.Background(), completeTime)
	defer cancel()
	b, err := a.liveSandbox(ctx, id)
	if err != nil || b.State != "running" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	dir, _ := path.Split(name)
	names, err := b.at.Names(ctx, b.ID, path.Join(".", dir))
	if strings.HasPrefix(dir, "/") {
		names, err = b.at.Names(ctx, b.ID, path.Clean(dir))
	}
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var safe []string
	for _, n := range names {
		if strings.Trim(n, harmless) == "" { // the shell would run what a guest may write into a name
			safe = append(safe, id+":"+dir+n)
		}
	}
	return safe, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}

// harmless are the characters of names that have no meaning to a shell.
const harmless = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._/@%+,:=-"

// manCommand writes the manual.
func (a *app) manCommand() *cobra.Command {
	return &cobra.Command{Use: "man DIRECTORY", Short: "Write the manual as man pages", Args: exactly("DIRECTORY"),
		Long:    "Write a man page for each command into a directory, which is created if it does not exist.",
		Example: "  soulbox man ~/.local/share/man/man1\n  man soulbox-sandbox-create",
		RunE: func(c *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			c.Root().DisableAutoGenTag = true
			return doc.GenManTree(c.Root(), &doc.GenManHeader{Title: "SOULBOX", Section: "1", Source: "SoulBox"}, args[0])
		}}
}
