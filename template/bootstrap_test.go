package template

import (
	"os"
	"strings"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// dpkgDouble stands for dpkg, which a small archive has not: it says what it was asked, in the sandbox where that belongs.
const dpkgDouble = `#!/bin/sh
[ "$1" != --audit ] || exit 0
echo "dpkg $*" | tee -a /var/log-of-dpkg
`

// TestBootstrap makes a minimal system of an archive, in a real sandbox: its packages unpacked, its scripts run, and nothing left of what
// was only there for that.
func TestBootstrap(t *testing.T) {
	w := newWorkshop(t)
	d := newDebian(t).minimal()
	programs, err := os.ReadFile(sandboxtest.ImageTar(t, t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	d.addTar("programs", "1", programs, "Essential: yes")
	d.add("dpkg", "1", map[string]string{"usr/bin/dpkg": dpkgDouble, "etc/dpkg/dpkg.cfg.d/x": "", "etc/apt/x": "", "var/log/x.log": "x",
		"etc/machine-id": "x"}, "Priority: required")
	d.publish()
	var said strings.Builder
	m, err := w.builder.distribution(t.Context(), BaseOptions{Mirror: d.url, Suite: suite, Keyring: d.keyring,
		Say: func(format string, args ...any) { t.Logf(format, args...); said.WriteString(format) }})
	if err != nil {
		t.Fatal(err)
	}
	if m.Name != "debian:"+suite || len(m.Layers) != 1 || m.Parent != d.url+" "+suite {
		t.Errorf("%+v", m)
	}
	for _, what := range []string{"reading", "packages fetched", "%s"} {
		if !strings.Contains(said.String(), what) {
			t.Errorf("nothing was said of %q: %s", what, said.String())
		}
	}
	got := w.in(m.Name, "root", `cat /etc/apt/sources.list /var/log-of-dpkg; cat /usr/lib/libc.so.6; readlink /usr/bin/awk
for f in /.soulbox-build /etc/dpkg/dpkg.cfg.d/soulbox-install /usr/sbin/policy-rc.d /var/log/x.log /etc/machine-id; do
  [ ! -e $f ] || echo "left: $f"
done; stat -c %a /tmp`)
	debs := " apt.deb base-files.deb ca-certificates.deb debian-archive-keyring.deb dpkg.deb libc6.deb mawk.deb programs.deb"
	want := "deb " + d.url + " " + suite + ` main
dpkg --force-depends --force-overwrite --install base-files.deb
dpkg --force-depends --force-overwrite --install dpkg.deb
dpkg --force-depends --force-overwrite --install libc6.deb
dpkg --force-depends --force-overwrite --install mawk.deb
dpkg --force-depends --force-confold --unpack` + debs + `
dpkg --force-depends --force-confold --configure --pending
dpkg --configure -a
libcmawk
1777
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
