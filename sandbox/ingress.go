package sandbox

import (
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
)

// Ingress says how a gateway reaches the ports that are not exposed, and how it speaks to the servers on them.
type Ingress struct {
	// Open is OpenPublic for everybody, or OpenToken for clients that show the traffic token; "" means that they are not reachable.
	Open string `json:"open,omitempty"`
	// Host is the Host header that servers get, with ${PORT} for the port; "" means the gateway's.
	Host string `json:"host,omitempty"`
	TLS  []int  `json:"tls,omitempty"` // ports whose servers speak TLS
	// Insecure lets everybody who knows the sandbox's ID act in it without the access token, on servers that allow that.
	Insecure bool `json:"insecure,omitempty"`
}

// Values of Ingress.Open.
const (
	OpenPublic = "public"
	OpenToken  = "token"
)

const maxTLSPorts = 64

func (i Ingress) check() error {
	switch {
	case i.Open != "" && i.Open != OpenPublic && i.Open != OpenToken:
		return fmt.Errorf("ports are open to %q, %q or nobody, not %q: %w", OpenPublic, OpenToken, i.Open, ErrInvalid)
	case len(i.Host) > 253 || strings.ContainsAny(i.Host, " \t\r\n\x00/"):
		return fmt.Errorf("%q is no name of a host, such as localhost:${PORT}: %w", i.Host, ErrInvalid)
	case len(i.TLS) > maxTLSPorts || slices.ContainsFunc(i.TLS, func(port int) bool { return port < 1 || port > 65535 }):
		return fmt.Errorf("at most %d ports with TLS are possible, from 1 to 65535: %w", maxTLSPorts, ErrInvalid)
	}
	return nil
}

// giveSecrets makes the secrets that a sandbox does not have yet, and reports whether there were any.
func (r *record) giveSecrets() (some bool) {
	for _, secret := range []*string{&r.Traffic, &r.Access} {
		if *secret == "" {
			*secret, some = rand.Text(), true
		}
	}
	return some
}

// AccessToken is what clients show that act in the sandbox without its owner's key. It is a secret.
func (s *Sandbox) AccessToken() string {
	return s.current().Access
}
