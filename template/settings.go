package template

import (
	"bufio"
	"bytes"
	"crypto/md5" // dpkg records MD5 sums
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

// Of the machine's /etc, the host template shows these files, if everybody may read them:
//
//   - those that settings names: programs of all kinds need them;
//   - those that the packages of /usr own: with dpkg their conffiles, otherwise files named like something in /usr;
//   - links to any of these, and to /usr.
//
// It does not show passwords, keys, or files that say who and where this machine is. They are recognized by name (denied), by mode, and by
// content (secret); a file that is exactly as its package brought it is exempt from the last test.

// settings are the files of /etc that programs need, whatever made them, as globs.
var settings = []string{
	"alternatives", "bash.bashrc", "ca-certificates.conf", "ca-certificates", "crypto-policies", "debian_version", "environment.d",
	"fonts", "gai.conf", "inputrc", "java*", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "locale.alias", "locale.conf", "localtime",
	"login.defs", "lsb-release", "magic", "magic.mime", "man.conf", "man_db.conf", "manpath.config", "mime.types", "mke2fs.conf",
	"networks", "nsswitch.conf", "os-release", "pam.d", "perl", "pki/ca-trust", "pki/tls", "profile", "profile.d", "protocols", "python*",
	"rpc", "services", "sgml", "shells", "ssl/cert.pem", "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone", "vim", "xml",
}

// denied are names that are never shown, in any directory; in lower case.
var denied = []string{
	// Passwords and keys, and backups of files that hold them.
	"*.cred", "*.jks", "*.kdbx", "*.key", "*.keystore", "*.keytab", "*.ovpn", "*.p12", "*.pfx", "*.ppk", "*.psk", "*.secret", "*_key",
	"*credential*", "*htpasswd*", "*passwords*", "*secrets*", "*token", "*tokens", "auth.conf*", "auth.json", "authorized_keys*",
	"bindpw*", "chap-secrets", "doas.conf", "gshadow*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "id_rsa*", "netrc", ".netrc", "opasswd*",
	"passwd.client", "pap-secrets", ".pgpass", "private", "sasl_passwd*", "shadow*", "ssh_host_*", "sudoers*", "*~", "*-", "#*#", "*.bak",
	"*.dpkg-*", "*.old", "*.orig", "*.rpmnew", "*.rpmsave", "*.swp", "*.ucf-*",
	// Who and where this machine is, and which machines it knows.
	"*known_hosts*", "hostid", "hostnqn", "machine-id", "machine-info",
	".git", ".svn", ".hg", ".bzr", // for those who keep /etc in version control
}

// deniedPaths are files that say who and where this machine is, what it starts, and how it is reached; as globs below /etc.
var deniedPaths = []string{
	"NetworkManager", "adjtime", "aliases*", "anacrontab", "apt", "bluetooth", "ceph", "cloud", "cron*", "crypttab", "default/grub*",
	"dhcp", "docker", "environment", "exim4", "exports*", "fstab*", "group*", "grub*", "hostname", "hosts*", "init.d", "ipsec*", "iscsi",
	"iwd", "krb5.conf*", "kubernetes", "letsencrypt", "libvirt", "logrotate.d", "lvm", "mail", "mailname", "mdadm", "motd", "mtab",
	"multipath*", "netplan", "network", "nvme", "openvpn", "passwd*", "postfix", "ppp", "rancher", "rc?.d", "resolv*", "samba", "snmp",
	"ssl/private", "sssd", "strongswan*", "subgid*", "subuid*", "swanctl", "systemd", "udev", "update-motd.d", "wireguard",
	"wpa_supplicant",
}

// secret matches what looks like a password or a key in a text: NAME = VALUE, <name>VALUE<, //user:password@host, "machine … password …".
var secret = regexp.MustCompile(`(?im)^[^#;\n]*(?:(?:passw(?:or)?d|passphrase|secret|token|api_?key|access_?key|bindpw|` +
	`credentials?|_auth)["']?` +
	`(?:[ \t]*[:=][ \t]*|>)["']?[^\s"'<]|//[^/\s:@]+:[^/\s@]+@|\bpassword[ \t]+\S+[ \t]*$)`)

var privateKey = []byte("PRIVATE KEY-----")

const (
	maxSetting   = 4 << 20  // of one file, in bytes
	maxSettings  = 64 << 20 // of all files, in bytes
	maxWalked    = 50_000   // entries of /etc that are visited
	maxEtcDepth  = 16
	dpkgStatus   = "var/lib/dpkg/status"
	maxDpkgLine  = 1 << 20
	installedPkg = "install ok installed"
)

// etc collects files from a machine's /etc.
type etc struct {
	tree    *rootTree
	machine string // the directory that is the machine's root
	// shipped are the conffiles below /etc of the installed packages, with the MD5 sums of what the packages brought; nil without dpkg.
	shipped map[string]string
	usr     map[string]bool   // names in /usr, for machines without dpkg
	links   map[string]string // shown if they lead to something that is shown
	walked  int
}

// addSettings adds the files of the machine's /etc that programs need.
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
	for more := true; more; { // links may lead to other links
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

// walk visits the entries of a directory below /etc. If all is set, every entry is wanted.
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
			continue // it has been removed since
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

// take adds an entry that is wanted and that everybody may read; it walks into directories.
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

// read adds a file if it is as its package brought it, or if nothing in it looks like a secret.
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

// hasSecret reports whether a text has a password or a key in it. In a binary file it looks for keys only.
func hasSecret(text []byte) bool {
	if bytes.Contains(text, privateKey) {
		return true
	}
	return !bytes.Contains(text, []byte{0}) && !bytes.HasPrefix(text, []byte("-----BEGIN CERTIFICATE-----")) && secret.Match(text)
}

// leads reports whether a link of /etc leads to something that a sandbox sees.
func (e *etc) leads(name, target string) bool {
	if !path.IsAbs(target) {
		target = path.Join("/etc", path.Dir(name), target)
	}
	target = path.Clean(target)
	return strings.HasPrefix(target, "/usr/") || strings.HasPrefix(target, "/etc/") && e.tree.has(target[1:])
}

// named reports whether an entry directly below /etc has the name of something in /usr, such as nginx, resolvconf.conf or logrotate.d.
// Without dpkg it counts as belonging to that.
func (e *etc) named(name string) bool {
	stem := strings.ToLower(name)
	for _, end := range []string{"", ".d", ".conf", ".conf.d", "rc", ".cfg", ".ini"} {
		if s, ok := strings.CutSuffix(stem, end); ok && e.usr[s] {
			return true
		}
	}
	return false
}

// namesOfUsr returns the names, in lower case, of what packages have put into /usr.
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

// conffiles reads from dpkg's status file the conffiles below /etc of the installed packages, with the MD5 sums of what the packages
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
	there, within := false, false // whether the package is installed; whether the line belongs to its conffiles
	lines := bufio.NewScanner(f)
	lines.Buffer(make([]byte, 64<<10), maxDpkgLine)
	for lines.Scan() {
		line := lines.Bytes()
		if within && len(line) > 0 && line[0] == ' ' {
			// "/etc/name md5", then "obsolete" or "remove-on-upgrade" if the current package does not have the file. A name may have
			// spaces.
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

// matches reports whether one of the globs matches a name or a directory above it.
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

// globbed is path.Match with one of our own patterns, which are well formed. It first compares the first and last letters, in which most
// names differ.
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

// missing reports whether a file does not exist or the server's user cannot read it: such a file is not for sandboxes either.
func missing(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist)
}

func ignoreMissing(err error) error {
	if missing(err) {
		return nil
	}
	return err
}
