package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"soulbox.dev/soulbox/access"
)

const keyUsage = `soulbox-mcp key makes and ends the keys that clients of 'soulbox-mcp http' need. A running server sees the change at once.

Usage:
  soulbox-mcp key create --owner NAME [--expires TIME] [flags]
                               make a key, and print it
  soulbox-mcp key list [flags] show the keys, without their secrets
  soulbox-mcp key revoke --id ID [flags]
                               end a key
`

// runKey makes, lists and revokes keys. A running server sees the change at once.
func runKey(args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	verb := ""
	if len(args) > 0 {
		verb, args = args[0], args[1:]
	}
	c := config{onExit: "kill"}
	var owner, id string
	var expires time.Duration
	var add func(*flag.FlagSet)
	var run func(*access.Keys) error
	switch verb {
	case "create":
		add = func(f *flag.FlagSet) {
			f.StringVar(&owner, "owner", "", "`name` of the key's owner; sandboxes belong to owners")
			f.DurationVar(&expires, "expires", 0, "how long it is valid; default forever")
		}
		run = func(keys *access.Keys) error { return createKey(keys, owner, expires, stdout, stderr) }
	case "revoke":
		add = func(f *flag.FlagSet) { f.StringVar(&id, "id", "", "`id` of the key, from 'soulbox-mcp key list'") }
		run = func(keys *access.Keys) error { return revokeKey(keys, id) }
	case "list":
		add = func(*flag.FlagSet) {}
		run = func(keys *access.Keys) error { return listKeys(keys, stdout) }
	case "", "help", "--help", "-h":
		_, err := fmt.Fprint(stdout, keyUsage)
		return err
	default:
		return noCommand("key "+verb, "soulbox-mcp key help")
	}
	if err := c.parse("key "+verb, args, getenv, stderr, add); err != nil {
		return err
	}
	switch {
	case verb == "create" && owner == "":
		return usageError{errors.New("--owner is missing: the name of the key's owner")}
	case verb == "revoke" && id == "":
		return usageError{errors.New("--id is missing: the id of the key, from 'soulbox-mcp key list'")}
	}
	if err := os.MkdirAll(c.stateDir, 0o711); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	return run(&access.Keys{Dir: c.stateDir})
}

// createKey makes a key and shows its secret.
func createKey(keys *access.Keys, owner string, expires time.Duration, stdout, stderr io.Writer) error {
	secret, key, err := keys.Create(owner, expires)
	if errors.Is(err, access.ErrInvalid) {
		return usageError{err}
	}
	if err != nil {
		return err
	}
	if _, err = fmt.Fprintf(stdout, "%s\n", secret); err != nil {
		return fmt.Errorf("the key %s was made, but not shown: %v; revoke it by 'soulbox-mcp key revoke --id %s'", key.ID, err,
			key.ID) //nolint:errorlint // a broken pipe is not quiet here
	}
	fmt.Fprintf(stderr, "key %s of %s; it is shown only once\n", key.ID, key.Owner)
	return nil
}

// revokeKey ends a key.
func revokeKey(keys *access.Keys, id string) error {
	err := keys.Revoke(id)
	if errors.Is(err, access.ErrNoKey) {
		err = fmt.Errorf("%w; 'soulbox-mcp key list' shows them", err)
	}
	return err
}

// listKeys shows all keys, without their secrets.
func listKeys(keys *access.Keys, stdout io.Writer) error {
	all, err := keys.List()
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tOWNER\tCREATED\tSTATE")
	for _, k := range all {
		state := "valid"
		switch {
		case !k.Revoked.IsZero():
			state = "revoked " + k.Revoked.Format(time.RFC3339)
		case !k.Valid(time.Now()):
			state = "expired " + k.Expires.Format(time.RFC3339)
		case !k.Expires.IsZero():
			state = "valid until " + k.Expires.Format(time.RFC3339)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", k.ID, k.Owner, k.Created.Format(time.RFC3339), state)
	}
	return w.Flush()
}
