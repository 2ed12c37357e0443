package gvisor_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/internal/erofs"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// tinyELF is a program of 135 bytes that exits with 42. It fits into one block, which gVisor can map only if it is not inline.
var tinyELF = []byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x3e\x00\x01\x00\x00\x00\x78\x00\x40\x00\x00\x00" +
	"\x00\x00\x40\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x40\x00\x38\x00\x01\x00" +
	"\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x40\x00\x00\x00" +
	"\x00\x00\x00\x00\x40\x00\x00\x00\x00\x00\x87\x00\x00\x00\x00\x00\x00\x00\x87\x00\x00\x00\x00\x00\x00\x00\x00\x10" +
	"\x00\x00\x00\x00\x00\x00\xb8\x3c\x00\x00\x00\xbf\x2a\x00\x00\x00\x0f\x05\x00\x00\x00")

// TestImage: what is difficult for gVisor in images works: small programs, hard links, links, owners, modes, devices, times, and /tmp on
// disk.
func TestImage(t *testing.T) {
	dir := sandboxtest.Dir(t)
	f, err := os.OpenFile(filepath.Join(dir, "tiny.erofs"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	base, err := erofs.Open(sandboxtest.Image(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	root, err := base.Tree()
	if err != nil {
		t.Fatal(err)
	}
	w := erofs.NewWriter(f)
	if err := w.Base(t.Context(), base); err != nil {
		t.Fatal(err)
	}
	add := func(text string) erofs.Extent {
		e, err := w.Add(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	stamp := time.Unix(978_307_200, 0)
	shared := &erofs.Node{Mode: unix.S_IFREG | 0o644, Data: add("shared\n"), Time: stamp}
	delete(root.Children["tmp"].Children, ".X11-unix") // leaves /tmp empty
	root.Children["t"] = &erofs.Node{Mode: unix.S_IFDIR | 0o755, Children: map[string]*erofs.Node{
		"tiny": {Mode: unix.S_IFREG | 0o755, Data: add(string(tinyELF))}, "one": shared, "two": shared,
		"long":   {Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("./", 500) + "one"},
		"own":    {Mode: unix.S_IFREG | 0o640, UID: 1000, GID: 54321, Data: add("mine")},
		"suid":   {Mode: unix.S_IFREG | 0o4755, UID: 0, Data: root.Children["usr"].Children["bin"].Children["id"].Data},
		"null":   {Mode: unix.S_IFCHR | 0o666, Device: unix.Mkdev(1, 3)},
		"closed": {Mode: unix.S_IFDIR | 0o700, Children: map[string]*erofs.Node{"x": {Mode: unix.S_IFREG | 0o600}}},
	}}
	if err := w.Finish(root); err != nil {
		t.Fatal(err)
	}
	for _, inMemory := range []bool{false, true} {
		limits := sandbox.Limits{DiskInMemory: inMemory, Disk: 64 << 20}
		_, c := newSandbox(t, sandbox.CreateOptions{Base: &sandbox.Template{Name: "tiny", Image: f.Name()}, Limits: limits})
		for command, want := range map[string]string{
			"/t/tiny; echo $?": "42\n",
			"stat -c '%h %i' /t/one /t/two | sort -u | wc -l": "1\n",
			"cat /t/long":                         "shared\n",
			"stat -c '%u %g %a %Y' /t/own /t/one": "1000 54321 640 0\n0 0 644 978307200\n",
			"cat /t/closed/x 2>&1":                "ermission denied",
			"/t/suid | cut -d' ' -f3":             "euid=0(root)\n",
			"ls -l /t/null 2>&1":                  "No such file",
			// gVisor gives devices in images no numbers, and so takes them for whiteouts
			"echo x >> /t/one 2>&1": "ermission denied",
			"echo kept > /tmp/x; df --output=fstype /tmp / | tail -n 2 | sort -u | wc -l": "1\n",
			"head -c 100000000 /dev/zero > /tmp/big 2>&1; " +
				"stat -c %s /tmp/big | { read n; [ $n -lt 70000000 ] && echo full; }; rm /tmp/big": "full\n",
		} {
			if got := output(sandboxtest.Run(t, c, command)); !strings.Contains(got, want) {
				t.Errorf("in memory %v: %s: %q, want %q", inMemory, command, got, want)
			}
		}
		got := output(sandboxtest.RunAs(t, c, "root",
			"echo more >> /t/one; cat /t/one /t/two; rm -rf /usr/bin/cat; ls /usr/bin/cat 2>&1; apt 2>/dev/null; true"))
		if !strings.HasPrefix(got, "shared\nmore\n") || !strings.Contains(got, "No such file") {
			t.Errorf("%q", got)
		}
	}
}
