package template

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"soulbox.dev/soulbox/sandbox"
)

// HostName is the name of the template that shows this machine's programs.
const HostName = "host"

// programs are the directories of programs and libraries; where they are links into /usr, the links are kept.
var programs = []string{"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"}

// settings are the files of /etc that programs need, as globs. What is not here is not seen: no passwords, keys, hosts, mounts or
// credentials of this machine.
var settings = []string{
	"alternatives", "bash.bashrc", "ca-certificates.conf", "ca-certificates", "debian_version", "environment.d", "fonts", "gai.conf", "inputrc",
	"java*", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "locale.alias", "locale.conf", "localtime", "lsb-release", "magic", "magic.mime",
	"mime.types", "mke2fs.conf", "networks", "nsswitch.conf", "os-release", "perl", "profile", "profile.d", "protocols", "python*", "rpc", "services",
	"shells", "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone", "vim",
}

// empty are directories that a machine has, with their modes. The hidden one in /tmp keeps runsc from mounting a tmpfs there,
// whose content would be memory of the sandbox.
var empty = map[string]fs.FileMode{
	"dev": 0o755, "proc": 0o755, "sys": 0o755, "run": 0o755, "run/lock": 0o1777, "tmp": 0o1777, "tmp/.X11-unix": 0o1777, "root": 0o700, "home": 0o755,
	"home/user": 0o755, "mnt": 0o755, "opt": 0o755, "srv": 0o755, "var": 0o755, "var/tmp": 0o1777, "var/log": 0o755, "var/cache": 0o755,
	"var/lib": 0o755, "var/lib/soulbox": 0o700, "var/spool": 0o755, "etc": 0o755, ".soulbox": 0o755,
}

// files are written, not copied.
var files = map[string]string{
	"etc/passwd": "root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n" +
		"user:x:1000:1000:user:/home/user:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
	"etc/group":    "root:x:0:\ndaemon:x:1:\ntty:x:5:\nstaff:x:50:\nuser:x:1000:\nnogroup:x:65534:\n",
	"etc/shadow":   "root:*:19000:0:99999:7:::\nuser:*:19000:0:99999:7:::\n",
	"etc/hosts":    "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
	"etc/hostname": "sandbox\n",
	"etc/fstab":    "",
	"home/user/.bashrc": "# ~/.bashrc: for interactive shells\n[ -z \"$PS1\" ] && return\nPS1='\\u@\\h:\\w\\$ '\n" +
		"alias ls='ls --color=auto'\nalias ll='ls -l'\n",
	"home/user/.profile": "# ~/.profile: for login shells\n[ -n \"$BASH_VERSION\" ] && [ -f ~/.bashrc ] && . ~/.bashrc\nPATH=\"$HOME/.local/bin:$HOME/bin:$PATH\"\n",
}

// host makes the root of the host template once per server. It is content-addressed and never changed: sandboxes of other servers use it.
func (s *Store) host() (sandbox.Template, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := sandbox.Template{Name: HostName}
	links := map[string]string{}
	for _, name := range programs {
		path := "/" + name
		info, err := os.Lstat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return t, fmt.Errorf("template host: %w", err)
		case info.Mode()&fs.ModeSymlink != 0:
			if links[name], err = os.Readlink(path); err != nil {
				return t, fmt.Errorf("template host: %w", err)
			}
		case info.IsDir():
			t.Mounts = append(t.Mounts, sandbox.Mount{Source: path, Destination: path})
		}
	}
	if s.root == "" {
		root, err := s.makeRoot(t.Mounts, links)
		if err != nil {
			return t, fmt.Errorf("template host: %w", err)
		}
		s.root = root
	}
	t.Root = s.root
	return t, nil
}

// makeRoot makes the directory that is the base of the root, or finds one with the same content.
func (s *Store) makeRoot(mounts []sandbox.Mount, links map[string]string) (string, error) {
	return sandbox.Install(s.Dir, func(temp string) (string, error) {
		if err := fill(temp, mounts, links); err != nil {
			return "", err
		}
		sum, err := digest(temp)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("host-%s-%d", sum[:16], s.UID), s.giveAway(temp)
	})
}

// giveAway gives a tree to whom sandboxes run as.
func (s *Store) giveAway(root string) error {
	if s.UID == 0 {
		return nil
	}
	return filepath.WalkDir(root, func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(name, s.UID, s.GID)
	})
}

func fill(root string, mounts []sandbox.Mount, links map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(empty)) {
		if err := makeDir(filepath.Join(root, name), empty[name]); err != nil {
			return err
		}
	}
	for _, m := range mounts {
		if err := makeDir(filepath.Join(root, m.Destination), 0o755); err != nil {
			return err
		}
	}
	for name, target := range links {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			return err
		}
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := os.Symlink("/proc/self/mounts", filepath.Join(root, "etc/mtab")); err != nil {
		return err
	}
	if err := os.Symlink("/run", filepath.Join(root, "var/run")); err != nil {
		return err
	}
	for _, glob := range settings {
		found, err := filepath.Glob(filepath.Join("/etc", glob))
		if err != nil {
			return err
		}
		for _, name := range found {
			if err := copyTree(name, filepath.Join(root, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

func makeDir(name string, mode fs.FileMode) error {
	if err := os.MkdirAll(name, 0o755); err != nil {
		return err
	}
	// Chmod with the sticky bit in Go's own notation.
	perm := mode & 0o777
	if mode&0o1000 != 0 {
		perm |= fs.ModeSticky
	}
	return os.Chmod(name, perm)
}

// maxSetting bounds what is copied of one file of /etc, in bytes.
const maxSetting = 4 << 20

// copyTree copies what everybody may read. What cannot be read by the server's user is no business of a sandbox either.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		rel, err := filepath.Rel(from, name)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		info, err := entry.Info()
		if err != nil {
			return nil // gone since
		}
		switch {
		case entry.IsDir():
			if info.Mode().Perm()&0o005 != 0o005 {
				return fs.SkipDir
			}
			return os.MkdirAll(target, 0o755)
		case info.Mode()&fs.ModeSymlink != 0:
			link, err := os.Readlink(name)
			if err != nil {
				return nil // gone since
			}
			if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
				return err
			}
			return os.Symlink(link, target)
		case info.Mode().IsRegular() && info.Mode().Perm()&0o004 != 0 && info.Size() <= maxSetting:
			return copyFile(name, target, info.Mode().Perm())
		}
		return nil
	})
}

func copyFile(from, to string, perm fs.FileMode) error {
	src, err := os.Open(from)
	if err != nil {
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	defer src.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm|0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// digest sums names, modes and contents of a tree.
func digest(root string) (string, error) {
	sum := sha256.New()
	err := filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		fmt.Fprintf(sum, "%q %v", rel, info.Mode())
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			link, err := os.Readlink(name)
			if err != nil {
				return err
			}
			fmt.Fprintf(sum, " %q", link)
		case info.Mode().IsRegular():
			f, err := os.Open(name)
			if err != nil {
				return err
			}
			fmt.Fprintf(sum, " %d ", info.Size())
			_, err = io.Copy(sum, f)
			return errors.Join(err, f.Close())
		}
		return nil
	})
	return hex.EncodeToString(sum.Sum(nil)), err
}
