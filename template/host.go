package template

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"soulbox.dev/soulbox/internal/durable"
	"soulbox.dev/soulbox/sandbox"
)

// HostName is the name of the template that shows this machine's programs.
const HostName = "host"

// programs are the directories of programs and libraries. Those that are links into /usr stay links.
var programs = []string{"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"}

// empty are the directories that every machine has, with their modes. The hidden one in /tmp keeps runsc from mounting a tmpfs there, whose
// content would count as the sandbox's memory.
var empty = map[string]fs.FileMode{
	"dev": 0o755, "proc": 0o755, "sys": 0o755, "run": 0o755, "run/lock": fs.ModeSticky | 0o777, "tmp": fs.ModeSticky | 0o777,
	"tmp/.X11-unix": fs.ModeSticky | 0o777, "root": 0o700, "home": 0o755,
	"home/user": 0o755, "mnt": 0o755, "opt": 0o755, "srv": 0o755, "var": 0o755, "var/tmp": fs.ModeSticky | 0o777, "var/log": 0o755,
	"var/cache": 0o755,
	"var/lib":   0o755, "var/lib/soulbox": 0o700, "var/spool": 0o755, "etc": 0o755, ".soulbox": 0o755,
}

// files are written, not copied from the machine. Their users are the ones that packages expect and whose numbers are the same on all
// Debian machines.
var files = map[string]string{
	"etc/passwd": "root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n" +
		"man:x:6:12:man:/var/cache/man:/usr/sbin/nologin\nwww-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\n" +
		"user:x:1000:1000:user:/home/user:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
	"etc/group": "root:x:0:\ndaemon:x:1:\ntty:x:5:\nman:x:12:\nwww-data:x:33:\nstaff:x:50:\nuser:x:1000:\nnogroup:x:65534:\n",
	"etc/shadow": "root:*:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\nman:*:19000:0:99999:7:::\nwww-data:*:19000:0:99999:7:::\n" +
		"user:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n",
	"etc/hosts":    "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
	"etc/hostname": "sandbox\n",
	"etc/fstab":    "",
	"home/user/.bashrc": "# ~/.bashrc: for interactive shells\n[ -z \"$PS1\" ] && return\nPS1='\\u@\\h:\\w\\$ '\n" +
		"alias ls='ls --color=auto'\nalias ll='ls -l'\n",
	"home/user/.profile": "# ~/.profile: for login shells\n[ -n \"$BASH_VERSION\" ] && [ -f ~/.bashrc ] && . " +
		"~/.bashrc\nPATH=\"$HOME/.local/bin:$HOME/bin:$PATH\"\n",
}

// host makes the root of the host template once per server. The root is content-addressed and never changed, because sandboxes of other
// servers use it.
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
	t, err := hostTree("/", mounts, links)
	if err != nil {
		return "", err
	}
	return durable.Install(s.Dir, fmt.Sprintf("host-%s-%d", t.digest()[:16], s.UID), func(temp string) error {
		return errors.Join(t.write(temp), s.giveAway(temp))
	})
}

// giveAway makes the user that sandboxes run as the owner of a tree.
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

// hostTree returns the root's own files and what programs need of the machine's /etc.
func hostTree(machine string, mounts []sandbox.Mount, links map[string]string) (*rootTree, error) {
	t := newRootTree()
	for name, mode := range empty {
		t.dir(name, mode)
	}
	for _, m := range mounts {
		t.dir(strings.TrimPrefix(m.Destination, "/"), 0o755)
	}
	for name, target := range links {
		t.link(name, target)
	}
	for name, text := range files {
		t.file(name, 0o644, []byte(text))
	}
	t.link("etc/mtab", "/proc/self/mounts")
	t.link("var/run", "/run")
	return t, addSettings(t, machine)
}
