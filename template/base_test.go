package template

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestNoContainers calls the base's stand-ins for programs that start containers: each says one sentence, and none replaces a program that
// exists.
func TestNoContainers(t *testing.T) {
	bin := t.TempDir()
	own := filepath.Join(bin, "podman")
	if err := os.WriteFile(own, []byte("#!/bin/sh\necho own\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	sh := func(script string) (string, int) {
		t.Helper()
		cmd := exec.Command("/bin/sh", "-ec", script)
		cmd.Env = []string{"PATH=" + bin + ":" + bin + "/system"}
		out, _ := cmd.CombinedOutput() // the test checks its exit code
		return string(out), cmd.ProcessState.ExitCode()
	}
	if err := os.Mkdir(filepath.Join(bin, "system"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, program := range map[string]string{"chmod": "/bin/chmod"} {
		if err := os.Symlink(program, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	if out, code := sh(strings.ReplaceAll(noContainers, "/usr/bin", bin+"/system")); code != 0 || out != "" {
		t.Fatalf("exit %d, %q", code, out)
	}
	out, code := sh("docker run hello-world")
	if code != 125 || strings.Count(out, "\n") != 1 || !strings.HasPrefix(out, "docker: ") || !strings.Contains(out, "template_build") {
		t.Errorf("docker: exit %d, %q", code, out)
	}
	if out, code := sh("podman ps"); code != 0 || out != "own\n" {
		t.Errorf("podman of its own: exit %d, %q", code, out)
	}
}
