package sandbox

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
)

// Bind gives a context that also ends with the sandbox, and when this server leaves it to another.
func (s *Sandbox) Bind(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.ctx, func() { cancel(context.Cause(s.ctx)) })
	return ctx, func() {
		stop()
		cancel(nil)
	}
}

// Gone says whether the sandbox has ended, or this server has left it to another.
func (s *Sandbox) Gone() bool { return s.ctx.Err() != nil }

// AddEnv adds to the environment of processes that are started from now on. It wakes no sandbox, and one that boots anew has forgotten it.
func (s *Sandbox) AddEnv(ctx context.Context, env map[string]string) error {
	if err := checkEnv(env); err != nil {
		return fmt.Errorf("update sandbox %s: %w", s.id, err)
	}
	client, err := s.Look("tell")
	if err != nil {
		return err
	}
	config := s.current().configuration()
	config.Env = env
	return client.Configure(ctx, config)
}

// Ingress says how those of its ports are reached through a gateway that nobody has exposed, and how the servers there are spoken to.
type Ingress struct {
	// Open is OpenPublic for everybody, OpenToken for those who show the traffic token; "" is nobody.
	Open string `json:"open,omitempty"`
	// Host is what servers are told as the host that was asked for, with ${PORT} for the port; "" is the gateway's.
	Host string `json:"host,omitempty"`
	TLS  []int  `json:"tls,omitempty"` // ports whose servers speak TLS
	// Insecure says that what is in it is for everybody who knows its id, without the access token, on servers that allow that.
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

// giveSecrets gives a sandbox the secrets that it has not got, and says whether there were any.
func (r *record) giveSecrets() (some bool) {
	for _, secret := range []*string{&r.Traffic, &r.Access} {
		if *secret == "" {
			*secret, some = rand.Text(), true
		}
	}
	return some
}

// AccessToken is what clients show who act in the sandbox without its owner's key. It is a secret.
func (s *Sandbox) AccessToken() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec.Access
}

// Reachable tells whether a port is reached through a gateway, and whether by everybody.
func (s *Sandbox) Reachable(port int) (public, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.ports[port]; e != nil {
		return e.Public, true
	}
	return s.rec.Ingress.Open == OpenPublic, s.rec.Ingress.Open != "" && !s.rec.ended()
}

// gate is what a connection through a gateway to a port lives as long as; nil where there is none. s.mu is held.
func (s *Sandbox) gate(port int) context.Context {
	if e := s.ports[port]; e != nil {
		return e.gate
	}
	if s.rec.Ingress.Open == "" || s.rec.ended() {
		return nil
	}
	return s.ctx
}
