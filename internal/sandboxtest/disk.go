package sandboxtest

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// onDiskVar is the variable that tells a test's run in a user namespace the directory for its small disk.
const onDiskVar = "SOULBOX_TEST_SMALL_DISK"

// OnSmallDisk calls do with a file system in memory of size bytes: a real one, which can be full. As an ordinary user, it runs the test
// once more in a user namespace, where the user may mount.
func OnSmallDisk(t *testing.T, size int64, do func(dir string)) {
	t.Helper()
	dir := os.Getenv(onDiskVar)
	if dir == "" && os.Geteuid() != 0 {
		onDisk(t)
		return
	}
	if dir == "" {
		dir = Dir(t)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0711", size)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	do(dir)
}

// onDisk runs the test in its own namespaces, as the same user.
func onDisk(t *testing.T) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.count=1")
	cmd.Env = append(os.Environ(), onDiskVar+"="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		AmbientCaps: []uintptr{unix.CAP_SYS_ADMIN},
		UidMappings: []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// Fill fills a file system so that left bytes stay free, with a file that replaces the one of the last call. free removes it.
func Fill(t *testing.T, dir string, left int64) (free func()) {
	t.Helper()
	name := dir + "/ballast"
	var st unix.Statfs_t
	err := os.Remove(name)
	if os.IsNotExist(err) {
		err = nil
	}
	if err == nil {
		err = unix.Statfs(dir, &st)
	}
	var f *os.File
	if err == nil {
		f, err = os.Create(name)
	}
	for step := int64(st.Bavail)*st.Bsize - left; err == nil && step >= 4096; step /= 2 { // other processes may write meanwhile
		if err = unix.Fallocate(int(f.Fd()), 0, sizeOf(f), step); err == unix.ENOSPC {
			err = nil
		}
		if unix.Statfs(dir, &st) == nil {
			step = min(step, 2*max(0, int64(st.Bavail)*st.Bsize-left))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close() // nothing was written through it
	return func() {
		if err := os.Remove(name); err != nil {
			t.Error(err)
		}
	}
}

func sizeOf(f *os.File) int64 {
	info, err := f.Stat()
	if err != nil {
		return 0
	}
	return info.Size()
}
