package envd

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Operations that a signature allows.
const (
	OpRead  = "read"
	OpWrite = "write"
)

// Sign makes the signature of a URL for one file. Its holder can do that one operation without the sandbox's token, until a time (zero: as
// long as the token lasts). path and user are as in the URL, which is not normalised. The form is E2B's (docs/protocol.md).
func Sign(path, operation, user, token string, until time.Time) string {
	raw := path + ":" + operation + ":" + user + ":" + token
	if !until.IsZero() {
		raw += ":" + strconv.FormatInt(until.Unix(), 10)
	}
	sum := sha256.Sum256([]byte(raw))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// SignedQuery returns the query of a signed URL of /files.
func SignedQuery(path, operation, user, token string, until time.Time) url.Values {
	q := url.Values{"path": {path}, "signature": {Sign(path, operation, user, token, until)}}
	if user != "" {
		q.Set("username", user)
	}
	if !until.IsZero() {
		q.Set("signature_expiration", strconv.FormatInt(until.Unix(), 10))
	}
	return q
}

// unsigned says what is wrong with the signature of a request for a file; "" means nothing.
func (t Target) unsigned(r *http.Request, operation string) string {
	if r.Header.Get(AccessHeader) != "" {
		return "the access token is not that of this sandbox"
	}
	q := r.URL.Query()
	shown := q["signature"]
	if len(shown) != 1 || shown[0] == "" {
		return "missing signature query parameter"
	}
	for _, name := range []string{"path", "username", "signature_expiration"} {
		if len(q[name]) > 1 {
			return "invalid signature"
		}
	}
	if strings.Contains(q.Get("username"), ":") { // the parts of the signed text must stay distinct
		return "invalid signature"
	}
	var until time.Time
	if text := q.Get("signature_expiration"); text != "" {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || strconv.FormatInt(n, 10) != text || n <= 0 {
			return "invalid signature"
		}
		until = time.Unix(n, 0)
	}
	token := t.Sandbox.AccessToken()
	want := Sign(q.Get("path"), operation, q.Get("username"), token, until)
	switch {
	case token == "" || subtle.ConstantTimeCompare([]byte(shown[0]), []byte(want)) != 1:
		return "invalid signature"
	case !until.IsZero() && time.Now().After(until):
		return "signature is already expired"
	}
	return ""
}
