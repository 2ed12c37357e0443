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

// runKey makes, lists and revokes keys. A running server sees the change at once.
func runKey(args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	verb := ""
	if len(args) > 0 {
		verb, args = args[0], args[1:]
	}
	var c config
	c.onExit = "kill"
	var owner, id string
	var expires time.Duration
	err := c.parse("key "+verb, args, getenv, stderr, func(f *flag.FlagSet) {
		switch verb {
		case "create":
			f.StringVar(&owner, "owner", "", "`name` of the key's owner; sandboxes belong to owners")
			f.DurationVar(&expires, "expires", 0, "how long it is valid; default forever")
		case "revoke":
			f.StringVar(&id, "id", "", "`id` of the key, from 'soulbox-mcp key list'")
		}
	})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(c.stateDir, 0o711); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	keys := &access.Keys{Dir: c.stateDir}
	switch verb {
	case "create":
		secret, key, err := keys.Create(owner, expires)
		if err != nil {
			return err
		}
		if _, err = fmt.Fprintf(stdout, "%s\n", secret); err != nil {
			return fmt.Errorf("the key %s was made, but not shown: %v; revoke it by 'soulbox-mcp key revoke --id %s'", key.ID, err,
				key.ID) //nolint:errorlint // a broken pipe is not quiet here
		}
		fmt.Fprintf(stderr, "key %s of %s; it is shown only once\n", key.ID, key.Owner)
		return nil
	case "revoke":
		return keys.Revoke(id)
	case "list":
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
	return errors.New("run 'soulbox-mcp key create --owner NAME', 'key list' or 'key revoke --id ID'")
}
