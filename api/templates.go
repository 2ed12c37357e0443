package api

import (
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/api/envd"
	"soulbox.dev/soulbox/internal/cursor"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

// defaultTag is the tag of a name without one.
const defaultTag = "default"

// plainName returns the stored form of a template's or snapshot's name. Clients may put the owner before the name, and the default tag
// after it.
func plainName(owner, name string) string {
	name = strings.ToLower(strings.TrimSpace(name))
	if owner == "" {
		owner = "local"
	}
	name = strings.TrimPrefix(name, strings.ToLower(owner)+"/")
	return strings.TrimSuffix(strings.TrimSuffix(name, ":"+defaultTag), ":latest")
}

// templateName returns the domain's name of a template. If "base" has not been built, it is the server's default template.
func (c *Control) templateName(owner, name string) string {
	name = plainName(owner, name)
	if plain, id := tagged(name); template.ValidBuildID(id) {
		if all, err := c.Store.List(owner); err == nil { // otherwise the domain will not find it
			for _, m := range all {
				if of, _ := tagged(m.Name); of == plain && m.BuildID() == id {
					return m.Name
				}
			}
		}
	}
	if name == template.BaseName {
		if _, err := c.Store.Get(owner, name); err != nil {
			return ""
		}
	}
	return name
}

// templateInfo is a template in a list.
type templateInfo struct {
	TemplateID  string     `json:"templateID"`
	BuildID     string     `json:"buildID"`
	CPUCount    int        `json:"cpuCount"`
	MemoryMB    int64      `json:"memoryMB"`
	DiskSizeMB  int64      `json:"diskSizeMB"`
	Public      bool       `json:"public"`
	Aliases     []string   `json:"aliases"`
	Names       []string   `json:"names"`
	CreatedAt   time.Time  `json:"createdAt"`
	UpdatedAt   time.Time  `json:"updatedAt"`
	CreatedBy   *struct{}  `json:"createdBy"`
	SpawnedAt   *time.Time `json:"lastSpawnedAt"`
	SpawnCount  int        `json:"spawnCount"`
	BuildCount  int        `json:"buildCount"`
	EnvdVersion string     `json:"envdVersion"`
	BuildStatus string     `json:"buildStatus"`
}

func (c *Control) templateInfo(m template.Manifest) templateInfo {
	l := c.Manager.Limits(m.Limits)
	return templateInfo{TemplateID: m.Name, BuildID: m.BuildID(), CPUCount: max(1, int(l.CPU+0.5)), MemoryMB: l.Memory >> 20,
		DiskSizeMB: l.Disk >> 20, Public: m.Owner == "",
		Aliases: []string{m.Name}, Names: []string{m.Name}, CreatedAt: m.Created, UpdatedAt: m.Created, BuildCount: 1,
		EnvdVersion: envd.Version, BuildStatus: string(template.BuildReady)}
}

func (c *Control) listTemplates(r *call) error {
	if err := r.isTeam(r.URL.Query().Get("teamID")); err != nil {
		return err
	}
	all, err := c.Store.List(r.owner)
	if err != nil {
		return err
	}
	out := []templateInfo{}
	for _, m := range all {
		out = append(out, c.templateInfo(m))
	}
	if strings.HasPrefix(r.URL.Path, "/v2/") {
		if out, err = page(r, "api-templates", out, false, func(t templateInfo) string { return t.TemplateID }); err != nil {
			return err
		}
	}
	return r.answer(http.StatusOK, out)
}

// templateOfPath finds the template that a path names.
func (c *Control) templateOfPath(r *call) (template.Manifest, error) {
	return c.Store.Get(r.owner, plainName(r.owner, r.PathValue("id")))
}

func (c *Control) getTemplate(r *call) error {
	m, err := c.templateOfPath(r)
	if err != nil {
		return err
	}
	body, err := json.Marshal(c.templateInfo(m))
	if err != nil {
		return err
	}
	out := map[string]any{}
	if err := json.Unmarshal(body, &out); err != nil {
		return err
	}
	out["builds"] = []map[string]any{{"buildID": m.BuildID(), "status": template.BuildReady, "createdAt": m.Created, "updatedAt": m.Created,
		"finishedAt": m.Created,
		"cpuCount":   out["cpuCount"], "memoryMB": out["memoryMB"], "diskSizeMB": out["diskSizeMB"], "envdVersion": envd.Version}}
	return r.answer(http.StatusOK, out)
}

// deleteTemplate deletes a template or a snapshot; clients see both as templates. Clients cannot delete the operator's.
func (c *Control) deleteTemplate(r *call) error {
	name := plainName(r.owner, r.PathValue("id"))
	err := c.Store.Delete(r.owner, name)
	if errors.Is(err, sandbox.ErrNoTemplate) {
		if err = c.Manager.DeleteSnapshot(r.owner, name); errors.Is(err, sandbox.ErrNoSnapshot) {
			if m, merr := c.Store.Get(r.owner, name); merr == nil && m.Owner != r.owner {
				return refuse(http.StatusForbidden, "the template '%s' is the operator's", name)
			}
			return refuse(http.StatusNotFound, "template '%.100s' not found", r.PathValue("id"))
		}
	}
	if err != nil {
		return err
	}
	return r.done(http.StatusNoContent)
}

func (c *Control) publish(r *call) error {
	var body struct {
		Public *bool `json:"public"`
	}
	if err := r.body(&body); err != nil {
		return err
	}
	m, err := c.templateOfPath(r)
	if err != nil {
		return err
	}
	if body.Public != nil && *body.Public != (m.Owner == "") {
		return refuse(http.StatusNotImplemented, "only the operator of this server makes templates that everybody sees")
	}
	return r.answer(http.StatusOK, map[string]any{"names": []string{m.Name}})
}

// templatePart serves two paths that one pattern cannot tell apart: /templates/aliases/{name} and /templates/{name}/tags.
func (c *Control) templatePart(r *call) error {
	switch {
	case r.PathValue("id") == "aliases":
		return c.alias(r, r.PathValue("what"))
	case r.PathValue("what") == "tags":
		return c.listTags(r)
	}
	return refuse(http.StatusNotFound, "there is no %s", r.URL.Path)
}

func (c *Control) alias(r *call, name string) error {
	m, err := c.Store.Get(r.owner, plainName(r.owner, name))
	if errors.Is(err, sandbox.ErrNoTemplate) {
		return refuse(http.StatusNotFound, "template '%.100s' not found", name)
	}
	if err != nil {
		return err
	}
	return r.answer(http.StatusOK, map[string]any{"templateID": m.Name, "public": m.Owner == ""})
}

// tagged splits a name from its tag.
func tagged(name string) (plain, tag string) {
	plain, tag, _ = strings.Cut(name, ":")
	return plain, cmp.Or(tag, defaultTag)
}

// plainOf returns a name without its tag.
func plainOf(name string) string {
	plain, _ := tagged(name)
	return plain
}

// checkTags refuses empty tags, in the name and in tags.
func checkTags(name string, tags []string) error {
	if strings.HasSuffix(strings.TrimSpace(name), ":") ||
		slices.ContainsFunc(tags, func(t string) bool { return strings.TrimSpace(t) == "" }) {
		return refuse(http.StatusBadRequest, "a tag is empty: leave it out, or name it")
	}
	return nil
}

// withTag returns the name that a template has under a tag.
func withTag(plain, tag string) string {
	if tag = strings.ToLower(strings.TrimSpace(tag)); tag == defaultTag || tag == "latest" || tag == "" {
		return plain
	}
	return plain + ":" + tag
}

const maxTags = 32

// addTags stores a template under further tags.
func (c *Control) addTags(r *call) error {
	var body struct {
		Target string   `json:"target"`
		Tags   []string `json:"tags"`
	}
	if err := r.body(&body); err != nil {
		return err
	}
	if len(body.Tags) == 0 || len(body.Tags) > maxTags {
		return refuse(http.StatusBadRequest, "give 1 to %d tags", maxTags)
	}
	if err := checkTags(body.Target, body.Tags); err != nil {
		return err
	}
	m, err := c.Store.Get(r.owner, plainName(r.owner, body.Target))
	if err != nil {
		return err
	}
	if m.Owner != r.owner {
		return refuse(http.StatusForbidden, "the template '%s' is the operator's", m.Name)
	}
	if err := c.tag(m, body.Tags); err != nil {
		return err
	}
	return r.answer(http.StatusCreated, map[string]any{"tags": body.Tags, "buildID": m.BuildID()})
}

// tag stores a template under its name with each of the tags.
func (c *Control) tag(m template.Manifest, tags []string) error {
	names := make([]string, len(tags))
	for i, t := range tags {
		names[i] = withTag(plainOf(m.Name), t)
	}
	return c.Builds.Name(m, names...)
}

func (c *Control) removeTags(r *call) error {
	var body struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}
	if err := r.body(&body); err != nil {
		return err
	}
	if len(body.Tags) == 0 || len(body.Tags) > maxTags {
		return refuse(http.StatusBadRequest, "give 1 to %d tags", maxTags)
	}
	if err := checkTags(body.Name, body.Tags); err != nil {
		return err
	}
	plain, _ := tagged(plainName(r.owner, body.Name))
	for _, t := range body.Tags {
		if withTag(plain, t) == plain {
			return refuse(http.StatusBadRequest, "the tag %q cannot be removed: delete the template", t)
		}
		if err := c.Store.Delete(r.owner, withTag(plain, t)); err != nil {
			return err
		}
	}
	return r.done(http.StatusNoContent)
}

func (c *Control) listTags(r *call) error {
	plain, _ := tagged(plainName(r.owner, r.PathValue("id")))
	all, err := c.Store.List(r.owner)
	if err != nil {
		return err
	}
	out := []map[string]any{}
	for _, m := range all {
		if name, tag := tagged(m.Name); name == plain {
			out = append(out, map[string]any{"tag": tag, "buildID": m.BuildID(), "createdAt": m.Created})
		}
	}
	if len(out) == 0 {
		return refuse(http.StatusNotFound, "template '%.100s' not found", r.PathValue("id"))
	}
	return r.answer(http.StatusOK, out)
}

// snapshot saves a sandbox. A snapshot replaces an older one of the same name, as clients expect of templates.
func (c *Control) snapshot(r *call) error {
	var body struct {
		Name string `json:"name"`
	}
	if err := r.body(&body); err != nil {
		return err
	}
	sb, err := c.liveSandbox(r)
	if err != nil {
		return err
	}
	if err := checkTags(body.Name, nil); err != nil {
		return err
	}
	return r.save(sb, body.Name, true)
}

// snapshotOwn saves a sandbox without a loss: one of the same name is replaced only if that is wanted.
func (c *Control) snapshotOwn(r *call) error {
	var body client.NewSnapshot
	sb, err := c.bodyOf(r, &body)
	if err != nil {
		return err
	}
	if err := checkTags(body.Name, nil); err != nil {
		return err
	}
	return r.save(sb, body.Name, body.Replace)
}

// save makes a snapshot, and answers with it.
func (r *call) save(sb *sandbox.Sandbox, name string, replace bool) error {
	o := sandbox.SnapshotOptions{Name: plainName(r.owner, name), Unnamed: name == "", Replace: replace && name != ""}
	if o.Unnamed {
		o.Name = strings.ToLower(rand.Text()[:shortID])
	}
	snap, err := sb.Snapshot(r.Context(), o)
	if errors.Is(err, sandbox.ErrSnapshot) {
		return refuse(http.StatusConflict, "there is a snapshot %q: delete it, take another name, or ask to replace it (--replace)", o.Name)
	}
	if err != nil {
		return gone(sb, err)
	}
	return r.answer(http.StatusCreated, r.snapshotOf(snap))
}

// snapshotOf describes a snapshot as clients know it: a template of the caller's team, or, if unnamed, one that only its id names.
func (r *call) snapshotOf(s sandbox.Snapshot) map[string]any {
	name, tag := tagged(s.Name)
	names := []string{}
	if !s.Unnamed {
		name = access.Name(r.owner) + "/" + name
		names = append(names, name)
	}
	return map[string]any{"snapshotID": name + ":" + tag, "names": names}
}

func (c *Control) listSnapshots(r *call) error {
	all, err := c.Manager.Snapshots(r.owner)
	if err != nil {
		return err
	}
	q := r.URL.Query()
	of, _, _ := strings.Cut(q.Get("sandboxID"), "-")
	name := plainName(r.owner, q.Get("name"))
	all = slices.DeleteFunc(all, func(s sandbox.Snapshot) bool {
		plain, _ := tagged(s.Name)
		return of != "" && s.Sandbox != of || name != "" && s.Name != name && plain != name
	})
	key := func(s sandbox.Snapshot) string { return cursor.Key(s.Created, s.Name) }
	if all, err = page(r, "api-snapshots", all, true, key); err != nil {
		return err
	}
	out := []map[string]any{}
	for _, s := range all {
		out = append(out, r.snapshotOf(s))
	}
	return r.answer(http.StatusOK, out)
}
