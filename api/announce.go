package api

import (
	"cmp"
	"crypto/rand"
	"errors"
	"net/http"
	"slices"
	"strings"

	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

// announcement describes a build that will be started later. Older clients put the Dockerfile into it; newer ones send steps when they
// start the build.
type announcement struct {
	Name     string   `json:"name"`
	Alias    string   `json:"alias"`
	Tags     []string `json:"tags"`
	CPUCount int      `json:"cpuCount"`
	MemoryMB int64    `json:"memoryMB"`
	FreeDisk int64    `json:"minFreeDiskMb"`
	TeamID   string   `json:"teamID"`

	Dockerfile string `json:"dockerfile"`
	StartCmd   string `json:"startCmd"`
	ReadyCmd   string `json:"readyCmd"`
}

// newTemplate announces a build whose steps are sent when it is started.
func (c *Control) newTemplate(r *call) error {
	var body announcement
	if err := r.body(&body); err != nil {
		return err
	}
	return c.announce(r, body, template.BuildRequest{})
}

// newOldTemplate announces a build as clients before E2B's build system 2.0 do: with a Dockerfile, whose image they push next. This server
// ignores that image and builds the Dockerfile.
func (c *Control) newOldTemplate(r *call) error {
	var body announcement
	if err := r.body(&body); err != nil {
		return err
	}
	if strings.TrimSpace(body.Dockerfile) == "" || len(body.Dockerfile) > maxOldDockerfile {
		return refuse(http.StatusBadRequest, "give a dockerfile of at most %d bytes", maxOldDockerfile)
	}
	body.Name = cmp.Or(r.PathValue("id"), body.Name, body.Alias, strings.ToLower(rand.Text()[:shortID]))
	return c.announce(r, body, template.BuildRequest{Dockerfile: body.Dockerfile, StartCmd: body.StartCmd, ReadyCmd: body.ReadyCmd})
}

// maxOldDockerfile bounds the text of a Dockerfile that is kept until its build starts, in bytes.
const maxOldDockerfile = 64 << 10

// shortID is the length of the names that this server generates for templates and snapshots without a name, as long as E2B's ids.
const shortID = 20

// startOldBuild starts a build that was announced with its Dockerfile.
func (c *Control) startOldBuild(r *call) error {
	b, err := c.findBuild(r, r.PathValue("id"))
	if err != nil {
		return err
	}
	if b.Request.Dockerfile == "" {
		return refuse(http.StatusBadRequest,
			"the build was announced without a Dockerfile: start it by POST /v2/templates/{id}/builds/{bid}")
	}
	if err := c.launch(b, b.Request, nil, ""); err != nil {
		return err
	}
	return r.done(http.StatusAccepted)
}

// announce registers a build, which is started later.
func (c *Control) announce(r *call, body announcement, req template.BuildRequest) error {
	if err := errors.Join(r.isTeam(body.TeamID), checkTags(cmp.Or(body.Name, body.Alias), body.Tags)); err != nil {
		return err
	}
	name := plainName(r.owner, cmp.Or(body.Name, body.Alias))
	if name == "" {
		return refuse(http.StatusBadRequest, "the template has no name")
	}
	plain, tag := tagged(name)
	tags := slices.Clone(body.Tags)
	if tag != defaultTag || len(tags) == 0 {
		tags = append([]string{tag}, tags...)
	}
	if len(tags) > maxTags || body.CPUCount < 0 || body.CPUCount > 1024 || body.MemoryMB < 0 || body.MemoryMB > maxMB ||
		body.FreeDisk < 0 || body.FreeDisk > maxMB {
		return refuse(http.StatusBadRequest, "at most %d tags, 1024 CPUs and %d MB are possible", maxTags, maxMB)
	}
	names := make([]string, len(tags))
	for i, t := range tags {
		var err error
		if names[i], err = template.CheckName(withTag(plain, t)); err != nil {
			return err
		}
	}
	req.Owner, req.Name = r.owner, names[0]
	req.Limits = sandbox.Limits{CPU: float64(body.CPUCount), Memory: body.MemoryMB << 20}
	if body.FreeDisk > 0 {
		req.Limits.Disk = max(c.Manager.Limits(sandbox.Limits{}).Disk, body.FreeDisk<<20)
	}
	b, err := c.Builds.Announce(req, names[1:]...)
	if err != nil {
		return err
	}
	return r.answer(http.StatusAccepted, map[string]any{"templateID": plain, "buildID": b.ID, "public": false, "names": []string{plain},
		"aliases": []string{plain}, "tags": tags})
}
