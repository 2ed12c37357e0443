package envd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"path"
	"syscall"

	"soulbox.dev/soulbox/agent"
)

// compose joins several files into one and removes them.
func (s *Server) compose(w http.ResponseWriter, r *http.Request) {
	p := scopeOf(r.Context())
	var body struct {
		Sources     []string `json:"source_paths"`
		Destination string   `json:"destination"`
		User        string   `json:"username"`
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxMessage)).Decode(&body); err != nil {
		fail(w, http.StatusBadRequest, "the body is not a JSON object with source_paths and destination: "+err.Error())
		return
	}
	if len(body.Sources) == 0 || len(body.Sources) > maxComposed || body.Destination == "" {
		fail(w, http.StatusBadRequest, fmt.Sprintf("give 1 to %d source_paths, and a destination", maxComposed))
		return
	}
	to, ok := s.resolve(w, r, p, body.Destination, body.User)
	if !ok {
		return
	}
	sources, real := make([]string, len(body.Sources)), map[string]string{}
	for i, name := range body.Sources {
		if sources[i], ok = s.resolve(w, r, p, name, body.User); !ok {
			return
		}
		info, err := p.client.Stat(r.Context(), sources[i])
		if err == nil && info.Type == agent.TypeDir {
			err = syscall.EISDIR
		}
		if err == nil {
			real[sources[i]], err = p.resolveLinks(r.Context(), sources[i])
		}
		if err != nil {
			s.wrong(w, r, sources[i], err)
			return
		}
	}
	all := &oneAfterAnother{ctx: r.Context(), client: p.client, names: sources}
	info, err := p.client.WriteFile(r.Context(), to, all,
		agent.WriteOptions{User: body.User, Attrs: map[string]string{}, AttrsBelow: metadataPrefix})
	all.close()
	if err != nil {
		s.wrong(w, r, cmp.Or(all.failed, to), err)
		return
	}
	made, err := p.resolveLinks(r.Context(), to)
	if err != nil {
		s.wrong(w, r, to, err)
		return
	}
	for _, name := range sources {
		if real[name] == made { // never remove the result, under whatever name it was given
			continue
		}
		if err := p.client.Remove(r.Context(), agent.PathRequest{Path: name}); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.wrong(w, r, name, err)
			return
		}
	}
	answer(w, uploaded{Path: info.Path, Name: path.Base(info.Path), Type: "file"})
}

// resolveLinks returns the path of a file with all links resolved.
func (p *scope) resolveLinks(ctx context.Context, file string) (string, error) {
	info, err := p.client.Lstat(ctx, file)
	if err == nil && (info.Link == nil || info.Link.Real == "") {
		err = &fs.PathError{Op: "resolve", Path: file, Err: fs.ErrNotExist}
	}
	if err != nil {
		return "", err
	}
	return info.Link.Real, nil
}

// oneAfterAnother reads files of a sandbox one after the other; it opens each when the previous one has ended.
type oneAfterAnother struct {
	ctx    context.Context
	client *agent.Client
	names  []string
	body   io.ReadCloser
	failed string // the file that could not be read
}

// Read implements io.Reader.
func (o *oneAfterAnother) Read(p []byte) (int, error) {
	for {
		if o.body == nil {
			if len(o.names) == 0 {
				return 0, io.EOF
			}
			body, _, err := o.client.ReadFile(o.ctx, o.names[0], 0, -1)
			if err != nil {
				o.failed = o.names[0]
				return 0, err
			}
			o.body, o.names = body, o.names[1:]
		}
		n, err := o.body.Read(p)
		if err == io.EOF {
			o.close()
			err = nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (o *oneAfterAnother) close() {
	if o.body != nil {
		_ = o.body.Close() // it was only read
		o.body = nil
	}
}
