package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestReaderGone: a command whose output goes to 'grep -q' or 'head' ends quietly once they have read enough, as other programs do. A key
// that was made but not shown is an error.
func TestReaderGone(t *testing.T) {
	dir := sandboxtest.Dir(t)
	for _, args := range []string{"template list", "template help", "key list", "cert --out " + filepath.Join(dir, "tls"), "help",
		"version", "key create --owner ann"} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		c := exec.Command(sandboxtest.Program(t, "soulbox-mcp"), strings.Fields(args)...)
		c.Env = []string{"HOME=" + dir, "PATH=/usr/bin:/bin", "SOULBOX_STATE_DIR=" + dir}
		var stderr bytes.Buffer
		c.Stdout, c.Stderr = w, &stderr
		err = c.Run()
		if cerr := w.Close(); cerr != nil {
			t.Fatal(cerr)
		}
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Errorf("%s: %v", args, err)
			continue
		}
		if args == "key create --owner ann" {
			if exit.ExitCode() != 1 || !strings.Contains(stderr.String(), "key revoke --id ") {
				t.Errorf("%s: %d %s", args, exit.ExitCode(), stderr.String())
			}
		} else if exit.ExitCode() != 141 || stderr.Len() > 0 {
			t.Errorf("%s: %d %s", args, exit.ExitCode(), stderr.String())
		}
	}
}
