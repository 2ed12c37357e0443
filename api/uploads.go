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
	"time"

	"soulbox.dev/soulbox/api/envd"
)

var filesHash = regexp.MustCompile(`^[0-9a-zA-Z]{16,128}$`)

// fileLink says whether files of a build are here, and where they can be sent to.
func (c *Control) fileLink(r *call) error {
	hash := r.PathValue("hash")
	if !filesHash.MatchString(hash) {
		return refuse(http.StatusBadRequest, "%.40q is no hash of files", hash)
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

// sign makes the proof of an upload: who has it sends files of that name to that owner's builds, until then.
func (c *Control) sign(parts ...string) string {
	mac := hmac.New(sha256.New, []byte(c.secret))
	for _, p := range parts {
		fmt.Fprintf(mac, "%d:%s", len(p), p)
	}
	return hex.EncodeToString(mac.Sum(nil))
}

// upload takes files of a build.
func (c *Control) upload(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	owner, until := q.Get("owner"), q.Get("until")
	last, err := strconv.ParseInt(until, 10, 64)
	if want := c.sign(owner, r.PathValue("id"), r.PathValue("hash"), until); err != nil || !hmac.Equal([]byte(want), []byte(q.Get("signature"))) || time.Now().Unix() > last {
		c.fail(w, r, refuse(http.StatusForbidden, "the URL is not valid, or not any more; ask for another one"))
		return
	}
	idle := envd.NewIdle(w, bodyTime)
	defer idle.Over()
	if err := c.Store.SaveUpload(owner, r.PathValue("hash"), idle.Reader(r.Body)); err != nil {
		c.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusCreated)
}
