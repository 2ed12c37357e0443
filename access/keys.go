package access

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"soulbox.dev/soulbox/internal/durable"
)

// Keys are the API keys of a state directory, in its file "keys". They are stored hashed, so that reading the file is not enough to use
// them. Any number of processes may use the file at once: each sees the others' changes at its next look. Keys is safe for concurrent use.
type Keys struct {
	Dir  string
	Disk durable.Disk // changes the file; its Fault is for tests

	mu     sync.Mutex
	seen   os.FileInfo
	known  []Key
	lives  map[string]life // of keys that were used, by hash
	owners map[string]life // of owners with a valid key
}

// life ends when a key, or an owner's last key, is no longer valid.
type life struct {
	ctx context.Context
	end context.CancelCauseFunc
}

// Key is an API key without its secret.
type Key struct {
	ID      string    `json:"id"`
	Owner   string    `json:"owner"`
	Hash    string    `json:"sha256"` // of the secret: 160 random bits, which need no slow hash
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires,omitzero"`
	Revoked time.Time `json:"revoked,omitzero"`
}

// Valid reports whether the key is valid at a time.
func (k Key) Valid(at time.Time) bool {
	return k.Revoked.IsZero() && (k.Expires.IsZero() || at.Before(k.Expires))
}

// ErrKey means that a key is not, or no longer, valid. It tells neither which key nor why.
var ErrKey = errors.New("the key is not valid")

// ErrInvalid means that an argument is not allowed.
var ErrInvalid = errors.New("invalid")

// ErrNoKey means that no key has this ID.
var ErrNoKey = errors.New("there is no such key")

var (
	keyPattern   = regexp.MustCompile(`^e2b_[0-9a-f]{40}$`)
	ownerPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$`)
)

// Create makes a key for an owner, valid for a time (zero: without end), and returns its secret, which is stored nowhere.
func (k *Keys) Create(owner string, valid time.Duration) (secret string, key Key, err error) {
	if !ownerPattern.MatchString(owner) || valid < 0 {
		return "", Key{},
			fmt.Errorf("create key: an owner is 1 to 64 letters, digits or . _ @ - and a key is valid for a positive time: %w", ErrInvalid)
	}
	var random [24]byte
	rand.Read(random[:])
	secret = "e2b_" + hex.EncodeToString(random[:20])
	key = Key{ID: hex.EncodeToString(random[20:]), Owner: owner, Hash: hash(secret), Created: time.Now().UTC()}
	if valid > 0 {
		key.Expires = key.Created.Add(valid)
	}
	return secret, key, k.change(func(all []Key) ([]Key, error) { return append(all, key), nil })
}

// Revoke ends a key. It stays in the list, so that a server whose keys are all revoked is not mistaken for one that wants none.
func (k *Keys) Revoke(id string) error {
	return k.change(func(all []Key) ([]Key, error) {
		for i := range all {
			if all[i].ID == id {
				if all[i].Revoked.IsZero() {
					all[i].Revoked = time.Now().UTC()
				}
				return all, nil
			}
		}
		return nil, fmt.Errorf("revoke key %q: %w", id, ErrNoKey)
	})
}

// List lists all keys, including those that are no longer valid.
func (k *Keys) List() ([]Key, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.look(); err != nil {
		return nil, err
	}
	return slices.Clone(k.known), nil
}

// Exist reports whether keys are needed: as soon as the file exists, whatever it contains. If it is empty, broken or unreadable, no key is
// valid.
func (k *Keys) Exist() bool {
	_, err := os.Lstat(k.path())
	return !errors.Is(err, fs.ErrNotExist)
}

// Admit returns the owner of a secret, and a context that ends, with ErrKey, once the key is no longer valid. Watch must be running. It
// takes the same time for every invalid secret.
func (k *Keys) Admit(secret string) (owner string, valid context.Context, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	key, err := k.validKey(secret)
	if err != nil {
		return "", nil, err
	}
	return key.Owner, lifeOf(&k.lives, key.Hash), nil
}

// OwnerValid returns a context that ends, with ErrKey, once an owner has no valid key any more. Watch must be running.
func (k *Keys) OwnerValid(owner string) (valid context.Context, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.look(); err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(k.known, func(key Key) bool { return key.Owner == owner && key.Valid(time.Now()) }) {
		return nil, ErrKey
	}
	return lifeOf(&k.owners, owner), nil
}

// validKey returns the valid key of a secret. k.mu is held.
func (k *Keys) validKey(secret string) (Key, error) {
	if err := k.look(); err != nil {
		return Key{}, err
	}
	given, found, now := []byte(hash(secret)), Key{}, time.Now()
	for _, key := range k.known {
		if same := subtle.ConstantTimeCompare(given, []byte(key.Hash)); same == 1 && key.Valid(now) {
			found = key
		}
	}
	if found.Hash == "" || !keyPattern.MatchString(secret) {
		return Key{}, ErrKey
	}
	return found, nil
}

func lifeOf(all *map[string]life, name string) context.Context {
	l, ok := (*all)[name]
	if !ok {
		if *all == nil {
			*all = map[string]life{}
		}
		l.ctx, l.end = context.WithCancelCause(context.Background())
		(*all)[name] = l
	}
	return l.ctx
}

// keyLook is how often Watch checks whether keys are still valid.
const keyLook = 250 * time.Millisecond

// Watch ends the contexts that Admit and OwnerValid returned as soon as they must end, until ctx ends. If the keys cannot be read, it ends
// nothing, and no new request is admitted meanwhile.
func (k *Keys) Watch(ctx context.Context, log *slog.Logger) {
	ticker := time.NewTicker(keyLook)
	defer ticker.Stop()
	told := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		said := ""
		if err := k.endInvalid(); err != nil {
			said = err.Error()
		}
		if said != told && said != "" {
			log.Error("the keys cannot be read: no new request is accepted", "error", said)
		}
		told = said
	}
}

func (k *Keys) endInvalid() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.look(); err != nil {
		return err
	}
	hashes, owners, now := map[string]bool{}, map[string]bool{}, time.Now()
	for _, key := range k.known {
		if key.Valid(now) {
			hashes[key.Hash], owners[key.Owner] = true, true
		}
	}
	endOthers(k.lives, hashes)
	endOthers(k.owners, owners)
	return nil
}

func endOthers(all map[string]life, valid map[string]bool) {
	for name, l := range all {
		if !valid[name] {
			l.end(ErrKey)
			delete(all, name)
		}
	}
}

func hash(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

func (k *Keys) path() string { return filepath.Join(k.Dir, "keys") }

// look reads the file if it has changed. k.mu is held.
func (k *Keys) look() error {
	now, err := os.Stat(k.path())
	if errors.Is(err, fs.ErrNotExist) {
		k.seen, k.known = nil, nil
		return nil
	}
	if err != nil {
		return fmt.Errorf("read keys: %w", err)
	}
	if k.seen != nil && os.SameFile(now, k.seen) && now.ModTime().Equal(k.seen.ModTime()) && now.Size() == k.seen.Size() {
		return nil
	}
	body, err := os.ReadFile(k.path())
	if err != nil {
		return fmt.Errorf("read keys: %w", err)
	}
	var known []Key
	if err := json.Unmarshal(body, &known); err != nil {
		return fmt.Errorf("the keys file %s is broken (%w); restore it, or remove it and create all keys again", k.path(), err)
	}
	k.seen, k.known = now, known
	return nil
}

// change rewrites the file while no other process can.
func (k *Keys) change(to func([]Key) ([]Key, error)) error {
	lock, err := durable.Lock(k.path()+".lock", true)
	if err != nil {
		return fmt.Errorf("write keys: %w", err)
	}
	defer lock.Close()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.seen = nil
	if err := k.look(); err != nil {
		return err
	}
	changed, err := to(append([]Key(nil), k.known...))
	if err != nil {
		return err
	}
	body, err := json.MarshalIndent(changed, "", "  ")
	if err != nil {
		return fmt.Errorf("write keys: %w", err)
	}
	k.seen = nil
	if err := k.Disk.Replace(k.path(), body, 0o600); err != nil {
		return fmt.Errorf("write keys: %w", err)
	}
	return nil
}
