package access

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
)

// Provider checks tokens of an OpenID provider. It fetches the provider's keys when the first token comes. It is safe for concurrent use.
type Provider struct {
	Issuer   string // its URL
	Audience string // the audience that its tokens must have

	mu       sync.Mutex
	verifier *oidc.IDTokenVerifier
}

// providerOwner begins the names of owners from the provider; no owner of a key has a colon.
const providerOwner = "oidc:"

// providerTime bounds a request to the provider.
const providerTime = 10 * time.Second

// owner returns the subject of a token, with a prefix that no key's owner has, and when the token expires.
func (p *Provider) owner(ctx context.Context, token string) (string, time.Time, error) {
	v, err := p.get()
	if err != nil {
		return "", time.Time{}, fmt.Errorf("ask the OpenID provider: %w", err)
	}
	t, err := v.Verify(ctx, token)
	if err != nil {
		return "", time.Time{}, errors.New("the token is not valid") // the cause could repeat parts of the token in the log
	}
	if t.Subject == "" {
		return "", time.Time{}, errors.New("the token names no subject")
	}
	return providerOwner + t.Subject, t.Expiry, nil
}

func (p *Provider) get() (*oidc.IDTokenVerifier, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.verifier == nil {
		// The verifier fetches the keys again with this context whenever they change, so the context must not end.
		ctx := oidc.ClientContext(context.Background(), &http.Client{Timeout: providerTime})
		provider, err := oidc.NewProvider(ctx, p.Issuer)
		if err != nil {
			return nil, err
		}
		p.verifier = provider.VerifierContext(ctx, &oidc.Config{ClientID: p.Audience})
	}
	return p.verifier, nil
}
