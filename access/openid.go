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

// Provider checks tokens of an OpenID provider, which is asked for its keys when the first token comes. It is safe for concurrent use.
type Provider struct {
	Issuer   string // its URL
	Audience string // whom its tokens must be made for

	mu       sync.Mutex
	verifier *oidc.IDTokenVerifier
}

// providerOwner begins the names of owners that the provider knows; no owner of a key has a colon.
const providerOwner = "oidc:"

// providerTime bounds what the provider is asked.
const providerTime = 10 * time.Second

// owner is the subject of a token, apart from the owners of keys, and until when it is valid.
func (p *Provider) owner(ctx context.Context, token string) (string, time.Time, error) {
	v, err := p.get()
	if err != nil {
		return "", time.Time{}, fmt.Errorf("ask the OpenID provider: %w", err)
	}
	t, err := v.Verify(ctx, token)
	if err != nil {
		return "", time.Time{}, errors.New("the token is not valid") // what is wrong with it could repeat parts of it in the log
	}
	if t.Subject == "" {
		return "", time.Time{}, errors.New("the token names nobody")
	}
	return providerOwner + t.Subject, t.Expiry, nil
}

func (p *Provider) get() (*oidc.IDTokenVerifier, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.verifier == nil {
		// The keys are fetched again by the provider's own client, whenever they change, so its context must last.
		ctx := oidc.ClientContext(context.Background(), &http.Client{Timeout: providerTime})
		provider, err := oidc.NewProvider(ctx, p.Issuer)
		if err != nil {
			return nil, err
		}
		p.verifier = provider.VerifierContext(ctx, &oidc.Config{ClientID: p.Audience})
	}
	return p.verifier, nil
}
