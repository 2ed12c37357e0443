package guest

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"soulbox.dev/soulbox/agent"
)

// A machine that is restored from a saved state may be one of many copies. So it gets a new boot_id, and the file "generation" in ShellDir
// a higher number, which programs may watch. The host starts its hooks (sandbox/restored.go).

const (
	bootIDFile     = "/proc/sys/kernel/random/boot_id"
	generationFile = "generation"
)

// restored makes the machine distinct from the one that was saved. If one step fails, the others are still done.
func (s *Server) restored() (r agent.Restored, err error) {
	if !s.opts.Init {
		return r, nil // the machine is not a sandbox
	}
	r.Generation, err = s.nextGeneration()
	return r, errors.Join(err, s.renewBootID())
}

// nextGeneration increments the number in the file that programs see; the first one is 0. The number never decreases, whatever programs
// write to the file.
func (s *Server) nextGeneration() (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	dir := s.shells.dir
	if err := errors.Join(os.MkdirAll(filepath.Dir(dir), 0o755), os.MkdirAll(dir, 0o733), os.Chmod(dir, 0o733|os.ModeSticky)); err != nil {
		return s.generation, err
	}
	f, known, err := openOwn(filepath.Join(dir, generationFile), 0o644)
	if err != nil {
		return s.generation, err
	}
	defer f.Close()
	was := s.generation
	if n, err := strconv.ParseInt(strings.TrimSpace(known), 10, 64); err == nil && n < math.MaxInt64 {
		was = max(was, n)
	}
	s.generation = was + 1
	_, err = f.WriteAt(fmt.Appendf(nil, "%d\n", s.generation), 0) // one write, and never shorter, so that readers always see a number
	return s.generation, err
}

// openOwn opens a file of the agent that others may read, and returns its content. Anything else of that name is removed: a program of the
// sandbox made it.
func openOwn(name string, perm fs.FileMode) (f *os.File, text string, err error) {
	for range 3 {
		f, err = os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, perm)
		if err == nil {
			var st unix.Stat_t
			if err = unix.Fstat(int(f.Fd()), &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && int(st.Uid) == os.Geteuid() &&
				st.Nlink == 1 {
				body, err := io.ReadAll(io.LimitReader(f, 64))
				return f, string(body), errors.Join(err, f.Chmod(perm)) // the umask may have removed bits
			}
			_ = f.Close() // without having written to it
		}
		if err := os.RemoveAll(name); err != nil {
			return nil, "", err
		}
	}
	return nil, "", errors.Join(fmt.Errorf("%s is not the agent's", name), err)
}

// renewBootID makes the kernel show a new boot_id: gVisor saves the old one with the machine.
func (s *Server) renewBootID() error {
	var id [16]byte
	rand.Read(id[:])
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // a random UUID
	text := fmt.Appendf(nil, "%x-%x-%x-%x-%x\n", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
	if err := os.MkdirAll(s.opts.SpoolDir, 0o700); err != nil {
		return err
	}
	name := filepath.Join(s.opts.SpoolDir, "boot_id")
	f, _, err := openOwn(name, 0o444)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(text, 0)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if shown, err := os.ReadFile(bootIDFile); err == nil && bytes.Equal(shown, text) {
		return nil // it was mounted before the machine was saved
	}
	return mountOn(bootIDFile, agent.MountRequest{Source: name, ReadOnly: true})
}
