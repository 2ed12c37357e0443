package template

import (
	"bufio"
	"bytes"
	"crypto/md5" // what dpkg has
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// What comes of the machine's /etc into the host template, of what everybody may read:
//
//   - what settings names: programs of all kinds need that;
//   - what the packages of /usr have there as theirs: with dpkg their conffiles, else what has the name of something in /usr;
//   - links to any of that, and to /usr.
//
// Passwords, keys, and what says who and where this machine is, does not: by its name (denied), by its mode, and by what is written in it
// (secret), unless it is what the package brought, to the letter.

// settings are the files of /etc that programs need, whoever has made them, as globs.
var settings = []string{
	"alternatives", "bash.bashrc", "ca-certificates.conf", "ca-certificates", "crypto-policies", "debian_version", "environment.d",
	"fonts", "gai.conf", "inputrc", "java*", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "locale.alias", "locale.conf", "localtime",
	"login.defs", "lsb-release", "magic", "magic.mime", "man.conf", "man_db.conf", "manpath.config", "mime.types", "mke2fs.conf",
	"networks", "nsswitch.conf", "os-release", "pam.d", "perl", "pki/ca-trust", "pki/tls", "profile", "profile.d", "protocols", "python*",
	"rpc", "services", "sgml", "shells", "ssl/cert.pem", "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone", "vim", "xml",
}

// denied are names that never come, wherever they are; in lower case.
var denied = []string{
	// Passwords and keys, and backups of files that have them.
	"*.cred", "*.jks", "*.kdbx", "*.key", "*.keystore", "*.keytab", "*.ovpn", "*.p12", "*.pfx", "*.ppk", "*.psk", "*.secret", "*_key",
	"*credential*", "*htpasswd*", "*passwords*", "*secrets*", "*token", "*tokens", "auth.conf*", "auth.json", "authorized_keys*",
	"bindpw*", "chap-secrets", "doas.conf", "gshadow*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "id_rsa*", "netrc", ".netrc", "opasswd*",
	"passwd.client", "pap-secrets", ".pgpass", "private", "sasl_passwd*", "shadow*", "ssh_host_*", "sudoers*", "*~", "*-", "#*#", "*.bak",
	"*.dpkg-*", "*.old", "*.orig", "*.rpmnew", "*.rpmsave", "*.swp", "*.ucf-*",
	// Who and where this machine is, and whom it knows.
	"*known_hosts*", "hostid", "hostnqn", "machine-id", "machine-info",
	".git", ".svn", ".hg", ".bzr", // of who keeps /etc in one
}

// deniedPaths are what says who and where this machine is, what it starts, and how it is reached; as globs below /etc.
var deniedPaths = []string{
	"NetworkManager", "adjtime", "aliases*", "anacrontab", "apt", "bluetooth", "ceph", "cloud", "cron*", "crypttab", "default/grub*",
	"dhcp", "docker", "environment", "exim4", "exports*", "fstab*", "group*", "grub*", "hostname", "hosts*", "init.d", "ipsec*", "iscsi",
	"iwd", "krb5.conf*", "kubernetes", "letsencrypt", "libvirt", "logrotate.d", "lvm", "mail", "mailname", "mdadm", "motd", "mtab",
	"multipath*", "netplan", "network", "nvme", "openvpn", "passwd*", "postfix", "ppp", "rancher", "rc?.d", "resolv*", "samba", "snmp",
	"ssl/private", "sssd", "strongswan*", "subgid*", "subuid*", "swanctl", "systemd", "udev", "update-motd.d", "wireguard",
	"wpa_supplicant",
}

// secret is what a password or a key looks like in a text: NAME = VALUE, <name>VALUE<, //user:password@host, "machine … password …".
var secret = regexp.MustCompile(`(?im)^[^#;\n]*(?:(?:passw(?:or)?d|passphrase|secret|token|api_?key|access_?key|bindpw|credentials?|_auth)["']?` +
	`(?:[ \t]*[:=][ \t]*|>)["']?[^\s"'<]|//[^/\s:@]+:[^/\s@]+@|\bpassword[ \t]+\S+[ \t]*$)`)

var privateKey = []byte("PRIVATE KEY-----")

const (
	maxSetting   = 4 << 20  // of one file, in bytes
	maxSettings  = 64 << 20 // of all
	maxWalked    = 50_000   // entries of /etc that are looked at
	maxEtcDepth  = 16
	dpkgStatus   = "var/lib/dpkg/status"
	maxDpkgLine  = 1 << 20
	installedPkg = "install ok installed"
)

// etc walks through /etc of a machine.
type etc struct {
	tree    *rootTree
	machine string // the directory that is its root
	// shipped are the conffiles of the packages that are installed, below /etc, with the MD5 sums of what the packages brought; nil without
	// dpkg.
	shipped map[string]string
	usr     map[string]bool   // names in /usr, without dpkg
	links   map[string]string // that come if they lead to what comes
	walked  int
}

// addSettings adds what programs need of the machine's /etc.
func addSettings(t *rootTree, machine string) error {
	e := &etc{tree: t, machine: machine, links: map[string]string{}}
	var err error
	if e.shipped, err = conffiles(filepath.Join(machine, dpkgStatus)); err != nil {
		return fmt.Errorf("read what dpkg knows: %w", err)
	}
	if len(e.shipped) == 0 {
		if e.usr, err = namesOfUsr(machine); err != nil {
			return err
		}
	}
	if err := e.walk("", false, 0); err != nil {
		return err
	}
	for more := true; more; { // links to links
		more = false
		for name, target := range e.links {
			if e.leads(name, target) {
				t.link("etc/"+name, target)
				delete(e.links, name)
				more = true
			}
		}
	}
	return nil
}

// walk looks at what is in a directory below /etc; all of it is wanted or some.
func (e *etc) walk(dir string, all bool, depth int) error {
	entries, err := os.ReadDir(filepath.Join(e.machine, "etc", dir))
	if missing(err) || depth > maxEtcDepth {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		name := path.Join(dir, entry.Name())
		if e.walked++; e.walked > maxWalked {
			return fmt.Errorf("/etc has more than %d entries; remove what no program needs", maxWalked)
		}
		if isDenied(name) || e.tree.has("etc/"+name) && !entry.IsDir() {
			continue
		}
		wanted := all || matches(settings, name) || dir == "" && e.named(name)
		info, err := entry.Info()
		if missing(err) {
			continue // gone since
		}
		if err == nil {
			err = e.take(name, info, wanted, depth)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// take adds what is wanted of what everybody may read, and walks on.
func (e *etc) take(name string, info fs.FileInfo, wanted bool, depth int) error {
	sum, shipped := e.shipped[name]
	perm := info.Mode().Perm()
	switch {
	case info.IsDir():
		if perm&0o005 != 0o005 {
			return nil
		}
		if wanted {
			e.tree.parents("etc/" + name + "/")
		}
		return e.walk(name, wanted, depth+1)
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(filepath.Join(e.machine, "etc", name))
		switch {
		case err != nil:
			return ignoreMissing(err)
		case wanted || shipped:
			e.tree.link("etc/"+name, target)
		default:
			e.links[name] = target
		}
	case info.Mode().IsRegular() && perm&0o004 != 0 && info.Size() <= maxSetting && (wanted || shipped):
		return e.read(name, perm, sum)
	}
	return nil
}

// read adds a file, if it is as its package brought it or has nothing in it that looks like a secret.
func (e *etc) read(name string, perm fs.FileMode, shipped string) error {
	text, err := os.ReadFile(filepath.Join(e.machine, "etc", name))
	if err != nil {
		return ignoreMissing(err)
	}
	sum := md5.Sum(text)
	if hex.EncodeToString(sum[:]) != shipped && hasSecret(text) {
		return nil
	}
	if e.tree.size+len(text) > maxSettings {
		return fmt.Errorf("what programs need of /etc has more than %d MB; remove what no program needs", maxSettings>>20)
	}
	e.tree.file("etc/"+name, perm, text)
	return nil
}

// hasSecret tells whether a text has a password or a key in it. A binary file is asked for keys alone.
func hasSecret(text []byte) bool {
	if bytes.Contains(text, privateKey) {
		return true
	}
	return !bytes.Contains(text, []byte{0}) && !bytes.HasPrefix(text, []byte("-----BEGIN CERTIFICATE-----")) && secret.Match(text)
}

// leads tells whether a link of /etc leads to something that a sandbox sees.
func (e *etc) leads(name, target string) bool {
	if !path.IsAbs(target) {
		target = path.Join("/etc", path.Dir(name), target)
	}
	target = path.Clean(target)
	return strings.HasPrefix(target, "/usr/") || strings.HasPrefix(target, "/etc/") && e.tree.has(target[1:])
}

// named tells whether something right below /etc has the name of something in /usr, such as nginx, resolvconf.conf or logrotate.d: without
// dpkg it is taken for its.
func (e *etc) named(name string) bool {
	stem := strings.ToLower(name)
	for _, end := range []string{"", ".d", ".conf", ".conf.d", "rc", ".cfg", ".ini"} {
		if s, ok := strings.CutSuffix(stem, end); ok && e.usr[s] {
			return true
		}
	}
	return false
}

// namesOfUsr are the names, in lower case, of what packages have put into /usr.
func namesOfUsr(machine string) (map[string]bool, error) {
	names := map[string]bool{}
	for _, dir := range []string{"bin", "sbin", "lib", "lib64", "libexec", "share", "share/doc"} {
		entries, err := os.ReadDir(filepath.Join(machine, "usr", dir))
		if err != nil && !missing(err) {
			return nil, err
		}
		for _, entry := range entries {
			names[strings.ToLower(entry.Name())] = true
		}
	}
	return names, nil
}

// conffiles reads from dpkg's status file which conffiles the packages that are installed have below /etc, with the MD5 sums of what they
// brought.
func conffiles(name string) (map[string]string, error) {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	found := map[string]string{}
	there, within := false, false // the package is installed; the line is of its conffiles
	lines := bufio.NewScanner(f)
	lines.Buffer(make([]byte, 64<<10), maxDpkgLine)
	for lines.Scan() {
		line := lines.Bytes()
		if within && len(line) > 0 && line[0] == ' ' {
			// "/etc/name md5", and "obsolete" or "remove-on-upgrade" where the package of now does not have it. A name may have spaces.
			line := string(line[1:])
			at := strings.LastIndexByte(line, ' ')
			if rel, ok := strings.CutPrefix(line, "/etc/"); ok && there && at > len("/etc/") && len(line)-at-1 == md5.Size*2 {
				found[rel[:at-len("/etc/")]] = line[at+1:]
			}
			continue
		}
		within = bytes.Equal(line, []byte("Conffiles:"))
		if status, ok := bytes.CutPrefix(line, []byte("Status: ")); ok {
			there = string(status) == installedPkg || string(status) == "hold ok installed"
		}
	}
	return found, lines.Err()
}

func isDenied(name string) bool {
	base := strings.ToLower(path.Base(name))
	return matches(deniedPaths, name) || slices.ContainsFunc(denied, func(glob string) bool { return globbed(glob, base) })
}

// matches tells whether a name is, or is below, what one of the globs matches.
func matches(globs []string, name string) bool {
	return slices.ContainsFunc(globs, func(glob string) bool {
		head, rest := name, strings.Count(glob, "/")
		for i := range len(name) {
			if name[i] != '/' {
				continue
			}
			if rest == 0 {
				head = name[:i]
				break
			}
			rest--
		}
		return globbed(glob, head)
	})
}

// globbed is path.Match with a pattern of ours, which is well formed. Most names differ in the first or last letter.
func globbed(glob, name string) bool {
	if first := glob[0]; first != '*' && first != name[0] {
		return false
	}
	if last := glob[len(glob)-1]; last != '*' && last != name[len(name)-1] {
		return false
	}
	ok, _ := path.Match(glob, name)
	return ok
}

// missing tells whether something is not there or not for the server's user: what he cannot read is no business of a sandbox either.
func missing(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist)
}

func ignoreMissing(err error) error {
	if missing(err) {
		return nil
	}
	return err
}
