package api

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/api/envd"
)

var filesHash = regexp.MustCompile(`^[0-9a-zA-Z]{16,128}$`)

// fileLink answers whether the server has the files of a build, and with a URL to send them to.
func (c *Control) fileLink(r *call) error {
	hash := r.PathValue("hash")
	if !filesHash.MatchString(hash) {
		return refuse(http.StatusBadRequest, "%.40q is not a hash of files", hash)
	}
	out := map[string]any{"present": c.Store.HasUpload(r.owner, hash)}
	base := c.URL
	if base == nil {
		base = &url.URL{Scheme: "http", Host: r.Host}
		if r.TLS != nil {
			base.Scheme = "https"
		}
	}
	to := base.JoinPath("templates", url.PathEscape(r.PathValue("id")), "files", hash)
	until := strconv.FormatInt(time.Now().Add(uploadTime).Unix(), 10)
	to.RawQuery = url.Values{"owner": {r.owner}, "until": {until}, "signature": {c.sign(r.owner, r.PathValue("id"), hash, until)}}.Encode()
	out["url"] = to.String()
	return r.answer(http.StatusCreated, out)
}

// sign makes the signature of an upload URL. Its holder can send files of that name for that owner's builds until the given time.
func (c *Control) sign(parts ...string) string {
	mac := hmac.New(sha256.New, []byte(c.secret))
	for _, p := range parts {
		fmt.Fprintf(mac, "%d:%s", len(p), p)
	}
	return hex.EncodeToString(mac.Sum(nil))
}

// upload stores the files of a build.
func (c *Control) upload(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	owner, until := q.Get("owner"), q.Get("until")
	last, err := strconv.ParseInt(until, 10, 64)
	if want := c.sign(owner, r.PathValue("id"), r.PathValue("hash"), until); err != nil ||
		!hmac.Equal([]byte(want), []byte(q.Get("signature"))) || time.Now().Unix() > last {
		c.fail(w, r, refuse(http.StatusForbidden, "the URL is invalid or has expired; request another one"))
		return
	}
	release, err := takeRequest(r.Context(), c.Manager, owner, agent.FileBuffers)
	if err != nil {
		c.fail(w, r, err)
		return
	}
	defer release()
	idle := envd.NewIdle(w, bodyTime)
	defer idle.Over()
	if err := c.Store.SaveUpload(owner, r.PathValue("hash"), idle.Reader(r.Body)); err != nil {
		c.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusCreated)
}

// maxDockerfile bounds the text of a Dockerfile, in bytes.
const maxDockerfile = 1 << 20

// buildDockerfile starts an announced build, with a Dockerfile and files that were sent before.
func (c *Control) buildDockerfile(r *call) error {
	var body client.NewBuild
	if err := r.body(&body); err != nil {
		return err
	}
	b, err := c.findBuild(r, r.PathValue("name"))
	if err != nil {
		return err
	}
	if strings.TrimSpace(body.Dockerfile) == "" || len(body.Dockerfile) > maxDockerfile || body.Context != "" &&
		!filesHash.MatchString(body.Context) {
		return refuse(http.StatusBadRequest, "give a Dockerfile of at most %d bytes, and as its context the hash by which it was sent",
			maxDockerfile)
	}
	if body.Context != "" && !c.Store.HasUpload(r.owner, body.Context) {
		return refuse(http.StatusBadRequest, "the files %.20s… of the build are not on this server, or have expired: send them again",
			body.Context)
	}
	req := b.Request
	req.Dockerfile, req.Filtered, req.Args, req.Target, req.NoCache = body.Dockerfile, body.Filtered, body.Args, body.Target, body.NoCache
	req.StartCmd, req.ReadyCmd, req.Protect = body.StartCmd, body.ReadyCmd, protectOf(body.Protect)
	if err := c.launch(b, req, nil, body.Context); err != nil {
		return err
	}
	return r.done(http.StatusAccepted)
}

// lastBuild says which build of a template was begun last, also one that has failed.
func (c *Control) lastBuild(r *call) error {
	id, err := c.Builds.Last(r.owner, plainName(r.owner, r.PathValue("name")))
	if err != nil {
		return err
	}
	return r.answer(http.StatusOK, map[string]string{"build": id})
}

// sendContext stores the files of a build: a tar, which may be compressed.
func (c *Control) sendContext(r *call) error {
	hash := r.PathValue("hash")
	if !filesHash.MatchString(hash) {
		return refuse(http.StatusBadRequest, "%.40q is not a hash of files", hash)
	}
	idle := envd.NewIdle(r.w, bodyTime)
	defer idle.Over()
	if err := c.Store.SaveUpload(r.owner, hash, idle.Reader(r.whole)); err != nil {
		return err
	}
	return r.done(http.StatusCreated)
}

// hasContext answers whether the server has the files of a build.
func (c *Control) hasContext(r *call) error {
	if hash := r.PathValue("hash"); !filesHash.MatchString(hash) || !c.Store.HasUpload(r.owner, hash) {
		return refuse(http.StatusNotFound, "the files are not on this server")
	}
	return r.done(http.StatusOK)
}
