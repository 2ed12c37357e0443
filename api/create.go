package api

import (
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"soulbox.dev/soulbox/sandbox"
)

// newSandbox is a client's request for a sandbox.
type newSandbox struct {
	TemplateID      string `json:"templateID"`
	Secure          *bool  `json:"secure"`
	Timeout         *int64 `json:"timeout"`
	AutoPause       bool   `json:"autoPause"`
	AutoPauseMemory *bool  `json:"autoPauseMemory"`
	AutoResume      *struct {
		Enabled bool `json:"enabled"`
	} `json:"autoResume"`
	Internet     *bool             `json:"allow_internet_access"`
	Network      *network          `json:"network"`
	Metadata     map[string]string `json:"metadata"`
	Env          map[string]string `json:"envVars"`
	MCP          json.RawMessage   `json:"mcp"`
	IAM          json.RawMessage   `json:"iam"`
	VolumeMounts []json.RawMessage `json:"volumeMounts"`
}

func given(raw json.RawMessage) bool { return len(raw) > 0 && string(raw) != "null" }

// options translates the request into the options of a sandbox.
func (n newSandbox) options(c *Control, owner string, life int64) (o sandbox.CreateOptions, err error) {
	switch {
	case n.TemplateID == "":
		return o, refuse(http.StatusBadRequest, "templateID is missing")
	case len(n.VolumeMounts) > 0:
		return o, refuse(http.StatusNotImplemented, "this server has no volumes")
	case given(n.MCP):
		return o, refuse(http.StatusNotImplemented,
			"this server has no MCP gateway in sandboxes: start MCP servers by commands.run, or build a template with them")
	case given(n.IAM):
		return o, refuse(http.StatusNotImplemented, "this server gives sandboxes no identities")
	}
	resume := n.AutoResume != nil && n.AutoResume.Enabled
	filesOnly := n.AutoPause && n.AutoPauseMemory != nil && !*n.AutoPauseMemory
	if resume && (!n.AutoPause || filesOnly) {
		return o, refuse(http.StatusBadRequest, "autoResume needs autoPause with memory")
	}
	if !n.AutoPause && n.AutoPauseMemory != nil && !*n.AutoPauseMemory {
		return o, refuse(http.StatusBadRequest, "autoPauseMemory=false only applies when autoPause is true")
	}
	lifetime, err := seconds("timeout", n.Timeout, life, maxLife)
	if err != nil {
		return o, err
	}
	o = sandbox.CreateOptions{Owner: owner, Template: c.templateName(owner, n.TemplateID), Metadata: n.Metadata, Env: n.Env,
		Times: sandbox.Times{Life: max(lifetime, time.Second), First: max(lifetime, time.Second), OnTimeout: sandbox.ActionKill,
			NoAutoResume: !resume, FilesOnly: filesOnly}}
	if n.AutoPause {
		o.Times.OnTimeout = sandbox.ActionPause
	}
	o.Ingress = n.Network.ingress()
	if o.Ingress.Insecure = c.Gateway.insecure() && n.Secure != nil && !*n.Secure; o.Ingress.Insecure &&
		o.Ingress.Open != sandbox.OpenPublic {
		return o, refuse(http.StatusBadRequest, "a sandbox without public traffic needs its token: leave out secure=false")
	}
	snap, saved, err := c.snapshotOf(owner, o.Template)
	if err != nil {
		return o, err
	}
	if saved && (n.Network == nil && n.Internet == nil || !snap.Network.On()) {
		if n.Network != nil && (len(n.Network.AllowOut) > 0 || len(n.Network.DenyOut) > 0) || n.Internet != nil && *n.Internet {
			return o, refuse(http.StatusBadRequest, "snapshot %q was made from a sandbox without a network, so its sandboxes have none",
				o.Template)
		}
		return o, nil // the network stays as it was saved
	}
	o.Network, err = n.Network.egress(n.Internet, c.NoNetwork)
	return o, err
}

// seconds reads and checks a time that a client gives.
func seconds(name string, given *int64, without, most int64) (time.Duration, error) {
	if given != nil {
		without = *given
	}
	if without < 0 || without > most {
		return 0, refuse(http.StatusBadRequest, "%s is from 0 to %d seconds", name, most)
	}
	return time.Duration(without) * time.Second, nil
}

func (c *Control) create(r *call, life int64) error {
	var body newSandbox
	if err := r.body(&body); err != nil {
		return err
	}
	o, err := body.options(c, r.owner, life)
	if err != nil {
		return err
	}
	sb, err := c.Manager.Create(r.Context(), o)
	if errors.Is(err, sandbox.ErrNoTemplate) {
		return refuse(http.StatusNotFound, "template '%.100s' not found", body.TemplateID)
	}
	if err != nil {
		return err
	}
	return r.answer(http.StatusCreated, c.created(sb))
}

// snapshotOf finds an owner's snapshot, unless a template has the name.
func (c *Control) snapshotOf(owner, name string) (snap sandbox.Snapshot, found bool, err error) {
	if _, err := c.Store.Get(owner, name); err == nil || name == "" {
		return snap, false, nil
	}
	snap, err = c.Manager.FindSnapshot(owner, name)
	if errors.Is(err, sandbox.ErrNoSnapshot) {
		return snap, false, nil
	}
	return snap, err == nil, err
}
