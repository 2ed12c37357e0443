// Package soulbox_test holds the rules of the repository that concern all packages.
package soulbox_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "soulbox.dev/soulbox"

// mayImport is the graph of docs/architecture.md: which of our packages each package may import. Tests may also use internal/sandboxtest.
var mayImport = map[string][]string{
	"access":               {"internal/durable"},
	"agent":                {"internal/names"},
	"agent/guest":          {"agent", "agent/guest/rawsys", "internal/names"},
	"agent/guest/rawsys":   {},
	"sandbox":              {"access", "agent", "internal/durable"},
	"internal/cursor":      {},
	"internal/durable":     {},
	"internal/loopback":    {},
	"internal/erofs":       {},
	"internal/wholenum":    {},
	"internal/spawntime":   {"agent/guest/rawsys"},
	"gvisor/patch":         {},
	"internal/names":       {},
	"gvisor":               {"sandbox", "internal/durable", "internal/erofs"},
	"template":             {"access", "sandbox", "agent", "internal/durable", "internal/erofs", "internal/names"},
	"mcpserver":            {"access", "internal/loopback"},
	"tools":                {"access", "sandbox", "agent", "template", "internal/cursor", "internal/wholenum", "internal/names"},
	"resources":            {"sandbox", "agent", "template", "internal/cursor", "internal/names"},
	"internal/sandboxtest": {"sandbox", "agent", "agent/guest", "internal/erofs"},
	"cmd/soulbox-agent":    {"agent/guest"},
	"api": {"access", "sandbox", "agent", "template", "api/envd", "api/client", "internal/cursor",
		"internal/wholenum", "internal/names", "internal/loopback"},
	"api/client": {"internal/loopback", "internal/names", "api/envd/spec/process", "api/envd/spec/filesystem",
		"api/envd/spec/process/processconnect", "api/envd/spec/filesystem/filesystemconnect"},
	"api/envd": {"internal/names", "access", "sandbox", "agent", "api/client", "api/envd/spec/process",
		"api/envd/spec/filesystem", "api/envd/spec/process/processconnect", "api/envd/spec/filesystem/filesystemconnect"},
	"api/envd/spec":                              {},
	"api/envd/spec/process":                      {},
	"api/envd/spec/filesystem":                   {},
	"api/envd/spec/process/processconnect":       {"api/envd/spec/process"},
	"api/envd/spec/filesystem/filesystemconnect": {"api/envd/spec/filesystem"},
	"cmd/soulbox-mcp": {"access", "agent", "sandbox", "gvisor", "template", "mcpserver", "tools", "resources",
		"api", "api/envd", "api/client", "internal/durable", "internal/loopback"},
	"conformance/server": {"mcpserver"},
	"cmd/soulbox":        {"api/client", "internal/loopback", "internal/names", "internal/durable"},
}

// testsMayImport adds to mayImport for tests: a runtime is tested with the domain above it and a template below.
var testsMayImport = map[string][]string{
	"sandbox":    {"internal/sandboxtest", "agent/guest"},
	"gvisor":     {"internal/sandboxtest", "internal/erofs", "agent", "template"},
	"template":   {"internal/sandboxtest", "gvisor"},
	"tools":      {"internal/sandboxtest", "mcpserver"},
	"resources":  {"internal/sandboxtest", "mcpserver", "access"},
	"api":        {"internal/sandboxtest", "api/envd/spec/process/processconnect", "api/envd/spec/filesystem/filesystemconnect"},
	"api/envd":   {"internal/sandboxtest"},
	"api/client": {"api", "sandbox", "template", "internal/sandboxtest"},
	"agent":      {},
}

// onlyIn says which packages may import a library. Libraries not named here are free to all packages but the agent.
var onlyIn = map[string][]string{
	"github.com/mark3labs/mcp-go":            {"tools", "resources", "mcpserver", "cmd/soulbox-mcp", "conformance/server"},
	"github.com/opencontainers/runtime-spec": {"gvisor", "template"},
	"github.com/opencontainers/image-spec":   {"gvisor", "template"},
	"gvisor.dev/gvisor":                      {"gvisor"},
	"flag":                                   {"cmd/soulbox-mcp", "internal/sandboxtest", "gvisor/patch"},
	"github.com/google/jsonschema-go":        {"tools"},
	"github.com/sourcegraph/jsonrpc2":        {"agent", "agent/guest"},
	"github.com/hashicorp/yamux":             {"agent", "agent/guest"},
	"github.com/modelcontextprotocol/go-sdk": {"cmd/soulbox-mcp"}, // in tests only
	"github.com/coreos/go-oidc":              {"access"},
	"github.com/charmbracelet":               {"tools"},
	"github.com/creack/pty":                  {"agent/guest"},
	"connectrpc.com/connect": {"api/envd", "api/client", "api/envd/spec/process/processconnect",
		"api/envd/spec/filesystem/filesystemconnect"},
	"golang.org/x/crypto":             {"cmd/soulbox-mcp"},
	"github.com/spf13":                {"cmd/soulbox"},
	"github.com/schollz/progressbar":  {"cmd/soulbox"},
	"github.com/BurntSushi/toml":      {"cmd/soulbox"},
	"github.com/rogpeppe/go-internal": {"cmd/soulbox"},
	"golang.org/x/term":               {"cmd/soulbox"},
	"go.uber.org/goleak":              {"internal/sandboxtest"},
}

// agentMayUse are the libraries that the agent may use; it must stay small.
var agentMayUse = []string{"github.com/sourcegraph/jsonrpc2", "github.com/hashicorp/yamux", "github.com/creack/pty",
	"golang.org/x/sys", module + "/internal/names", module + "/agent",
	module + "/agent/guest/rawsys"}

func TestImports(t *testing.T) {
	seen := map[string]bool{}
	for file, imports := range allImports(t) {
		pkg := path.Dir(file)
		if pkg == "." {
			continue
		}
		seen[pkg] = true
		allowed, known := mayImport[pkg]
		if !known {
			t.Errorf("%s: package %s is not in the layout of docs/architecture.md: add it there and to mayImport", file, pkg)
			continue
		}
		test := strings.HasSuffix(file, "_test.go")
		if test {
			allowed = append(slices.Clone(allowed), append(testsMayImport[pkg], pkg, "internal/sandboxtest")...)
		}
		for _, imported := range imports {
			if ours, ok := strings.CutPrefix(imported, module+"/"); ok && !slices.Contains(allowed, ours) {
				t.Errorf("%s imports %s, which %s may not", file, ours, pkg)
			}
			for library, owners := range onlyIn {
				if (imported == library || strings.HasPrefix(imported, library+"/")) && !slices.Contains(owners, pkg) {
					t.Errorf("%s imports %s, which only %s may", file, imported, strings.Join(owners, ", "))
				}
			}
			first, _, _ := strings.Cut(imported, "/")
			if (pkg == "agent" || strings.HasPrefix(pkg, "agent/")) && !test && strings.Contains(first, ".") &&
				!slices.ContainsFunc(agentMayUse, func(lib string) bool {
					return imported == lib ||
						strings.HasPrefix(imported, lib+"/")
				}) {
				t.Errorf("%s imports %s: the agent is to stay small", file, imported)
			}
		}
	}
	for pkg := range mayImport {
		if !seen[pkg] {
			t.Errorf("package %s of the layout does not exist", pkg)
		}
	}
}

// TestEnvironment: only cmd reads the environment.
func TestEnvironment(t *testing.T) {
	for file := range allImports(t) {
		if strings.HasPrefix(file, "cmd/") || strings.HasPrefix(file, "internal/") || strings.HasSuffix(file, "_test.go") {
			continue
		}
		body, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, call := range []string{"os.Getenv(", "os.LookupEnv(", "os.Environ("} {
			if strings.Contains(string(body), call) {
				t.Errorf("%s calls %s; only cmd reads the environment", file, call)
			}
		}
	}
}

// TestPackageDocs: every package that is not generated has a paragraph on what it is for.
func TestPackageDocs(t *testing.T) {
	for pkg := range mayImport {
		if strings.HasPrefix(pkg, "api/envd/spec/") {
			continue // generated
		}
		files, err := filepath.Glob(filepath.Join(pkg, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		documented := false
		for _, file := range files {
			parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments|parser.PackageClauseOnly)
			if err != nil {
				t.Fatal(err)
			}
			documented = documented || parsed.Doc != nil
		}
		if !documented {
			t.Errorf("package %s has no doc comment", pkg)
		}
	}
}

// TestThreats: every test that docs/threats.md names exists.
func TestThreats(t *testing.T) {
	doc, err := os.ReadFile("docs/threats.md")
	if err != nil {
		t.Fatal(err)
	}
	var tests strings.Builder
	for file := range allImports(t) {
		if strings.HasSuffix(file, "_test.go") {
			body, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			tests.Write(body)
		}
	}
	names := regexp.MustCompile("`(Test[A-Za-z0-9]+)`").FindAllStringSubmatch(string(doc), -1)
	if len(names) < 40 {
		t.Errorf("it names %d tests", len(names))
	}
	for _, name := range names {
		if !strings.Contains(tests.String(), "func "+name[1]+"(t *testing.T)") {
			t.Errorf("docs/threats.md names %s, which does not exist", name[1])
		}
	}
}

// allImports maps every Go file of the module to its imports.
func allImports(t *testing.T) map[string][]string {
	t.Helper()
	all := map[string][]string{}
	err := filepath.WalkDir(".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() && (name == "bin" || name == ".git" || name == ".cache" || name == "gvisor/runsc") {
			return fs.SkipDir
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		all[name] = nil
		for _, spec := range parsed.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			all[name] = append(all[name], imported)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
