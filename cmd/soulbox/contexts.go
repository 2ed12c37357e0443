package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/internal/durable"
	"soulbox.dev/soulbox/internal/loopback"
)

// localContext is the name of this machine's servers.
const localContext = "local"

// contexts are the servers that a user has logged in to; the file that holds them is readable only by the user.
type contexts struct {
	Current string           `json:"current,omitempty"`
	Known   map[string]login `json:"contexts"`
}

type login struct {
	URL string `json:"url"`
	Key string `json:"key,omitempty"`
}

func (c contexts) names() []string { return slices.Sorted(maps.Keys(c.Known)) }

func (a *app) contextsFile() string {
	return filepath.Join(cmp.Or(a.getenv("XDG_CONFIG_HOME"), filepath.Join(a.getenv("HOME"), ".config")), "soulbox", "contexts.json")
}

func (a *app) readContexts() (c contexts, err error) {
	c.Known = map[string]login{}
	if !filepath.IsAbs(a.contextsFile()) {
		return c, errors.New("there is no place for logins: HOME is not set")
	}
	body, err := os.ReadFile(a.contextsFile())
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err == nil {
		err = json.Unmarshal(body, &c)
	}
	if c.Known == nil {
		c.Known = map[string]login{}
	}
	if err != nil {
		return c, fmt.Errorf("read the logins in %s: %w; fix or remove that file", a.contextsFile(), err)
	}
	return c, nil
}

// writeContexts replaces the file atomically.
func (a *app) writeContexts(c contexts) error {
	name := a.contextsFile()
	body, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	return durable.Disk{}.Replace(name, append(body, '\n'), 0o600)
}

// chosen returns the login to use, chosen by flag, environment or 'auth use'; ok is false for this machine.
func (a *app) chosen() (l login, name string, ok bool, err error) {
	name = cmp.Or(a.context, a.getenv("SOULBOX_CONTEXT"))
	if name == "" && a.getenv("SOULBOX_URL") != "" {
		return login{a.getenv("SOULBOX_URL"), a.getenv("SOULBOX_API_KEY")}, "SOULBOX_URL", true, nil
	}
	c, err := a.readContexts()
	if err != nil {
		return l, "", false, err
	}
	if name = cmp.Or(name, c.Current, localContext); name == localContext {
		return l, name, false, nil
	}
	l, ok = c.Known[name]
	if !ok {
		return l, name, false, fmt.Errorf("there is no login %q; 'soulbox auth info' lists them", name)
	}
	return l, name, true, nil
}

func (a *app) authCommand() *cobra.Command {
	auth := group(&cobra.Command{Use: "auth", Short: "Log in to a server, and log out",
		Long:    "Logins are kept in a file that only you can read. Without one, soulbox uses the servers that you run on this machine.",
		Example: "  soulbox auth login --url https://box.example.com\n  soulbox auth info"})
	var at, name, key string
	in := &cobra.Command{Use: "login", Short: "Log in to a server", Args: exactly(),
		Long: "Log in to a server, with a key that its operator has made with 'soulbox-mcp key create'. soulbox asks for the key, or " +
			"reads it from stdin with\n--key -; it is never an argument, since other users could see that.",
		Example: "  soulbox auth login --url https://box.example.com\n  soulbox auth login --url https://box.example.com --name team " +
			"--key - <key.txt",
		RunE: func(c *cobra.Command, _ []string) error { return a.login(c.Context(), at, name, key) }}
	in.Flags().StringVar(&at, "url", "", "`URL` of the server (SOULBOX_URL)")
	in.Flags().StringVar(&name, "name", "", "`name` of the login; default the server's host, with its port if that is an unusual one")
	in.Flags().StringVar(&key, "key", "", "\"-\" reads the key from stdin")
	out := &cobra.Command{Use: "logout [NAME]", Short: "Forget a login", Args: between(0, "NAME"),
		Long: "Forget a login and its key; without a name, the current login. The key stays valid; 'soulbox-mcp key revoke' revokes " +
			"it.",
		Example: "  soulbox auth logout\n  soulbox auth logout team",
		RunE:    func(_ *cobra.Command, args []string) error { return a.logout(args) }}
	use := &cobra.Command{Use: "use NAME", Short: "Use another login from now on", Args: exactly("NAME"),
		Long: "Use another login from now on; \"local\" is this machine.", Example: "  soulbox auth use team\n  soulbox auth use local",
		RunE: func(_ *cobra.Command, args []string) error { return a.useContext(args[0]) }}
	info := &cobra.Command{Use: "info", Short: "Show the logins, and who you are to the server", Args: exactly(),
		Example: "  soulbox auth info",
		Long:    "Show the logins, which of them is used, and who you are to its server. Keys are not shown.",
		RunE:    func(c *cobra.Command, _ []string) error { return a.authInfo(c.Context()) }}
	auth.AddCommand(in, out, use, info)
	return auth
}

func (a *app) login(ctx context.Context, at, name, key string) error {
	if at = cmp.Or(at, a.getenv("SOULBOX_URL")); at == "" {
		return usageError{errors.New("give the server's URL with --url")}
	}
	if key != "" && key != "-" {
		return usageError{errors.New("a key is not given as an argument, where other users could see it: leave --key out to be asked, or " +
			"use --key - to read it from stdin")}
	}
	u, err := url.Parse(at)
	if err != nil || u.Host == "" {
		return usageError{fmt.Errorf("%q is not the URL of a server, such as https://box.example.com", at)}
	}
	named := name != ""
	if name, err = a.loginName(name, u); err != nil {
		return err
	}
	if u.Scheme == "http" && !loopback.Is(u.Hostname()) {
		fmt.Fprintf(a.stderr, "soulbox: anyone on the network between here and %s can read the key: use https\n", u.Host) // best effort
	}
	secret := ""
	if key == "-" {
		defer context.AfterFunc(ctx, func() { os.Exit(128 + int(syscall.SIGINT)) })() // a read of stdin does not end with ctx
		line, err := bufio.NewReader(io.LimitReader(a.stdin, 4096)).ReadString('\n')
		if err != nil && err != io.EOF {
			return err
		}
		secret = strings.TrimSpace(line)
	} else if secret = a.getenv("SOULBOX_API_KEY"); secret == "" {
		if secret, err = a.askSecret("Key: "); err != nil {
			return err
		}
	}
	c, err := a.newClient(client.Options{URL: at, Key: secret})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	who, err := c.Caller(ctx)
	if err != nil {
		return err
	}
	all, err := a.readContexts()
	if err != nil {
		return err
	}
	if err := mayReplace(all, name, u, named); err != nil { // another soulbox may have made it meanwhile
		return err
	}
	all.Known[name], all.Current = login{at, secret}, name
	if err := a.writeContexts(all); err != nil {
		return err
	}
	return a.printf("You are %s at %s; the login is called %s.\n", who, at, name)
}

// loginName is what a login to a server is called: as its user says, or by the server's host and an unusual port. A login to the same
// server that an older soulbox has called by the host alone keeps its name.
func (a *app) loginName(given string, u *url.URL) (string, error) {
	if given == localContext || strings.ContainsAny(given, " \t\n/") {
		return "", usageError{fmt.Errorf("%q cannot be the name of a login", given)}
	}
	all, err := a.readContexts()
	if err != nil {
		return "", err
	}
	name := cmp.Or(given, hostOf(u))
	if old, ok := all.Known[u.Hostname()]; given == "" && ok && sameServer(old.URL, u) {
		name = u.Hostname()
	}
	if name == localContext {
		return "", usageError{fmt.Errorf("%q cannot be the name of a login: say --name", name)}
	}
	return name, mayReplace(all, name, u, given != "")
}

// mayReplace refuses to forget a login to another server, whose key may be nowhere else, if its name was not said.
func mayReplace(all contexts, name string, u *url.URL, named bool) error {
	if old, ok := all.Known[name]; ok && !named && !sameServer(old.URL, u) {
		return fmt.Errorf("the login %s is for %s: choose another name with --name, or say --name %s to replace that login", name,
			old.URL, name)
	}
	return nil
}

// defaultPorts are those of schemes.
var defaultPorts = map[string]string{"http": "80", "https": "443"}

// hostOf is the host of a URL, with its port if that is not the scheme's own.
func hostOf(u *url.URL) string {
	host := strings.ToLower(u.Hostname())
	if port := u.Port(); port != "" && port != defaultPorts[u.Scheme] {
		return net.JoinHostPort(host, port)
	}
	return host
}

// sameServer says whether the URL of a login is that of a server, however it is written.
func sameServer(known string, u *url.URL) bool {
	k, err := url.Parse(known)
	end := func(u *url.URL) string { return strings.TrimSuffix(strings.TrimSuffix(u.Path, "/"), "/mcp") }
	return err == nil && k.Scheme == u.Scheme && hostOf(k) == hostOf(u) && end(k) == end(u)
}

// askSecret asks at the terminal and hides the answer.
func (a *app) askSecret(prompt string) (string, error) {
	fd, ok := terminalOf(a.stdin)
	if !ok {
		return "", usageError{errors.New("there is no terminal to ask for the key: use --key - and send it on stdin")}
	}
	saved, err := term.GetState(fd)
	if err != nil {
		return "", err
	}
	defer restoreAtSignal(fd, saved)()
	fmt.Fprint(a.stderr, prompt) // if stderr fails, no user is at the terminal
	text, err := term.ReadPassword(fd)
	fmt.Fprintln(a.stderr) // as above
	return strings.TrimSpace(string(text)), err
}

func (a *app) logout(args []string) error {
	all, err := a.readContexts()
	if err != nil {
		return err
	}
	name := all.Current
	if len(args) > 0 {
		name = args[0]
	}
	if name == "" {
		return errors.New("no login is used, so there is none to forget: name one of those that 'soulbox auth info' lists")
	}
	if _, ok := all.Known[name]; !ok {
		return fmt.Errorf("there is no login %q to forget; 'soulbox auth info' lists them", name)
	}
	delete(all.Known, name)
	if all.Current == name {
		all.Current = ""
	}
	if err := a.writeContexts(all); err != nil {
		return err
	}
	return a.printf("%s is forgotten.\n", name)
}

func (a *app) useContext(name string) error {
	all, err := a.readContexts()
	if err != nil {
		return err
	}
	if _, ok := all.Known[name]; !ok && name != localContext {
		return fmt.Errorf("there is no login %q; 'soulbox auth login' makes one", name)
	}
	if all.Current = name; name == localContext {
		all.Current = ""
	}
	if err := a.writeContexts(all); err != nil {
		return err
	}
	return a.printf("%s is used from now on.\n", name)
}

func (a *app) authInfo(ctx context.Context) error {
	all, err := a.readContexts()
	if err != nil {
		return err
	}
	l, name, remote, err := a.chosen()
	if err != nil {
		return err
	}
	t := a.table("", "NAME", "URL")
	for _, known := range append([]string{localContext}, all.names()...) {
		mark, at := "", cmp.Or(all.Known[known].URL, "the servers of this user on this machine")
		if known == name {
			mark = "*"
		}
		t.row(mark, known, at)
	}
	if name == "SOULBOX_URL" {
		t.row("*", "", l.URL+" (SOULBOX_URL)")
	}
	if err := t.flush(); err != nil || !remote {
		return err
	}
	c, err := a.newClient(client.Options{URL: l.URL, Key: l.Key})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	who, err := c.Caller(ctx)
	if err != nil {
		return err
	}
	s, err := c.Server(ctx)
	if err != nil {
		return err
	}
	return a.printf("You are %s at %s, SoulBox %s.\n", who, l.URL, s.Version)
}
