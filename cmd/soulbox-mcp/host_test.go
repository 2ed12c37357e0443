package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestHostPrograms: programs of this machine find their files in /etc, and no others. Programs that are not installed here are tested with
// made-up packages (template, TestConffiles).
func TestHostPrograms(t *testing.T) {
	p := launch(t, "")
	for _, try := range []struct{ file, command, want string }{
		{"/etc/pam.d/su", "su user -c 'id -un'", "user\n"},
		{"/etc/pam.d/login", "su -s /bin/sh -c 'id -un' www-data", "www-data\n"},
		{"/etc/ssh/ssh_config", "ssh -T -G example.com 2>/dev/null | grep -c '^sendenv LANG'", "1\n"},
		{"/etc/manpath.config", "manpath -q | grep -o /usr/share/man", "/usr/share/man\n"},
		{"/etc/maven/m2.conf", "mvn -B -v 2>/dev/null | grep -o 'Apache Maven'", "Apache Maven\n"},
		{"/etc/chromium.d", "ls /etc/chromium.d | grep -c .", ""},
		{"/etc/nginx/nginx.conf", "nginx -t 2>&1 | grep -o 'syntax is ok'", "syntax is ok\n"},
		{"/etc/login.defs", "useradd -m ann && su ann -c 'cat ~/.profile' | grep -c bashrc", "3\n"},
	} {
		if _, err := os.Stat(try.file); err != nil {
			t.Logf("%s is not on this machine", try.file)
			continue
		}
		got := p.call("exec", map[string]any{"command": try.command, "user": "root", "yield_ms": 50_000}).Result.StructuredContent["output"]
		if got != try.want && (try.want != "" || got == "0\n") {
			t.Errorf("%s: %q, not %q", try.command, got, try.want)
		}
	}
	secrets := "/etc/gshadow /etc/sudoers /etc/machine-id /etc/ssh/ssh_host_* /etc/ssl/private /etc/resolv.conf /etc/apt " +
		"/etc/environment /etc/cron.d"
	if got := p.exec("ls -d " + secrets + " 2>/dev/null; grep -rl 'PRIVATE KEY-----' /etc 2>/dev/null"); got != "" {
		t.Errorf("of the machine are seen: %s", got)
	}
}

// TestNextServerFindsHost: another server on the same state directory writes nothing among the templates.
func TestNextServerFindsHost(t *testing.T) {
	state := sandboxtest.Dir(t)
	var p *program
	for range 2 { // the second server also makes what is made once, such as the lock of the collector
		p = launch(t, state, "--on-exit=kill")
		p.exec("true")
		p.close()
	}
	list := func() string {
		out, err := exec.Command("stat", "-c", "%n %y %z", filepath.Join(state, "templates"),
			filepath.Join(state, "agent")).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v", out, err)
		}
		return string(out)
	}
	before := list()
	p = launch(t, state, "--on-exit=kill")
	if got := p.exec("echo there"); got != "there\n" {
		t.Fatal(got)
	}
	if after := list(); after != before {
		t.Errorf("written to again:\n%sbefore:\n%s", after, before)
	}
	p.close()
}
