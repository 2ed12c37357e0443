package template

import (
	"crypto/md5"
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// machineOf makes a machine's root from files; a file of mode zero becomes a link to its text.
func machineOf(t *testing.T, files map[string]madeFile) string {
	t.Helper()
	root := t.TempDir()
	for name, f := range files {
		to := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if f.mode == 0 {
			err = os.Symlink(f.text, to)
		} else if err = os.WriteFile(to, []byte(f.text), 0o600); err == nil {
			err = os.Chmod(to, f.mode)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

type madeFile struct {
	mode fs.FileMode
	text string
}

func plain(text string) madeFile { return madeFile{0o644, text} }

func md5Of(text string) string {
	sum := md5.Sum([]byte(text))
	return hex.EncodeToString(sum[:])
}

// settingsOf returns the names of what a machine's /etc adds to the root, without directories.
func settingsOf(t *testing.T, files map[string]madeFile) (names []string, tree *rootTree) {
	t.Helper()
	tree, err := hostTree(machineOf(t, files), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	own, err := hostTree(t.TempDir(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, e := range tree.entries {
		if rel, ok := strings.CutPrefix(name, "etc/"); ok && !e.mode.IsDir() && !own.has(name) {
			names = append(names, rel)
		}
	}
	slices.Sort(names)
	return names, tree
}

func wantNames(t *testing.T, got []string, want ...string) {
	t.Helper()
	slices.Sort(want)
	for _, name := range want {
		if !slices.Contains(got, name) {
			t.Errorf("%s does not come along", name)
		}
	}
	for _, name := range got {
		if !slices.Contains(want, name) {
			t.Errorf("%s comes along", name)
		}
	}
}

const mavenSettings = "<settings>\n<!--\n<password>repopwd</password> is how it looks\n-->\n</settings>\n"

// TestConffiles: files that packages brought to /etc are shown, changed or not; files that belong to no package, secrets, and files about
// this machine are not.
func TestConffiles(t *testing.T) {
	status := "Package: chromium\nStatus: install ok installed\nConffiles:\n /etc/chromium.d/default-flags " + md5Of("flags") +
		"\n /etc/chromium/a name " + md5Of("x") +
		"\nDescription: browser\n /etc/not-a-conffile 0123456789abcdef0123456789abcdef\n\n" +
		"Package: maven\nStatus: install ok installed\nConffiles:\n /etc/maven/settings.xml " + md5Of(mavenSettings) +
		"\n /etc/maven/m2.conf " + md5Of("as shipped") + "\n\n" +
		"Package: util-linux\nStatus: install ok installed\nConffiles:\n /etc/pam.d/su " + md5Of("auth sufficient pam_rootok.so") + "\n\n" +
		"Package: man-db\nStatus: hold ok installed\nConffiles:\n /etc/manpath.config " + md5Of("MANDATORY_MANPATH /usr/man") +
		"\n /etc/cron.daily/man-db " + md5Of("job") + "\n\n" +
		"Package: nginx\nStatus: install ok installed\nConffiles:\n /etc/nginx/nginx.conf " + md5Of("as shipped") +
		"\n /etc/nginx/sites-available/default " + md5Of("site") +
		"\n /etc/nginx/proxy.conf " + md5Of("as shipped") + "\n /etc/nginx/tls.pem " + md5Of("as shipped") + "\n /etc/nginx/closed.conf " +
		md5Of("closed") + "\n\n" +
		"Package: openssh\nStatus: install ok installed\nConffiles:\n /etc/ssh/ssh_config " + md5Of("Host *") +
		"\n /etc/sudoers.d/README " + md5Of("readme") +
		"\n /etc/NetworkManager/NetworkManager.conf " + md5Of("nm") + "\n /etc/krb5.keytab " + md5Of("kt") + "\n\n" +
		"Package: gone\nStatus: deinstall ok config-files\nConffiles:\n /etc/gone.conf " + md5Of("gone") + "\n"
	got, tree := settingsOf(t, map[string]madeFile{
		"var/lib/dpkg/status": plain(status), "usr/bin/ourapp": plain(""),
		"etc/chromium.d/default-flags": plain("flags"), "etc/chromium/a name": plain("x"), "etc/not-a-conffile": plain("x"),
		"etc/maven/settings.xml": plain(mavenSettings), "etc/maven/m2.conf": plain("main is x\npassword = hunter2\n"),
		"etc/pam.d/su": plain("auth sufficient pam_rootok.so"),
		"etc/pam.d/common-password": plain("password\t[success=1 " +
			"default=ignore]\tpam_unix.so\npassword\trequisite\tpam_deny.so\n@include common-password\nx\n"),
		"etc/manpath.config": plain("MANDATORY_MANPATH /usr/man"), "etc/cron.daily/man-db": plain("job"),
		"etc/nginx/nginx.conf": plain("user www-data; # of this machine\n"), "etc/nginx/sites-available/default": plain("site"),
		"etc/nginx/sites-enabled/default":  {0, "../sites-available/default"},
		"etc/nginx/sites-enabled/customer": {0, "/srv/customer/site"},
		"etc/nginx/proxy.conf":             plain("proxy_pass http://ann:hunter2@10.0.0.1;\n"),
		"etc/nginx/tls.pem":                plain("-----BEGIN PRIVATE KEY-----\nx\n"), "etc/nginx/closed.conf": {0o640, "closed"},
		"etc/nginx/modules-enabled/x.conf": {0, "/usr/share/nginx/x.conf"},
		"etc/ssh/ssh_config":               plain("Host *"), "etc/ssh/ssh_host_rsa_key": plain("x"), "etc/ssh/ssh_known_hosts": plain("x"),
		"etc/sudoers.d/README":                   plain("readme"),
		"etc/NetworkManager/NetworkManager.conf": plain("nm"), "etc/krb5.keytab": plain("kt"), "etc/gone.conf": plain("gone"),
		"etc/ourapp/config": plain("x"),
		"etc/machine-id":    plain("x"), "etc/ssl/private/x.key": plain("x"),
		"etc/profile.d/proxy.sh": plain("export https_proxy=http://ann:hunter2@proxy:3128\n"),
		"etc/profile.d/lang.sh":  plain("export LANG=C.UTF-8\n"), "etc/hosts.deny": plain("x"),
		"etc/passwd": plain("ann:x:1:1::/home/ann:/bin/sh\n"),
	})
	wantNames(t, got, "chromium.d/default-flags", "chromium/a name", "maven/settings.xml", "pam.d/su", "pam.d/common-password",
		"manpath.config", "nginx/nginx.conf",
		"nginx/sites-available/default", "nginx/sites-enabled/default", "nginx/modules-enabled/x.conf", "ssh/ssh_config",
		"profile.d/lang.sh")
	if text := string(tree.entries["etc/passwd"].text); strings.Contains(text, "ann") {
		t.Errorf("the machine's users are seen: %s", text)
	}
}

// TestSettingsWithoutDpkg: without Debian's package manager, files named like something in /usr are shown.
func TestSettingsWithoutDpkg(t *testing.T) {
	files := map[string]madeFile{
		"usr/bin/chromium": plain(""), "usr/share/maven/x": plain(""), "usr/sbin/nginx": plain(""), "usr/bin/ssh": plain(""),
		"usr/bin/npm": plain(""), "usr/bin/pip": plain(""),
		"usr/share/doc/networkmanager/x": plain(""), "usr/bin/sudo": plain(""), "usr/bin/wget": plain(""),
		"etc/chromium/master_preferences": plain("{}"), "etc/maven/m2.conf": plain("main is x\n"),
		"etc/maven/settings.xml": plain("<password>hunter2</password>"),
		"etc/nginx/nginx.conf":   plain("user http;\n"), "etc/nginx/.htpasswd": plain("ann:x"), "etc/ssh/ssh_config": plain("Host *\n"),
		"etc/ssh/ssh_host_ed25519_key": plain("x"),
		"etc/man_db.conf":              plain("x"), "etc/pam.d/su": plain("x"),
		"etc/npmrc":    plain("//registry.example.com/:_authToken=hunter2\n"),
		"etc/pip.conf": plain("[global]\nindex-url = https://ann:hunter2@pypi.example.com/simple\n"),
		"etc/wgetrc":   plain("# passwd = x\ntries = 20\n"),
		"etc/NetworkManager/system-connections/home": plain("x"), "etc/sudoers.d/x": plain("x"), "etc/ourapp/config": plain("x"),
		"etc/shadow-": plain("x"), "etc/machine-id": plain("x"),
	}
	want := []string{"chromium/master_preferences", "maven/m2.conf", "nginx/nginx.conf", "ssh/ssh_config", "man_db.conf", "pam.d/su",
		"wgetrc"}
	got, _ := settingsOf(t, files)
	wantNames(t, got, want...)
	files["var/lib/dpkg/status"] = plain("") // dpkg as a tool on a machine of another distribution
	got, _ = settingsOf(t, files)
	wantNames(t, got, want...)
}
