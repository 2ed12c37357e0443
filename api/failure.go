package api

import (
	"encoding/json"
	"fmt"
	"html"
	"net/http"
)

// failure is an error of the gateway itself, in the form that E2B's clients know.
type failure struct {
	SandboxID string `json:"sandboxId"`
	Message   string `json:"message"`
	Port      int    `json:"port,omitempty"`
	Code      int    `json:"code"`
}

func notFound(id string) failure {
	return failure{SandboxID: id, Code: http.StatusBadGateway, Message: "The sandbox was not found"}
}

func (f failure) write(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if isBrowser(r) {
		h.Set("Content-Type", "text/html; charset=utf-8")
		w.WriteHeader(f.Code)
		where := ""
		if f.SandboxID != "" {
			where = "<p>Sandbox <code>" + html.EscapeString(f.SandboxID) + "</code>"
			if f.Port != 0 {
				where += fmt.Sprintf(", port <code>%d</code>", f.Port)
			}
			where += "</p>"
		}
		_, _ = fmt.Fprintf(w, "<html><head><title>SoulBox</title></head><body><h1>%d</h1><p>%s</p>%s</body></html>\n", f.Code,
			html.EscapeString(f.Message), where) // the client may be gone
		return
	}
	h.Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(f.Code)
	_ = json.NewEncoder(w).Encode(f) // the client may be gone
}
