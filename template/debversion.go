package template

import (
	"strconv"
	"strings"

	"pault.ag/go/debian/version"
)

// compareVersions compares versions as dpkg does (deb-version(7)). The texts are cut here and not by version.Parse, because archives also
// have versions that Parse refuses, such as v1.10 or 1.0_rc1, and dpkg gives these an order too.
func compareVersions(a, b string) int { return version.Compare(cutVersion(a), cutVersion(b)) }

func cutVersion(text string) (v version.Version) {
	if epoch, rest, ok := strings.Cut(text, ":"); ok {
		if n, err := strconv.ParseUint(epoch, 10, 31); err == nil {
			v.Epoch, text = uint(n), rest
		}
	}
	v.Version = text
	if i := strings.LastIndexByte(text, '-'); i >= 0 {
		v.Version, v.Revision = text[:i], text[i+1:]
	}
	return v
}
