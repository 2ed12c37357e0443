package api

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// TestStallingSilence: an answer that is silent for longer than a client may stall continues, in HTTP/1.1 and HTTP/2.
func TestStallingSilence(t *testing.T) {
	const limit = 300 * time.Millisecond
	silent := make(chan struct{})
	web := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := stalling{w, limit}
		defer answer.clearDeadline()
		for range 2 {
			if _, err := io.WriteString(answer, "word\n"); err != nil {
				t.Error(err)
			}
			if err := http.NewResponseController(answer).Flush(); err != nil {
				t.Error(err)
			}
			select {
			case <-silent:
			case <-r.Context().Done():
				t.Error("the request ended in the silence")
			case <-time.After(3 * limit):
			}
		}
	}))
	web.EnableHTTP2 = true
	web.StartTLS()
	defer web.Close()
	defer close(silent)
	two := web.Client()
	one := &http.Client{Transport: &http.Transport{TLSClientConfig: two.Transport.(*http.Transport).TLSClientConfig.Clone()}}
	one.Transport.(*http.Transport).TLSClientConfig.NextProtos = nil
	for name, client := range map[string]*http.Client{"HTTP/1.1": one, "HTTP/2.0": two} {
		res, err := client.Get(web.URL)
		if err != nil {
			t.Fatal(name, err)
		}
		body, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil || string(body) != "word\nword\n" || res.Proto != name {
			t.Errorf("%s: %q of %s, %v", name, body, res.Proto, err)
		}
	}
}
