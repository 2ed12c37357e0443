package agent

import (
	"encoding/json"
	"reflect"
	"slices"
	"unicode/utf8"

	"soulbox.dev/soulbox/internal/names"
)

// JSON cannot carry bytes that are not text. So file names cross the pipe in the notation of package names, and are plain bytes on both
// sides of it (PROTOCOL.md, section 2). A field that holds one has the tag `is:"name"`.

// ForWire returns v as it is encoded to cross the pipe: names are in the notation.
func ForWire(v any) any {
	if r := reflect.ValueOf(v); r.IsValid() {
		return renamed(r, names.Text).Interface()
	}
	return nil
}

// Unmarshal decodes what was encoded ForWire. Names that are too long are refused later.
func Unmarshal(body []byte, v any) error {
	err := json.Unmarshal(body, v)
	if r := reflect.ValueOf(v).Elem(); err == nil {
		r.Set(renamed(r, names.Parse))
	}
	return err
}

// renamed returns a copy of v in which to has changed every name. What holds no name is not copied but shared.
func renamed(v reflect.Value, to func(string) string) reflect.Value {
	kind := v.Kind()
	if !holdsNames(v.Type()) || (kind == reflect.Pointer || kind == reflect.Slice) && v.IsNil() {
		return v
	}
	switch kind {
	case reflect.Pointer:
		c := reflect.New(v.Type().Elem())
		c.Elem().Set(renamed(v.Elem(), to))
		return c
	case reflect.Slice:
		c := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
		for i := range v.Len() {
			c.Index(i).Set(renamed(v.Index(i), to))
		}
		return c
	}
	c := reflect.New(v.Type()).Elem()
	c.Set(v)
	for i := range v.NumField() {
		switch f := v.Type().Field(i); {
		case f.Tag.Get("is") == "name":
			c.Field(i).SetString(to(v.Field(i).String()))
		case f.IsExported():
			c.Field(i).Set(renamed(v.Field(i), to))
		}
	}
	return c
}

// holdsNames reports whether values of a type may contain names: the types of wire.go, none of which contains itself.
func holdsNames(t reflect.Type) bool {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice:
		return holdsNames(t.Elem())
	case reflect.Struct:
		for i := range t.NumField() {
			if f := t.Field(i); f.Tag.Get("is") == "name" || f.IsExported() && holdsNames(f.Type) {
				return true
			}
		}
	}
	return false
}

// MarshalJSON writes arguments that are not text in the notation, too: older agents take only text.
func (v StartRequest) MarshalJSON() ([]byte, error) {
	type plain StartRequest
	if v.Shown = v.hasBytes(); v.Shown {
		v.Args = slices.Clone(v.Args)
		for i, arg := range v.Args {
			v.Args[i] = names.Show(arg)
		}
	}
	return json.Marshal(plain(v))
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *StartRequest) UnmarshalJSON(body []byte) error {
	type plain StartRequest
	err := json.Unmarshal(body, (*plain)(v))
	if v.Shown {
		for i, arg := range v.Args {
			v.Args[i] = names.Parse(arg)
		}
	}
	return err
}

// hasBytes reports whether an argument is not text.
func (v StartRequest) hasBytes() bool {
	return slices.ContainsFunc(v.Args, func(arg string) bool { return !utf8.ValidString(arg) })
}
