package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestInsecureByDefault: sandboxes without a token are possible only on loopback, unless the operator says otherwise.
func TestInsecureByDefault(t *testing.T) {
	for args, want := range map[string]bool{"": true, "--allow-insecure-sandboxes=false": false,
		"--public-url=https://box.example.com":                            false,
		"--public-url=https://box.example.com --allow-insecure-sandboxes": true} {
		c, err := parseHTTP(strings.Fields(args), func(string) string { return "" }, io.Discard)
		if err != nil || c.insecure != want {
			t.Errorf("%q: %v, %v", args, c.insecure, err)
		}
	}
	c := httpConfig{}
	if _, err := parseHTTP(strings.Fields("--listen=0.0.0.0:0 --allow-remote --origin=https://x.example"),
		func(string) string { return "" }, io.Discard); err == nil || c.insecure {
		t.Error("strangers are let in")
	}
}

// makeCert makes a certificate as 'soulbox-mcp cert' does, and returns its directory.
func makeCert(t *testing.T, dir, domain string) string {
	t.Helper()
	if err := runCert([]string{"--domain", domain, "--out", dir}, func(string) string { return "" }, io.Discard, io.Discard); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestCert: clients that trust the authority trust the certificate, for the domain and all names directly below it; a second certificate
// keeps the authority.
func TestCert(t *testing.T) {
	dir := makeCert(t, filepath.Join(t.TempDir(), "tls"), "box.test")
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	files := &certFiles{cert: filepath.Join(dir, "cert.pem"), key: filepath.Join(dir, "key.pem"), log: slog.New(slog.DiscardHandler)}
	first, err := files.get(nil)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(first.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	for name, want := range map[string]bool{"box.test": true, "api.box.test": true, "49983-sb1.box.test": true, "a.b.box.test": false,
		"localhost": true, "127.0.0.1": true, "evil.test": false} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, want := range map[string]os.FileMode{"ca.key": 0o600, "key.pem": 0o600} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != want {
			t.Error(name, info.Mode(), err)
		}
	}
	makeCert(t, dir, "other.test")
	if again, err := os.ReadFile(filepath.Join(dir, "ca.pem")); err != nil || string(again) != string(ca) {
		t.Error("the authority is another one", err)
	}
	// A new certificate is served; broken files are not, and end nothing.
	files.next = time.Time{}
	second, err := files.get(nil)
	if err != nil || slices.Equal(second.Certificate[0], first.Certificate[0]) {
		t.Error("the old certificate is served", err)
	}
	if err := os.WriteFile(files.cert, []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	files.next = time.Time{}
	if third, err := files.get(nil); err != nil || third != second {
		t.Error(err)
	}
	if _, err := (&certFiles{cert: files.cert, key: files.key}).get(nil); err == nil {
		t.Error("a broken certificate is served")
	}
}

// TestCertUnreadable: the server may run as another user than the one who made the certificate; 'cert' and the server say what to do.
func TestCertUnreadable(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tls")
	var out strings.Builder
	if err := runCert([]string{"--out", dir}, func(string) string { return "" }, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "can read key.pem, so the server has to run as") {
		t.Error(out.String())
	}
	files := &certFiles{cert: filepath.Join(dir, "cert.pem"), key: filepath.Join(dir, "key.pem")}
	if os.Geteuid() == 0 {
		return // root can read everything; an ordinary user continues
	}
	if err := os.Chmod(dir, 0); err != nil {
		t.Fatal(err)
	}
	_, err := files.get(nil)
	if cerr := os.Chmod(dir, 0o700); cerr != nil {
		t.Fatal(cerr)
	}
	if err == nil || !strings.Contains(err.Error(), "give it the files by 'sudo chown'") {
		t.Error(err)
	}
}

// TestMayHave: certificates are requested only for names of this server, and of existing sandboxes.
func TestMayHave(t *testing.T) {
	m, err := sandbox.NewManager(sandbox.Options{Dir: t.TempDir(), Runtime: &sandboxtest.Fake{}, Templates: sandboxtest.Templates{}})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	sb, err := m.Create(context.Background(), sandbox.CreateOptions{Ingress: sandbox.Ingress{Open: sandbox.OpenPublic}})
	if err != nil {
		t.Fatal(err)
	}
	all := &names{domain: "Box.test", manager: m}
	for name, want := range map[string]bool{"08000-" + sb.ID() + ".box.test": false, "x-" + sb.ID() + ".box.test": false, "box.test": true,
		"API.box.test": true, "sandbox.box.test": true, "8000-" + sb.ID() + ".box.test": true, "8000-" + sb.ID() + "-x.box.test": false,
		"8000-sbnothere.box.test": false, "x.box.test": false, "evil.test": false, "a.api.box.test": false, sb.ID() + ".box.test": false} {
		if err := all.may(name); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	got := 0
	for port := 1; port < 100; port++ {
		if all.may(fmt.Sprintf("%d-%s.box.test", port, sb.ID())) == nil {
			got++
		}
	}
	if got != namesEach-1 || all.may("8000-"+sb.ID()+".box.test") != nil {
		t.Errorf("%d names of one sandbox", got)
	}
}

// TestTLSFlags: flags that cannot work are refused at once.
func TestTLSFlags(t *testing.T) {
	dir := makeCert(t, t.TempDir(), "box.test")
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for want, flags := range map[string][]string{
		"--tls-cert and --tls-key go together": {"--tls-cert=" + cert},
		"not both":                             {"--tls-cert=" + cert, "--tls-key=" + key, "--acme=a@box.test"},
		"--acme needs --domain":                {"--acme=a@box.test"},
		"is http://":                           {"--tls-cert=" + cert, "--tls-key=" + key, "--public-url=http://box.test"},
	} {
		if _, err := parseHTTP(append(flags, "--state-dir="+t.TempDir()), func(string) string { return "" }, io.Discard); err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v", flags, err)
		}
	}
	if c, err := (&tlsConfig{cert: cert, key: key}).config(t.TempDir(), "box.test", nil, slog.New(slog.DiscardHandler)); err != nil ||
		c.MinVersion != tls.VersionTLS12 {
		t.Error(err)
	}
	if err := runEnvd(t.Context(), []string{"--listen=0.0.0.0:0"}, func(string) string { return "" }, io.Discard, io.Discard); err == nil ||
		!strings.Contains(err.Error(), "not on loopback") {
		t.Error(err)
	}
}
