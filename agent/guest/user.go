package guest

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/agent/guest/rawsys"
)

// identity is the user, with groups and home, as which a process runs.
type identity struct {
	name   string
	uid    uint32
	gid    uint32
	groups []uint32
	home   string
}

// builtin are the users of every sandbox.
var builtin = map[string]identity{
	"root": {name: "root", home: "/root"},
	"user": {name: "user", uid: 1000, gid: 1000, home: "/home/user"},
}

// lookup finds a user by name, uid or uid:gid; "" is the sandbox's default user. Outside a sandbox there is only the agent's own user.
func (s *Server) lookup(spec string) (identity, error) {
	if !s.opts.Init {
		self := identity{name: strconv.Itoa(os.Getuid()), uid: uint32(os.Getuid()), gid: uint32(os.Getgid()), home: s.opts.Home}
		if spec == "" || spec == self.name {
			return self, nil
		}
		return identity{}, fmt.Errorf("user %q: %w", agent.Clip(spec, 80), agent.ErrNoUser)
	}
	if spec == "" {
		s.mu.Lock()
		spec = cmp.Or(s.config.User, "user")
		s.mu.Unlock()
	}
	name, group, numeric := strings.Cut(spec, ":")
	id := identity{home: "/"}
	found := false
	for _, f := range s.fields.read("/etc/passwd", 7) {
		if f[0] != name && f[2] != name {
			continue
		}
		uid, uerr := strconv.ParseUint(f[2], 10, 32)
		gid, gerr := strconv.ParseUint(f[3], 10, 32)
		if uerr == nil && gerr == nil {
			id, found = identity{name: f[0], uid: uint32(uid), gid: uint32(gid), home: f[5]}, true
			break
		}
	}
	if known, ok := builtin[name]; ok && !found {
		id, found = known, true // the sandbox stays usable even if the guest has lost its /etc/passwd
	}
	if !found {
		uid, err := strconv.ParseUint(name, 10, 32)
		if err != nil || uid == 1<<32-1 { // 1<<32-1 means "no change" to the kernel
			return identity{}, fmt.Errorf("user %q: %w", agent.Clip(spec, 80), agent.ErrNoUser)
		}
		id = identity{name: name, uid: uint32(uid), gid: uint32(uid), home: "/"}
	}
	if numeric {
		gid, err := strconv.ParseUint(group, 10, 32)
		if err != nil {
			return identity{}, fmt.Errorf("user %q: %w", agent.Clip(spec, 80), agent.ErrNoUser)
		}
		id.gid = uint32(gid)
	}
	id.groups = s.groupsOf(id, !numeric)
	return id, nil
}

// groupsOf returns the groups that a login gives a user: first the user's own, then those in /etc/group. A user given as uid:gid has only
// that group, as in Docker.
func (s *Server) groupsOf(id identity, named bool) []uint32 {
	groups := []uint32{id.gid}
	if !named {
		return groups
	}
	have := map[uint32]bool{id.gid: true}
	for _, f := range s.fields.read("/etc/group", 4) {
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil || gid == 1<<32-1 || have[uint32(gid)] || !strings.Contains(","+f[3]+",", ","+id.name+",") {
			continue
		}
		have[uint32(gid)] = true
		groups = append(groups, uint32(gid))
	}
	return groups
}

func (s *Server) describeUser(r agent.UserRequest) (agent.User, error) {
	id, err := s.lookup(r.User)
	if err != nil {
		return agent.User{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return agent.User{Name: id.name, UID: id.uid, GID: id.gid, Home: id.home, Cwd: cmp.Or(s.config.Cwd, id.home)}, nil
}

// fieldCache keeps the fields of passwd(5) and group(5) files as long as the files do not change.
type fieldCache struct {
	mu    sync.Mutex
	files map[string]cachedFields
}

type cachedFields struct {
	stat   unix.Statx_t
	fields [][]string
}

// read returns the fields of each line that has at least n.
func (c *fieldCache) read(name string, n int) [][]string {
	st, err := rawsys.Stat(name)
	if err != nil {
		return nil
	}
	st.Atime = unix.StatxTimestamp{} // reading the file is not a change
	c.mu.Lock()
	defer c.mu.Unlock()
	if old, ok := c.files[name]; ok && old.stat == st {
		return old.fields
	}
	if c.files == nil {
		c.files = map[string]cachedFields{}
	}
	fields := passwdFields(name, n)
	c.files[name] = cachedFields{st, fields}
	return fields
}

// passwdFields reads a file of passwd(5) or group(5). The guest controls its content, so its size is bounded and broken lines are skipped.
func passwdFields(name string, n int) [][]string {
	f, err := openRegular(name)
	if err != nil {
		return nil
	}
	defer f.Close()
	var all [][]string
	lines := bufio.NewScanner(io.LimitReader(f, 1<<20))
	for lines.Scan() && len(all) < 10_000 {
		if fields := strings.Split(lines.Text(), ":"); len(fields) >= n {
			all = append(all, fields)
		}
	}
	return all
}

// ownerNames maps ids to names, for listings.
type ownerNames struct{ users, groups map[string]string }

func (s *Server) ownerNames() ownerNames {
	o := ownerNames{users: map[string]string{}, groups: map[string]string{}}
	for _, f := range s.fields.read("/etc/passwd", 7) {
		if _, ok := o.users[f[2]]; !ok {
			o.users[f[2]] = f[0]
		}
	}
	for _, f := range s.fields.read("/etc/group", 4) {
		if _, ok := o.groups[f[2]]; !ok {
			o.groups[f[2]] = f[0]
		}
	}
	return o
}

func nameOf(names map[string]string, id uint32) string {
	key := strconv.FormatUint(uint64(id), 10)
	if name, ok := names[key]; ok {
		return name
	}
	return key
}
