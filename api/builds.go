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
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

const (
	maxStepText  = 500 // bytes of a step that are shown if it fails
	maxSteps     = 1000
	logPage      = 100
	maxMB        = 1 << 30
	uploadTime   = time.Hour // how long files can be sent to a URL
	defaultImage = "e2bdev/base"
)

// startRequest describes what to build.
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

// from returns what the build begins from. The image from which clients begin by default means this server's own base. A template keeps its
// user and its directory.
func (s startRequest) from(c *Control, owner string) (from template.From, err error) {
	switch {
	case given(s.Registry):
		return from, refuse(http.StatusNotImplemented,
			"this server pulls only with the operator's credentials: 'soulbox-mcp template pull' makes a template from a private image")
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

// startBuild starts an announced build.
func (c *Control) startBuild(r *call) error {
	var body startRequest
	if err := r.body(&body); err != nil {
		return err
	}
	b, err := c.findBuild(r, r.PathValue("id"))
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
				return refuse(http.StatusBadRequest, "step %d: %.40q is not a hash of files", i+1, s.FilesHash)
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
	var shown []template.Shown
	for i, s := range steps {
		text := s.Args[0]
		shown = append(shown, template.Shown{Line: lines[i], Text: agent.Inert(agent.Whole([]byte(text[:min(len(text), maxStepText)])))})
	}
	req := b.Request
	req.Dockerfile, req.Shown, req.Login, req.NoCache, req.StartCmd, req.ReadyCmd = dockerfile, shown, true, body.Force, body.StartCmd,
		body.ReadyCmd
	if !c.NoNetwork {
		req.Network = sandbox.Network{Mode: sandbox.NetworkFull} // its sandboxes get a network, so its service is saved with one
	}
	if err := c.launch(b, req, sent, ""); err != nil {
		return err
	}
	return r.done(http.StatusAccepted)
}

// findBuild finds the caller's build that a path names.
func (c *Control) findBuild(r *call, name string) (*template.Build, error) {
	if err := r.hasBuildID(); err != nil {
		return nil, err
	}
	id := r.PathValue("bid")
	b := c.Builds.Find(r.owner, id)
	if b == nil || plainOf(b.Names[0]) != plainOf(plainName(r.owner, name)) {
		return nil, fmt.Errorf("build %.60q of template %.60q: %w", id, name, template.ErrNoBuild)
	}
	return b, nil
}

// hasBuildID checks the id of a build in a path.
func (r *call) hasBuildID() error {
	if id := r.PathValue("bid"); !template.ValidBuildID(id) {
		return refuse(http.StatusBadRequest, "the build id %.60q is malformed: it is a UUID", id)
	}
	return nil
}

// launch starts an announced build. sent are the hashes of uploaded files that COPY uses; files, if not empty, is the hash of an uploaded
// context.
func (c *Control) launch(b *template.Build, req template.BuildRequest, sent []string, files string) error {
	var whole *template.Files
	req.Files = map[string]*template.Files{}
	req.Open = func(ctx context.Context, req *template.BuildRequest) (err error) {
		if err := c.openUploads(ctx, *req, sent); err != nil || files == "" {
			return err
		}
		whole, err = c.Store.OpenUpload(ctx, req.Owner, files)
		req.Context = whole
		return err
	}
	err := c.Builds.Start(context.Background(), b, req, func() (err error) {
		for _, f := range req.Files {
			err = errors.Join(err, f.Close())
		}
		if whole != nil {
			err = errors.Join(err, whole.Close())
		}
		return err
	})
	if errors.Is(err, template.ErrStarted) {
		return refuse(http.StatusConflict, "build %s was started already", b.ID)
	}
	return err
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

// buildState returns the state of the build that a path names.
func (c *Control) buildState(r *call) (template.Standing, error) {
	if err := r.hasBuildID(); err != nil {
		return template.Standing{}, err
	}
	return c.Builds.Standing(r.owner, r.PathValue("bid"))
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
	b, err := c.buildState(r)
	if err != nil {
		return err
	}
	part := b.Lines[min(offset, int64(len(b.Lines))):]
	part = part[:min(int64(len(part)), limit)]
	logs := []string{}
	for _, l := range part {
		logs = append(logs, l.Text)
	}
	out := map[string]any{"templateID": plainName(r.owner, r.PathValue("id")), "buildID": r.PathValue("bid"), "status": b.Status,
		"logs": logs, "logEntries": entries(part)}
	if b.Err != nil {
		out["reason"] = reason(b.Err, b.Steps)
	}
	return r.answer(http.StatusOK, out)
}

// reason says why a build failed, and at which of the client's steps.
func reason(err error, steps []template.Shown) map[string]any {
	out := map[string]any{"message": err.Error(), "logEntries": []buildEntry{}}
	var failed *template.StepError
	if !errors.As(err, &failed) {
		return out
	}
	n := 0
	for n < len(steps) && steps[n].Line <= failed.Line {
		n++
	}
	message := fmt.Sprintf("%s: %v", failed.Command, failed.Err)
	if out["step"] = "base"; n > 0 {
		out["step"] = strconv.Itoa(n)
		if strings.HasPrefix(failed.Command, "RUN ") {
			message = fmt.Sprintf("failed to run command '%s': command failed: %v", steps[n-1].Text, failed.Err)
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
	b, err := c.buildState(r)
	if err != nil {
		return err
	}
	lines := slices.Clone(b.Lines)
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
