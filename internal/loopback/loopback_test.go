package loopback

import "testing"

// TestHosts: what the host of a request is, and whether that is this machine.
func TestHosts(t *testing.T) {
	for _, test := range []struct {
		host, bare   string
		is, isItself bool // of the bare host
	}{
		{"localhost", "localhost", true, true},
		{"LOCALHOST.:8787", "localhost", true, true},
		{"8000-sb1.localhost:80", "8000-sb1.localhost", true, false},
		{"a.b.Localhost.", "a.b.localhost", true, false},
		{"127.0.0.9", "127.0.0.9", true, true},
		{"127.0.0.1:49983", "127.0.0.1", true, true},
		{"[::1]", "::1", true, true},
		{"[::1]:8787", "::1", true, true},
		{"::1", "::1", true, true},
		{"[::ffff:127.0.0.1]:80", "::ffff:127.0.0.1", true, true},
		{"mylocalhost", "mylocalhost", false, false},
		{"localhost.example.com", "localhost.example.com", false, false},
		{"127.0.0.1.example.com:80", "127.0.0.1.example.com", false, false},
		{"10.0.0.1:80", "10.0.0.1", false, false},
		{"0.0.0.0", "0.0.0.0", false, false},
		{"[::]:80", "::", false, false},
		{"2130706433", "2130706433", false, false},
		{"", "", false, false},
		{":80", "", false, false},
	} {
		bare := Bare(test.host)
		if bare != test.bare || Is(bare) != test.is || IsItself(bare) != test.isItself {
			t.Errorf("%q: %q %v %v", test.host, bare, Is(bare), IsItself(bare))
		}
	}
}
