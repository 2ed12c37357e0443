package client

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// TestLocalhost: a name below localhost is this machine, though no resolver knows it, and no proxy is asked for it; of a certificate that
// nobody vouches for it is said what to do.
func TestLocalhost(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
	answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte(`{"version":"` + r.Host + `"}`)) })
	plain, secure := httptest.NewServer(answer), httptest.NewTLSServer(answer)
	defer plain.Close()
	defer secure.Close()
	port := func(at string) string { u, _ := url.Parse(at); return u.Port() }
	for _, host := range []string{"localhost", "soulbox.localhost", "8000-sb1.Soulbox.LocalHost"} {
		c, err := New(Options{URL: "http://" + host + ":" + port(plain.URL)})
		if err != nil {
			t.Fatal(err)
		}
		if s, err := c.Server(t.Context()); err != nil || s.Version != host+":"+port(plain.URL) {
			t.Errorf("%s: %+v %v", host, s, err)
		}
		c.Close()
	}
	c, err := New(Options{URL: "https://soulbox.localhost:" + port(secure.URL)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = c.Server(t.Context()); err == nil || !strings.Contains(err.Error(), "SSL_CERT_FILE") || !Unreachable(err) {
		t.Error(err)
	}
	secure.Close()
	if _, err = c.Server(t.Context()); err == nil || !strings.Contains(err.Error(), "127.0.0.1") || strings.Contains(err.Error(), "\n") {
		t.Error(err)
	}
}
