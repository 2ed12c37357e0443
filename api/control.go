package api

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"soulbox.dev/soulbox/access"
	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/api/envd"
	"soulbox.dev/soulbox/internal/cursor"
	"soulbox.dev/soulbox/internal/wholenum"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

// Control is the control plane. It serves sandboxes, snapshots and templates as E2B's REST API does (docs/e2b.md, docs/protocol.md). It is
// safe for concurrent use.
type Control struct {
	Manager *sandbox.Manager
	Store   *template.Store
	Builds  *template.Builds
	// Owner returns the owner of a request. Its error is shown to the client.
	Owner func(*http.Request) (string, error)
	// MayAsk reports whether an owner may send a request now. MayRead reports whether the owner may send a body of a size (-1 means
	// unknown); done releases that. If one of them is nil, it always allows.
	MayAsk  func(owner string) bool
	MayRead func(owner string, size int64) (done func(), ok bool)
	// Gateway serves the ports of sandboxes.
	Gateway *Gateway
	// URL is the control plane's address in the URLs that it returns; if nil, the address that the client used.
	URL *url.URL
	// Self is what the server says about itself.
	Self client.Server
	// Local says that the server serves only its own user, who is the operator.
	Local bool
	// NoNetwork says that sandboxes have no network.
	NoNetwork bool
	Log       *slog.Logger

	begin  sync.Once
	secret string          // for signatures of uploads
	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
}

// start sets the unexported fields; it may be called again.
func (c *Control) start() {
	c.begin.Do(func() {
		c.secret = rand.Text()
		c.ctx, c.cancel = context.WithCancelCause(context.Background())
	})
}

const (
	maxBody  = 4 << 20
	freeBody = 64 << 10    // bytes of a body that are read without asking MayRead
	bodyTime = time.Minute // for the whole body
)

// Routes returns the handlers of a Control, by patterns of http.ServeMux.
func (c *Control) Routes() map[string]http.Handler {
	c.start()
	routes := map[string]http.Handler{}
	for _, table := range []map[string]func(*call) error{c.e2bRoutes(), c.ownRoutes()} {
		for pattern, do := range table {
			routes[pattern] = c.handler(do)
		}
	}
	for _, path := range []string{"/volumes", "/volumes/", "/volumecontent/", "/secrets", "/secrets/", "/access-tokens", "/access-tokens/",
		"/api-keys", "/api-keys/", "/nodes", "/nodes/", "/admin/"} {
		routes[path] = c.handler(func(r *call) error {
			return refusal{http.StatusNotImplemented, "this server has no " + strings.Split(r.URL.Path, "/")[1] +
				" (docs/e2b.md says what it has)"}
		})
	}
	for _, path := range []string{"/sandboxes", "/sandboxes/", "/v1/", "/v2/", "/v3/", "/templates", "/templates/", "/snapshots",
		"/snapshots/", "/teams", "/teams/"} {
		routes[path] = c.handler(func(r *call) error { return refuse(http.StatusNotFound, "there is no %s %.200s", r.Method, r.URL.Path) })
	}
	routes["PUT /templates/{id}/files/{hash}"] = http.HandlerFunc(c.upload) // the signed URL is the proof
	return routes
}

// e2bRoutes are the calls of E2B's API (docs/e2b.md).
func (c *Control) e2bRoutes() map[string]func(*call) error {
	return map[string]func(*call) error{
		"GET /sandboxes":                          c.listRunning,
		"GET /v2/sandboxes":                       c.list,
		"POST /sandboxes":                         func(r *call) error { return c.create(r, oldLife) },
		"POST /v2/sandboxes":                      func(r *call) error { return c.create(r, newLife) },
		"GET /sandboxes/metrics":                  c.allMetrics,
		"GET /sandboxes/{id}":                     c.get,
		"DELETE /sandboxes/{id}":                  c.kill,
		"POST /sandboxes/{id}/pause":              c.pause,
		"POST /sandboxes/{id}/resume":             c.resume,
		"POST /sandboxes/{id}/connect":            c.connectTo,
		"POST /v2/sandboxes/{id}/connect":         c.connectTo,
		"POST /sandboxes/{id}/timeout":            c.setTimeout,
		"POST /sandboxes/{id}/refreshes":          c.refresh,
		"PUT /sandboxes/{id}/network":             c.setNetwork,
		"POST /sandboxes/{id}/fork":               c.fork,
		"POST /sandboxes/{id}/snapshots":          c.snapshot,
		"GET /snapshots":                          c.listSnapshots,
		"GET /sandboxes/{id}/metrics":             c.metrics,
		"GET /sandboxes/{id}/logs":                c.oldLogs,
		"GET /v2/sandboxes/{id}/logs":             c.logs,
		"GET /teams":                              c.teams,
		"GET /teams/{id}/metrics":                 c.teamMetrics,
		"GET /teams/{id}/metrics/max":             c.teamMaximum,
		"GET /templates":                          c.listTemplates,
		"GET /v2/templates":                       c.listTemplates,
		"GET /templates/{id}":                     c.getTemplate,
		"DELETE /templates/{id}":                  c.deleteTemplate,
		"PATCH /templates/{id}":                   c.publish,
		"PATCH /v2/templates/{id}":                c.publish,
		"POST /v2/templates":                      c.newTemplate,
		"POST /v3/templates":                      c.newTemplate,
		"POST /templates":                         c.newOldTemplate,
		"POST /templates/{id}":                    c.newOldTemplate,
		"POST /templates/{id}/builds/{bid}":       c.startOldBuild,
		"GET /templates/{id}/files/{hash}":        c.fileLink,
		"POST /v2/templates/{id}/builds/{bid}":    c.startBuild,
		"GET /templates/{id}/builds/{bid}/status": c.buildStatus,
		"GET /templates/{id}/builds/{bid}/logs":   c.buildLogs,
		"POST /templates/tags":                    c.addTags,
		"DELETE /templates/tags":                  c.removeTags,
		"GET /templates/{id}/{what}":              c.templatePart,
	}
}

// Close ends the streams that do not end by themselves.
func (c *Control) Close() {
	c.start()
	c.cancel(sandbox.ErrClosed)
}

// call is a request of an owner.
type call struct {
	*http.Request
	w       http.ResponseWriter
	owner   string
	whole   io.ReadCloser                                         // its body without a limit
	mayRead func(owner string, size int64) (done func(), ok bool) // may be nil
}

// refusal is an error with its HTTP status.
type refusal struct {
	code    int
	message string
}

// Error implements error.
func (r refusal) Error() string { return r.message }

func refuse(code int, format string, args ...any) error {
	return refusal{code, fmt.Sprintf(format, args...)}
}

// handler authenticates, limits and charges a request before do serves it.
func (c *Control) handler(do func(*call) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set(client.APIHeader, strconv.Itoa(client.API))
		if err := tooOld(r.Header); err != nil {
			c.fail(w, r, err)
			return
		}
		owner, err := c.Owner(r)
		if err != nil {
			w.Header().Set("WWW-Authenticate", "Bearer")
			c.fail(w, r, refusal{http.StatusUnauthorized, err.Error()})
			return
		}
		if c.MayAsk != nil && !c.MayAsk(owner) {
			w.Header().Set("Retry-After", "1")
			c.fail(w, r, refusal{http.StatusTooManyRequests, "you have sent too many requests; wait for a second"})
			return
		}
		release, err := c.charge(r, owner)
		if err != nil {
			c.fail(w, r, err)
			return
		}
		defer release()
		whole := r.Body
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		if err := do(&call{r, w, owner, whole, c.MayRead}); err != nil {
			c.fail(w, r, err)
		}
	})
}

// tooOld refuses clients with an older protocol: a soulbox older than client.Oldest, and E2B's SDKs before version 1.
func tooOld(h http.Header) error {
	if own := h.Get(client.APIHeader); own != "" {
		if v, err := strconv.Atoi(own); err != nil || v < client.Oldest {
			return refuse(http.StatusBadRequest, "this server speaks version %d of the API, and none older than %d: update your soulbox",
				client.API, client.Oldest)
		}
	}
	version := h.Get("Package_version")
	if product, v, ok := strings.Cut(h.Get("User-Agent"), "/"); ok && version == "" && strings.HasPrefix(product, "e2b-") {
		version = v
	}
	if major, _, _ := strings.Cut(version, "."); major == "0" &&
		(h.Get("Publisher") == "e2b" || strings.HasPrefix(h.Get("User-Agent"), "e2b-")) {
		return refuse(http.StatusBadRequest, "the version %.20s of the SDK is too old for this server; install 1.0 or a later one", version)
	}
	return nil
}

// statuses maps the domain's errors to HTTP statuses; the first match counts.
var statuses = []struct {
	err  error
	code int
}{
	{sandbox.ErrNotFound, http.StatusNotFound},
	{sandbox.ErrNoTemplate, http.StatusNotFound},
	{sandbox.ErrNoSnapshot, http.StatusNotFound},
	{sandbox.ErrNotExposed, http.StatusNotFound},
	{template.ErrNoBuild, http.StatusNotFound},
	{sandbox.ErrTooMany, http.StatusTooManyRequests},
	{sandbox.ErrNoRoom, http.StatusServiceUnavailable},
	{access.ErrFull, http.StatusServiceUnavailable},
	{sandbox.ErrNoDisk, http.StatusInsufficientStorage},
	{sandbox.ErrClosed, http.StatusServiceUnavailable},
	{sandbox.ErrBusySnapshot, http.StatusConflict},
	{sandbox.ErrSnapshot, http.StatusConflict},
	{sandbox.ErrState, http.StatusConflict},
	{sandbox.ErrUnfit, http.StatusConflict},
	{sandbox.ErrInvalid, http.StatusBadRequest},
	{context.DeadlineExceeded, http.StatusGatewayTimeout},
}

// fail answers with an error in E2B's form.
func (c *Control) fail(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the client is gone
	}
	told := tell(err)
	if told.Code == http.StatusInternalServerError {
		c.Log.Error("API", "method", r.Method, "path", r.URL.Path, "error", err)
	}
	if strings.Contains(r.URL.Path, "/envd/") && envd.Refuse(w, r, told.Code, told.Message) {
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	w.WriteHeader(told.Code)
	_ = json.NewEncoder(w).Encode(told) // the client may be gone
}

// told is an error in E2B's form.
type told struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

func tell(err error) told {
	out := told{http.StatusInternalServerError, agent.Inert([]byte(err.Error()))}
	var known refusal
	if errors.As(err, &known) {
		out.Code = known.code
		return out
	}
	for _, s := range statuses {
		if errors.Is(err, s.err) {
			out.Code = s.code
			break
		}
	}
	return out
}

// answer answers with JSON.
func (r *call) answer(code int, body any) error {
	r.w.Header().Set("Content-Type", "application/json")
	r.w.WriteHeader(code)
	_ = json.NewEncoder(r.w).Encode(body) // the client may be gone
	return nil
}

// done answers without a body. Content-Length must say so, except for 204.
func (r *call) done(code int) error {
	if code != http.StatusNoContent {
		r.w.Header().Set("Content-Length", "0")
	}
	r.w.WriteHeader(code)
	return nil
}

// body reads the JSON of a request. An empty body is an object without fields.
func (r *call) body(to any) error {
	text, err := r.read()
	var large *http.MaxBytesError
	var known refusal
	if errors.As(err, &known) {
		return err
	}
	if errors.As(err, &large) {
		return refuse(http.StatusRequestEntityTooLarge, "the body has more than %d bytes", maxBody)
	}
	if err != nil {
		return refuse(http.StatusBadRequest, "the body cannot be read: %v", err)
	}
	if len(strings.TrimSpace(string(text))) == 0 {
		return nil
	}
	if err := wholenum.Unmarshal(text, to); err != nil {
		return refuse(http.StatusBadRequest, "the body is not the expected JSON object: %v", err)
	}
	return nil
}

// read reads a whole body. For a large one it reserves room until the body is read.
func (r *call) read() ([]byte, error) {
	idle := envd.NewIdle(r.w, bodyTime)
	idle.Moves()
	defer idle.Over()
	text, err := io.ReadAll(io.LimitReader(r.Body, freeBody))
	if err != nil || len(text) < freeBody {
		return text, err
	}
	if r.mayRead != nil {
		done, ok := r.mayRead(r.owner, r.ContentLength)
		if !ok {
			r.w.Header().Set("Retry-After", "1")
			return nil, refusal{http.StatusTooManyRequests, "you are sending too much at once; wait for a second"}
		}
		defer done()
	}
	rest, err := io.ReadAll(r.Body)
	return append(text, rest...), err
}

// number reads a number of the query.
func (r *call) number(name string, least, most, without int64) (int64, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return without, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < least || n > most {
		return 0, refuse(http.StatusBadRequest, "%s is a number from %d to %d, not %.40q", name, least, most, text)
	}
	return n, nil
}

// page sorts a list and cuts it to the requested page. The name of the list is in its cursors.
func page[T any](r *call, list string, all []T, falling bool, key func(T) string) ([]T, error) {
	limit, err := r.number("limit", 1, maxPage, maxPage)
	if err != nil {
		return nil, err
	}
	all, next, err := cursor.Page(list, r.URL.Query().Get("nextToken"), all, int(limit), falling, key)
	if errors.Is(err, cursor.ErrInvalid) {
		return nil, refuse(http.StatusBadRequest, "nextToken: %v", err)
	}
	if err != nil {
		return nil, err
	}
	if next != "" {
		r.w.Header().Set("X-Next-Token", next)
	}
	return all, nil
}

const maxPage = 100

// isTeam refuses the id of a team that is not the caller's; an empty id means the caller's own.
func (r *call) isTeam(id string) error {
	if own := access.Name(r.owner); id != "" && id != own {
		return refuse(http.StatusForbidden, "the team %.60q is not that of your key, which is %q", id, own)
	}
	return nil
}

// teams answers with the team of a key, for E2B's command line.
func (c *Control) teams(r *call) error {
	name := access.Name(r.owner)
	return r.answer(http.StatusOK, []map[string]any{{"teamID": name, "name": name, "apiKey": "", "isDefault": true}})
}
