package template

import (
	"cmp"
	"testing"
)

// TestVersionOrder compares versions as Debian orders them. What is wanted is what "dpkg --compare-versions" of dpkg 1.21 says.
func TestVersionOrder(t *testing.T) {
	for _, test := range []struct {
		a    string
		want int
		b    string
	}{
		{"1.0", 0, "1.0"},
		// A tilde comes before everything, the end too.
		{"1.0~rc1", -1, "1.0"}, {"1.0~~", -1, "1.0~"}, {"1.0~", -1, "1.0a"}, {"1.0~rc1-1", -1, "1.0-1"},
		{"1.2-1~bpo12+1", -1, "1.2-1"}, {"1.0.~1", -1, "1.0."},
		// A missing revision is 0.
		{"1.0", 0, "1.0-0"}, {"1.0", -1, "1.0-1"},
		// Epochs come first. One that is missing is 0.
		{"9", -1, "1:1"}, {"0:1", 0, "1"}, {"1:0.9", 1, "1.5"}, {"10:1", 1, "9:1"},
		// Letters come before other characters.
		{"1.0a", 1, "1.0"}, {"1.0a", -1, "1.0+"}, {"1.0Z", -1, "1.0a"}, {"1.0.1", 1, "1.0+"}, {"1.0+b1", 1, "1.0"},
		// Numbers are compared as numbers, whatever their length.
		{"1.10", 1, "1.9"}, {"1.01", 0, "1.1"}, {"1.0-10", 1, "1.0-9"}, {"2.36-9+deb12u4", -1, "2.36-9+deb12u10"},
		{"1.2.3", -1, "1.2.3.0"}, {"18446744073709551617", 1, "18446744073709551616"},
		// The revision is what follows the last hyphen.
		{"1.0-1-2", 1, "1.0-1"},
		// What Debian's policy forbids has an order, too.
		{"v1.10", 1, "v1.9"}, {"1.0_rc1", 1, "0.9"}, {"1.0-", 0, "1.0"},
	} {
		if got := compareVersions(test.a, test.b); cmp.Compare(got, 0) != test.want {
			t.Errorf("%s against %s: got %d, want %d", test.a, test.b, got, test.want)
		}
		if got := compareVersions(test.b, test.a); cmp.Compare(got, 0) != -test.want {
			t.Errorf("%s against %s: got %d, want %d", test.b, test.a, got, -test.want)
		}
	}
}
