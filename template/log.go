package template

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/durable"
)

// Bounds of a build's log. What exceeds them is counted and dropped.
const (
	maxLine     = 4 << 10
	maxLogBytes = 8 << 20
	tailLines   = 20
)

// buildID matches what NewBuildID makes, and what it made in older servers.
var buildID = regexp.MustCompile(`^(bd[a-z0-9]{16}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})$`)

// NewBuildID returns an id that cannot be guessed: a random UUID (RFC 9562, 5.4).
func NewBuildID() string {
	var random [16]byte
	rand.Read(random[:])
	return asUUID(random, 4)
}

// asUUID formats bytes as a UUID of a version.
func asUUID(b [16]byte, version byte) string {
	b[6], b[8] = b[6]&0x0f|version<<4, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// ValidBuildID reports whether a text has the form of a build's id.
func ValidBuildID(id string) bool { return buildID.MatchString(id) }

// BuildID returns the id of the build that made a template. A template that was not built here gets an id derived from its manifest, always
// the same one (RFC 9562, 5.8).
func (m Manifest) BuildID() string {
	if m.Build != "" {
		return m.Build
	}
	sum := sha256.Sum256([]byte(hashOf(m.Owner, m.Name, m.Image, m.Created.UTC().String())))
	return asUUID([16]byte(sum[:16]), 8)
}

// buildLog is the log of a build. It is safe for concurrent use.
type buildLog struct {
	mu      sync.Mutex
	f       *os.File
	each    func(Line)
	size    int
	dropped int
	err     error
}

// newLog begins the log of a build.
func (s *Store) newLog(id, owner, name string, each func(Line)) (*buildLog, error) {
	dir := s.file("builds", id)
	if err := errors.Join(s.makeKind("builds"), os.MkdirAll(dir, 0o700)); err != nil {
		return nil, err
	}
	// The owner decides who may read the log, so it is on disk before the first line. The lines themselves are not synced: a power cut ends
	// the build, and may cost the last of them.
	if err := errors.Join(s.Durable.Replace(filepath.Join(dir, "owner"), []byte(owner), 0o600),
		s.Durable.Replace(filepath.Join(dir, "name"), []byte(name), 0o600)); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, logFile), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	if err := durable.Flock(f, unix.LOCK_EX); err != nil { // tells other servers that the build is running
		return nil, errors.Join(err, f.Close())
	}
	return &buildLog{f: f, each: each}, nil
}

const logFile = "log.jsonl"

// beingBuilt reports whether this or another server works on a build that has a log.
func (s *Store) beingBuilt(id string) bool {
	return !abandoned(filepath.Join(s.file("builds", id), logFile))
}

// line adds a line.
func (l *buildLog) line(level, step, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(text) > maxLine && level != "error" {
		text = string(agent.Whole([]byte(text[:maxLine]))) + "…"
	}
	entry := Line{Time: time.Now().UTC(), Level: level, Step: step, Text: agent.Inert([]byte(text))}
	body, err := json.Marshal(entry)
	if err != nil || l.size+len(body) > maxLogBytes && level != "error" {
		l.dropped++
		return
	}
	l.size += len(body) + 1
	if _, err := l.f.Write(append(body, '\n')); err != nil && l.err == nil {
		l.err = fmt.Errorf("write the log of the build: %w", err)
	}
	if l.each != nil {
		l.each(entry)
	}
}

func (l *buildLog) close() error {
	if l.dropped > 0 {
		l.line("error", "", fmt.Sprintf("%d lines were too many and are not kept", l.dropped))
	}
	return errors.Join(l.err, l.f.Close())
}

// ErrNoBuild means that there is no log of a build.
var ErrNoBuild = errors.New("no such build")

// BuildLog returns the current log of an owner's build as JSON lines.
func (s *Store) BuildLog(owner, id string) ([]byte, error) {
	dir := s.file("builds", id)
	if !buildID.MatchString(id) {
		return nil, fmt.Errorf("build %q: %w", clip(id), ErrNoBuild)
	}
	whose, err := os.ReadFile(filepath.Join(dir, "owner"))
	if errors.Is(err, os.ErrNotExist) || err == nil && string(whose) != owner {
		return nil, fmt.Errorf("build %q: %w", id, ErrNoBuild)
	}
	if err != nil {
		return nil, err
	}
	f, err := os.Open(filepath.Join(dir, logFile))
	if errors.Is(err, os.ErrNotExist) { // its server died just then
		return nil, fmt.Errorf("build %q: %w", id, ErrNoBuild)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 2*maxLogBytes))
}

// lastLog finds, among the builds of an owner's template that have a log, the one that began last, and when; "" means none.
func (s *Store) lastLog(owner, name string) (id string, began time.Time, err error) {
	entries, err := os.ReadDir(s.file("builds", ""))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", began, err
	}
	for _, e := range entries {
		dir := s.file("builds", e.Name())
		info, err := os.Stat(filepath.Join(dir, "name"))
		if err != nil || !info.ModTime().After(began) {
			continue // older servers did not write it, or it is just being removed
		}
		of, err := os.ReadFile(filepath.Join(dir, "name"))
		whose, werr := os.ReadFile(filepath.Join(dir, "owner"))
		if err == nil && werr == nil && string(of) == name && string(whose) == owner {
			id, began = e.Name(), info.ModTime()
		}
	}
	return id, began, nil
}

// lines splits the output of a command into lines and remembers the last ones. It is safe for concurrent use.
type lines struct {
	mu   sync.Mutex
	each func(string)
	part map[string][]byte // the unfinished line of each stream
	last []string
}

func newLines(each func(string)) *lines { return &lines{each: each, part: map[string][]byte{}} }

func (l *lines) add(f agent.OutputFrame) {
	l.mu.Lock()
	defer l.mu.Unlock()
	rest := append(l.part[f.Stream], f.Data...)
	for {
		line, after, ok := bytes.Cut(rest, []byte("\n"))
		if !ok && len(rest) <= maxLine {
			break
		}
		if !ok {
			line = agent.Whole(rest[:maxLine])
			after = rest[len(line):]
		}
		l.put(line)
		rest = after
	}
	l.part[f.Stream] = bytes.Clone(rest)
}

func (l *lines) put(line []byte) {
	// Keep only what follows the last carriage return: a progress bar has overwritten the rest.
	line = bytes.TrimRight(line, "\r")
	if i := bytes.LastIndexByte(line, '\r'); i >= 0 {
		line = line[i+1:]
	}
	text := agent.Inert(line)
	l.each(text)
	if l.last = append(l.last, text); len(l.last) > tailLines {
		l.last = l.last[1:]
	}
}

// end emits the unfinished lines.
func (l *lines) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for stream, rest := range l.part {
		if len(rest) > 0 {
			l.put(rest)
		}
		delete(l.part, stream)
	}
}

func (l *lines) tail() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.last, "\n")
}
