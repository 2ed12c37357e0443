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

// Builds are the builds of one server, whoever asks for them: MCP, the HTTP API or the command line. A build is announced, waits for its
// owner's turn, is under way, and is over. Those that are over are kept for a while; of others, and of other servers' on the same state
// directory, there are logs. It is safe for concurrent use.
type Builds struct {
	*Builder

	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	work   sync.WaitGroup

	mu   sync.Mutex
	byID map[string]*Announced
}

// NewBuilds makes an empty registry.
func NewBuilds(b *Builder) *Builds {
	s := &Builds{Builder: b, byID: map[string]*Announced{}}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s
}

// Status is where a build stands.
type Status string

// The values of Status, as E2B names them.
const (
	BuildWaiting Status = "waiting" // announced, or waits for its turn
	BuildRunning Status = "building"
	BuildReady   Status = "ready"
	BuildFailed  Status = "error"
)

const (
	maxWaiting  = 64        // builds of an owner that are announced or under way
	maxFinished = 32        // of those that are over
	buildKept   = time.Hour // after it has changed for the last time
	maxKeptLog  = 20_000    // lines in memory
)

// Announced is a build that this server knows. It is safe for concurrent use.
type Announced struct {
	ID, Owner string
	Names     []string     // of the template that comes of it
	Request   BuildRequest // what was said of it when it was announced, until it is started
	made      time.Time

	mu      sync.Mutex
	started bool
	done    chan struct{} // closed when it is over
	status  Status
	lines   []Line
	shown   []Shown
	built   Built
	err     error
	changed time.Time
}

// Shown is a step as its client has written it, and the line of the Dockerfile at which it begins.
type Shown struct {
	Line int
	Text string
}

// Standing is where a build stands, with its log.
type Standing struct {
	Status Status
	Lines  []Line
	Steps  []Shown
	Err    error // why it has failed
}

// Announce adds a build that is to be started, of a template that gets other names, too. It fails if the owner has as many as may wait.
func (s *Builds) Announce(req BuildRequest, others ...string) (*Announced, error) {
	now := time.Now()
	owner := req.Owner
	b := &Announced{ID: NewBuildID(), Owner: owner, Names: append([]string{req.Name}, others...), Request: req, made: now, changed: now,
		status: BuildWaiting,
		done:   make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	open, over := 0, []*Announced{}
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
	slices.SortFunc(over, func(a, b *Announced) int { return b.made.Compare(a.made) })
	for _, old := range over[min(len(over), maxFinished):] {
		delete(s.byID, old.ID)
	}
	if open >= maxWaiting {
		return nil, fmt.Errorf("%d builds of yours wait or are under way: %w", open, sandbox.ErrTooMany)
	}
	s.byID[b.ID] = b
	return b, nil
}

// open says whether a build is not over.
func (s Status) open() bool { return s == BuildWaiting || s == BuildRunning }

func (b *Announced) look() (status Status, started bool, changed time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.status, b.started, b.changed
}

// Find finds a build of an owner's that this server knows; nil is none.
func (s *Builds) Find(owner, id string) *Announced {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.byID[id]; b != nil && b.Owner == owner {
		return b
	}
	return nil
}

// UnderWay reports whether there is a build that is carried out, or waits for its turn.
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

// ErrStarted is of a build that was started before.
var ErrStarted = errors.New("the build was started already")

// Start has an announced build carried out as soon as it is its owner's turn, until ctx or the registry ends. req is its Request, with what
// has become known since. after, if not nil, is called once it is over, and its error is the build's, too.
func (s *Builds) Start(ctx context.Context, b *Announced, req BuildRequest, after func() error) error {
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

// Run announces a build, starts it and waits for its end; each, if not nil, is told of each line of its log. The build ends with ctx.
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

// line keeps a line of the log. The first one says that it is the build's turn.
func (b *Announced) line(l Line) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.status = BuildRunning
	if b.changed = time.Now(); len(b.lines) < maxKeptLog || l.Level == "error" {
		b.lines = append(b.lines, l)
	}
}

func (b *Announced) end(built Built, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.changed, b.status, b.built, b.err = time.Now(), BuildReady, built, err
	b.lines = nil // they are on disk
	if err != nil {
		b.status = BuildFailed
	}
	close(b.done)
}

// Standing finds where a build of an owner's stands: one of this server, or what is left of another's.
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
	if err != nil && b == nil {
		all, lerr := s.Store.List(owner)
		if lerr == nil && slices.ContainsFunc(all, func(m Manifest) bool { return m.Owner == owner && m.BuildID() == id }) {
			return Standing{Status: BuildReady}, nil // it was made without a log, such as by an import
		}
		return Standing{}, err
	}
	lines := parseLog(text)
	if b != nil { // one that has failed before it began has no log
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

// parseLog reads a log. A line that is being written is left out.
func parseLog(text []byte) (lines []Line) {
	for line := range strings.Lines(string(text)) {
		var l Line
		if json.Unmarshal([]byte(line), &l) == nil {
			lines = append(lines, l)
		}
	}
	return lines
}

// Close ends the builds that were begun here, and waits for them.
func (s *Builds) Close() {
	s.cancel(sandbox.ErrClosed)
	s.work.Wait()
}
