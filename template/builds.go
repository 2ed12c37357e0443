package template

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"soulbox.dev/soulbox/sandbox"
)

// Builds is the registry of the builds of one server, for all its faces: MCP, the HTTP API and the command line. A build is announced,
// waits for its owner's turn, runs, and ends. Builds that have ended are kept for a while; of older ones, and of those of other servers on
// the same state directory, only logs remain. It is safe for concurrent use.
type Builds struct {
	*Builder

	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	work   sync.WaitGroup

	mu   sync.Mutex
	byID map[string]*Build
}

// NewBuilds makes an empty registry.
func NewBuilds(b *Builder) *Builds {
	s := &Builds{Builder: b, byID: map[string]*Build{}}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s
}

// Status is the state of a build.
type Status string

// The values of Status, as E2B names them.
const (
	BuildWaiting Status = "waiting" // announced, or waiting for its turn
	BuildRunning Status = "building"
	BuildReady   Status = "ready"
	BuildFailed  Status = "error"
)

const (
	maxWaiting  = 64        // builds of an owner that are announced or running
	maxFinished = 32        // builds of an owner that have ended
	buildKept   = time.Hour // since the last change
	maxKeptLog  = 20_000    // lines in memory
)

// Build is a build that this server knows, whether it waits, runs or has ended. It is safe for concurrent use.
type Build struct {
	ID, Owner string
	Names     []string     // of the template that it makes
	Request   BuildRequest // as announced; emptied when the build starts
	made      time.Time

	mu      sync.Mutex
	started bool
	done    chan struct{} // closed when the build has ended
	status  Status
	lines   []Line
	shown   []Shown
	built   Built
	err     error
	changed time.Time
}

// Shown is a step as its client has written it, with the line of the Dockerfile at which it begins.
type Shown struct {
	Line int
	Text string
}

// Standing is the state of a build, with its log.
type Standing struct {
	Status Status
	Lines  []Line
	Steps  []Shown
	Err    error // why it has failed
}

// Announce adds a build, to be started later, whose template also gets the names in others. It fails if too many builds of the owner wait
// or run.
func (s *Builds) Announce(req BuildRequest, others ...string) (*Build, error) {
	now := time.Now()
	owner := req.Owner
	b := &Build{ID: NewBuildID(), Owner: owner, Names: append([]string{req.Name}, others...), Request: req, made: now, changed: now,
		status: BuildWaiting,
		done:   make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	open, over := 0, []*Build{}
	for id, old := range s.byID {
		status, started, changed := old.look()
		switch {
		case time.Since(changed) > buildKept && !(started && status.open()):
			delete(s.byID, id)
		case old.Owner != owner:
		case status.open():
			open++
		default:
			over = append(over, old)
		}
	}
	slices.SortFunc(over, func(a, b *Build) int { return b.made.Compare(a.made) })
	for _, old := range over[min(len(over), maxFinished):] {
		delete(s.byID, old.ID)
	}
	if open >= maxWaiting {
		return nil, fmt.Errorf("%d of your builds wait or run: %w", open, sandbox.ErrTooMany)
	}
	s.byID[b.ID] = b
	return b, nil
}

// open reports whether a build has not ended.
func (s Status) open() bool { return s == BuildWaiting || s == BuildRunning }

func (b *Build) look() (status Status, started bool, changed time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.status, b.started, b.changed
}

// Find returns a build of the owner that this server knows, or nil.
func (s *Builds) Find(owner, id string) *Build {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.byID[id]; b != nil && b.Owner == owner {
		return b
	}
	return nil
}

// Last is the id of the build of an owner's template that was begun last, whether it has failed or is still running: one of this server, or
// one that another has left a log of.
func (s *Builds) Last(owner, name string) (id string, err error) {
	id, began, err := s.Store.lastLog(owner, name)
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.byID {
		if _, started, _ := b.look(); started && b.Owner == owner && slices.Contains(b.Names, name) && b.made.After(began) {
			id, began = b.ID, b.made
		}
	}
	if id == "" {
		return "", fmt.Errorf("build of template %q: %w", clip(name), ErrNoBuild)
	}
	return id, nil
}

// UnderWay reports whether a build is running, or started and waiting for its turn.
func (s *Builds) UnderWay() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.byID {
		if status, started, _ := b.look(); started && status.open() {
			return true
		}
	}
	return false
}

// ErrStarted means that the build was started before.
var ErrStarted = errors.New("the build was started already")

// Start runs an announced build as soon as it is its owner's turn. The build is cancelled when ctx or the registry ends. req is the build's
// Request, completed with what has become known since. Start calls after, if not nil, when the build has ended, and adds its error to the
// build's.
func (s *Builds) Start(ctx context.Context, b *Build, req BuildRequest, after func() error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.started {
		return fmt.Errorf("build %s: %w", b.ID, ErrStarted)
	}
	b.started, b.changed, b.shown, b.Request = true, time.Now(), req.Shown, BuildRequest{}
	req.ID, req.Owner, req.Name = b.ID, b.Owner, b.Names[0]
	each := b.line
	if req.each != nil {
		each = func(l Line) { b.line(l); req.each(l) }
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.ctx, func() { cancel(context.Cause(s.ctx)) })
	s.work.Go(func() {
		defer stop()
		defer cancel(nil)
		built, err := s.Build(ctx, req, each)
		if err == nil {
			err = s.Name(built.Manifest, b.Names[1:]...)
		}
		if after != nil {
			err = errors.Join(err, after())
		}
		b.end(built, err)
	})
	return nil
}

// Run announces a build, starts it and waits for its end. It calls each, if not nil, with every line of the log. The build is cancelled
// with ctx.
func (s *Builds) Run(ctx context.Context, req BuildRequest, each func(Line)) (Built, error) {
	b, err := s.Announce(req)
	if err != nil {
		return Built{}, err
	}
	req.each = each
	if err := s.Start(ctx, b, req, nil); err != nil {
		return Built{}, err
	}
	<-b.done
	return b.built, b.err
}

// line keeps a line of the log. The first line means that the build's turn has come.
func (b *Build) line(l Line) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.status = BuildRunning
	if b.changed = time.Now(); len(b.lines) < maxKeptLog || l.Level == "error" {
		b.lines = append(b.lines, l)
	}
}

func (b *Build) end(built Built, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.changed, b.status, b.built, b.err = time.Now(), BuildReady, built, err
	b.lines = nil // they are on disk
	if err != nil {
		b.status = BuildFailed
	}
	close(b.done)
}

// Standing returns the state of a build of the owner: of this server's build, or what the files tell about another server's.
func (s *Builds) Standing(owner, id string) (Standing, error) {
	b := s.Find(owner, id)
	if b != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.status.open() {
			return Standing{Status: b.status, Lines: slices.Clone(b.lines)}, nil
		}
	}
	text, err := s.Store.BuildLog(owner, id)
	if err != nil && !errors.Is(err, ErrNoBuild) { // the host does not let it be read: that says nothing of the build
		return Standing{}, err
	}
	if err != nil && b == nil {
		all, lerr := s.Store.List(owner)
		if lerr == nil && slices.ContainsFunc(all, func(m Manifest) bool { return m.Owner == owner && m.BuildID() == id }) {
			return Standing{Status: BuildReady}, nil // it was made without a log, for example by an import
		}
		return Standing{}, err
	}
	lines := parseLog(text)
	if b != nil { // a build that failed before it began has no log
		return Standing{b.status, lines, b.shown, b.err}, nil
	}
	all, err := s.Store.List(owner)
	if err != nil || slices.ContainsFunc(all, func(m Manifest) bool { return m.Build == id }) {
		return Standing{Status: BuildReady, Lines: lines}, err
	}
	if s.Store.beingBuilt(id) {
		return Standing{Status: BuildRunning, Lines: lines}, nil
	}
	failed := errors.New("the server ended before the build did; start it again")
	if n := len(lines); n > 0 && lines[n-1].Level == "error" {
		failed = errors.New(lines[n-1].Text)
	}
	return Standing{Status: BuildFailed, Lines: lines, Err: failed}, nil
}

// parseLog reads a log. It skips a line that is still being written.
func parseLog(text []byte) (lines []Line) {
	for line := range strings.Lines(string(text)) {
		var l Line
		if json.Unmarshal([]byte(line), &l) == nil {
			lines = append(lines, l)
		}
	}
	return lines
}

// Close cancels the builds of this registry and waits for them.
func (s *Builds) Close() {
	s.cancel(sandbox.ErrClosed)
	s.work.Wait()
}
