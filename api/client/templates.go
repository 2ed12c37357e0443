package client

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// Templates lists the templates that the caller sees.
func (c *Client) Templates(ctx context.Context) (all []Template, err error) {
	err = c.call(ctx, "GET", "/v1/templates", nil, nil, &all)
	return all, err
}

// DeleteTemplate deletes a template or a snapshot. Its sandboxes keep running.
func (c *Client) DeleteTemplate(ctx context.Context, name string) error {
	return c.call(ctx, "DELETE", "/templates/"+url.PathEscape(name), nil, nil, nil)
}

// Pull makes a template from an image of a registry.
func (c *Client) Pull(ctx context.Context, name, reference string) (t Template, err error) {
	err = c.call(ctx, "PUT", "/v1/templates/"+url.PathEscape(name), nil, map[string]string{"reference": reference}, &t)
	return t, err
}

// Push pushes a template to a registry.
func (c *Client) Push(ctx context.Context, name, reference string) (t Template, err error) {
	err = c.call(ctx, "POST", "/v1/templates/"+url.PathEscape(name)+"/push", nil, map[string]string{"reference": reference}, &t)
	return t, err
}

// CopyTemplate stores a template under a further name.
func (c *Client) CopyTemplate(ctx context.Context, name, to string) (t Template, err error) {
	err = c.call(ctx, "POST", "/v1/templates/"+url.PathEscape(name)+"/copy", nil, map[string]string{"to": to}, &t)
	return t, err
}

// Announce announces a build of a template. It returns the name in its stored form and the id of the build. Zero limits are the server's.
func (c *Client) Announce(ctx context.Context, name string, cpu int, memoryMB, diskMB int64) (kept, build string, err error) {
	body := map[string]any{"name": name}
	if cpu > 0 {
		body["cpuCount"] = cpu
	}
	if memoryMB > 0 {
		body["memoryMB"] = memoryMB
	}
	if diskMB > 0 {
		body["minFreeDiskMb"] = diskMB
	}
	var out struct{ TemplateID, BuildID string }
	err = c.call(ctx, "POST", "/v3/templates", nil, body, &out)
	return out.TemplateID, out.BuildID, err
}

// HasContext reports whether the server has the files of a build.
func (c *Client) HasContext(ctx context.Context, name, hash string) (bool, error) {
	err := c.call(ctx, "HEAD", "/v1/templates/"+url.PathEscape(name)+"/context/"+hash, nil, nil, nil)
	if IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// SendContext sends the files of a build as a tar.
func (c *Client) SendContext(ctx context.Context, name, hash string, body io.Reader) error {
	res, err := c.send(ctx, http.MethodPut, "/v1/templates/"+url.PathEscape(name)+"/context/"+hash, nil, "application/x-tar", body)
	if err != nil {
		return err
	}
	return res.Body.Close()
}

// Build starts an announced build.
func (c *Client) Build(ctx context.Context, name, build string, n NewBuild) error {
	return c.call(ctx, "POST", "/v1/templates/"+url.PathEscape(name)+"/builds/"+build, nil, n, nil)
}

// LastBuild is the id of the build of a template that was begun last, also of one that has failed.
func (c *Client) LastBuild(ctx context.Context, name string) (id string, err error) {
	var out struct{ Build string }
	err = c.call(ctx, "GET", "/v1/templates/"+url.PathEscape(name)+"/builds/last", nil, nil, &out)
	return out.Build, err
}

// BuildLine is a line of a build's log.
type BuildLine struct {
	Time    time.Time `json:"timestamp"`
	Message string    `json:"message"`
	Level   string    `json:"level"`
	Step    string    `json:"step"`
}

// BuildStatus is the state of a build.
type BuildStatus struct {
	Status string      `json:"status"` // waiting, building, ready or error
	Lines  []BuildLine `json:"logEntries"`
	Reason *struct {
		Step    string `json:"step"`
		Message string `json:"message"`
	} `json:"reason"`
}

// BuildStatus returns the state of a build, and some lines of its log from the nth on.
func (c *Client) BuildStatus(ctx context.Context, name, build string, n int) (s BuildStatus, err error) {
	q := url.Values{"logsOffset": {strconv.Itoa(n)}}
	err = c.call(ctx, "GET", "/templates/"+url.PathEscape(name)+"/builds/"+build+"/status", q, nil, &s)
	return s, err
}
