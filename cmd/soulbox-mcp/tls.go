package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"

	"soulbox.dev/soulbox/api/envd"
	"soulbox.dev/soulbox/internal/durable"
	"soulbox.dev/soulbox/sandbox"
)

// tlsConfig is what flags say about TLS. The zero value means no TLS.
type tlsConfig struct {
	cert, key string
	email     string // contact address for certificates by ACME
	directory string // URL of the ACME server
}

func (t *tlsConfig) flags(f *flag.FlagSet) {
	f.StringVar(&t.cert, "tls-cert", "", "`file` of a certificate, PEM, for the domain, api. and its wildcard; read again when it changes")
	f.StringVar(&t.key, "tls-key", "", "`file` of its key")
	f.StringVar(&t.email, "acme", "",
		"contact `address` to get certificates by ACME, one for each requested name; port 443 must lead here")
	f.StringVar(&t.directory, "acme-directory", acme.LetsEncryptURL, "`URL` of the ACME server")
}

func (t *tlsConfig) on() bool { return t.cert != "" || t.email != "" }

func (t *tlsConfig) scheme() string {
	if t.on() {
		return "https"
	}
	return "http"
}

func (t *tlsConfig) check(domain, public string) error {
	switch {
	case (t.cert == "") != (t.key == ""):
		return errors.New("--tls-cert and --tls-key go together")
	case t.cert != "" && t.email != "":
		return errors.New("give a certificate, or --acme to get some, not both")
	case t.email != "" && domain == "":
		return errors.New("--acme needs --domain: the certificates are for its names")
	case t.on() && strings.HasPrefix(public, "http://"):
		return errors.New("--public-url is http://, but the server is to speak TLS")
	}
	return nil
}

// config is the server's TLS configuration; nil if it does not use TLS.
func (t *tlsConfig) config(stateDir, domain string, m *sandbox.Manager, log *slog.Logger) (*tls.Config, error) {
	switch {
	case t.cert != "":
		files := &certFiles{cert: t.cert, key: t.key, log: log}
		c, err := files.get(nil)
		if err != nil {
			return nil, err
		}
		if domain != "" && c.Leaf != nil {
			if err := c.Leaf.VerifyHostname("8000-sandbox." + domain); err != nil {
				log.Warn("the certificate is not for the domain: clients will refuse the ports of sandboxes", "domain", domain, "error",
					err)
			}
		}
		return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: files.get}, nil
	case t.email != "":
		all := &names{domain: domain, manager: m}
		manager := &autocert.Manager{Prompt: autocert.AcceptTOS, Cache: autocert.DirCache(filepath.Join(stateDir, "acme")), Email: t.email,
			Client:     &acme.Client{DirectoryURL: t.directory},
			HostPolicy: func(_ context.Context, host string) error { return all.may(host) }}
		c := manager.TLSConfig()
		c.MinVersion = tls.VersionTLS12
		return c, nil
	}
	return nil, nil
}

// namesEach is for how many names of one sandbox certificates are requested.
const namesEach = 8

// names decides which names get certificates: those of the server, and some of each existing sandbox. Anyone may ask for a name, and ACME
// servers limit how many certificates they issue.
type names struct {
	domain  string
	manager *sandbox.Manager

	mu  sync.Mutex
	got map[string][]string // by sandbox
}

// may returns an error if no certificate may be requested for a name.
func (n *names) may(host string) error {
	domain, m := n.domain, n.manager
	host, domain = strings.ToLower(host), strings.ToLower(domain)
	label, below := strings.CutSuffix(host, "."+domain)
	if host == domain || below && (label == "api" || label == "sandbox") {
		return nil
	}
	if parts := strings.SplitN(label, "-", 3); below && len(parts) == 2 {
		port, perr := strconv.Atoi(parts[0])
		sb, err := m.Any(parts[1])
		if err == nil && perr == nil && port > 0 && port < 1<<16 && strconv.Itoa(port) == parts[0] && !sb.Info().State.Ended() {
			_, open := sb.Reachable(port)
			return n.count(sb.ID(), host, open || port == envd.Port)
		}
	}
	return fmt.Errorf("%q is not a name of this server or of a sandbox", host)
}

// count counts a new name of a sandbox, or refuses it.
func (n *names) count(id, host string, open bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if slices.Contains(n.got[id], host) {
		return nil
	}
	if !open || len(n.got[id]) >= namesEach {
		return fmt.Errorf("%q does not lead to an open port, or its sandbox has too many names", host)
	}
	if n.got == nil {
		n.got = map[string][]string{}
	}
	if len(n.got[id]) == 0 { // a new sandbox: forget those that have ended
		maps.DeleteFunc(n.got, func(old string, _ []string) bool {
			sb, err := n.manager.Any(old)
			return err != nil || sb.Info().State.Ended()
		})
	}
	n.got[id] = append(n.got[id], host)
	return nil
}

// certFiles is a certificate and its key in files, which are read again when they change.
type certFiles struct {
	cert, key string
	log       *slog.Logger

	mu    sync.Mutex
	known *tls.Certificate
	at    time.Time // when the files last changed
	next  time.Time // when to check them again
}

const (
	certLook  = 10 * time.Second
	certRetry = time.Minute // after invalid files
)

// get is a tls.Config's GetCertificate. While new files are invalid, the old certificate stays in use.
func (c *certFiles) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if c.known != nil && now.Before(c.next) {
		return c.known, nil
	}
	c.next = now.Add(certLook)
	at, err := c.changed()
	if err == nil && (c.known == nil || !at.Equal(c.at)) {
		var pair tls.Certificate
		if pair, err = tls.LoadX509KeyPair(c.cert, c.key); err == nil {
			c.known, c.at = &pair, at
		}
	}
	if err != nil && c.known != nil {
		c.next = now.Add(certRetry)
		c.log.Error("read certificate again; the old one is served", "file", c.cert, "error", err)
	}
	if c.known != nil {
		return c.known, nil
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("read certificate: %w; the server runs as uid %d: give it the files by 'sudo chown', or make them as that "+
			"user by 'soulbox-mcp cert'", err, os.Geteuid())
	}
	return nil, fmt.Errorf("read certificate: %w", err)
}

// changed is when either file last changed.
func (c *certFiles) changed() (last time.Time, err error) {
	for _, name := range []string{c.cert, c.key} {
		info, err := os.Stat(name)
		if err != nil {
			return last, err
		}
		if info.ModTime().After(last) {
			last = info.ModTime()
		}
	}
	return last, nil
}

// certLife is how long the certificates of 'cert' are valid; clients accept no longer validity.
const certLife = 397 * 24 * time.Hour

// runCert makes a certificate authority, if there is none yet, and a certificate for a domain and all names below it: for development.
func runCert(args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	var domain, dir string
	flags := flag.NewFlagSet("soulbox-mcp cert", flag.ContinueOnError)
	flags.StringVar(&domain, "domain", "soulbox.localhost", "`domain` of the certificate, which is also for all names below it")
	flags.StringVar(&dir, "out", filepath.Join(defaultStateDir(getenv), "tls"), "`directory` for ca.pem, cert.pem and key.pem")
	if err := parseFlags(flags, args, stderr); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	ca, caKey, err := authority(dir)
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	cert := certificate(domain)
	cert.DNSNames = []string{domain, "*." + domain, "localhost"}
	cert.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	cert.KeyUsage, cert.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	body, err := x509.CreateCertificate(rand.Reader, cert, ca, &key.PublicKey, caKey)
	if err != nil {
		return err
	}
	if err := errors.Join(writeKey(filepath.Join(dir, "key.pem"), key),
		writePEM(filepath.Join(dir, "cert.pem"), "CERTIFICATE", body, 0o644)); err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, `made for %[1]s and *.%[1]s, valid until %[2]s:
  soulbox-mcp http --domain %[1]s --tls-cert %[3]s/cert.pem --tls-key %[3]s/key.pem
clients trust it by %[3]s/ca.pem: NODE_EXTRA_CA_CERTS for Node, SSL_CERT_FILE for Python and Go. Keep ca.key to yourself.
%[4]s
`, domain, cert.NotAfter.Format(time.DateOnly), dir, readers(dir, getenv))
	return err
}

// readers says who can read the key of 'cert': only the user who made it, which may not be the user that the server runs as.
func readers(dir string, getenv func(string) string) string {
	who := fmt.Sprintf("uid %d", os.Geteuid())
	if u, err := user.Current(); err == nil {
		who = u.Username
	}
	text := fmt.Sprintf("Only %s can read key.pem, so the server has to run as %s", who, who)
	if to := getenv("SUDO_USER"); os.Geteuid() == 0 && to != "" {
		return fmt.Sprintf("%s; to run it as %s: sudo chown -R %s %s", text, to, to, dir)
	}
	return text + fmt.Sprintf("; to run it as another user, make them as that one, or: sudo chown -R USER %s", dir)
}

func certificate(name string) *x509.Certificate {
	var serial [16]byte
	rand.Read(serial[:])
	return &x509.Certificate{SerialNumber: new(big.Int).SetBytes(serial[:]),
		Subject:   pkix.Name{CommonName: name, Organization: []string{"SoulBox development"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(certLife), BasicConstraintsValid: true}
}

// authority reads the certificate authority of a directory, or makes it.
func authority(dir string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	certFile, keyFile := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "ca.key")
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err == nil {
		ca, err := x509.ParseCertificate(pair.Certificate[0])
		key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
		if err != nil || !ok || time.Until(ca.NotAfter) < certLife {
			return nil, nil, fmt.Errorf("%s was not made by 'cert', or expires soon: remove it and ca.key, or name another --out", certFile)
		}
		return ca, key, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, nil, fmt.Errorf("read the certificate authority: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	ca := certificate("SoulBox development CA")
	ca.IsCA, ca.KeyUsage, ca.NotAfter = true, x509.KeyUsageCertSign, time.Now().Add(10*certLife)
	body, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	if err != nil {
		return nil, nil, err
	}
	if err := errors.Join(writeKey(keyFile, key), writePEM(certFile, "CERTIFICATE", body, 0o644)); err != nil {
		return nil, nil, err
	}
	ca, err = x509.ParseCertificate(body)
	return ca, key, err
}

func writeKey(name string, key *ecdsa.PrivateKey) error {
	body, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(name, "PRIVATE KEY", body, 0o600)
}

func writePEM(name, kind string, body []byte, perm os.FileMode) error {
	return durable.Disk{}.Replace(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: body}), perm)
}
