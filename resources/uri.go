package resources

import (
	"net/url"
	"strconv"
	"strings"

	"soulbox.dev/soulbox/internal/names"
	"soulbox.dev/soulbox/sandbox"
)

// kind is what a URI names.
type kind int

const (
	kindSandbox kind = iota
	kindFile
	kindOutput
	kindLogs
	kindMetrics
	kindTemplate
)

// parsedURI is a parsed URI.
type parsedURI struct {
	kind    kind
	name    string // of a template, or the id of a sandbox
	build   string // id of a build, if its log is meant
	path    string // absolute path of a file
	process string
	offset  int64 // start of a range; for a process's output counted from its beginning
	limit   int64 // 0: as much as one read returns
}

// parse parses a URI. A URI that is not ours, for whatever reason, is treated as not found.
func parse(uri string) (parsedURI, bool) {
	if rest, ok := strings.CutPrefix(uri, "template://"); ok {
		return parseTemplate(rest)
	}
	u, err := url.Parse(uri)
	if err != nil || u.User != nil || u.Fragment != "" || u.Opaque != "" || u.ForceQuery || len(uri) > 8192 {
		return parsedURI{}, false
	}
	n := parsedURI{name: u.Host}
	if !n.parseRange(u.RawQuery) {
		return parsedURI{}, false
	}
	if u.Scheme != "sandbox" || !sandbox.ValidID(u.Host) {
		return parsedURI{}, false
	}
	switch rest := u.Path; {
	case rest == "" && u.RawQuery == "":
		n.kind = kindSandbox
	case rest == "/logs":
		n.kind = kindLogs
	case rest == "/metrics" && u.RawQuery == "":
		n.kind = kindMetrics
	case strings.HasPrefix(rest, "/files/"):
		n.kind, n.path = kindFile, names.Parse(strings.TrimPrefix(rest, "/files"))
	case strings.HasPrefix(rest, "/processes/") && strings.HasSuffix(rest, "/output"):
		n.kind, n.process = kindOutput, strings.TrimSuffix(strings.TrimPrefix(rest, "/processes/"), "/output")
		return n, n.process != "" && !strings.Contains(n.process, "/")
	default:
		return parsedURI{}, false
	}
	return n, true
}

// parseTemplate parses the URI of a template: NAME, or NAME/builds/ID/log. A name may contain a colon, which does not begin a port.
func parseTemplate(rest string) (parsedURI, bool) {
	rest, query, _ := strings.Cut(rest, "?")
	n := parsedURI{kind: kindTemplate}
	if !n.parseRange(query) || len(rest) > 256 {
		return parsedURI{}, false
	}
	parts := strings.Split(rest, "/")
	n.name = parts[0]
	switch {
	case len(parts) == 1:
		return n, n.name != "" && query == ""
	case len(parts) == 4 && parts[1] == "builds" && parts[3] == "log":
		n.build = parts[2]
		return n, n.build != ""
	}
	return parsedURI{}, false
}

// parseRange parses the range of a URI: offset and limit in bytes.
func (n *parsedURI) parseRange(query string) bool {
	values, err := url.ParseQuery(query)
	if err != nil {
		return false
	}
	for key, list := range values {
		v, err := strconv.ParseInt(list[0], 10, 64)
		if err != nil || v < 0 || len(list) != 1 {
			return false
		}
		switch key {
		case "offset":
			n.offset = v
		case "limit":
			n.limit = v
		default:
			return false
		}
	}
	return true
}

func sandboxURI(id string) string { return "sandbox://" + id }

func fileURI(id, path string) string {
	return (&url.URL{Scheme: "sandbox", Host: id, Path: "/files" + names.Show(path)}).String()
}

func outputURI(id, process string) string {
	return (&url.URL{Scheme: "sandbox", Host: id, Path: "/processes/" + process + "/output"}).String()
}

// part adds a range to a URI.
func part(uri string, offset int64) string {
	base, _, _ := strings.Cut(uri, "?")
	return base + "?offset=" + strconv.FormatInt(offset, 10)
}
