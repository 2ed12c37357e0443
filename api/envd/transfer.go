package envd

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"mime/multipart"
	"net/http"
	"path"
	"strconv"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	"soulbox.dev/soulbox/agent"
)

const (
	maxComposed    = 1000
	maxMetadata    = 4096 // bytes of names and values
	metadataHeader = "X-Metadata-"
)

// uploaded describes a written file to the client.
type uploaded struct {
	Path     string            `json:"path"`
	Name     string            `json:"name"`
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// target returns the file of a request and its user; ok is false if the request has been answered with an error.
func (s *Server) target(w http.ResponseWriter, r *http.Request) (p *scope, file, who string, ok bool) {
	p, who = scopeOf(r.Context()), r.URL.Query().Get("username")
	file, ok = s.resolve(w, r, p, r.URL.Query().Get("path"), who)
	return p, file, who, ok
}

// resolve is absolute, but answers errors in the form of plain HTTP. An empty path stays empty.
func (s *Server) resolve(w http.ResponseWriter, r *http.Request, p *scope, name, who string) (string, bool) {
	if name == "" {
		return "", true
	}
	file, err := p.absolute(r.Context(), name, who)
	switch connect.CodeOf(err) {
	case connect.CodeUnauthenticated:
		fail(w, http.StatusUnauthorized, fmt.Sprintf("error looking up user '%s': user: unknown user %s", who, who))
	case connect.CodeInvalidArgument:
		fail(w, http.StatusBadRequest, err.Error())
	default:
		if err == nil {
			return file, true
		}
		s.refuse(w, r, err)
	}
	return "", false
}

// wrong answers with the error of a file.
func (s *Server) wrong(w http.ResponseWriter, r *http.Request, file string, err error) {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		fail(w, http.StatusNotFound, fmt.Sprintf("path '%s' does not exist", file))
	case errors.Is(err, syscall.EISDIR):
		fail(w, http.StatusBadRequest, fmt.Sprintf("path '%s' is a directory", file))
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		fail(w, http.StatusInsufficientStorage, "not enough disk space available")
	default:
		s.refuse(w, r, err)
	}
}

// download sends a file.
func (s *Server) download(w http.ResponseWriter, r *http.Request) {
	p, file, _, ok := s.target(w, r)
	if !ok {
		return
	}
	if file == "" {
		fail(w, http.StatusBadRequest, "name a file by ?path=")
		return
	}
	zip, acceptable := encoding(r.Header.Values("Accept-Encoding"))
	if !acceptable {
		fail(w, http.StatusNotAcceptable, "no acceptable encoding found, supported: [identity, gzip]")
		return
	}
	body, info, err := p.client.ReadFile(r.Context(), file, 0, -1)
	if err != nil {
		s.wrong(w, r, file, err)
		return
	}
	f := &guestFile{ctx: r.Context(), client: p.client, name: file, size: info.Size, body: body}
	defer f.close()
	h := w.Header()
	h.Set("Content-Disposition", "inline; filename*=UTF-8''"+escape(path.Base(file)))
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Vary", "Accept-Encoding")
	if h.Set("Content-Type", mime.TypeByExtension(path.Ext(file))); h.Get("Content-Type") == "" {
		h.Set("Content-Type", "application/octet-stream")
	}
	switch {
	case zip && r.Header.Get("Range") == "":
		h.Set("Content-Encoding", "gzip")
		h.Set("Last-Modified", info.MTime.UTC().Format(http.TimeFormat))
		out := gzip.NewWriter(p.idle.writer(w))
		_, err = io.Copy(out, f)
		if err == nil {
			err = out.Close()
		}
	case info.Size == 0 && strings.HasPrefix(file, "/proc/"): // its files have no size
		_, err = io.Copy(p.idle.writer(w), f)
	default:
		http.ServeContent(p.idle.writer(w), r, path.Base(file), info.MTime, f)
		err = f.err
	}
	if err != nil { // the answer must not look complete
		panic(http.ErrAbortHandler)
	}
}

// escape encodes a text as a header's parameter (RFC 8187).
func escape(text string) string {
	var b strings.Builder
	for _, c := range []byte(text) {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~", c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// encoding reports whether to send gzip, and whether the client accepts any encoding that there is (RFC 9110, 12.5.3). A client that
// accepts both equally gets the file uncompressed, which is faster on most networks and supports ranges.
func encoding(accept []string) (zip, acceptable bool) {
	weight := map[string]float64{"identity": -1, "gzip": -1, "*": -1}
	for _, one := range strings.Split(strings.Join(accept, ","), ",") {
		name, params, _ := strings.Cut(strings.TrimSpace(one), ";")
		q := 1.0
		if v, ok := strings.CutPrefix(strings.ReplaceAll(strings.TrimSpace(params), " ", ""), "q="); ok {
			if n, err := strconv.ParseFloat(v, 64); err == nil {
				q = n
			}
		}
		weight[strings.ToLower(strings.TrimSpace(name))] = q
	}
	for _, name := range []string{"identity", "gzip"} {
		if weight[name] < 0 && weight["*"] >= 0 {
			weight[name] = weight["*"]
		}
	}
	if weight["identity"] < 0 { // always acceptable unless the client excludes it
		return weight["gzip"] > 0 && len(accept) == 1 && strings.TrimSpace(accept[0]) == "gzip", true
	}
	if weight["gzip"] > weight["identity"] {
		return true, true
	}
	return false, weight["identity"] > 0
}

// guestFile reads a file of a sandbox from any offset.
type guestFile struct {
	ctx    context.Context
	client *agent.Client
	name   string
	size   int64
	at     int64
	body   io.ReadCloser // from at on; nil if not opened
	err    error         // except the end of the file
}

// Seek implements io.Seeker.
func (f *guestFile) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += f.at
	case io.SeekEnd:
		offset += f.size
	}
	if offset < 0 {
		return 0, errors.New("seek before the beginning")
	}
	if offset != f.at {
		f.close()
		f.at = offset
	}
	return offset, nil
}

// Read implements io.Reader. A file that has become shorter is an error, because its length has been announced.
func (f *guestFile) Read(p []byte) (int, error) {
	if f.body == nil {
		if f.body, _, f.err = f.client.ReadFile(f.ctx, f.name, f.at, -1); f.err != nil {
			f.body = nil
			return 0, f.err
		}
	}
	n, err := f.body.Read(p)
	f.at += int64(n)
	if err == io.EOF && f.at < f.size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF {
		f.err = err
	}
	return n, err
}

func (f *guestFile) close() {
	if f.body != nil {
		_ = f.body.Close() // it was only read
		f.body = nil
	}
}

// upload writes files.
func (s *Server) upload(w http.ResponseWriter, r *http.Request) {
	p, file, who, ok := s.target(w, r)
	if !ok {
		return
	}
	metadata, attrs, err := metadataOf(r.Header)
	if err != nil {
		fail(w, http.StatusBadRequest, err.Error())
		return
	}
	body, ok := unzipped(w, r, p.idle.Reader(r.Body))
	if !ok {
		return
	}
	written := []uploaded{}
	put := func(to string, from io.Reader) bool {
		in := &source{r: from}
		info, err := p.client.WriteFile(r.Context(), to, in, agent.WriteOptions{User: who, Attrs: attrs, AttrsBelow: metadataPrefix})
		switch {
		case err == nil:
			written = append(written, uploaded{Path: info.Path, Name: path.Base(info.Path), Type: "file", Metadata: metadata})
			return true
		case in.err != nil && r.Context().Err() == nil && !p.hasEnded(err):
			fail(w, http.StatusBadRequest, "the body broke off: "+in.err.Error())
		case errors.Is(err, fs.ErrNotExist):
			s.refuse(w, r, err)
		default:
			s.wrong(w, r, to, err)
		}
		return false
	}
	kind, params, _ := mime.ParseMediaType(r.Header.Get("Content-Type")) // an unknown type is refused below
	switch kind {
	case "application/octet-stream":
		if file == "" {
			fail(w, http.StatusBadRequest, "name the file by ?path=")
			return
		}
		if !put(file, body) {
			return
		}
	case "multipart/form-data":
		if !s.parts(w, r, p, multipart.NewReader(body, params["boundary"]), file, who, put) {
			return
		}
	default:
		fail(w, http.StatusBadRequest, "send the file as multipart/form-data in the field file, or as application/octet-stream")
		return
	}
	answer(w, written)
}

// unzipped returns the decoded body of a request. It answers a request whose encoding is unknown.
func unzipped(w http.ResponseWriter, r *http.Request, body io.Reader) (io.Reader, bool) {
	switch e := strings.ToLower(r.Header.Get("Content-Encoding")); e {
	case "", "identity":
		return body, true
	case "gzip":
		zipped, err := gzip.NewReader(body)
		if err != nil {
			fail(w, http.StatusBadRequest, "the body is not gzip, as its header says: "+err.Error())
		}
		return zipped, err == nil
	default:
		fail(w, http.StatusUnsupportedMediaType, "the encoding "+strconv.Quote(e)+" is not known; use gzip or none")
		return nil, false
	}
}

// source remembers the error of the client's body.
type source struct {
	r   io.Reader
	err error
}

// Read implements io.Reader.
func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// parts writes each file of a form as it arrives.
func (s *Server) parts(w http.ResponseWriter, r *http.Request, p *scope, form *multipart.Reader, file, who string,
	put func(string, io.Reader) bool) bool {
	for n := 0; ; {
		part, err := form.NextPart()
		if err == io.EOF {
			if n == 0 {
				fail(w, http.StatusBadRequest, "the form has no field file")
			}
			return n > 0
		}
		if err != nil {
			if r.Context().Err() != nil {
				panic(http.ErrAbortHandler)
			}
			fail(w, http.StatusBadRequest, "the form cannot be read: "+err.Error())
			return false
		}
		if part.FormName() != "file" {
			continue
		}
		to := file
		if n++; to == "" {
			// Part.FileName would return only the last element of the path.
			_, params, _ := mime.ParseMediaType(part.Header.Get("Content-Disposition"))
			if params["filename"] == "" {
				fail(w, http.StatusBadRequest, "a file has no name: name it by ?path= or the filename of its part")
				return false
			}
			var ok bool
			if to, ok = s.resolve(w, r, p, params["filename"], who); !ok {
				return false
			}
		} else if n > 1 {
			fail(w, http.StatusBadRequest, "several files cannot go to one path: leave out ?path=")
			return false
		}
		if !put(to, part) {
			return false
		}
	}
}

// metadataOf returns the metadata that a request sets on its files, as clients see it and as attributes. It replaces all earlier metadata
// of a file.
func metadataOf(h http.Header) (metadata, attrs map[string]string, err error) {
	size := 0
	attrs = map[string]string{}
	for name, values := range h {
		key, ok := strings.CutPrefix(name, metadataHeader)
		if !ok {
			continue
		}
		if key = strings.ToLower(key); key == "" || values[0] == "" {
			return nil, nil, fmt.Errorf("metadata %q: neither its name nor its value may be empty", key)
		}
		if metadata == nil {
			metadata = map[string]string{}
		}
		metadata[key], attrs[metadataPrefix+key] = values[0], values[0]
		size += len(key) + len(values[0])
	}
	if size > maxMetadata {
		return nil, nil, fmt.Errorf("the metadata has %d bytes, at most %d are possible", size, maxMetadata)
	}
	return metadata, attrs, nil
}
