package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

// BenchmarkE2B uses the HTTP API as E2B's clients do: commands, and large files compared with nginx on the same ones.
func BenchmarkE2B(b *testing.B) {
	if b.N > 1 {
		return // it counts its own iterations, once
	}
	var t table
	defer func() { t.print() }()
	w := serve(b, "")
	box := newBox(b, w, `{"templateID":"base","timeout":3000}`)
	for what, body := range map[string]string{"Start /bin/true": `{"process":{"cmd":"/bin/true"}}`,
		"Start bash -l -c true, as commands.run does": `{"process":{"cmd":"/bin/bash","args":["-l","-c","true"]}}`} {
		t.measure(b, what, 200, func() {
			if s := box.stream(startCall, body, nil); s.end == nil || len(s.end) > 0 {
				b.Fatalf("%+v", s)
			}
		})
	}
	t.measure(b, "Stat", 300, func() { box.must("POST", "/filesystem.Filesystem/Stat", `{"path":"/tmp"}`) })
	t.measure(b, "a file of 1 KB in", 300, func() { box.must("POST", "/files?path=/tmp/small", string(make([]byte, 1024))) })
	t.measure(b, "a file of 1 KB out", 300, func() { box.must("GET", "/files?path=/tmp/small", "") })
	t.measure(b, "create and kill by REST", 10, func() { newBox(b, w, `{"templateID":"base"}`).kill() })
	const size = 1 << 30
	in, out := box.transfer(size)
	t.say("1 GiB in and out, through the server", fmt.Sprintf("%.0f and %.0f MB/s; the server took %d MB at most", in, out,
		peakMemory(b, w.cmd.Process.Pid)>>20))
	if in, out, err := benchNginx(b, size); err != nil {
		t.say("the same by nginx", err.Error())
	} else {
		t.say("the same by nginx, a file of this machine", fmt.Sprintf("%.0f and %.0f MB/s", in, out))
	}
}

func (b *remoteBox) must(method, path, body string) {
	if err := b.expect(method, path, body, http.StatusOK, ""); err != nil {
		b.t.Fatal(err)
	}
}

// benchNginx sends a file to nginx and gets it back, in MB/s.
func benchNginx(b *testing.B, size int64) (in, out float64, err error) {
	program, err := exec.LookPath("/usr/sbin/nginx")
	if err != nil {
		return 0, 0, fmt.Errorf("nginx is missing: apt-get install nginx-light")
	}
	dir := sandboxtest.Dir(b)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, 0, err
	}
	at := l.Addr().String()
	if err := l.Close(); err != nil {
		return 0, 0, err
	}
	config := fmt.Sprintf(`worker_processes 1; daemon off; pid %[1]s/pid; error_log %[1]s/error.log;
events {}
http { access_log off; sendfile on; client_max_body_size 0; client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
server { listen %[2]s; root %[1]s/files; dav_methods PUT; create_full_put_path on; } }`, dir, at)
	if os.Geteuid() == 0 {
		config = "user root;\n" + config
	}
	if err := os.WriteFile(filepath.Join(dir, "conf"), []byte(config), 0o644); err != nil {
		return 0, 0, err
	}
	if err := os.Mkdir(filepath.Join(dir, "files"), 0o755); err != nil {
		return 0, 0, err
	}
	cmd := exec.Command(program, "-p", dir, "-c", filepath.Join(dir, "conf"), "-e", filepath.Join(dir, "error.log"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return 0, 0, err
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	}()
	sandboxtest.Eventually(b, "nginx listens", func() bool {
		c, err := net.Dial("tcp", at)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	part := bytes.Repeat([]byte("nginx "), 1<<17)
	began := time.Now()
	req, err := http.NewRequest("PUT", "http://"+at+"/large", io.LimitReader(endless{part}, size))
	if err != nil {
		return 0, 0, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, 0, err
	}
	_ = res.Body.Close()
	if !slices.Contains([]int{201, 204}, res.StatusCode) {
		return 0, 0, fmt.Errorf("nginx: %s", res.Status)
	}
	in = float64(size) / time.Since(began).Seconds() / 1e6
	began = time.Now()
	if res, err = http.Get("http://" + at + "/large"); err != nil {
		return 0, 0, err
	}
	defer res.Body.Close()
	if n, err := io.Copy(io.Discard, res.Body); err != nil || n != size {
		return 0, 0, fmt.Errorf("nginx: %d bytes: %w", n, err)
	}
	return in, float64(size) / time.Since(began).Seconds() / 1e6, nil
}
