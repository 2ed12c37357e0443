package sandboxtest

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// programsVar is the variable that tells a test binary that runs as an ordinary user where the built programs are.
const programsVar = "SOULBOX_TEST_PROGRAMS"

const runtimeVar = "SOULBOX_RUNTIME_DIR"

// ordinaryID is the user ID of the tests' second run, if they were started as root.
const ordinaryID = 65_432

// Main runs a package's tests and, if it was started as root, runs them again as an ordinary user with an empty home. If asRoot names
// tests, root runs only these, unless -run asks for others: name the tests whose result depends on the user. Tests that need runsc fail if
// it does not run: none is skipped.
func Main(m *testing.M, asRoot ...string) {
	flag.Parse()
	run := flag.Lookup("test.run").Value
	if all := run.String(); os.Geteuid() == 0 && len(asRoot) > 0 && all == "" {
		if err := run.Set("^(" + strings.Join(asRoot, "|") + ")$"); err != nil {
			panic(err)
		}
	}
	runtime, err := os.MkdirTemp("", "soulbox-run-") // so that servers of tests cannot be found from outside
	if err == nil {
		err = os.Setenv(runtimeVar, runtime)
	}
	if err != nil {
		panic(err)
	}
	user := func() (said []byte, err error) { return nil, nil }
	if os.Geteuid() == 0 && os.Getenv("UPDATE_GOLDEN") == "" { // at the same time: both mostly wait. Goldens are recorded once
		user = again()
	}
	code := m.Run()
	said, err := user()
	_, _ = os.Stdout.Write(said) // if the output is not read, nothing else is lost
	if err = errors.Join(err, os.RemoveAll(runtime)); err != nil {
		fmt.Fprintln(os.Stderr, "tests as an ordinary user:", err)
		code = 1
	}
	os.Exit(code)
}

// RuntimeEnv returns the environment variable that keeps the sockets of servers that a test starts from being found from outside.
func RuntimeEnv() string { return runtimeVar + "=" + os.Getenv(runtimeVar) }

// again starts this test binary as an ordinary user; wait waits for its end.
func again() (wait func() (said []byte, err error)) {
	dir, err := os.MkdirTemp("", "soulbox-user-")
	var cmd *exec.Cmd
	var out bytes.Buffer
	if err == nil {
		if cmd, err = asUser(dir); err == nil {
			cmd.Stdout, cmd.Stderr = &out, &out
			err = cmd.Start()
		}
	}
	return func() ([]byte, error) {
		if err == nil {
			err = cmd.Wait()
		}
		if dir != "" {
			err = errors.Join(err, os.RemoveAll(dir))
		}
		return append([]byte("as an ordinary user\n"), out.Bytes()...), err
	}
}

// asUser prepares the run as an ordinary user in a directory.
func asUser(dir string) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	wd, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	copies := map[string]string{self: "test", filepath.Join(wd, "testdata"): "testdata"}
	for _, name := range []string{"README.md", "docs", "examples"} { // for tests of commands: they run the examples
		copies[filepath.Join(wd, "../..", name)] = name
	}
	programs, err := findPrograms()
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"runsc", "soulbox-agent", "soulbox-mcp", "soulbox", "spawntime"} {
		copies[filepath.Join(programs, name)] = name
	}
	for from, to := range copies {
		if err := copyAll(from, filepath.Join(dir, to)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	home := filepath.Join(dir, "home")
	if err := os.Mkdir(home, 0o700); err != nil {
		return nil, err
	}
	if err := errors.Join(os.Chown(home, ordinaryID, ordinaryID), os.Chmod(dir, 0o755)); err != nil {
		return nil, err
	}
	var args []string
	for _, a := range os.Args[1:] {
		if !strings.HasPrefix(a, "-test.testlogfile") && !strings.HasPrefix(a, "-test.gocoverdir") &&
			!strings.HasPrefix(a, "-test.coverprofile") &&
			!strings.HasPrefix(a, "-test.outputdir") {
			args = append(args, a)
		}
	}
	cmd := exec.Command(filepath.Join(dir, "test"), args...)
	cmd.Dir = dir
	cmd.Env = []string{"HOME=" + home, "TMPDIR=" + home, "PATH=" + os.Getenv("PATH"), programsVar + "=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinaryID, Gid: ordinaryID}}
	return cmd, nil
}

func copyAll(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return os.CopyFS(to, os.DirFS(from))
	}
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// findPrograms finds bin/ of the module.
func findPrograms() (string, error) {
	if dir := os.Getenv(programsVar); dir != "" {
		return dir, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "deps_test.go")); err == nil {
			bin := filepath.Join(dir, "bin")
			if _, err := os.Stat(filepath.Join(bin, "runsc")); err != nil {
				return "", fmt.Errorf("%w: run 'make build' first", err)
			}
			return bin, nil
		}
	}
	return "", errors.New("the module's root is not found")
}

// Amount is how much of something a test repeats or makes: the full amount, or with -short, as in 'make test', one that still finds a fault
// that occurs often.
func Amount(full, short int) int {
	if testing.Short() {
		return short
	}
	return full
}

// AsUserAlone skips a slow test as root: Main runs it again as an ordinary user.
func AsUserAlone(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		t.Skip("slow: runs only when the tests run again as an ordinary user")
	}
}

// Program returns the path of a built program: runsc, soulbox-agent or soulbox-mcp.
func Program(t testing.TB, name string) string {
	t.Helper()
	dir, err := findPrograms()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

// AgentPath returns the path of a copy of the agent in its own directory, which any user can pass through.
func AgentPath(t testing.TB) string {
	t.Helper()
	path := filepath.Join(Dir(t), "agent", "soulbox-agent") // its image is made beside the directory
	if err := errors.Join(os.Mkdir(filepath.Dir(path), 0o755), copyAll(Program(t, "soulbox-agent"), path)); err != nil {
		t.Fatal(err)
	}
	return path
}

// Dir makes a temporary directory that any user can pass through, as the sandboxes of a server that runs as root must. When the test ends,
// no process of a sandbox in it may run, and it must be removable, so nothing may be mounted in it.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "soulbox-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left := Processes(dir); len(left) > 0 {
			t.Errorf("processes are left: %v", left)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("something is left: %v", err)
		}
	})
	return dir
}

// Processes lists the processes on the host whose command line names dir: sentries and gofers of sandboxes in it.
func Processes(dir string) []int {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil
	}
	var pids []int
	for _, name := range lines {
		line, err := os.ReadFile(name)
		pid, perr := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err == nil && perr == nil && pid != os.Getpid() && bytes.Contains(line, []byte("--root="+dir)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Eventually waits until a condition holds. The time limit is far beyond what it should take: it only keeps a failing test from hanging.
func Eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}
