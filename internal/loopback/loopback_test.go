package loopback

import "testing"

// TestLoopback: which hosts are this machine.
func TestLoopback(t *testing.T) {
	for host, want := range map[string]bool{"localhost": true, "a.b.localhost": true, "LOCALHOST.": true, "127.0.0.9": true, "::1": true,
		"mylocalhost": false, "localhost.example.com": false, "10.0.0.1": false, "": false} {
		if got := Is(host); got != want {
			t.Errorf("%q: %v", host, got)
		}
	}
}
