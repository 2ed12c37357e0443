// Package loopback reads the hosts of requests and addresses, tells which are this machine's own, and dials those without DNS and proxies.
// It knows nothing of what is served there.
package loopback

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
)

// Is reports whether a host is this machine, whatever DNS says: localhost and all names below it are (RFC 6761, 6.3), which many
// resolvers do not know.
func Is(host string) bool {
	if localName(host) {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

// IsItself is Is for servers that trust what they call this machine: localhost and the addresses of loopback, but no name below localhost,
// since a sandbox may have such a name, with pages of its own. The host is one that Bare returns.
func IsItself(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

// Bare is the host of a request without its port, brackets, trailing dot and case, as names are compared.
func Bare(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	return strings.TrimSuffix(strings.ToLower(strings.Trim(host, "[]")), ".")
}

func localName(host string) bool {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	return host == "localhost" || strings.HasSuffix(host, ".localhost")
}

// Dial returns a function that dials as the dialer does, but resolves this machine's names without DNS.
func Dial(d *net.Dialer) func(ctx context.Context, network, addr string) (net.Conn, error) {
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

// Proxy returns the proxy that the environment names; there is none for this machine.
func Proxy(r *http.Request) (*url.URL, error) {
	if Is(r.URL.Hostname()) {
		return nil, nil
	}
	return http.ProxyFromEnvironment(r)
}
