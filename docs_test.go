package soulbox_test

import (
	"bytes"
	"errors"
	"go/ast"
	"go/parser"
	"go/scanner"
	"go/token"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// maxColumns is the maximum length of a line of a document or of code.
const maxColumns = 140

// repositoryFiles are the files of the repository, including those that are not committed yet. Without a checkout, as in an unpacked
// archive, they are all files of the directory.
func repositoryFiles(t *testing.T) []string {
	t.Helper()
	var files []string
	out, err := exec.Command("git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard").Output()
	if err == nil {
		for name := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
			if info, err := os.Lstat(name); err == nil && info.Mode().IsRegular() {
				files = append(files, name)
			} else if err != nil && !errors.Is(err, fs.ErrNotExist) { // a file that was removed, and the removal is not committed
				t.Fatal(err)
			}
		}
	} else if err := fs.WalkDir(os.DirFS("."), ".", func(name string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && slices.Contains([]string{".git", ".cache", "bin", "node_modules"}, path.Base(name)) {
			return fs.SkipDir
		}
		if err == nil && entry.Type().IsRegular() {
			files = append(files, name)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if len(files) < 100 {
		t.Fatalf("the repository has %d files", len(files))
	}
	return files
}

func read(t *testing.T, name string) string {
	t.Helper()
	body, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// link is a link in Markdown: [text](target) or ![text](target).
var link = regexp.MustCompile(`\]\(([^)\s]+)\)`)

// TestDocLinks: every relative link of a document leads to a file of the repository, and to a heading that exists.
func TestDocLinks(t *testing.T) {
	files := repositoryFiles(t)
	for _, name := range files {
		if path.Ext(name) != ".md" {
			continue
		}
		for _, found := range link.FindAllStringSubmatch(withoutCode(read(t, name)), -1) {
			target, err := url.Parse(found[1])
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if target.Scheme != "" {
				continue
			}
			to := name
			if target.Path != "" {
				to = path.Join(path.Dir(name), target.Path)
			}
			if info, err := os.Stat(to); err != nil || !info.IsDir() && !slices.Contains(files, to) {
				t.Errorf("%s links to %s, which is not in the repository", name, found[1])
			} else if target.Fragment != "" && !slices.Contains(anchors(read(t, to)), target.Fragment) {
				t.Errorf("%s links to %s, and %s has no such heading", name, found[1], to)
			}
		}
	}
}

// withoutCode removes indented code and text in backquotes.
func withoutCode(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "    ") {
			b.WriteString(regexp.MustCompile("`[^`\n]*`").ReplaceAllString(line, ""))
		}
	}
	return b.String()
}

// anchors are the names by which links reach a document's headings, as GitHub makes them, and those that the document defines.
func anchors(text string) (all []string) {
	for _, id := range regexp.MustCompile(`<a id="([^"]+)">`).FindAllStringSubmatch(text, -1) {
		all = append(all, id[1])
	}
	for line := range strings.Lines(text) {
		if heading, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " "); ok && strings.HasPrefix(line, "#") {
			heading = regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(strings.ToLower(strings.TrimSpace(heading)), "")
			all = append(all, strings.ReplaceAll(heading, " ", "-"))
		}
	}
	return all
}

// document is the name of a document in a text. A name behind a host's name is on the web.
var document = regexp.MustCompile(`(https?://\S*)?[A-Za-z0-9_./-]*[A-Za-z0-9_-]\.md\b`)

// named are the extensions of the files in which documents are named.
var named = []string{".md", ".go", ".proto", ".patch", ".sh", ".bash", ".mjs", ".txt", ""}

// TestDocNames: no document, comment or message names a document that is not in the repository, such as its makers' private notes.
func TestDocNames(t *testing.T) {
	files := repositoryFiles(t)
	documents := map[string]bool{}
	for _, name := range files {
		if path.Ext(name) == ".md" {
			documents[name], documents[path.Base(name)] = true, true
		}
	}
	for _, name := range files {
		if !slices.Contains(named, path.Ext(name)) || isTestData(name) {
			continue
		}
		for number, line := range strings.Split(read(t, name), "\n") {
			for _, found := range document.FindAllString(line, -1) {
				if strings.HasPrefix(found, "http") {
					continue
				}
				if at := path.Join(path.Dir(name), found); !documents[at] && !documents[strings.TrimPrefix(found, "../../")] {
					t.Errorf("%s:%d names %s, which is not in the repository", name, number+1, found)
				}
			}
		}
	}
}

// file is the name of a file with a directory in a text. A name behind a host's name is on the web, one behind ~ or / is of a home or a
// system.
var file = regexp.MustCompile(`(https?://\S*)?[~$]?[A-Za-z0-9_./-]*/[A-Za-z0-9_.-]*[A-Za-z0-9_-]\.(go|py|toml|sh|json|txt|patch|md)\b`)

// elsewhere are names of files that are not of the repository: in gVisor's own, and in the store of templates, where a word in capitals
// stands for many.
var elsewhere = regexp.MustCompile(`^(pkg|runsc|fsimpl)/|(^|/)[A-Z]+\.json$`)

// TestFileNames: every file that a document or a comment names with its directory is in the repository.
func TestFileNames(t *testing.T) {
	files := repositoryFiles(t)
	for _, name := range files {
		if isTestData(name) {
			continue
		}
		for number, text := range remarks(t, name) {
			for _, found := range file.FindAllString(text, -1) {
				if strings.HasPrefix(found, "http") || strings.ContainsAny(found[:1], "~$/") || elsewhere.MatchString(found) {
					continue
				}
				if !slices.Contains(files, found) && !slices.Contains(files, path.Join(path.Dir(name), found)) {
					t.Errorf("%s:%d names %s, which is not in the repository", name, number, found)
				}
			}
		}
	}
}

// remarks are what is said in a file about the code, by line: all lines of a document, and the comments of a program.
func remarks(t *testing.T, name string) map[int]string {
	t.Helper()
	said, mark := map[int]string{}, ""
	switch path.Ext(name) {
	case ".go":
		src := []byte(read(t, name))
		set := token.NewFileSet()
		in := set.AddFile("", set.Base(), len(src))
		var s scanner.Scanner
		s.Init(in, src, nil, scanner.ScanComments)
		for {
			switch pos, kind, text := s.Scan(); kind {
			case token.EOF:
				return said
			case token.COMMENT:
				said[in.Line(pos)] = text
			}
		}
	case ".md":
	case ".mjs", ".proto":
		mark = "//"
	case ".sh", ".bash", "":
		mark = "#"
	default:
		return nil
	}
	for number, line := range strings.Split(read(t, name), "\n") {
		if at := strings.Index(line, mark); at >= 0 {
			said[number+1] = line[at:]
		}
	}
	return said
}

// isTestData reports whether a file is material of a test, such as a recorded answer.
func isTestData(name string) bool {
	return strings.Contains(name, "testdata/") || name == "docs_test.go"
}

// TestDocColumns: lines of documents are short enough to be read side by side. The text for models has one line per paragraph, and reports
// to upstream are written as they are filed.
func TestDocColumns(t *testing.T) {
	for _, name := range repositoryFiles(t) {
		if path.Ext(name) != ".md" || name == "tools/instructions.md" || strings.HasPrefix(name, "docs/upstream/") {
			continue
		}
		for number, line := range bytes.Split([]byte(read(t, name)), []byte("\n")) {
			if n := utf8.RuneCount(line); n > maxColumns {
				t.Errorf("%s:%d has %d columns, at most %d are allowed", name, number+1, n, maxColumns)
			}
		}
	}
}

// contributorDocs are the documents whose names of files and code are checked.
var contributorDocs = []string{"AGENTS.md", "docs/architecture.md", "docs/gvisor.md", "docs/threats.md"}

// TestDocCode: the files and names of code that the documents for contributors mention exist, are of the package or type that they are said
// to be of, and are declared in the file that is named beside them. That does not prove a sentence right, but it catches what was renamed
// or moved.
func TestDocCode(t *testing.T) {
	files := repositoryFiles(t)
	words, of, inFile := map[string]bool{}, members{}, map[string]members{}
	for _, name := range files {
		if path.Ext(name) == ".go" {
			code := read(t, name)
			wordsOf(code, words)
			inFile[name] = members{}
			if err := errors.Join(of.add(code), inFile[name].add(code)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, name := range contributorDocs {
		for _, p := range placesIn(read(t, name)) {
			if !slices.ContainsFunc(files, func(file string) bool {
				return (file == p.file || strings.HasSuffix(file, "/"+p.file)) && inFile[file].declares(p.name)
			}) {
				t.Errorf("%s says that %s is in %s, which does not declare it", name, p.name, p.file)
			}
		}
	}
	quoted, code := regexp.MustCompile("`([^`\n]+)`"), regexp.MustCompile(`^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$`)
	for _, name := range contributorDocs {
		for _, found := range quoted.FindAllStringSubmatch(read(t, name), -1) {
			text := found[1]
			switch {
			case text == "machine.json": // a file of a sandbox
			case path.Ext(text) == ".go" && !strings.Contains(text, "*"):
				if !slices.ContainsFunc(files, func(file string) bool { return file == text || strings.HasSuffix(file, "/"+text) }) {
					t.Errorf("%s names the file %s, which is not in the repository", name, text)
				}
			case code.MatchString(text):
				if word := text[strings.LastIndex(text, ".")+1:]; !words[word] {
					t.Errorf("%s names %s, and no code has the word %s", name, text, word)
				}
				parts := strings.Split(text, ".")
				for i, owner := range parts[:len(parts)-1] {
					if len(of[owner]) > 0 && !of.has(owner, parts[i+1]) {
						t.Errorf("%s names %s, and %s has no %s", name, text, owner, parts[i+1])
					}
				}
			}
		}
	}
}

// place is a name of code, and the file that a document says it is in.
type place struct{ name, file string }

// placesIn finds a document's names with files beside them: "`a` and `b` in `x.go`", "`a` is in `x.go`", "`a` (`x.go`)",
// "(`a`, `b`, `x.go`)" and "`x.go` `a`".
func placesIn(text string) (all []place) {
	const (
		name = "`[A-Za-z_][\\w.]*`"
		list = name + "(?:(?:,| and|, and| or) " + name + ")*"
		file = "`([\\w./-]+\\.go)`"
	)
	text, single := strings.Join(strings.Fields(text), " "), regexp.MustCompile(name)
	for _, form := range []string{"(" + list + "),? (?:is |are )?in " + file, "(" + name + ") \\(" + file, "\\((" + list + "), " + file} {
		for _, found := range regexp.MustCompile(form).FindAllStringSubmatch(text, -1) {
			for _, one := range single.FindAllString(found[1], -1) {
				all = append(all, place{strings.Trim(one, "`"), found[2]})
			}
		}
	}
	for _, found := range regexp.MustCompile(file+" ("+name+")").FindAllStringSubmatch(text, -1) {
		all = append(all, place{strings.Trim(found[2], "`"), found[1]})
	}
	return slices.DeleteFunc(all, func(p place) bool { return path.Ext(p.name) == ".go" || path.Ext(p.name) == ".json" })
}

// TestPlaces: each form of naming a file beside a name is found.
func TestPlaces(t *testing.T) {
	got := placesIn("`a` and `b.C` in `x.go`; `d` is in `x/y.go`, `e`\n(`z.go`), (`f`, `g`, `z.go`) and `v.go` `h`. " +
		"`state.json` in `x.go`, `i`.")
	want := []place{{"a", "x.go"}, {"b.C", "x.go"}, {"d", "x/y.go"}, {"e", "z.go"}, {"f", "z.go"}, {"g", "z.go"}, {"h", "v.go"}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// declares reports whether a name is declared, as a member of the owner that it is written with, or of any.
func (m members) declares(name string) bool {
	parts := strings.Split(name, ".")
	last := parts[len(parts)-1]
	if len(parts) > 1 {
		return m[parts[len(parts)-2]][last]
	}
	for _, of := range m {
		if of[last] {
			return true
		}
	}
	return false
}

// members has, by the names of packages and types, what is declared in them: "" is the key of no name.
type members map[string]map[string]bool

// embedded marks a name that a type embeds, whose members are the type's, too.
const embedded = "embedded "

func (m members) put(owner, name string) {
	if m[owner] == nil {
		m[owner] = map[string]bool{}
	}
	m[owner][name] = true
}

// add adds what a file declares.
func (m members) add(code string) error {
	file, err := parser.ParseFile(token.NewFileSet(), "", code, parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	for _, d := range file.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if d.Recv == nil {
				m.put(file.Name.Name, d.Name.Name)
			} else {
				m.put(baseName(d.Recv.List[0].Type), d.Name.Name)
			}
		case *ast.GenDecl:
			for _, s := range d.Specs {
				switch s := s.(type) {
				case *ast.TypeSpec:
					m.put(file.Name.Name, s.Name.Name)
					m.addType(s)
				case *ast.ValueSpec:
					for _, id := range s.Names {
						m.put(file.Name.Name, id.Name)
					}
				}
			}
		}
	}
	return nil
}

// addType adds the fields of a struct, or the methods of an interface.
func (m members) addType(s *ast.TypeSpec) {
	var list *ast.FieldList
	switch of := s.Type.(type) {
	case *ast.StructType:
		list = of.Fields
	case *ast.InterfaceType:
		list = of.Methods
	default:
		return
	}
	for _, f := range list.List {
		for _, id := range f.Names {
			m.put(s.Name.Name, id.Name)
		}
		if base := baseName(f.Type); len(f.Names) == 0 && base != "" {
			m.put(s.Name.Name, base)
			m.put(s.Name.Name, embedded+base)
		}
	}
}

// baseName is the name of a type without its package, pointer and parameters.
func baseName(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return baseName(e.X)
	case *ast.IndexExpr:
		return baseName(e.X)
	case *ast.SelectorExpr:
		return e.Sel.Name
	case *ast.Ident:
		return e.Name
	}
	return ""
}

// has reports whether a package or type declares a name, or embeds a type that does.
func (m members) has(owner, name string) bool {
	if m[owner][name] {
		return true
	}
	for member := range m[owner] {
		if base, ok := strings.CutPrefix(member, embedded); ok && base != owner && m.has(base, name) {
			return true
		}
	}
	return false
}

// wordsOf adds the words of code, and of strings in it, such as names of tools. Words of comments do not count.
func wordsOf(code string, words map[string]bool) {
	set := token.NewFileSet()
	var s scanner.Scanner
	s.Init(set.AddFile("", set.Base(), len(code)), []byte(code), nil, 0)
	word := regexp.MustCompile(`\w+`)
	for {
		switch _, kind, text := s.Scan(); kind {
		case token.EOF:
			return
		case token.IDENT:
			words[text] = true
		case token.STRING:
			for _, one := range word.FindAllString(text, -1) {
				words[one] = true
			}
		}
	}
}

// TestDocLayout: the layout in docs/architecture.md has every package, and no other.
func TestDocLayout(t *testing.T) {
	_, layout, _ := strings.Cut(read(t, "docs/architecture.md"), "\n## Layout\n")
	layout, _, _ = strings.Cut(layout, "\n## ")
	shown := map[string]bool{"gvisor/runsc": true} // a module of its own, which is not in the graph
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(layout, -1) {
		name := strings.TrimSuffix(row[1], "/")
		if _, known := mayImport[name]; !known && !shown[name] {
			t.Errorf("the layout has %s, which is no package", name)
		}
		shown[name] = true
	}
	for name := range mayImport {
		if !shown[name] && !strings.HasPrefix(name, "api/envd/spec/") { // generated
			t.Errorf("the layout in docs/architecture.md has no row for %s", name)
		}
	}
}
