package agent

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// notNames are the fields of text on the wire that are no file names, by what they are called in whatever type. Patterns match names but
// are text; an address may be a socket's, and is text as well; arguments and the environment have notations of their own.
var notNames = strings.Fields(`Address Aliases Args Attrs AttrsBelow Boot Cause Command Data Detail Dial Env Error Functions Glob Group Head
	ID Ignore Kind Message Mode Name Network New Old Op Options Owner Pattern Permissions Process Shell Signal Snippet State Stdin Stream Tag
	Tail Text Type Unset User Variables Version Watch`)

// TestNameTags: each field of text in a type of the wire is a file name, with the tag that says so, or is known to be none. Without the tag
// a name that is not text would be changed on its way.
func TestNameTags(t *testing.T) {
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	names, others := 0, map[string]bool{}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".go") || strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), e.Name(), nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok {
				return true
			}
			if of, ok := spec.Type.(*ast.StructType); ok {
				for _, f := range of.Fields.List {
					if f.Tag == nil || !isText(f.Type) {
						continue
					}
					tag, what := reflect.StructTag(strings.Trim(f.Tag.Value, "`")), spec.Name.Name+"."+f.Names[0].Name
					switch isName, known := tag.Get("is") == "name", slices.Contains(notNames, f.Names[0].Name); {
					case isName && known:
						t.Errorf("%s is a file name, and elsewhere it is none: call it another name", what)
					case isName:
						if id, ok := f.Type.(*ast.Ident); !ok || id.Name != "string" {
							t.Errorf("%s has the tag of a file name, which only a string may have", what)
						}
						names++
					case known:
						others[f.Names[0].Name] = true
					default:
						t.Errorf("%s: if it is a file name it needs the tag is:\"name\", otherwise add it to notNames", what)
					}
				}
			}
			return true
		})
	}
	if names < 25 || len(others) != len(notNames) {
		t.Errorf("%d names were found, and %d of %d others", names, len(others), len(notNames))
	}
}

// isText reports whether values of a type are made of strings or bytes.
func isText(e ast.Expr) bool {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name == "string" || e.Name == "byte"
	case *ast.ArrayType:
		return isText(e.Elt)
	case *ast.MapType:
		return isText(e.Key) || isText(e.Value)
	case *ast.StarExpr:
		return isText(e.X)
	}
	return false
}
