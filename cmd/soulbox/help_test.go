package main

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"soulbox.dev/soulbox/api/client"
)

// TestHelpGolden: the help of every command equals the recorded help, and has an example.
func TestHelpGolden(t *testing.T) {
	a := &app{getenv: func(string) string { return "" }}
	root := a.root()
	root.InitDefaultCompletionCmd()
	var text bytes.Buffer
	var show func(*cobra.Command)
	show = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "completion" || c.Name() == "help" { // cobra's own
			return
		}
		if c.Example == "" || c.Short == "" || c.Long == "" {
			t.Errorf("%s has no example, or does not say what it does", c.CommandPath())
		}
		for line := range strings.Lines(c.Example) {
			if !strings.HasPrefix(line, "  ") {
				t.Errorf("%s: the example %q is not indented", c.CommandPath(), line)
			}
		}
		text.WriteString("$ " + c.CommandPath() + " --help\n")
		c.InitDefaultHelpFlag()
		c.SetOut(&text)
		if err := c.Help(); err != nil {
			t.Error(err)
		}
		text.WriteString("\n")
		for _, sub := range c.Commands() {
			show(sub)
		}
	}
	show(root)
	golden := filepath.Join("testdata", "help.txt")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(golden, text.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil || string(want) != text.String() {
		t.Errorf("the help is not as recorded (%v): 'make golden' records it anew:\n%s", err, text.String())
	}
}

// TestVersions: if a server and a client are too far apart, the error says which of them to update.
func TestVersions(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(client.APIHeader, "0")
		_, _ = w.Write([]byte("[]"))
	}))
	defer web.Close()
	var said bytes.Buffer
	a := &app{stdin: os.Stdin, stdout: &said, stderr: &said,
		getenv: func(name string) string { return map[string]string{"SOULBOX_URL": web.URL}[name] }}
	if code := a.run([]string{"sandbox", "list"}); code != exitFailed || !strings.Contains(said.String(), "update soulbox-mcp") {
		t.Errorf("%d %s", code, said.String())
	}
}

// TestPrintable: output of a guest cannot act on the terminal.
func TestPrintable(t *testing.T) {
	var shown bytes.Buffer
	w := &inert{to: &shown}
	for _, part := range []string{"a\x1b]0;t", "itle\x07\tä\xc2", "\x9b31m\r\n\x7f\xc2", "\xb0", "caf\xe9!", "\xe6\x97", "\xa5\xf0\x9f"} {
		if n, err := w.Write([]byte(part)); err != nil || n != len(part) {
			t.Error(n, err)
		}
	}
	if err := writeRest(w); err != nil {
		t.Error(err)
	}
	if got, want := shown.String(), "a^[]0;title^G\tä?31m\r\n^?°caf\\xe9!日\\xf0\\x9f"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := printable("a\x1b]0;title\x07\tb\u009b31m\n"); strings.ContainsAny(got, "\x1b\x07\n\t\u009b") {
		t.Errorf("%q", got)
	}
}
