package template

import "pault.ag/go/debian/version"

// compareVersions compares versions as deb-version(7) defines. What is no version comes before all that are.
func compareVersions(a, b string) int {
	parsed := func(text string) version.Version {
		v, err := version.Parse(text)
		if err != nil {
			return version.Version{Version: "~~"} // a tilde comes before the end
		}
		return v
	}
	return version.Compare(parsed(a), parsed(b))
}
