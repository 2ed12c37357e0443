package soulbox_test

import (
	"go/ast"
	"go/parser"
	"go/scanner"
	"go/token"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// sources calls each with every Go file of the repository that somebody has written.
func sources(t *testing.T, each func(name string, src []byte)) {
	t.Helper()
	for _, name := range repositoryFiles(t) {
		if path.Ext(name) == ".go" && !strings.HasPrefix(name, "api/envd/spec/") {
			each(name, []byte(read(t, name)))
		}
	}
}

// TestGoColumns: lines of code are short enough to be read side by side. A raw string of several lines is data: what is in it, such as a
// program, stays as it is.
func TestGoColumns(t *testing.T) {
	sources(t, func(name string, src []byte) {
		raw := rawLines(src)
		for number, line := range strings.Split(string(src), "\n") {
			if n := utf8.RuneCountInString(strings.ReplaceAll(line, "\t", "    ")); n > maxColumns && !raw[number+1] {
				t.Errorf("%s:%d has %d columns, at most %d are allowed", name, number+1, n, maxColumns)
			}
		}
	})
}

// TestScriptColumns: so are the lines of what builds, tests and runs.
func TestScriptColumns(t *testing.T) {
	seen := map[string]bool{}
	for _, name := range repositoryFiles(t) {
		if isTestData(name) {
			continue
		}
		kind := ""
		switch base := path.Base(name); {
		case base == "Makefile", strings.HasPrefix(base, "Dockerfile"):
			kind = base
		case slices.Contains([]string{".sh", ".bash", ".py", ".pl", ".s", ".toml", ".proto"}, path.Ext(name)):
			kind = path.Ext(name)
		case path.Ext(name) == "" && strings.HasPrefix(read(t, name), "#!"):
			kind = "#!"
		}
		if seen[kind] = true; kind == "" {
			continue
		}
		for number, line := range strings.Split(read(t, name), "\n") {
			if n := utf8.RuneCountInString(strings.ReplaceAll(line, "\t", "    ")); n > maxColumns {
				t.Errorf("%s:%d has %d columns, at most %d are allowed", name, number+1, n, maxColumns)
			}
		}
	}
	for _, kind := range []string{"Makefile", "Dockerfile", ".sh", "#!"} {
		if !seen[kind] {
			t.Errorf("no %s was looked at", kind)
		}
	}
}

// rawLines are the lines of raw strings that have more than one.
func rawLines(src []byte) map[int]bool {
	files := token.NewFileSet()
	file := files.AddFile("", files.Base(), len(src))
	var s scanner.Scanner
	s.Init(file, src, nil, 0)
	raw := map[int]bool{}
	for {
		pos, kind, text := s.Scan()
		if kind == token.EOF {
			return raw
		}
		if kind == token.STRING && text[0] == '`' && strings.Contains(text, "\n") {
			first := file.Line(pos)
			for i := range strings.Count(text, "\n") + 1 {
				raw[first+i] = true
			}
		}
	}
}

// TestExportedDocs: each exported name has a sentence. Names in a group may share the group's. A method counts whatever its type is called:
// others call it through a type that embeds its own, or through an interface.
func TestExportedDocs(t *testing.T) {
	sources(t, func(name string, src []byte) {
		if strings.HasSuffix(name, "_test.go") {
			return
		}
		files := token.NewFileSet()
		parsed, err := parser.ParseFile(files, name, src, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		want := func(id *ast.Ident, docs ...*ast.CommentGroup) {
			for _, doc := range docs {
				if doc != nil {
					return
				}
			}
			if id.IsExported() {
				t.Errorf("%s: %s has no comment", files.Position(id.Pos()), id.Name)
			}
		}
		for _, d := range parsed.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				want(d.Name, d.Doc)
			case *ast.GenDecl:
				for _, s := range d.Specs {
					switch s := s.(type) {
					case *ast.TypeSpec:
						want(s.Name, d.Doc, s.Doc, s.Comment)
					case *ast.ValueSpec:
						for _, id := range s.Names {
							want(id, d.Doc, s.Doc, s.Comment)
						}
					}
				}
			}
		}
	})
}

// Bounds of what one reads at once, in lines. Tests are excepted: they may tell long stories.
const (
	maxFile = 500
	maxFunc = 60
)

// TestLengths: files and functions are short enough to be read at once.
func TestLengths(t *testing.T) {
	sources(t, func(name string, src []byte) {
		if strings.HasSuffix(name, "_test.go") {
			return
		}
		files := token.NewFileSet()
		parsed, err := parser.ParseFile(files, name, src, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(src), "\n"); n > maxFile {
			t.Errorf("%s has %d lines, at most %d are allowed", name, n, maxFile)
		}
		for _, d := range parsed.Decls {
			if d, ok := d.(*ast.FuncDecl); ok {
				if n := files.Position(d.End()).Line - files.Position(d.Pos()).Line + 1; n > maxFunc {
					t.Errorf("%s: %s has %d lines, at most %d are allowed", files.Position(d.Pos()), d.Name.Name, n, maxFunc)
				}
			}
		}
	})
}

// private is what refers to notes that only the makers of SoulBox have. What the code or test shows is said instead.
var private = regexp.MustCompile(`(?i)\bmust[ -]show\b|\btraps? [0-9]|\bissue #?[0-9]|\bissues #[0-9]`)

// TestNoPrivateNotes: no comment or document cites such notes.
func TestNoPrivateNotes(t *testing.T) {
	for _, cited := range []string{"issue 5, must show 1", "Trap 6:", "issue #12"} {
		if !private.MatchString(cited) {
			t.Errorf("%q passes", cited)
		}
	}
	for _, name := range repositoryFiles(t) {
		if !slices.Contains(named, path.Ext(name)) || isTestData(name) || name == "house_test.go" {
			continue
		}
		for number, line := range strings.Split(read(t, name), "\n") {
			if found := private.FindString(line); found != "" {
				t.Errorf("%s:%d cites %q, which readers do not have: say what is shown instead", name, number+1, found)
			}
		}
	}
}
