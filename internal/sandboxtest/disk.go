package sandboxtest

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// onDiskVar names the directory that the run of a test on a small disk is for.
const onDiskVar = "SOULBOX_TEST_SMALL_DISK"

// OnSmallDisk does something with a file system in memory of so many bytes: a real one, which can be full. An ordinary user mounts it in a
// user namespace, in which the test runs once more.
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

// onDisk runs the test in namespaces of its own, as the same user.
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

// Fill fills a file system but for so many bytes, with a file that is at most as large as before. It gives what removes that.
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
	for step := int64(st.Bavail)*st.Bsize - left; err == nil && step >= 4096; step /= 2 { // others may write meanwhile
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
	_ = f.Close() // it is empty
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
