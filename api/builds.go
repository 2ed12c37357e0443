package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

// States of a build.
const (
	statusWaiting  = "waiting"
	statusBuilding = "building"
	statusReady    = "ready"
	statusError    = "error"
)

const (
	maxWaiting   = 64        // builds of an owner that are announced or under way
	maxFinished  = 32        // of those that are over; of the others there are logs
	maxStepText  = 500       // bytes of a step that are shown where it fails
	buildKept    = time.Hour // after it has changed for the last time
	maxBuildLog  = 20_000    // lines
	maxSteps     = 1000
	logPage      = 100
	maxMB        = 1 << 30
	uploadTime   = time.Hour // in which files can be sent to a URL
	defaultImage = "e2bdev/base"
)

// build is a build of a client's.
type build struct {
	id, owner, name string
	tags            []string
	limits          sandbox.Limits
	made            time.Time
	old             template.BuildRequest // of one whose Dockerfile came with its announcement

	mu      sync.Mutex
	status  string
	lines   []template.Line
	steps   []step
	err     error
	changed time.Time
}

// step is a step of a client's, and the line of the Dockerfile at which it begins.
type step struct {
	line int
	text string
}

// builds are those that this server knows. Of others there are logs. It is safe for concurrent use.
type builds struct {
	mu   sync.Mutex
	byID map[string]*build
}

// add announces a build.
func (s *builds) add(b *build) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byID == nil {
		s.byID = map[string]*build{}
	}
	open, over := 0, []*build{}
	for id, old := range s.byID {
		old.mu.Lock()
		status, quiet := old.status, time.Since(old.changed) > buildKept
		old.mu.Unlock()
		switch {
		case quiet && status != statusBuilding:
			delete(s.byID, id)
		case old.owner != b.owner:
		case status == statusWaiting || status == statusBuilding:
			open++
		default:
			over = append(over, old)
		}
	}
	slices.SortFunc(over, func(a, b *build) int { return b.made.Compare(a.made) })
	for _, old := range over[min(len(over), maxFinished):] {
		delete(s.byID, old.id)
	}
	if open >= maxWaiting {
		return fmt.Errorf("%d builds of yours wait or are under way: %w", open, sandbox.ErrTooMany)
	}
	s.byID[b.id] = b
	return nil
}

// underWay says whether there is a build that is carried out, or waits for its turn.
func (s *builds) underWay() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.byID {
		b.mu.Lock()
		building := b.status == statusBuilding
		b.mu.Unlock()
		if building {
			return true
		}
	}
	return false
}

func (s *builds) find(owner, id string) *build {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.byID[id]; b != nil && b.owner == owner {
		return b
	}
	return nil
}

// startRequest is what is to be built.
type startRequest struct {
	FromImage    string          `json:"fromImage"`
	FromTemplate string          `json:"fromTemplate"`
	Registry     json.RawMessage `json:"fromImageRegistry"`
	Force        bool            `json:"force"`
	Steps        []struct {
		Type      string   `json:"type"`
		Args      []string `json:"args"`
		FilesHash string   `json:"filesHash"`
		Force     bool     `json:"force"`
	} `json:"steps"`
	StartCmd string `json:"startCmd"`
	ReadyCmd string `json:"readyCmd"`
}

// from is what the build begins from. The image that clients begin from who name none is this server's own. A template keeps its user and
// its directory.
func (s startRequest) from(c *Control, owner string) (from template.From, err error) {
	switch {
	case given(s.Registry):
		return from, refuse(http.StatusNotImplemented,
			"this server pulls with the operator's credentials alone: 'soulbox-mcp template pull' makes a template of a private image")
	case s.FromTemplate != "" && s.FromImage != "":
		return from, refuse(http.StatusBadRequest, "give fromImage or fromTemplate, not both")
	case s.FromTemplate != "":
		m, err := c.Store.Get(owner, plainName(owner, s.FromTemplate))
		return template.From{Name: m.Name, User: m.Config.User, Cwd: m.Config.WorkingDir}, err
	}
	image := strings.TrimSpace(s.FromImage)
	if image == "" || image == defaultImage || strings.HasPrefix(image, defaultImage+":") {
		return template.From{Name: template.BaseName}, nil
	}
	if strings.ContainsAny(image, " \t\r\n$\\\"'`#") || len(image) > 512 {
		return from, refuse(http.StatusBadRequest, "fromImage %.100q is not the name of an image", image)
	}
	return template.From{Name: image}, nil
}

// startBuild begins a build that was announced.
func (c *Control) startBuild(r *call) error {
	var body startRequest
	if err := r.body(&body); err != nil {
		return err
	}
	b, err := c.announced(r, r.PathValue("id"))
	if err != nil {
		return err
	}
	from, err := body.from(c, r.owner)
	if err != nil {
		return err
	}
	if len(body.Steps) > maxSteps {
		return refuse(http.StatusBadRequest, "%d steps, at most %d are possible", len(body.Steps), maxSteps)
	}
	var steps []template.Step
	var sent []string
	for i, s := range body.Steps {
		step := template.Step{Type: s.Type, Args: s.Args, Anew: s.Force}
		if s.FilesHash != "" {
			if !filesHash.MatchString(s.FilesHash) {
				return refuse(http.StatusBadRequest, "step %d: %.40q is no hash of files", i+1, s.FilesHash)
			}
			step.Files = strings.ToLower("files-" + s.FilesHash)
			sent = append(sent, s.FilesHash)
		}
		steps = append(steps, step)
	}
	dockerfile, lines, err := template.FromSteps(from, steps)
	if err != nil {
		return err
	}
	var shown []step
	for i, s := range steps {
		text := s.Args[0]
		shown = append(shown, step{lines[i], agent.Inert(agent.Whole([]byte(text[:min(len(text), maxStepText)])))})
	}
	req := template.BuildRequest{Dockerfile: dockerfile, Login: true, NoCache: body.Force, StartCmd: body.StartCmd, ReadyCmd: body.ReadyCmd}
	if !c.NoNetwork {
		req.Network = sandbox.Network{Mode: sandbox.NetworkFull} // its sandboxes have one, so that its service is saved with one
	}
	if err := c.launch(b, req, shown, sent, ""); err != nil {
		return err
	}
	return r.done(http.StatusAccepted)
}

// announced finds the build of a caller's that a path names.
func (c *Control) announced(r *call, name string) (*build, error) {
	if err := r.hasBuildID(); err != nil {
		return nil, err
	}
	b := c.builds.find(r.owner, r.PathValue("bid"))
	if b == nil || b.name != plainName(r.owner, name) {
		return nil, fmt.Errorf("build %.60q of template %.60q: %w", r.PathValue("bid"), name, template.ErrNoBuild)
	}
	return b, nil
}

// hasBuildID says what is wrong with the id of a build in a path.
func (r *call) hasBuildID() error {
	if id := r.PathValue("bid"); !template.ValidBuildID(id) {
		return refuse(http.StatusBadRequest, "the build id %.60q is malformed: it is a UUID", id)
	}
	return nil
}

// launch begins a build that was announced: of a Dockerfile, files that were sent by their names, and a context that was.
func (c *Control) launch(b *build, req template.BuildRequest, steps []step, sent []string, files string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.status != statusWaiting {
		return refuse(http.StatusConflict, "build %s was started already", b.id)
	}
	b.status, b.changed, b.steps = statusBuilding, time.Now(), steps
	req.ID, req.Owner, req.Name, req.Limits, req.Files = b.id, b.owner, withTag(b.name, b.tags[0]), b.limits, map[string]*template.Files{}
	c.work.Go(func() { c.build(b, req, sent, files) })
	return nil
}

// build carries out a build.
func (c *Control) build(b *build, req template.BuildRequest, sent []string, files string) {
	var whole *template.Files
	req.Open = func(ctx context.Context, req *template.BuildRequest) (err error) {
		if err := c.openUploads(ctx, *req, sent); err != nil || files == "" {
			return err
		}
		whole, err = c.Store.OpenUpload(ctx, req.Owner, files)
		req.Context = whole
		return err
	}
	built, err := c.Builder.Build(c.ctx, req, b.line)
	if err == nil && len(b.tags) > 1 {
		err = c.tag(built.Manifest, b.tags[1:])
	}
	for _, f := range req.Files {
		err = errors.Join(err, f.Close())
	}
	if whole != nil {
		err = errors.Join(err, whole.Close())
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.changed, b.status, b.err = time.Now(), statusReady, err
	b.lines = nil // they are on disk
	if err != nil {
		b.status = statusError
	}
}

func (c *Control) openUploads(ctx context.Context, req template.BuildRequest, sent []string) error {
	for _, hash := range sent {
		name := strings.ToLower("files-" + hash)
		if req.Files[name] != nil {
			continue
		}
		f, err := c.Store.OpenUpload(ctx, req.Owner, hash)
		if err != nil {
			return err
		}
		req.Files[name] = f
	}
	return nil
}

func (b *build) line(l template.Line) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.changed = time.Now(); len(b.lines) < maxBuildLog || l.Level == "error" {
		b.lines = append(b.lines, l)
	}
}

// buildEntry is a line of a build's log.
type buildEntry struct {
	Timestamp time.Time `json:"timestamp"`
	Message   string    `json:"message"`
	Level     string    `json:"level"`
	Step      string    `json:"step,omitempty"`
}

func entries(lines []template.Line) []buildEntry {
	out := []buildEntry{}
	for _, l := range lines {
		out = append(out, buildEntry{l.Time, l.Text, l.Level, l.Step})
	}
	return out
}

// standing is where a build stands.
type standing struct {
	status string
	lines  []template.Line
	steps  []step
	err    error // why it has failed
}

// lookUp finds a build: one of this server's, or what is left of another's.
func (c *Control) lookUp(r *call) (standing, error) {
	id := r.PathValue("bid")
	if err := r.hasBuildID(); err != nil {
		return standing{}, err
	}
	b := c.builds.find(r.owner, id)
	if b != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.status == statusWaiting || b.status == statusBuilding {
			return standing{status: b.status, lines: b.lines}, nil
		}
	}
	text, err := c.Store.BuildLog(r.owner, id)
	if err != nil && b == nil {
		if all, lerr := c.Store.List(r.owner); lerr == nil &&
			slices.ContainsFunc(all, func(m template.Manifest) bool { return m.Owner == r.owner && m.BuildID() == id }) {
			return standing{status: statusReady}, nil // it was made without a log, such as by an import
		}
		return standing{}, err
	}
	var lines []template.Line
	for line := range strings.Lines(string(text)) {
		var l template.Line
		if json.Unmarshal([]byte(line), &l) == nil {
			lines = append(lines, l)
		}
	}
	if b != nil { // one that has failed before it began has no log
		return standing{b.status, lines, b.steps, b.err}, nil
	}
	all, err := c.Store.List(r.owner)
	if err != nil || slices.ContainsFunc(all, func(m template.Manifest) bool { return m.Build == id }) {
		return standing{status: statusReady, lines: lines}, err
	}
	failed := errors.New("the server ended before the build did; start it again")
	if n := len(lines); n > 0 && lines[n-1].Level == "error" {
		failed = errors.New(lines[n-1].Text)
	}
	return standing{status: statusError, lines: lines, err: failed}, nil
}

func (c *Control) buildStatus(r *call) error {
	offset, err := r.number("logsOffset", 0, 1<<40, 0)
	if err != nil {
		return err
	}
	limit, err := r.number("limit", 0, logPage, logPage)
	if err != nil {
		return err
	}
	b, err := c.lookUp(r)
	if err != nil {
		return err
	}
	part := b.lines[min(offset, int64(len(b.lines))):]
	part = part[:min(int64(len(part)), limit)]
	logs := []string{}
	for _, l := range part {
		logs = append(logs, l.Text)
	}
	out := map[string]any{"templateID": plainName(r.owner, r.PathValue("id")), "buildID": r.PathValue("bid"), "status": b.status,
		"logs": logs, "logEntries": entries(part)}
	if b.err != nil {
		out["reason"] = reason(b.err, b.steps)
	}
	return r.answer(http.StatusOK, out)
}

// reason says why a build has failed, and at which of the client's steps.
func reason(err error, steps []step) map[string]any {
	out := map[string]any{"message": err.Error(), "logEntries": []buildEntry{}}
	var failed *template.StepError
	if !errors.As(err, &failed) {
		return out
	}
	n := 0
	for n < len(steps) && steps[n].line <= failed.Line {
		n++
	}
	message := fmt.Sprintf("%s: %v", failed.Command, failed.Err)
	if out["step"] = "base"; n > 0 {
		out["step"] = strconv.Itoa(n)
		if strings.HasPrefix(failed.Command, "RUN ") {
			message = fmt.Sprintf("failed to run command '%s': command failed: %v", steps[n-1].text, failed.Err)
		}
	}
	if failed.Tail != "" {
		message += "\n" + failed.Tail
	}
	out["message"] = message
	return out
}

func (c *Control) buildLogs(r *call) error {
	cursor, err := r.number("cursor", 0, maxSeconds*1000, 0)
	if err != nil {
		return err
	}
	limit, err := r.number("limit", 0, logPage, logPage)
	if err != nil {
		return err
	}
	b, err := c.lookUp(r)
	if err != nil {
		return err
	}
	lines := slices.Clone(b.lines)
	backward := r.URL.Query().Get("direction") == "backward"
	if backward {
		slices.Reverse(lines)
	}
	if cursor > 0 {
		at := time.UnixMilli(cursor)
		lines = slices.DeleteFunc(lines, func(l template.Line) bool {
			return !backward && l.Time.Before(at) || backward &&
				l.Time.After(at)
		})
	}
	return r.answer(http.StatusOK, map[string]any{"logs": entries(lines[:min(int64(len(lines)), limit)])})
}
