package main

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// change is what all patches together do to one file of gVisor.
type change struct {
	digest string // of the file before
	hunks  []hunk
}

// hunk replaces count lines, starting at line at, by other lines. Line numbers refer to gVisor's original file, so patches of one file do
// not depend on each other.
type hunk struct {
	patch     string
	at, count int
	anchor    string // how line at begins, for readers of the patch and for safety
	lines     []string
}

// parse reads one patch. The text before its first file is a comment.
//
//	--- PATH SHA-256      a file as gVisor has it
//	@@ LINE,COUNT TEXT    replace COUNT lines from LINE on, which begins with TEXT after its indentation
//	+our line
func parse(all map[string]*change, patch, body string) error {
	var file *change
	number := 0
	for line := range strings.Lines(body) {
		number++
		line = strings.TrimSuffix(line, "\n")
		var err error
		switch {
		case strings.HasPrefix(line, "--- "):
			file, err = parseFile(all, line[4:])
		case file == nil:
		case strings.HasPrefix(line, "@@ "):
			var h hunk
			h, err = parseHunk(line[3:])
			h.patch = patch
			file.hunks = append(file.hunks, h)
		case strings.HasPrefix(line, "+") && len(file.hunks) > 0 && file.hunks[len(file.hunks)-1].patch == patch:
			last := &file.hunks[len(file.hunks)-1]
			last.lines = append(last.lines, line[1:])
		default:
			err = errors.New("it is neither a file (---), nor a place (@@), nor a line of ours (+)")
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", number, err)
		}
	}
	if file == nil {
		return errors.New("it names no file: a line '--- PATH SHA-256' is missing")
	}
	return nil
}

func parseFile(all map[string]*change, line string) (*change, error) {
	name, digest, ok := strings.Cut(line, " ")
	if !ok || !filepath.IsLocal(name) {
		return nil, fmt.Errorf("%q is not 'PATH SHA-256'", line)
	}
	if c := all[name]; c == nil {
		all[name] = &change{digest: digest}
	} else if c.digest != digest {
		return nil, fmt.Errorf("another patch has another SHA-256 of %s", name)
	}
	return all[name], nil
}

func parseHunk(line string) (hunk, error) {
	place, anchor, _ := strings.Cut(line, " ")
	at, count, ok := strings.Cut(place, ",")
	h := hunk{at: atoi(at), count: atoi(count), anchor: anchor}
	if !ok || h.at < 1 || h.count < 0 {
		return hunk{}, fmt.Errorf("%q is not 'LINE,COUNT TEXT'", line)
	}
	return h, nil
}

// atoi returns -1 if s is not a number.
func atoi(s string) int {
	if n, err := strconv.Atoi(s); err == nil {
		return n
	}
	return -1
}

func digest(body []byte) string {
	sum := sha256.Sum256(body)
	return hex.EncodeToString(sum[:])
}

// anchor returns how a line begins, in the form that a patch uses.
func anchor(lines []string, at int) string {
	if at > len(lines) {
		return ""
	}
	text := strings.TrimSpace(lines[at-1])
	return strings.TrimSpace(text[:min(len(text), 48)])
}

// apply writes the changed file below to.
func (c *change) apply(from, to, name string) error {
	before, err := os.ReadFile(filepath.Join(from, name))
	if err != nil {
		return fmt.Errorf("%s is not a file of this gVisor: find out what replaced it, and change %s: %w", name, c.patches(), err)
	}
	if digest(before) != c.digest {
		return fmt.Errorf("%s has another SHA-256, so this is another gVisor: see whether %s is still needed, and record it again "+
			"(docs/upstream/README.md)",
			name, c.patches())
	}
	after, err := c.edit(string(before))
	if err != nil {
		return fmt.Errorf("change %s: %w", name, err)
	}
	return os.WriteFile(filepath.Join(to, name), []byte(after), 0o644)
}

func (c *change) edit(before string) (string, error) {
	slices.SortStableFunc(c.hunks, func(a, b hunk) int { return cmp.Compare(a.at, b.at) })
	old := strings.Split(before, "\n")
	var now []string
	next := 1 // the first line that is not copied yet
	for _, h := range c.hunks {
		switch {
		case h.at < next:
			return "", fmt.Errorf("%s changes line %d, which another hunk changes too", h.patch, h.at)
		case h.at+h.count > len(old)+1:
			return "", fmt.Errorf("%s changes line %d, and there are %d", h.patch, h.at+h.count-1, len(old))
		case anchor(old, h.at) != h.anchor:
			return "", fmt.Errorf("%s expects line %d to begin with %q, but it begins with %q", h.patch, h.at, h.anchor, anchor(old, h.at))
		}
		now = append(now, old[next-1:h.at-1]...)
		now = append(now, h.lines...)
		next = h.at + h.count
	}
	return strings.Join(append(now, old[next-1:]...), "\n"), nil
}

// patches names the patches that change the file.
func (c *change) patches() string {
	var names []string
	for _, h := range c.hunks {
		names = append(names, h.patch)
	}
	return strings.Join(slices.Compact(slices.Sorted(slices.Values(names))), ", ")
}
