package resources

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/names"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
)

// maxRead is how many bytes one read returns at most; the rest is read by ranges.
const maxRead = 1 << 20

// Options configures the resources.
type Options struct {
	Manager *sandbox.Manager
	Store   *template.Store
	// NotFound is the error for a URI that names nothing, in the class that the caller of this package expects.
	NotFound error
}

// Catalog provides the resources of a Manager. It is safe for concurrent use.
type Catalog struct{ Options }

// New makes the Catalog of a Manager.
func New(o Options) *Catalog { return &Catalog{o} }

// owner is the owner of a call. A call without an owner finds nothing.
func owner(ctx context.Context) (string, bool) {
	c, ok := server.ClientSessionFromContext(ctx).(interface{ Owner() string })
	if !ok {
		return "", false
	}
	return c.Owner(), true
}

// notFound is the error for everything the caller cannot see, in the same words whether or not it exists for others.
func (s *Catalog) notFound(uri string) error {
	if len(uri) > 200 {
		uri = uri[:200] + "…"
	}
	return fmt.Errorf("%w: %q; resources/list shows the sandboxes there are, and the URI of a directory its files", s.NotFound, uri)
}

// resolve finds the sandbox of a URI.
func (s *Catalog) resolve(ctx context.Context, uri string) (parsedURI, *sandbox.Sandbox, error) {
	n, ok := parse(uri)
	who, known := owner(ctx)
	if !ok || !known {
		return n, nil, s.notFound(uri)
	}
	if n.kind == kindTemplate {
		return n, nil, nil
	}
	sb, err := s.Manager.Get(who, n.name)
	if err != nil {
		return n, nil, s.notFound(uri)
	}
	return n, sb, nil
}

// Templates are the URI templates of all resources.
func (s *Catalog) Templates() []mcp.ResourceTemplate {
	var all []mcp.ResourceTemplate
	for _, t := range []struct{ uri, name, description, mime string }{
		{"sandbox://{id}", "sandbox", "State, limits and life time of a sandbox.", "application/json"},
		{"sandbox://{id}/files/{+path}", "file",
			"A file of a sandbox, or the list of a directory. Add ?offset=N&limit=M for a range in bytes.", ""},
		{"sandbox://{id}/processes/{process_id}/output", "output",
			"What a process has written. Add ?offset=N&limit=M for a range in bytes.", "text/plain"},
		{"sandbox://{id}/logs", "logs", "What has happened to a sandbox, as JSON lines. Add ?offset=N for the entries after that seq.",
			"application/jsonl"},
		{"sandbox://{id}/metrics", "metrics", "What a sandbox uses now, has used, and its samples of the last hour.", "application/json"},
		{"template://{name}", "template", "A template of sandboxes.", "application/json"},
		{"template://{name}/builds/{build_id}/log", "build log", "The log of a build of a template, as JSON lines.", "application/jsonl"},
	} {
		all = append(all, mcp.NewResourceTemplate(t.uri, t.name, mcp.WithTemplateDescription(t.description),
			mcp.WithTemplateMIMEType(t.mime)))
	}
	return all
}

// unreadable is an error for what exists but cannot be read: the request is at fault, not the server.
type unreadable struct{ error }

// ProtocolError says that the request was wrong.
func (e unreadable) ProtocolError() (code int, message string) {
	return mcp.INVALID_PARAMS, "it cannot be read: " + e.Error() + "; exec can look at it"
}

// Read reads a resource.
func (s *Catalog) Read(ctx context.Context, uri string) ([]mcp.ResourceContents, error) {
	contents, err := s.read(ctx, uri)
	if err != nil && ctx.Err() == nil && !errors.Is(err, agent.ErrLost) && !errors.Is(err, s.NotFound) {
		err = unreadable{err}
	}
	return contents, err
}

func (s *Catalog) read(ctx context.Context, uri string) ([]mcp.ResourceContents, error) {
	n, sb, err := s.resolve(ctx, uri)
	if err != nil {
		return nil, err
	}
	switch n.kind {
	case kindTemplate:
		return s.template(ctx, uri, n)
	case kindSandbox:
		return asJSON(uri, sb.Info().Describe())
	case kindLogs:
		return s.logs(ctx, sb, uri, n)
	case kindMetrics:
		return metrics(ctx, sb, uri)
	}
	client, err := sb.Agent(ctx, "read")
	if err != nil {
		return nil, err
	}
	if n.kind == kindOutput {
		return s.output(ctx, client, uri, n)
	}
	return s.file(ctx, client, uri, n)
}

// logsRead is how many entries one read returns at most.
const logsRead = 1000

// logs returns entries of a log as JSON lines: the last ones, or those after the offset, which counts entries.
func (s *Catalog) logs(ctx context.Context, sb *sandbox.Sandbox, uri string, n parsedURI) ([]mcp.ResourceContents, error) {
	sb.Refresh(ctx)
	page, err := sb.Logs(sandbox.LogQuery{After: n.offset, Limit: logsRead})
	if err != nil {
		return nil, err
	}
	var b strings.Builder
	for _, e := range page.Entries {
		line, err := json.Marshal(e)
		if err != nil {
			return nil, err
		}
		b.Write(append(line, '\n'))
	}
	meta := map[string]any{"last": page.Last}
	if page.More && n.offset > 0 {
		meta["next"] = part(uri, page.Last)
	}
	return asText(uri, "application/jsonl", b.String(), meta), nil
}

// metrics returns what a sandbox uses now, if it runs, what it has used in its life, and its samples of the last hour.
func metrics(ctx context.Context, sb *sandbox.Sandbox, uri string) ([]mcp.ResourceContents, error) {
	d := map[string]any{"time": time.Now().UTC().Format(time.RFC3339Nano)}
	if sb.Info().State == sandbox.Running {
		inside, outside, err := sb.Usage(ctx)
		if err != nil {
			return nil, err
		}
		d["now"] = map[string]any{
			"memory_bytes": inside.Memory, "host_memory_bytes": outside.Memory, "disk_used_bytes": inside.DiskUsed,
			"cpu_ms": inside.CPUMS, "processes": inside.Processes, "oom_kills": inside.OOMKills,
		}
	}
	samples, err := sb.Samples(time.Now().Add(-time.Hour), time.Time{})
	if err != nil {
		return nil, err
	}
	d["totals"], d["samples"] = sb.Info().Totals, samples
	return asJSON(uri, d)
}

func asText(uri, mimeType, text string, meta map[string]any) []mcp.ResourceContents {
	return []mcp.ResourceContents{mcp.TextResourceContents{URI: uri, MIMEType: mimeType, Text: text, Meta: meta}}
}

func asJSON(uri string, v any) ([]mcp.ResourceContents, error) {
	body, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return nil, err
	}
	return asText(uri, "application/json", string(body), nil), nil
}

// template returns a template, or the log of one of its builds.
func (s *Catalog) template(ctx context.Context, uri string, n parsedURI) ([]mcp.ResourceContents, error) {
	who, _ := owner(ctx) // resolve has checked that there is one
	if n.build != "" {
		log, err := s.Store.BuildLog(who, n.build)
		if errors.Is(err, template.ErrNoBuild) {
			return nil, s.notFound(uri)
		}
		if err != nil {
			return nil, err
		}
		from := min(n.offset, int64(len(log)))
		part := log[from:min(from+n.readLimit(), int64(len(log)))]
		return asText(uri, "application/jsonl", string(part), rest(uri, int64(len(log)), from+int64(len(part)))), nil
	}
	if n.name == template.HostName {
		return asJSON(uri, map[string]any{"name": n.name})
	}
	m, err := s.Store.Get(who, n.name)
	if errors.Is(err, sandbox.ErrNoTemplate) {
		return nil, s.notFound(uri)
	}
	if err != nil {
		return nil, err
	}
	m.Original = nil // bytes for registries
	return asJSON(uri, m)
}

// templates returns the names of the templates that an owner sees.
func (s *Catalog) templates(who string) ([]string, error) {
	all, err := s.Store.List(who)
	names := []string{template.HostName}
	for _, m := range all {
		names = append(names, m.Name)
	}
	return names, err
}

// missing turns the error for a missing file or process into the error for a missing resource.
func (s *Catalog) missing(uri string, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, agent.ErrNoProcess) || errors.Is(err, agent.ErrInvalid) {
		return s.notFound(uri)
	}
	return err
}

// readLimit is how much of a range one read returns.
func (n parsedURI) readLimit() int64 {
	if n.limit > 0 {
		return min(n.limit, maxRead)
	}
	return maxRead
}

// rest is the metadata that says where the next read continues.
func rest(uri string, size, next int64) map[string]any {
	meta := map[string]any{"size": size}
	if next < size {
		meta["next"] = part(uri, next)
	}
	return meta
}

func (s *Catalog) file(ctx context.Context, client *agent.Client, uri string, n parsedURI) ([]mcp.ResourceContents, error) {
	info, err := client.Stat(ctx, n.path)
	if err != nil {
		return nil, s.missing(uri, err)
	}
	if info.Type == agent.TypeDir {
		return s.directory(ctx, client, uri, n)
	}
	r, info, err := client.ReadFile(ctx, n.path, n.offset, n.readLimit())
	if err != nil {
		return nil, s.missing(uri, err)
	}
	defer r.Close()
	body, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	next := n.offset + int64(len(body))
	kind := mimeType(n.path, body)
	if next < info.Size { // a character that the range cuts in two is left for the next read
		if whole := agent.Whole(body); isText(whole) && len(whole) > 0 {
			next -= int64(len(body) - len(whole))
			body = whole
		}
	}
	meta := rest(uri, info.Size, next)
	if isText(body) {
		return asText(uri, kind, string(body), meta), nil
	}
	return []mcp.ResourceContents{mcp.BlobResourceContents{URI: uri, MIMEType: kind, Blob: base64.StdEncoding.EncodeToString(body),
		Meta: meta}}, nil
}

// isText reports whether p can be shown as it is: valid UTF-8 without terminal escapes.
func isText(p []byte) bool {
	return utf8.Valid(p) && bytes.IndexFunc(p, func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' && r != '\r' }) < 0
}

// mimeType goes by the name if its extension is known, else by the content.
func mimeType(name string, body []byte) string {
	if t := mime.TypeByExtension(path.Ext(name)); t != "" {
		return t
	}
	return http.DetectContentType(body)
}

// directory lists a directory, one line per entry.
func (s *Catalog) directory(ctx context.Context, client *agent.Client, uri string, n parsedURI) ([]mcp.ResourceContents, error) {
	list, err := client.Dir(ctx, agent.DirRequest{Path: n.path, Depth: 1, Limit: 10_000})
	if err != nil {
		return nil, s.missing(uri, err)
	}
	var b strings.Builder
	for _, e := range list.Entries {
		entry := e.Path
		if e.Type == agent.TypeDir {
			entry += "/"
		}
		fmt.Fprintf(&b, "%s\t%d\t%s\n", names.Show(entry), e.Size, e.MTime.UTC().Format(time.RFC3339))
	}
	if list.More {
		b.WriteString("[there are more]\n")
	}
	return asText(uri, "text/plain", b.String(), nil), nil
}

// output reads a range of what a process has written, with terminal escapes made inert. A character that the range cuts in two, or that the
// process has not finished writing, is left for the next read.
func (s *Catalog) output(ctx context.Context, client *agent.Client, uri string, n parsedURI) ([]mcp.ResourceContents, error) {
	var body []byte
	var p agent.Process
	first, over := int64(-1), false // over: the bytes that follow body are no longer kept
	err := client.Output(ctx, n.process, n.offset, false, func(f agent.OutputFrame) error {
		if f.End != nil {
			p = *f.End
			return nil
		}
		if first < 0 {
			first = f.Offset
		}
		if over = f.Offset > first+int64(len(body)); over {
			return errEnough
		}
		body = append(body, f.Data[:min(int64(len(f.Data)), n.readLimit()-int64(len(body)))]...)
		if int64(len(body)) >= n.readLimit() {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		snap, werr := client.Wait(ctx, agent.WaitRequest{Process: n.process})
		p, err = snap.Process, werr
	}
	if err != nil {
		return nil, s.missing(uri, err)
	}
	first = max(first, n.offset)
	ended := p.State == agent.StateExited && first+int64(len(body)) >= p.Output
	if whole := agent.Whole(body); !over && !ended && (len(whole) > 0 || int64(len(body)) < n.readLimit()) {
		body = whole
	}
	meta := rest(uri, p.Output, first+int64(len(body)))
	if first > n.offset {
		meta["dropped"] = first - n.offset
	}
	return asText(uri, "text/plain", agent.Inert(body), meta), nil
}

var errEnough = errors.New("enough")
