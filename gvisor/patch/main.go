// Command patch makes a copy of the pinned gVisor with SoulBox's changes, from which bin/runsc is built. A patch holds only the new lines.
// It names a file of gVisor by its SHA-256, so that another version of gVisor is noticed, and says where in the file the lines go. The
// command does not know what the patches do.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "patch:", err)
		os.Exit(1)
	}
}

func run(args []string, stdin io.Reader, stdout io.Writer) error {
	flags := flag.NewFlagSet("patch", flag.ContinueOnError)
	module := flags.String("module", "gvisor/runsc", "the module that pins gVisor; its patches/*.patch are applied")
	to := flags.String("to", "",
		"write the patched gVisor to `DIR`, which is replaced, and the go.mod and go.sum to build with "+
			"it to DIR.mod and DIR.sum")
	record := flags.Bool("record", false,
		"make a patch of the output of 'git diff -U0' on stdin, for the pinned gVisor; -module says where that is pinned")
	if err := flags.Parse(args); err != nil {
		return err
	}
	source, err := pinned(*module)
	if err != nil {
		return err
	}
	if *record {
		return fromDiff(stdin, stdout, source)
	}
	if *to == "" {
		return errors.New("no directory to write to is given: add -to DIR")
	}
	return build(*module, source, *to)
}

// pinned returns the directory of the gVisor that module pins, and downloads it if needed, as a build would.
func pinned(module string) (string, error) {
	cmd := exec.Command("go", "mod", "download", "-json", gvisorModule)
	cmd.Dir = module
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	runErr := cmd.Run()
	var found struct{ Dir, Error string }
	parseErr := json.Unmarshal(out.Bytes(), &found)
	if runErr == nil && parseErr == nil && found.Dir != "" {
		return found.Dir, nil
	}
	return "", fmt.Errorf("download gVisor as %s pins it: %w: %s%s", filepath.Join(module, "go.mod"), errors.Join(runErr, parseErr),
		errs.String(), found.Error)
}

const gvisorModule = "gvisor.dev/gvisor"

// build writes the patched gVisor. It replaces the old one at the end, so an interrupted build leaves no mixture.
func build(module, source, to string) error {
	names, err := filepath.Glob(filepath.Join(module, "patches", "*.patch"))
	if err != nil {
		return err
	}
	all := make(map[string]*change)
	for _, name := range names {
		body, err := os.ReadFile(name)
		if err == nil {
			err = parse(all, filepath.Base(name), string(body))
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
	}
	next := to + ".next"
	if err := errors.Join(os.RemoveAll(next), copyTree(source, next)); err != nil {
		return err
	}
	for name, c := range all {
		if err := c.apply(source, next, name); err != nil {
			return err
		}
	}
	if err := errors.Join(os.RemoveAll(to), os.Rename(next, to)); err != nil {
		return err
	}
	return modFile(module, to)
}

// copyTree copies what a build needs, which excludes tests.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		target := filepath.Join(to, strings.TrimPrefix(path, from))
		switch {
		case d.IsDir():
			return os.MkdirAll(target, 0o755)
		case strings.HasSuffix(path, "_test.go") || !d.Type().IsRegular():
			return nil
		}
		body, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(target, body, 0o644)
	})
}

// modFile writes module's go.mod, with gVisor replaced by to, and its go.sum, beside to.
func modFile(module, to string) error {
	dir, err := filepath.Abs(to)
	if err != nil {
		return err
	}
	mod, err := os.ReadFile(filepath.Join(module, "go.mod"))
	if err != nil {
		return err
	}
	sum, err := os.ReadFile(filepath.Join(module, "go.sum"))
	if err != nil {
		return err
	}
	mod = fmt.Appendf(mod, "\nreplace %s => %q\n", gvisorModule, dir)
	return errors.Join(os.WriteFile(to+".mod", mod, 0o644), os.WriteFile(to+".sum", sum, 0o644))
}

var (
	diffFile = regexp.MustCompile(`^\+\+\+ b/(.*)$`)
	diffHunk = regexp.MustCompile(`^@@ -(\d+)(?:,(\d+))? \+\S+ @@`)
)

// fromDiff makes a patch from a diff without context. It drops the lines that the diff removes: their number is enough.
func fromDiff(diff io.Reader, patch io.Writer, source string) error {
	body, err := io.ReadAll(diff)
	if err != nil {
		return err
	}
	var lines []string
	for line := range strings.Lines(string(body)) {
		line = strings.TrimSuffix(line, "\n")
		if m := diffFile.FindStringSubmatch(line); m != nil {
			text, err := os.ReadFile(filepath.Join(source, m[1]))
			if err != nil {
				return err
			}
			lines = strings.Split(string(text), "\n")
			_, _ = fmt.Fprintf(patch, "--- %s %s\n", m[1], digest(text))
			continue
		}
		if m := diffHunk.FindStringSubmatch(line); m != nil {
			at, count := atoi(m[1]), 1
			if m[2] != "" {
				count = atoi(m[2])
			}
			if count == 0 { // the diff names the line before
				at++
			}
			_, _ = fmt.Fprintf(patch, "@@ %d,%d %s\n", at, count, anchor(lines, at))
			continue
		}
		if strings.HasPrefix(line, "+") {
			_, _ = fmt.Fprintln(patch, line)
		}
	}
	return nil
}
