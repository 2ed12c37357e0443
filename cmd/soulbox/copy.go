package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/internal/names"
)

func (a *app) copyCommand() *cobra.Command {
	var user string
	var quiet bool
	c := &cobra.Command{Use: "cp SOURCE DESTINATION", Short: "Copy files into a sandbox, or out of it",
		Args: exactly("SOURCE", "DESTINATION"), ValidArgsFunction: a.completeCopy,
		Long: `Copy files and directories into a sandbox, or out of it. One side is ID:PATH; a path that does not begin with / is relative
to the user's home. "-" is a tar on stdin or stdout. A directory is copied into an existing directory, or becomes the destination;
"SOURCE/." is its content. "ID:." is the home directory: it can only be copied to a directory that does not exist yet. Symbolic
links stay links, existing files are replaced. What a sandbox sends is written below the destination and nowhere else.`,
		Example: "  soulbox cp report.csv ID:/tmp/\n  soulbox cp project ID:project\n  soulbox cp ID:/home/user/out .\n  soulbox cp " +
			"ID:/var/log - | tar tf -\n  tar cf - src | soulbox cp - ID:/home/user",
		RunE: func(c *cobra.Command, args []string) error {
			fromID, from, fromBox := remote(args[0])
			toID, to, toBox := remote(args[1])
			if fromBox == toBox {
				return usageError{errors.New("one of the two is in a sandbox, as ID:PATH")}
			}
			if fromBox && args[0] == fromID+":" { // a slip, after which files of a home would be among the user's own
				return usageError{fmt.Errorf("name a path: %s:. is the home directory", fromID)}
			}
			b, err := a.liveSandbox(c.Context(), fromID+toID)
			if err != nil {
				return err
			}
			t := transfer{app: a, box: b, user: user, quiet: quiet}
			if toBox {
				return asExec(t.in(c.Context(), from, to))
			}
			return asExec(t.out(c.Context(), from, to))
		}}
	c.Flags().StringVarP(&user, "user", "u", "", "`name` of the user in the sandbox; default the sandbox's user")
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	return c
}

// remote splits ID:PATH. A path of this machine that contains a colon must begin with . or /.
func remote(arg string) (id, name string, ok bool) {
	id, name, ok = strings.Cut(arg, ":")
	if !ok || id == "" || strings.Trim(id, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return "", arg, false
	}
	if name == "" {
		name = "."
	}
	return id, names.Parse(name), true
}

// transfer copies files with the sandbox's tar.
type transfer struct {
	*app
	box   box
	user  string
	quiet bool
}

// progress shows how much was copied, if stderr is a terminal; total is -1 if unknown.
func (t transfer) progress(total int64) *progressbar.ProgressBar {
	_, shown := terminalOf(t.stderr)
	return progressbar.NewOptions64(total, progressbar.OptionSetWriter(t.stderr), progressbar.OptionSetVisibility(shown && !t.quiet),
		progressbar.OptionShowBytes(true),
		progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish(), progressbar.OptionSetWidth(30))
}

// tar runs tar in the sandbox.
func (t transfer) tar(ctx context.Context, stdin io.Reader, stdout io.Writer, args ...string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s, err := t.box.at.Start(ctx, t.box.ID, client.Command{Args: append([]string{"tar"}, args...), User: t.user, Stdin: stdin != nil,
		Linger: execLinger}, t.reconnector(t.box.ID))
	var start *client.StartError
	if errors.As(err, &start) && start.Exit == 127 {
		return exitError{exitExec,
			errors.New("the sandbox has no tar, which cp needs: install it there, or copy single files with 'soulbox exec ID -- " +
				"cat FILE'")}
	}
	if err != nil {
		return err
	}
	if stdin != nil {
		go func() {
			if err := send(ctx, s, stdin); err != nil {
				cancel(err)
			}
		}()
	}
	stderr, denied := inertly(t.stderr), &seen{text: "Permission denied"}
	exit, err := s.Follow(ctx, stdout, io.MultiWriter(denied, stderr), nil)
	if err = errors.Join(err, writeRest(stderr)); err != nil {
		return t.end(s, err)
	}
	if exit.Code != 0 && denied.is && t.user != "root" {
		return exitError{exitFailed, errors.New("tar in the sandbox may not do that as its user: -u root does it as root")}
	}
	if exit.Code != 0 {
		return exitError{exitFailed, fmt.Errorf("tar in the sandbox has failed with exit code %d", exit.Code)}
	}
	return nil
}

// seen says whether a text has passed, whichever way it was cut.
type seen struct {
	text string
	last string
	is   bool
}

// Write implements io.Writer.
func (s *seen) Write(p []byte) (int, error) {
	s.last += string(p)
	s.is = s.is || strings.Contains(s.last, s.text)
	s.last = s.last[max(0, len(s.last)-len(s.text)):]
	return len(p), nil
}

// in copies into the sandbox.
func (t transfer) in(ctx context.Context, from, to string) error {
	if from == "-" {
		bar := t.progress(-1)
		defer bar.Close()
		return t.tar(ctx, io.TeeReader(t.stdin, bar), io.Discard, "-xopf", "-", "-C", to)
	}
	info, err := os.Lstat(from)
	if err != nil {
		return exitError{exitFailed, err}
	}
	there, err := t.box.at.Stat(ctx, t.box.ID, to)
	if err != nil && !client.IsNotFound(err) {
		return err
	}
	contents := strings.HasSuffix(from, "/.") || from == "."
	into, name := path.Dir(strings.TrimSuffix(to, "/")), path.Base(to)
	switch {
	case err == nil && there.Dir && contents:
		into, name = to, "."
	case err == nil && there.Dir:
		into, name = to, filepath.Base(from)
	case strings.HasSuffix(to, "/") && !info.IsDir():
		return exitError{exitFailed, fmt.Errorf("there is no directory %s in the sandbox", to)}
	}
	total, err := walk(ctx, from, nil)
	if err != nil {
		return exitError{exitFailed, err}
	}
	bar := t.progress(total)
	defer bar.Close()
	r, w := io.Pipe()
	defer r.Close()
	go func() {
		out := tar.NewWriter(w)
		_, err := walk(ctx, from, func(rel string, info fs.FileInfo, link string) error {
			if path.Join(name, rel) == "." { // the directory exists, and may belong to another user
				return nil
			}
			return add(out, from, rel, path.Join(name, rel), info, link, bar)
		})
		w.CloseWithError(errors.Join(err, out.Close()))
	}()
	return t.tar(ctx, r, io.Discard, "-xopf", "-", "-C", into)
}

// walk visits a file, or a directory and everything below it, and sums the sizes; rel is relative to root, "." is root itself.
func walk(ctx context.Context, root string, each func(rel string, info fs.FileInfo, link string) error) (total int64, err error) {
	err = filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		link := ""
		switch {
		case info.Mode().IsRegular():
			total += info.Size()
		case info.Mode()&fs.ModeSymlink != 0:
			if link, err = os.Readlink(name); err != nil {
				return err
			}
		case !info.IsDir():
			return nil // sockets and devices are not copied
		}
		rel, err := filepath.Rel(root, name)
		if err != nil || each == nil {
			return err
		}
		return each(filepath.ToSlash(rel), info, link)
	})
	return total, err
}

// add writes one file to a tar, without its owner.
func add(out *tar.Writer, root, rel, name string, info fs.FileInfo, link string, shown io.Writer) error {
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	h.Name, h.Uid, h.Gid, h.Uname, h.Gname, h.Format = name, 0, 0, "", "", tar.FormatPAX
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	if info.IsDir() {
		h.Name += "/"
	}
	if err := out.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
		return err
	}
	f, err := os.Open(filepath.Join(root, filepath.FromSlash(rel)))
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.Copy(io.MultiWriter(out, shown), io.LimitReader(f, h.Size))
	if err == nil && n < h.Size {
		err = fmt.Errorf("%s became shorter while it was read", f.Name())
	}
	return err
}

// out copies out of the sandbox.
func (t transfer) out(ctx context.Context, from, to string) error {
	whole := strings.HasSuffix(from, "/.")
	from = path.Clean(from)
	into, base := path.Dir(from), path.Base(from)
	if nameless := base == "." || base == ".." || base == "/"; whole || nameless {
		// A home directory has no name that the user chose, and its dot files must not mix with the user's own.
		if there, err := os.Stat(to); err == nil && there.IsDir() && !whole && to != "-" {
			return usageError{fmt.Errorf("%s exists. Name a new directory for a copy of %s:%s, or use %s:%s/. to copy its content into it",
				to, t.box.ID, from, t.box.ID, strings.TrimSuffix(from, "/"))}
		}
		whole, into, base = true, from, "."
	}
	bar := t.progress(-1)
	defer bar.Close()
	if _, shown := terminalOf(t.stdout); to == "-" && shown {
		return usageError{errors.New("stdout is a terminal, which cannot show a tar: redirect it, or name a destination")}
	}
	if to == "-" {
		return t.tar(ctx, nil, io.MultiWriter(t.stdout, bar), "-cf", "-", "-C", into, "--", base)
	}
	target, err := placeOf(to, base, whole)
	if err != nil {
		return exitError{exitFailed, err}
	}
	r, w := io.Pipe()
	sent := make(chan error, 1)
	go func() {
		err := t.tar(ctx, nil, io.MultiWriter(w, bar), "-cf", "-", "-C", into, "--", base)
		w.CloseWithError(err)
		sent <- err
	}()
	err = unpack(ctx, r, base, target, inertly(t.stderr))
	if err == nil {
		_, err = io.Copy(io.Discard, r) // the padding of tar's last block
	}
	_ = r.CloseWithError(err) // makes tar's writer end, with no other error unless it failed first
	if serr := <-sent; serr != nil && (err == nil || errors.Is(err, serr) || !errors.Is(serr, err)) {
		return serr
	}
	if err != nil {
		return exitError{exitFailed, err}
	}
	return nil
}
