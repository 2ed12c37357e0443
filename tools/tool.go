package tools

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/google/jsonschema-go/jsonschema"
	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/wholenum"
	"soulbox.dev/soulbox/sandbox"
)

// hints are the four annotations of a tool, of which every tool states all, and what else is said about it.
type hints struct {
	title       string
	readOnly    bool
	destructive bool
	idempotent  bool
	longResult  bool // some clients want to know
	slow        bool // a call may take long
}

// tool is a tool with what mcp-go does not know about it.
type tool struct {
	server.ServerTool
	slow bool
}

// maxResult is how many characters of a long result a client is asked to show.
const maxResult = 200_000

// output is what a tool returns: structured content, and the same as text.
type output interface{ text() string }

// define makes a tool from a method. In and Out are structs whose fields carry their descriptions; a field without omitempty is required.
func define[In any, Out output](s *Toolbox, name, description string, h hints,
	do func(context.Context, In) (Out, error)) tool {
	t := mcp.NewToolWithRawSchema(name, description, schema[In](true))
	t.RawOutputSchema = brief(schema[Out](false)) // models read the list in every conversation, so it must be short
	t.Annotations = mcp.ToolAnnotation{
		Title: h.title, ReadOnlyHint: &h.readOnly, DestructiveHint: &h.destructive, IdempotentHint: &h.idempotent, OpenWorldHint: new(bool),
	}
	if h.longResult {
		t.Meta = &mcp.Meta{AdditionalFields: map[string]any{"anthropic/maxResultSizeChars": maxResult}}
	}
	handle := func(ctx context.Context, req mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		var in In
		if err := decode(req.Params.RawArguments, &in); err != nil {
			return fail(name, err), nil
		}
		out, err := do(withRequest(ctx, &req.Params), in)
		var question *inputNeeded
		if errors.As(err, &question) {
			return question.result, nil
		}
		var protocol *protocolError
		if errors.As(err, &protocol) {
			return nil, protocol
		}
		if err != nil {
			if of, ok := any(in).(interface{ id() string }); ok && errors.Is(err, agent.ErrLost) && !errors.Is(err, sandbox.ErrState) {
				err = s.whyLost(ctx, of.id(), err)
			}
			return fail(name, err), nil
		}
		result := &mcp.CallToolResult{Content: []mcp.Content{mcp.NewTextContent(out.text())}, StructuredContent: out}
		if more, ok := any(out).(interface{ content() []mcp.Content }); ok {
			result.Content = append(result.Content, more.content()...)
		}
		return result, nil
	}
	return tool{ServerTool: server.ServerTool{Tool: t, Handler: handle}, slow: h.slow}
}

// schema is the JSON Schema of a struct. A field may have the tag enum:"a,b", least:"1" (which the tool checks), or as:"tool" if that
// tool already describes it. A field is optional by omission, not by null.
func schema[T any](input bool) json.RawMessage {
	s, err := jsonschema.For[T](nil)
	if err != nil {
		panic(err) // a fault in a type of this package, which every test shows
	}
	tidy(s, reflect.TypeFor[T](), input)
	body, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return body
}

// briefFields is how many fields a brief schema names: the list of all tools must stay short.
const briefFields = 3

// brief reduces a schema to the first fields that are always present, with their types.
func brief(body json.RawMessage) json.RawMessage {
	var s *jsonschema.Schema
	if err := json.Unmarshal(body, &s); err != nil {
		panic(err) // it was written above, so every test would fail
	}
	always := s.Required[:min(briefFields, len(s.Required))] // in the order of the fields
	for name, p := range s.Properties {
		if !slices.Contains(always, name) {
			delete(s.Properties, name)
			continue
		}
		kind := &jsonschema.Schema{Type: p.Type}
		if p.Items != nil { // some clients refuse arrays without items
			kind.Items = &jsonschema.Schema{Type: p.Items.Type}
		}
		s.Properties[name] = kind
	}
	s.Required = nil // it would repeat all names
	short, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return short
}

func tidy(s *jsonschema.Schema, t reflect.Type, input bool) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if len(s.Types) > 0 {
		for _, kind := range s.Types {
			if kind != "null" {
				s.Type = kind
			}
		}
		s.Types = nil
	}
	if len(s.Required) == 0 {
		s.Required = nil
	}
	s.AdditionalProperties = nil // results may get more fields later; for arguments that do not exist, decode has the better error
	switch {
	case s.Items != nil:
		tidy(s.Items, t.Elem(), input)
	case t.Kind() == reflect.Struct && s.Properties != nil:
		for _, f := range reflect.VisibleFields(t) {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			p := s.Properties[name]
			if p == nil {
				continue
			}
			if list := f.Tag.Get("enum"); list != "" {
				for _, v := range strings.Split(list, ",") {
					p.Enum = append(p.Enum, v)
				}
			}
			if least := f.Tag.Get("least"); least != "" {
				p.Minimum = new(float64)
				if _, err := fmt.Sscan(least, p.Minimum); err != nil {
					panic(err) // a fault in a tag, which every test shows
				}
			}
			if header := f.Tag.Get("header"); header != "" && input {
				p.Extra = map[string]any{"x-mcp-header": header} // so that a proxy can route by it (SEP-2243)
			}
			if other := f.Tag.Get("as"); other != "" { // the other tool has described it
				p.Types, p.Type, p.Properties, p.Required, p.Description = nil, "object", nil, nil, "as in "+other
			}
			tidy(p, f.Type, input)
		}
	}
}

// argumentError says what is wrong with an argument, in words for a model.
type argumentError string

// Error implements error.
func (e argumentError) Error() string { return string(e) }

func badArgument(format string, args ...any) error {
	return argumentError(fmt.Sprintf(format, args...))
}

// badCursor refuses a cursor that a tool did not make.
func badCursor(tool, instead string) error {
	return badArgument("The argument \"cursor\" does not come from %s; %s.", tool, instead)
}

// aliases are the names that other tools give our arguments and that models know.
var aliases = map[string]string{"cmd": "command", "workdir": "cwd", "file_path": "path", "old_string": "old_str", "new_string": "new_str",
	"yield_time_ms": "yield_ms"}

// decode fills a struct from a call's arguments, one by one, so that an error names the wrong one.
func decode(raw json.RawMessage, in any) error {
	given := map[string]json.RawMessage{}
	if len(raw) > 0 && string(raw) != "null" {
		if err := json.Unmarshal(raw, &given); err != nil {
			return badArgument("The arguments must be a JSON object.")
		}
	}
	value := reflect.ValueOf(in).Elem()
	fields := map[string]reflect.StructField{}
	var names []string
	for _, f := range reflect.VisibleFields(value.Type()) {
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" && name != "-" {
			fields[name] = f
			names = append(names, name)
		}
	}
	for name, arg := range given {
		f, ok := fields[name]
		if real := aliases[name]; !ok && real != "" {
			if _, both := given[real]; both {
				return badArgument("Give either %q or %q: they are the same argument.", real, name)
			}
			f, ok = fields[real]
		}
		if !ok {
			return badArgument("There is no argument %q. The arguments are: %s.", shorten(name, 60), strings.Join(names, ", "))
		}
		if string(arg) == "null" {
			continue
		}
		if err := setArgument(value.FieldByIndex(f.Index), arg); err != nil {
			return badArgument("The argument %q must be %s; got %s.", name, describeType(f.Type), shorten(string(arg), 60))
		}
		if list := f.Tag.Get("enum"); list != "" && !strings.Contains(","+list+",", ","+value.FieldByIndex(f.Index).String()+",") {
			return badArgument("The argument %q must be one of: %s; got %s.", name, strings.ReplaceAll(list, ",", ", "),
				shorten(string(arg), 60))
		}
		delete(fields, name)
		delete(fields, aliases[name])
	}
	for _, name := range names {
		if f, missing := fields[name]; missing && !strings.Contains(f.Tag.Get("json"), ",omit") {
			if what := f.Tag.Get("jsonschema"); what != "" {
				return badArgument("The argument %q is missing: %s.", name, what)
			}
			return badArgument("The argument %q is missing.", name) // its name says what it is
		}
	}
	return nil
}

// setArgument decodes one argument. Numbers and booleans in quotes are accepted, because models write them.
func setArgument(field reflect.Value, arg json.RawMessage) error {
	err := wholenum.Unmarshal(arg, field.Addr().Interface())
	if err == nil {
		return nil
	}
	var quoted string
	if json.Unmarshal(arg, &quoted) == nil && json.Valid([]byte(quoted)) {
		return wholenum.Unmarshal([]byte(quoted), field.Addr().Interface())
	}
	return err
}

func describeType(t reflect.Type) string {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int64:
		return "a whole number"
	case reflect.Float64:
		return "a number"
	case reflect.Slice:
		return "an array"
	}
	return "an object with string values"
}

func shorten(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n]) + "…"
	}
	return s
}

// fail is the result of a call that failed.
func fail(tool string, err error) *mcp.CallToolResult {
	return &mcp.CallToolResult{IsError: true, Content: []mcp.Content{mcp.NewTextContent(explain(tool, err))}}
}
