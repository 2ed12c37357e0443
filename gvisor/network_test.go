package gvisor_test

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// ask is a shell function that speaks to the proxy as programs do.
const ask = `ask() { exec 3<>/dev/tcp/127.0.0.1/3128 || return; printf "$1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" >&3; ` +
	`head -1 <&3; exec 3>&-; }; `

// TestNetwork: a sandbox reaches only its proxy, the proxy reaches nothing of this machine, and what it refuses is in the log. It works
// again after the sandbox was on disk.
func TestNetwork(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	port := listener.Addr().(*net.TCPAddr).Port
	sb, c := newSandbox(t, sandbox.CreateOptions{Network: sandbox.Network{Mode: sandbox.NetworkFull}})
	for command, want := range map[string]string{
		fmt.Sprintf("ask 'CONNECT 127.0.0.1:%d'", port):             "403",
		fmt.Sprintf("ask 'CONNECT localhost:%d'", port):             "403",
		fmt.Sprintf("ask 'GET http://127.0.0.1:%d/' | wc -c", port): "0",
		"ask 'CONNECT 169.254.169.254:80'":                          "403",
		"ask 'GET http://[::1]:80/' | wc -c":                        "0",
		"ask 'GET /'":                                               "400",
		"ask 'CONNECT nonsense'":                                    "40", // 400 or 403
		"ask nonsense":                                              "400",
		"echo $https_proxy":                                         "http://127.0.0.1:3128",
		fmt.Sprintf("(exec 3<>/dev/tcp/127.0.0.1/%d) 2>&1", port):   "refused",
		"(exec 3<>/dev/tcp/203.0.113.1/80) 2>&1":                    "nreachable",
		"for i in $(seq 40); do ask 'CONNECT 10.0.0.1:1' & done; wait": strings.TrimSuffix(strings.Repeat("HTTP/1.1 403 Forbidden\r\n", 40),
			"\n"),
	} {
		if got := output(sandboxtest.Run(t, c, ask+command)); !strings.Contains(got, want) {
			t.Errorf("%s: %q", command, got)
		}
	}
	logs, err := sb.Logs(sandbox.LogQuery{Text: "refused"})
	if err != nil || len(logs.Entries) == 0 || len(logs.Entries) > 20 {
		t.Error(len(logs.Entries), err)
	}
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	if err := sb.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c, err = sb.Agent(t.Context(), "test"); err != nil {
		t.Fatal(err)
	}
	if got := output(sandboxtest.Run(t, c, ask+"ask 'CONNECT 10.0.0.1:1'")); !strings.Contains(got, "403") {
		t.Errorf("after it was on disk: %q", got)
	}
	_, c = newSandbox(t, sandbox.CreateOptions{})
	if got := output(sandboxtest.Run(t, c, "(exec 3<>/dev/tcp/127.0.0.1/3128) 2>&1; echo $https_proxy")); !strings.Contains(got,
		"refused") || strings.Contains(got, "http") {
		t.Errorf("without a network: %q", got)
	}
}
