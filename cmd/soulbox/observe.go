package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/internal/names"
)

func (a *app) logsCommand() *cobra.Command {
	var follow bool
	var since time.Duration
	var source, level string
	var limit int
	c := &cobra.Command{Use: "logs ID", Short: "Show what happened to a sandbox", Args: exactly("ID"),
		ValidArgsFunction: a.completeSandboxes,
		Long: "Show what happened to a sandbox: changes of its state, starts and ends of its processes. A sandbox that has ended " +
			"is remembered for a day.",
		Example: "  soulbox sandbox logs ID\n  soulbox sandbox logs ID --follow --since 10m\n  soulbox sandbox logs ID --source process " +
			"--level warn",
		RunE: func(c *cobra.Command, args []string) error {
			if since < 0 || limit < 1 || limit > maxLogs {
				return usageError{fmt.Errorf("--since is a time such as 10m, and --tail from 1 to %d", maxLogs)}
			}
			b, err := a.anySandbox(c.Context(), args[0])
			if err != nil {
				return err
			}
			q := client.LogQuery{Level: level, Source: source, Limit: limit}
			if since > 0 {
				q.Since, q.Limit = time.Now().Add(-since), maxLogs
			}
			return a.logs(c.Context(), b, q, follow)
		}}
	f := c.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "continue until the sandbox has ended")
	f.DurationVar(&since, "since", 0, "only what happened in the last `time`, such as 10m")
	f.IntVarP(&limit, "tail", "n", 100, "number of `entries` from the end, without --since")
	f.StringVar(&source, "source", "", "only entries of this `source`: system, process or build")
	f.StringVar(&level, "level", "", "only entries of this level or above: debug, info, warn, error")
	oneOf(c, "source", "system", "process", "build")
	oneOf(c, "level", "debug", "info", "warn", "error")
	return c
}

const maxLogs = 1000

// logs prints a log page by page, and with follow continues with new entries.
func (a *app) logs(ctx context.Context, b box, q client.LogQuery, follow bool) error {
	seen := map[string]bool{} // entries of the last millisecond, with which the next page begins again
	for {
		list, err := b.at.Logs(ctx, b.ID, q)
		if err != nil {
			if ctx.Err() != nil {
				return nil // Ctrl-C is the usual end
			}
			return err
		}
		slices.SortStableFunc(list,
			func(x, y client.LogEntry) int { return x.Time.Compare(y.Time) }) // ends of processes are logged only when they are queried
		fresh := 0
		for _, e := range list {
			key := e.Time.String() + e.Message
			if seen[key] {
				continue
			}
			fresh++
			if at := e.Time.Truncate(time.Millisecond); at.After(q.Since) {
				q.Since, seen = at, map[string]bool{}
			}
			seen[key] = true
			colour := map[string]string{"warn": yellow, "error": red, "debug": dim}[e.Level]
			if err := a.printf("%s %-5s %-7s %s\n", a.coloured(dim, e.Time.Local().Format("2006-01-02 15:04:05.000")),
				a.coloured(colour, e.Level), e.Fields["source"], printable(e.Message)); err != nil {
				return err
			}
		}
		q.Limit = maxLogs
		if len(list) == maxLogs && fresh > 0 {
			continue // there is more
		}
		if !follow {
			return nil
		}
		sb, err := b.at.Sandbox(ctx, b.ID)
		if err == nil && fresh == 0 && (sb.State == "killed" || sb.State == "failed") {
			return nil
		}
		if q.Since.IsZero() {
			q.Since = time.Now().Add(-time.Minute)
		}
		if !pause(ctx, tick) {
			return nil
		}
	}
}

func (a *app) metricsCommand() *cobra.Command {
	var watch bool
	var since time.Duration
	var out format
	c := &cobra.Command{Use: "metrics ID", Short: "Show what a sandbox uses", Args: exactly("ID"), ValidArgsFunction: a.completeSandboxes,
		Long: "Show the processor, memory and disk that a sandbox uses now and has used, as numbers and plots. It is measured every five " +
			"seconds.", Example: "  soulbox sandbox metrics ID\n  soulbox sandbox metrics ID --watch --since 10m\n  soulbox sandbox " +
			"metrics ID -o json",
		RunE: func(c *cobra.Command, args []string) error {
			if since <= 0 {
				return usageError{errors.New("--since is a time such as 10m")}
			}
			b, err := a.anySandbox(c.Context(), args[0])
			if err != nil {
				return err
			}
			for {
				list, err := b.at.Metrics(c.Context(), b.ID, time.Now().Add(-since))
				if err == nil && out == formatJSON {
					err = a.json(list)
				} else if err == nil {
					err = a.repaint(a.stdout, plotted(list), watch)
				}
				if err != nil && c.Context().Err() == nil {
					return err
				}
				if !watch || !pause(c.Context(), 2*time.Second) {
					return nil
				}
			}
		}}
	c.Flags().BoolVarP(&watch, "watch", "w", false, "update until Ctrl-C")
	c.Flags().DurationVar(&since, "since", 5*time.Minute, "of the last `time`")
	out.flag(c, formatTable, formatJSON)
	return c
}

const plotWidth = 40 // samples

// plotted shows the last samples.
func plotted(list []client.Metric) string {
	if len(list) == 0 {
		return "nothing is measured yet; measurements are taken every five seconds\n"
	}
	list = list[max(0, len(list)-plotWidth):]
	last := list[len(list)-1]
	line := func(name, now string, of func(client.Metric) float64) string {
		values := make([]float64, len(list))
		for i, m := range list {
			values[i] = of(m)
		}
		return fmt.Sprintf("%-7s %-26s %s\n", name, now, spark(values))
	}
	share := func(used, total int64) float64 { return 100 * float64(used) / float64(max(total, 1)) }
	return line("CPU", fmt.Sprintf("%.1f %% of %d cores", last.CPUPct, last.CPUCount), func(m client.Metric) float64 { return m.CPUPct }) +
		line("memory", bytesOf(last.MemUsed)+" of "+bytesOf(last.MemTotal),
			func(m client.Metric) float64 { return share(m.MemUsed, m.MemTotal) }) +
		line("disk", bytesOf(last.DiskUsed)+" of "+bytesOf(last.DiskTotal),
			func(m client.Metric) float64 { return share(m.DiskUsed, m.DiskTotal) })
}

// spark plots percentages, each as one block (Unicode, U+2581 to U+2588).
func spark(values []float64) string {
	var b strings.Builder
	for _, v := range values {
		b.WriteRune(rune(0x2581 + min(7, max(0, int(v/12.5)))))
	}
	return b.String()
}

func (a *app) watchCommand() *cobra.Command {
	var recursive bool
	c := &cobra.Command{Use: "watch ID PATH", Short: "Show what changes in a directory of a sandbox", Args: exactly("ID", "PATH"),
		ValidArgsFunction: a.completeSandboxes,
		Long: "Show what changes in a directory of a sandbox, a line for each change, until Ctrl-C. Changes while the " +
			"connection is lost are not shown; a message says so.",
		Example: "  soulbox watch ID /home/user/project\n  soulbox watch ID --recursive=false /tmp",
		RunE: func(c *cobra.Command, args []string) error {
			ctx := c.Context()
			b, err := a.liveSandbox(ctx, args[0])
			if err != nil {
				return err
			}
			reconnect := a.reconnector(b.ID)
			at, lost := b.at, time.Time{}
			for {
				err := at.Watch(ctx, b.ID, names.Parse(args[1]), recursive, func() {
					if !lost.IsZero() {
						fmt.Fprintf(a.stderr, "soulbox: watching again; what changed in the last %s was not seen\n",
							short(time.Since(lost))) // if stderr fails, there is no other place to report
					}
					lost = time.Time{}
				}, func(e client.Event) error { return a.printf("%-7s %s\n", e.Op, names.Show(e.Name)) })
				var told *client.Error
				if ctx.Err() != nil {
					return nil // Ctrl-C is the usual end
				}
				if errors.As(err, &told) && told.Status < 500 {
					return err
				}
				if lost.IsZero() {
					lost = time.Now()
				} else if time.Since(lost) > 2*time.Minute {
					return err
				}
				if !pause(ctx, tick) {
					return nil
				}
				if next, err := reconnect(ctx); err == nil {
					at = next
				}
				sb, err := at.Sandbox(ctx, b.ID)
				if err == nil && (sb.State == "killed" || sb.State == "failed") {
					return fmt.Errorf("sandbox %s has ended: %s", b.ID, sb.Cause)
				}
				if err == nil && sb.State == "paused" { // watching would wake it
					return fmt.Errorf("sandbox %s was paused; 'soulbox sandbox resume %s' resumes it", b.ID, b.ID)
				}
			}
		}}
	c.Flags().BoolVarP(&recursive, "recursive", "r", true, "also in all directories below it")
	return c
}

func (a *app) portCommand() *cobra.Command {
	port := group(&cobra.Command{Use: "port", Short: "Make ports of a sandbox reachable",
		Long:    "Make ports of a sandbox reachable from this machine, or at a domain of its server.",
		Example: "  soulbox port expose ID 8000\n  soulbox port list ID"})
	list := &cobra.Command{Use: "list ID", Aliases: []string{"ls"}, Short: "List ports", Args: exactly("ID"),
		ValidArgsFunction: a.completeSandboxes, Long: "List the ports that are exposed, and those on which something listens.",
		Example: "  soulbox port list ID",
		RunE: func(c *cobra.Command, args []string) error {
			b, err := a.liveSandbox(c.Context(), args[0])
			if err != nil {
				return err
			}
			all, err := b.at.Ports(c.Context(), b.ID)
			if err != nil {
				return err
			}
			t := a.table("PORT", "LISTENING", "URL")
			for _, p := range all {
				listening := ""
				if p.Listening {
					listening = "yes"
				}
				t.row(strconv.Itoa(p.Port), listening, p.URL)
			}
			return t.flush()
		}}
	end := &cobra.Command{Use: "close ID PORT", Short: "Make a port unreachable again", Args: exactly("ID", "PORT"),
		ValidArgsFunction: a.completeSandboxes, Long: "Undo 'port expose' of a port, and close the connections to it.",
		Example: "  soulbox port close ID 8000",
		RunE: func(c *cobra.Command, args []string) error {
			n, err := portNumber(args[1])
			if err != nil {
				return err
			}
			b, err := a.liveSandbox(c.Context(), args[0])
			if err != nil {
				return err
			}
			err = b.at.ClosePort(c.Context(), b.ID, n)
			if client.IsNotFound(err) {
				return fmt.Errorf("%w; 'soulbox port list %s' shows those that are", err, b.ID)
			}
			return err
		}}
	port.AddCommand(a.exposeCommand(), list, end)
	return port
}

func (a *app) exposeCommand() *cobra.Command {
	var public bool
	var wait time.Duration
	c := &cobra.Command{Use: "expose ID PORT", Short: "Make a port reachable", Args: exactly("ID", "PORT"),
		ValidArgsFunction: a.completeSandboxes,
		Long: "Make a TCP port reachable, and print where: a URL on this machine, or below the domain of the server. Waits a moment for " +
			"a program that has just been started.",
		Example: "  soulbox port expose ID 8000\n  curl $(soulbox port expose ID 8000)",
		RunE: func(c *cobra.Command, args []string) error {
			n, err := portNumber(args[1])
			if err != nil {
				return err
			}
			if wait < 0 || wait > maxPortWait {
				return usageError{fmt.Errorf("--wait is a time up to %s", short(maxPortWait))}
			}
			b, err := a.liveSandbox(c.Context(), args[0])
			if err != nil {
				return err
			}
			p, err := b.at.ExposeWithin(c.Context(), b.ID, n, public, wait)
			if err != nil {
				return err
			}
			if !p.Listening {
				fmt.Fprintf(a.stderr, "soulbox: nothing listens on port %d yet, after %s; 'soulbox ps %s' lists what runs\n", n,
					wait, b.ID) // nobody else can be told
			}
			return a.printf("%s\n", p.URL)
		}}
	c.Flags().BoolVar(&public, "public", false, "also for clients without the sandbox's token")
	c.Flags().DurationVar(&wait, "wait", 5*time.Second, "`time` to wait for something that listens")
	return c
}

// maxPortWait is how long a server waits for something that listens.
const maxPortWait = 50 * time.Second

func portNumber(text string) (int, error) {
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > 65535 {
		return 0, usageError{fmt.Errorf("a port is a number from 1 to 65535, not %q", text)}
	}
	return n, nil
}

// maxURLTime is how long a server lets a signed URL be valid.
const maxURLTime = 7 * 24 * time.Hour

func (a *app) urlCommand() *cobra.Command {
	var write bool
	var valid time.Duration
	c := &cobra.Command{Use: "url ID PATH", Short: "Sign a URL for a file of a sandbox", Args: exactly("ID", "PATH"),
		ValidArgsFunction: a.completeSandboxes,
		Long: "Sign a URL with which anyone can read a file of a sandbox, or with --write write it, until the URL expires. It " +
			"needs a server that is reached by HTTP.",
		Example: "  soulbox url ID /home/user/report.pdf\n  curl --data-binary @data.csv -H 'Content-Type: application/octet-stream' " +
			"\"$(soulbox url ID /tmp/data.csv --write)\"",
		RunE: func(c *cobra.Command, args []string) error {
			if valid < time.Second || valid > maxURLTime {
				return usageError{errors.New("--expires is a time from a second to a week, such as 2h")}
			}
			b, err := a.liveSandbox(c.Context(), args[0])
			if err != nil {
				return err
			}
			at, err := b.at.FileURL(c.Context(), b.ID, names.Parse(args[1]), write, valid)
			if err != nil {
				return err
			}
			return a.printf("%s\n", at)
		}}
	c.Flags().BoolVar(&write, "write", false, "for writing")
	c.Flags().DurationVar(&valid, "expires", time.Hour, "`time` for which it is valid, up to a week")
	return c
}
