package api

import (
	"cmp"
	"errors"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"soulbox.dev/soulbox/api/envd"
	"soulbox.dev/soulbox/internal/cursor"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

// Lifetimes of sandboxes whose clients give none, and the largest allowed ones, in seconds.
const (
	oldLife    = 15
	newLife    = 300
	maxLife    = 100 * 365 * 24 * 3600
	maxRefresh = 3600
)

// clientID named the node of a sandbox in E2B's API; clients still require the field.
const clientID = "soulbox"

// created describes a sandbox to a client that made it or connects to it.
type created struct {
	TemplateID   string  `json:"templateID"`
	SandboxID    string  `json:"sandboxID"`
	ClientID     string  `json:"clientID"`
	EnvdVersion  string  `json:"envdVersion"`
	Alias        string  `json:"alias,omitempty"`
	AccessToken  string  `json:"envdAccessToken,omitempty"` // empty if the sandbox needs none
	TrafficToken *string `json:"trafficAccessToken"`
	Domain       *string `json:"domain"`
}

// listed is a sandbox in a list.
type listed struct {
	TemplateID   string            `json:"templateID"`
	Alias        string            `json:"alias,omitempty"`
	SandboxID    string            `json:"sandboxID"`
	ClientID     string            `json:"clientID"`
	StartedAt    time.Time         `json:"startedAt"`
	EndAt        time.Time         `json:"endAt"`
	CPUCount     int               `json:"cpuCount"`
	MemoryMB     int64             `json:"memoryMB"`
	DiskSizeMB   int64             `json:"diskSizeMB"`
	Metadata     map[string]string `json:"metadata,omitempty"`
	State        string            `json:"state"`
	EnvdVersion  string            `json:"envdVersion"`
	VolumeMounts []struct{}        `json:"volumeMounts"`
}

// detail is everything about a sandbox.
type detail struct {
	listed
	AccessToken string    `json:"envdAccessToken,omitempty"`
	Domain      *string   `json:"domain"`
	Internet    *bool     `json:"allowInternetAccess"`
	Network     network   `json:"network"`
	Lifecycle   lifecycle `json:"lifecycle"`
}

type lifecycle struct {
	AutoResume bool   `json:"autoResume"`
	OnTimeout  string `json:"onTimeout"`
}

func (c *Control) created(sb *sandbox.Sandbox) created {
	i := sb.Info()
	out := created{TemplateID: originOf(i), SandboxID: i.ID, ClientID: clientID, EnvdVersion: envd.Version,
		Alias: cmp.Or(i.Origin, i.Template), AccessToken: c.tokenOf(sb), Domain: c.domain()}
	if i.Ingress.Open != sandbox.OpenPublic {
		token := sb.TrafficToken()
		out.TrafficToken = &token
	}
	return out
}

// tokenOf returns the access token that clients of a sandbox need.
func (c *Control) tokenOf(sb *sandbox.Sandbox) string {
	if c.Gateway.free(sb.Info()) {
		return ""
	}
	return sb.AccessToken()
}

// domain returns the domain of sandboxes, or nil without TLS, because clients always put https:// before it.
func (c *Control) domain() *string {
	if c.Gateway == nil || !c.Gateway.secure() {
		return nil
	}
	return &c.Gateway.Base.Host
}

// templateOf returns the template from which a sandbox began.
func templateOf(i sandbox.Info) string { return cmp.Or(i.Template, template.HostName) }

// originOf returns what clients see as a sandbox's template: its snapshot, if it began from one.
func originOf(i sandbox.Info) string { return cmp.Or(i.Origin, templateOf(i)) }

func list(i sandbox.Info) listed {
	out := listed{TemplateID: originOf(i), Alias: cmp.Or(i.Origin, i.Template), SandboxID: i.ID, ClientID: clientID, StartedAt: began(i),
		EndAt: i.ExpiresAt, CPUCount: max(1, int(i.Limits.CPU+0.5)),
		MemoryMB: i.Limits.Memory >> 20, DiskSizeMB: i.Limits.Disk >> 20, Metadata: i.Metadata, State: "running", EnvdVersion: envd.Version,
		VolumeMounts: []struct{}{}}
	if i.State == sandbox.Paused {
		out.State, out.EndAt = "paused", i.Changed
	}
	return out
}

func began(i sandbox.Info) time.Time {
	if i.Ready.IsZero() {
		return i.Created
	}
	return i.Ready
}

// anySandbox finds a sandbox of the caller, which may have ended.
func (c *Control) anySandbox(r *call) (*sandbox.Sandbox, error) {
	id, _, _ := strings.Cut(r.PathValue("id"), "-") // a client id may follow
	sb, err := c.Manager.Get(r.owner, id)
	if err != nil {
		return nil, missing(r.PathValue("id"))
	}
	return sb, nil
}

// liveSandbox finds a sandbox of the caller that has not ended.
func (c *Control) liveSandbox(r *call) (*sandbox.Sandbox, error) {
	sb, err := c.anySandbox(r)
	if i := info(sb, err); i.State.Ended() && !i.OnDisk {
		return nil, missing(r.PathValue("id"))
	}
	return sb, err
}

// info describes the sandbox that was found.
func info(sb *sandbox.Sandbox, err error) sandbox.Info {
	if err != nil {
		return sandbox.Info{}
	}
	return sb.Info()
}

// bodyOf reads the body of a request and finds the sandbox of its path.
func (c *Control) bodyOf(r *call, body any) (*sandbox.Sandbox, error) {
	if err := r.body(body); err != nil {
		return nil, err
	}
	return c.liveSandbox(r)
}

// missing is the error for a sandbox that does not exist or is not the caller's.
func missing(id string) error {
	return refuse(http.StatusNotFound, "sandbox %.60q doesn't exist or you don't have access to it", id)
}

// gone turns an error into missing if the sandbox has ended meanwhile.
func gone(sb *sandbox.Sandbox, err error) error {
	if err != nil && sb.Info().State.Ended() {
		return missing(sb.ID())
	}
	return err
}

// living returns the owner's sandboxes that a query selects, the newest first.
func (c *Control) living(r *call, states map[string]bool) ([]sandbox.Info, error) {
	q := r.URL.Query()
	metadata, err := metadataQuery(q.Get("metadata"))
	if err != nil {
		return nil, err
	}
	var since time.Time
	if text := q.Get("startedAfter"); text != "" {
		if since, err = time.Parse(time.RFC3339, text); err != nil {
			return nil, refuse(http.StatusBadRequest, "startedAfter is a time such as 2026-01-02T15:04:05Z, not %.40q", text)
		}
	}
	filter := sandbox.Filter{Owner: r.owner, Metadata: metadata}
	if name := q.Get("template"); name != "" {
		filter.Template = cmp.Or(c.templateName(r.owner, name), template.HostName)
	}
	c.Manager.AwaitSettled(r.Context()) // sandboxes that another server left behind are adopted in a moment
	all := slices.DeleteFunc(c.Manager.List(filter), func(i sandbox.Info) bool {
		return i.State != sandbox.Running && i.State != sandbox.Paused || !states[list(i).State] || began(i).Before(since)
	})
	slices.SortFunc(all, func(a, b sandbox.Info) int { return cmp.Or(began(b).Compare(began(a)), cmp.Compare(b.ID, a.ID)) })
	return all, nil
}

// metadataQuery reads pairs that clients encode once more than a query needs, and each key and value once more again.
func metadataQuery(text string) (map[string]string, error) {
	if text == "" {
		return nil, nil
	}
	pairs, err := url.QueryUnescape(text)
	out := map[string]string{}
	for _, pair := range strings.Split(pairs, "&") {
		k, v, _ := strings.Cut(pair, "=")
		key, kerr := url.QueryUnescape(k)
		value, verr := url.QueryUnescape(v)
		err = errors.Join(err, kerr, verr)
		out[key] = value
	}
	if err != nil {
		return nil, refuse(http.StatusBadRequest, "metadata is not a list of key=value pairs: %v", err)
	}
	return out, nil
}

func (c *Control) listRunning(r *call) error {
	all, err := c.living(r, map[string]bool{"running": true})
	if err != nil {
		return err
	}
	return r.answer(http.StatusOK, listAll(all))
}

func listAll(all []sandbox.Info) []listed {
	out := []listed{}
	for _, i := range all {
		out = append(out, list(i))
	}
	return out
}

func (c *Control) list(r *call) error {
	states := map[string]bool{}
	for _, one := range r.URL.Query()["state"] {
		for _, s := range strings.Split(one, ",") {
			if s != "running" && s != "paused" {
				return refuse(http.StatusBadRequest, "state is running or paused, not %.40q", s)
			}
			states[s] = true
		}
	}
	if len(states) == 0 {
		states = map[string]bool{"running": true, "paused": true}
	}
	all, err := c.living(r, states)
	if err != nil {
		return err
	}
	order := cmp.Or(r.URL.Query().Get("order"), "desc")
	if order != "asc" && order != "desc" {
		return refuse(http.StatusBadRequest, "order is asc or desc, not %.40q", order)
	}
	running := 0
	for _, i := range all {
		if i.State == sandbox.Running {
			running++
		}
	}
	r.w.Header().Set("X-Total-Running", strconv.Itoa(running))
	key := func(i sandbox.Info) string { return cursor.Key(began(i), i.ID) }
	if all, err = page(r, "api-sandboxes", all, order == "desc", key); err != nil {
		return err
	}
	return r.answer(http.StatusOK, listAll(all))
}

func (c *Control) get(r *call) error {
	sb, err := c.liveSandbox(r)
	if err != nil {
		return err
	}
	i := sb.Info()
	on := i.Network.Mode == sandbox.NetworkFull || len(i.Network.Allow) > 0
	return r.answer(http.StatusOK, detail{listed: list(i), AccessToken: c.tokenOf(sb), Domain: c.domain(), Internet: &on,
		Network: networkOf(i),
		Lifecycle: lifecycle{AutoResume: !i.Times.NoAutoResume && i.Times.OnTimeout == sandbox.ActionPause,
			OnTimeout: string(i.Times.OnTimeout)}})
}

func (c *Control) kill(r *call) error {
	sb, err := c.liveSandbox(r)
	if err != nil {
		return err
	}
	err = sb.Kill(sandbox.CauseKilled)
	if errors.Is(err, sandbox.ErrState) { // another call is killing it
		return missing(sb.ID())
	}
	if err != nil {
		return gone(sb, err)
	}
	return r.done(http.StatusNoContent)
}

func (c *Control) pause(r *call) error {
	var body struct {
		Memory *bool `json:"memory"`
	}
	sb, err := c.bodyOf(r, &body)
	if err != nil {
		return err
	}
	filesOnly := body.Memory != nil && !*body.Memory // a sandbox without memory boots anew, so only clients that ask for that resume it
	err = sb.Pause(r.Context(), sandbox.PauseOptions{ToDisk: true, FilesOnly: filesOnly, AutoResume: !filesOnly &&
		!sb.Info().Times.NoAutoResume})
	if err != nil {
		return gone(sb, err)
	}
	return r.done(http.StatusNoContent)
}

// connectTo makes sure that a sandbox runs, and that it lives at least as long as the client asks.
func (c *Control) connectTo(r *call) error {
	var body struct {
		Timeout *int64 `json:"timeout"`
		Memory  *bool  `json:"memory"`
	}
	sb, err := c.bodyOf(r, &body)
	if err != nil {
		return err
	}
	life, err := seconds("timeout", body.Timeout, newLife, maxLife)
	if err != nil {
		return err
	}
	code := http.StatusOK
	for range connectTries {
		if err := sb.Settle(r.Context()); err != nil { // a sandbox that is being paused is resumed afterwards
			return err
		}
		i := sb.Info()
		if _, err := sb.Update(r.Context(), sandbox.Update{AtLeast: &life}); err != nil {
			return gone(sb, err)
		}
		if i.State == sandbox.Paused || i.OnDisk {
			code = http.StatusCreated
			o := sandbox.ResumeOptions{FilesOnly: i.OnDisk && body.Memory != nil && !*body.Memory}
			if err := sb.ResumeWith(r.Context(), o); err != nil && sb.Info().State != sandbox.Running {
				return gone(sb, err)
			}
		}
		if sb.Info().State == sandbox.Running { // no other call has paused it meanwhile
			break
		}
	}
	return r.answer(code, c.created(sb))
}

// connectTries is how often connectTo resumes a sandbox that other calls pause.
const connectTries = 3

func (c *Control) resume(r *call) error {
	var body struct {
		Timeout   *int64 `json:"timeout"`
		AutoPause *bool  `json:"autoPause"`
	}
	sb, err := c.bodyOf(r, &body)
	if err != nil {
		return err
	}
	life, err := seconds("timeout", body.Timeout, oldLife, maxLife)
	if err != nil {
		return err
	}
	was := sb.Info().State
	if err := sb.Settle(r.Context()); err != nil {
		return err
	}
	if was == sandbox.Running && sb.Info().State == was { // otherwise another call has just resumed it
		return refuse(http.StatusConflict, "sandbox %q is already running", sb.ID())
	}
	u := sandbox.Update{AtLeast: &life}
	if body.AutoPause != nil {
		u.OnTimeout = sandbox.ActionKill
		if *body.AutoPause {
			u.OnTimeout = sandbox.ActionPause
		}
	}
	if _, err := sb.Update(r.Context(), u); err != nil {
		return gone(sb, err)
	}
	if err := sb.Resume(r.Context()); err != nil && sb.Info().State != sandbox.Running {
		return gone(sb, err)
	}
	return r.answer(http.StatusCreated, c.created(sb))
}

func (c *Control) setTimeout(r *call) error {
	var body struct {
		Timeout *int64 `json:"timeout"`
	}
	if err := r.body(&body); err != nil {
		return err
	}
	if body.Timeout == nil {
		return refuse(http.StatusBadRequest, "timeout is missing")
	}
	life, err := seconds("timeout", body.Timeout, 0, maxLife)
	if err != nil {
		return err
	}
	return c.setLife(r, sandbox.Update{Lifetime: &life})
}

func (c *Control) refresh(r *call) error {
	var body struct {
		Duration *int64 `json:"duration"`
	}
	if err := r.body(&body); err != nil {
		return err
	}
	life, err := seconds("duration", body.Duration, oldLife, maxRefresh)
	if err != nil {
		return err
	}
	return c.setLife(r, sandbox.Update{AtLeast: &life})
}

// setLife changes the lifetime of a running sandbox. For a paused one clients expect "not found".
func (c *Control) setLife(r *call, u sandbox.Update) error {
	sb, err := c.liveSandbox(r)
	if err != nil {
		return err
	}
	if sb.Info().State != sandbox.Running {
		return refuse(http.StatusNotFound, "sandbox %q is not running: connect to it first, which resumes it", sb.ID())
	}
	if _, err := sb.Update(r.Context(), u); err != nil {
		return gone(sb, err)
	}
	return r.done(http.StatusNoContent)
}

func (c *Control) setNetwork(r *call) error {
	var body struct {
		network
		Internet *bool `json:"allow_internet_access"`
	}
	sb, err := c.bodyOf(r, &body)
	if err != nil {
		return err
	}
	n, err := body.network.egress(body.Internet, c.NoNetwork)
	if err == nil {
		err = gone(sb, sb.SetNetwork(n))
	}
	if err != nil {
		return err
	}
	return r.done(http.StatusNoContent)
}

// fork makes copies. The answer lists each copy by itself; one that could not be made has its error.
func (c *Control) fork(r *call) error {
	var body struct {
		Timeout *int64 `json:"timeout"`
		Count   *int   `json:"count"`
	}
	sb, err := c.bodyOf(r, &body)
	if err != nil {
		return err
	}
	life, err := seconds("timeout", body.Timeout, newLife, maxLife)
	if err != nil {
		return err
	}
	count := 1
	if body.Count != nil {
		count = *body.Count
	}
	copies, failed, err := sb.Fork(r.Context(), count, nil)
	if err != nil {
		return gone(sb, err)
	}
	errs := slices.Collect(maps.Values(failed))
	out := []map[string]any{}
	for _, one := range copies {
		if _, err := one.Update(r.Context(), sandbox.Update{Lifetime: &life}); err != nil {
			errs = append(errs, errors.Join(err, one.Kill(err)))
			continue
		}
		out = append(out, map[string]any{"sandbox": c.created(one)})
	}
	for _, err := range errs {
		out = append(out, map[string]any{"error": tell(err)})
	}
	return r.answer(http.StatusCreated, out)
}
