package mcpserver

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// read reads the message of a request.
func (h *HTTP) read(w http.ResponseWriter, r *http.Request, owner string) (m message, body []byte, ok bool) {
	if kind, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";"); !strings.EqualFold(strings.TrimSpace(kind), "application/json") {
		refuse(w, http.StatusUnsupportedMediaType, nil, codeInvalid, "the content type must be application/json")
		return m, nil, false
	}
	if a := r.Header.Get("Accept"); a != "" && !strings.Contains(a, "*/*") && !strings.Contains(a, "application/json") &&
		!strings.Contains(a, "application/*") && !strings.Contains(a, "text/event-stream") {
		refuse(w, http.StatusNotAcceptable, nil, codeInvalid, "accept application/json and text/event-stream")
		return m, nil, false
	}
	done, ok := h.Allowances.MayRead(owner, r.ContentLength)
	if !ok {
		tooMany(w, nil)
		return m, nil, false
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, moving{r.Body, http.NewResponseController(w), time.Now().Add(readTime)}, maxBody))
	done()
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{}) // only a ResponseWriter of a test has no deadline
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		refuse(w, http.StatusRequestEntityTooLarge, nil, codeInvalid,
			fmt.Sprintf("the message is longer than %d bytes; send large content in parts", maxBody))
		return m, nil, false
	}
	if err != nil {
		if r.ProtoMajor == 1 {
			w.Header().Set("Connection", "close")
		}
		refuse(w, http.StatusBadRequest, nil, codeParse, "the message did not arrive whole")
		return m, nil, false
	}
	body = []byte(strings.TrimSpace(string(body)))
	if len(body) == 0 {
		refuse(w, http.StatusBadRequest, nil, codeParse, "the message is empty")
		return m, nil, false
	}
	if m, err = parse(body); err != nil {
		refuseWith(w, http.StatusBadRequest, nil, malformed(body, err))
		return m, nil, false
	}
	return m, body, true
}

// readTime bounds how long a request's body takes to arrive; stallTime bounds how long nothing of it arrives.
const (
	readTime  = time.Minute
	stallTime = 10 * time.Second
)

// moving is a body that must keep arriving.
type moving struct {
	io.ReadCloser
	web *http.ResponseController
	end time.Time
}

// Read implements io.Reader.
func (m moving) Read(p []byte) (int, error) {
	next := time.Now().Add(stallTime)
	if m.end.Before(next) {
		next = m.end
	}
	_ = m.web.SetReadDeadline(next) // as above
	return m.ReadCloser.Read(p)
}
