package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
)

// Loopback says whether a host is this machine, whatever DNS says: localhost and all names below it are (RFC 6761, 6.3), which many
// resolvers do not know.
func Loopback(host string) bool {
	if localName(host) {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

func localName(host string) bool {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	return host == "localhost" || strings.HasSuffix(host, ".localhost")
}

// dialLocal dials as the dialer does, but asks nobody where this machine is.
func dialLocal(d *net.Dialer) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		host, port, err := net.SplitHostPort(addr)
		if err != nil || !localName(host) {
			return d.DialContext(ctx, network, addr)
		}
		var errs error
		for _, ip := range []string{"127.0.0.1", "::1"} {
			conn, err := d.DialContext(ctx, network, net.JoinHostPort(ip, port))
			if err == nil || ctx.Err() != nil {
				return conn, err
			}
			errs = errors.Join(errs, err)
		}
		return nil, oneLine{errs}
	}
}

// oneLine is several errors in one line.
type oneLine struct{ error }

// Error implements error.
func (e oneLine) Error() string { return strings.ReplaceAll(e.error.Error(), "\n", "; ") }

// Unwrap implements what errors.Is needs.
func (e oneLine) Unwrap() error { return e.error }

// proxyOf is the proxy that the environment wants, which is not asked for this machine.
func proxyOf(r *http.Request) (*url.URL, error) {
	if Loopback(r.URL.Hostname()) {
		return nil, nil
	}
	return http.ProxyFromEnvironment(r)
}

// untrusted says what to do about a certificate of an authority that this machine does not know.
func untrusted(err error) error {
	if errors.As(err, new(*tls.CertificateVerificationError)) {
		return fmt.Errorf("%w; if the server is yours, name the file of its authority's certificate by SSL_CERT_FILE", err)
	}
	return err
}
