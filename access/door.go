package access

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Door decides to which owner a request belongs. It is the one place that knows keys and the OpenID provider, for MCP, the HTTP API and the
// gateway alike. It is safe for concurrent use.
type Door struct {
	Keys     *Keys
	Provider *Provider // nil means none
	// Closed means that a token is always needed. Otherwise one is needed once there is a key, and from then on for good.
	Closed bool
	// Admitted, if not nil, is called for each request that is admitted, with its ctx and for how long it is admitted.
	Admitted func(ctx context.Context, g Grant)
	// NewKey says how to get a key, to clients and in the log; "" says nothing.
	NewKey string
	Log    *slog.Logger

	// Allowances bound what the requests of each owner take, by whatever face they come.
	Allowances

	closed atomic.Bool
}

// Grant says for how long a request is admitted. The zero Grant has no end.
type Grant struct {
	Valid   context.Context // ends when the key is no longer valid; nil if there is no key
	Expires time.Time       // of a provider's token, whose client gets new ones later; zero if there is none
}

// keyPrefix begins all keys; other tokens belong to the provider.
const keyPrefix = "e2b_"

// Required reports whether a request needs a token. If not, a request without one belongs to this machine's user.
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

// Authenticate returns the owner of a token: a key, or a token of the provider.
func (d *Door) Authenticate(ctx context.Context, token string) (owner string, err error) {
	if d.Provider != nil && !strings.HasPrefix(token, keyPrefix) {
		owner, expires, err := d.Provider.owner(ctx, token)
		if err == nil {
			d.admit(ctx, Grant{Expires: expires})
		}
		return owner, err
	}
	owner, valid, err := d.Keys.Admit(token)
	if err == nil {
		d.admit(ctx, Grant{Valid: valid})
	}
	return owner, err
}

// admit tells Admitted of a request that is let in.
func (d *Door) admit(ctx context.Context, g Grant) {
	if d.Admitted != nil {
		d.Admitted(ctx, g)
	}
}

// Errors of Caller, in words for its client.
var (
	ErrNoToken  = errors.New("give a valid key as X-API-Key: KEY")
	ErrNotValid = errors.New("the key is not, or no longer, valid")
)

// advise adds to an error how to get a key.
func (d *Door) advise(err error) error {
	if d.NewKey == "" {
		return err
	}
	return fmt.Errorf("%w; %s", err, d.NewKey)
}

// Caller returns the owner of a request to the HTTP API, by X-API-Key or a bearer token. If no token is needed, it ignores any, because
// E2B's SDKs always send a key.
func (d *Door) Caller(r *http.Request) (owner string, err error) {
	if !d.Required() {
		d.admit(r.Context(), Grant{})
		return "", nil
	}
	given := r.Header.Values("X-API-Key")
	if token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok && len(given) == 0 {
		given = []string{token}
	}
	if len(given) != 1 || given[0] == "" {
		return "", d.advise(ErrNoToken)
	}
	if owner, err = d.Authenticate(r.Context(), given[0]); err != nil {
		return "", d.advise(ErrNotValid)
	}
	return owner, nil
}

// AdmitOwner admits a request that shows a token of one of the owner's sandboxes. If keys are needed, the owner must have a valid one; this
// machine's user and owners from the provider need none.
func (d *Door) AdmitOwner(ctx context.Context, owner string) error {
	if !d.Required() || owner == "" || strings.HasPrefix(owner, providerOwner) {
		d.admit(ctx, Grant{})
		return nil
	}
	valid, err := d.Keys.OwnerValid(owner)
	if err == nil {
		d.admit(ctx, Grant{Valid: valid})
	}
	return err
}

// Watch ends what keys have admitted once they are no longer valid, until end is called.
func (d *Door) Watch() (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() { d.Keys.Watch(ctx, d.Log) })
	return func() {
		cancel()
		watching.Wait()
	}
}

// tellKeys logs that keys are needed, and whether any is valid.
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
		d.Log.Error("keys are needed but cannot be read: no key is accepted", "error", err)
	case valid == 0:
		err := d.advise(errors.New("keys are needed because the file of keys exists, but none is valid, so no key is accepted"))
		d.Log.Warn(err.Error())
	default:
		d.Log.Info("keys are needed", "valid", valid)
	}
}
