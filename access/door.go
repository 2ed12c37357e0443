package access

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Door decides whose a request is: the one place that knows keys and the OpenID provider, for MCP, the HTTP API and the gateway alike. It is
// safe for concurrent use.
type Door struct {
	Keys     *Keys
	Provider *Provider // nil is none
	// Closed says that a token is needed from the start. Else one is needed as soon as there is a key, and from then on for good.
	Closed bool
	// Admitted is told of each request that is let in: that of ctx, and for how long.
	Admitted func(ctx context.Context, g Grant)
	Log      *slog.Logger

	closed atomic.Bool
}

// Grant is for how long a request is let in. The zero Grant has no end.
type Grant struct {
	Valid   context.Context // ends when its key is not valid any more; nil is no key
	Expires time.Time       // of a provider's token, whose client has others later; zero is no such token
}

// keyPrefix begins all keys; other tokens are the provider's.
const keyPrefix = "e2b_"

// Required reports whether a request needs a token. Requests without one are the user's of this machine otherwise.
func (d *Door) Required() bool {
	if d.closed.Load() {
		return true
	}
	if !d.Closed && d.Provider == nil && !d.Keys.Exist() {
		return false
	}
	if !d.closed.Swap(true) && d.Keys.Exist() {
		d.tellKeys()
	}
	return true
}

// Authenticate finds the owner of a token: a key, or a token of the provider.
func (d *Door) Authenticate(ctx context.Context, token string) (owner string, err error) {
	if d.Provider != nil && !strings.HasPrefix(token, keyPrefix) {
		owner, expires, err := d.Provider.owner(ctx, token)
		if err == nil {
			d.Admitted(ctx, Grant{Expires: expires})
		}
		return owner, err
	}
	owner, valid, err := d.Keys.Admit(token)
	if err == nil {
		d.Admitted(ctx, Grant{Valid: valid})
	}
	return owner, err
}

// Errors of Caller, for who asked.
var (
	ErrNoToken  = errors.New("give a valid key as X-API-Key: KEY; soulbox-mcp key create makes one")
	ErrNotValid = errors.New("the key is not valid, or not any more; soulbox-mcp key create makes one")
)

// Caller finds whose a request of the HTTP API is, by X-API-Key or a bearer token. Where no token is needed none is looked at: E2B's SDKs
// always send a key.
func (d *Door) Caller(r *http.Request) (owner string, err error) {
	if !d.Required() {
		d.Admitted(r.Context(), Grant{})
		return "", nil
	}
	given := r.Header.Values("X-API-Key")
	if token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok && len(given) == 0 {
		given = []string{token}
	}
	if len(given) != 1 || given[0] == "" {
		return "", ErrNoToken
	}
	if owner, err = d.Authenticate(r.Context(), given[0]); err != nil {
		return "", ErrNotValid
	}
	return owner, nil
}

// AdmitOwner lets the tokens of an owner's sandboxes be worth something as long as the owner has a valid key, if keys are needed. This
// machine's user and those whom the provider knows have none.
func (d *Door) AdmitOwner(ctx context.Context, owner string) error {
	if !d.Required() || owner == "" || strings.HasPrefix(owner, providerOwner) {
		d.Admitted(ctx, Grant{})
		return nil
	}
	valid, err := d.Keys.OwnerValid(owner)
	if err == nil {
		d.Admitted(ctx, Grant{Valid: valid})
	}
	return err
}

// Watch ends what keys have let in once they are not valid any more, until the function that it gives is called.
func (d *Door) Watch() (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() { d.Keys.Watch(ctx, d.Log) })
	return func() {
		cancel()
		watching.Wait()
	}
}

// tellKeys says who may use a server that needs keys.
func (d *Door) tellKeys() {
	all, err := d.Keys.List()
	valid := 0
	for _, k := range all {
		if k.Valid(time.Now()) {
			valid++
		}
	}
	switch {
	case err != nil:
		d.Log.Error("keys are needed, and cannot be read: nobody is let in by one", "error", err)
	case valid == 0:
		d.Log.Warn("keys are needed, since there is a file of them, and none is valid: nobody is let in by one; 'soulbox-mcp key create " +
			"--owner NAME' makes one")
	default:
		d.Log.Info("keys are needed", "valid", valid)
	}
}

// BareHost is the host of a request without its port, brackets, trailing dot and case, as names are compared.
func BareHost(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	return strings.TrimSuffix(strings.ToLower(strings.Trim(host, "[]")), ".")
}
