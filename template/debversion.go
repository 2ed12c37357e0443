package template

import (
	"cmp"
	"strings"
)

// compareVersions compares versions as deb-version(7) defines.
func compareVersions(a, b string) int {
	split := func(v string) (epoch, upstream, revision string) {
		epoch = "0"
		if e, rest, ok := strings.Cut(v, ":"); ok {
			epoch, v = e, rest
		}
		if i := strings.LastIndexByte(v, '-'); i >= 0 {
			return epoch, v[:i], v[i+1:]
		}
		return epoch, v, ""
	}
	ea, ua, ra := split(a)
	eb, ub, rb := split(b)
	return cmp.Or(comparePart(ea, eb), comparePart(ua, ub), comparePart(ra, rb))
}

func comparePart(a, b string) int {
	for a != "" || b != "" {
		for a != "" && !isDigit(a[0]) || b != "" && !isDigit(b[0]) {
			if c := cmp.Compare(order(a), order(b)); c != 0 {
				return c
			}
			a, b = tail(a), tail(b)
		}
		var na, nb string
		na, a = digits(a)
		nb, b = digits(b)
		if c := cmp.Or(cmp.Compare(len(na), len(nb)), cmp.Compare(na, nb)); c != 0 {
			return c
		}
	}
	return 0
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// order returns the weight of the first character: a tilde sorts before the end, letters before all others.
func order(s string) int {
	switch {
	case s == "" || isDigit(s[0]):
		return 0
	case s[0] == '~':
		return -1
	case s[0] >= 'a' && s[0] <= 'z' || s[0] >= 'A' && s[0] <= 'Z':
		return int(s[0])
	}
	return int(s[0]) + 256
}

func tail(s string) string {
	if s == "" || isDigit(s[0]) {
		return s
	}
	return s[1:]
}

// digits cuts a number off the front and drops its leading zeros.
func digits(s string) (number, rest string) {
	i := 0
	for i < len(s) && isDigit(s[i]) {
		i++
	}
	return strings.TrimLeft(s[:i], "0"), s[i:]
}
