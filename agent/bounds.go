package agent

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"time"
)

// Bounds of what an agent answers, for fields without a bound of their own (`max:"N"`).
const (
	maxText    = 32 << 10 // bytes of a string: a path of 4 KiB takes three times that if it is not text
	maxObjects = 4 * MaxEntries
)

// decodeAnswer decodes what an agent has answered, and fails if a part of it is larger than allowed.
func decodeAnswer(raw json.RawMessage, result any) error {
	if n := objects(raw); n > maxObjects { // before decoding, which turns a few bytes of JSON into hundreds
		return fmt.Errorf("the answer has %d parts, at most %d are possible: %w", n, maxObjects, ErrTooLarge)
	}
	if len(raw) > 0 {
		if err := Unmarshal(raw, result); err != nil {
			return fmt.Errorf("decode the answer: %w", err)
		}
	}
	return bounded(reflect.ValueOf(result).Elem(), "", 0)
}

// objects counts the objects and lists in JSON.
func objects(raw []byte) (n int) {
	for {
		i := bytes.IndexAny(raw, `{["`)
		if i < 0 {
			return n
		}
		if raw[i] != '"' {
			n++
			raw = raw[i+1:]
			continue
		}
		for raw = raw[i+1:]; ; raw = raw[i+2:] { // to the end of the string
			if i = bytes.IndexAny(raw, `"\`); i < 0 || raw[i] == '\\' && i+2 > len(raw) {
				return n
			}
			if raw[i] == '"' {
				raw = raw[i+1:]
				break
			}
		}
	}
}

// bounded checks a value and everything in it; limit is the bound of its field, or 0 for the default.
func bounded(v reflect.Value, name string, limit int) error {
	switch v.Kind() {
	case reflect.String:
		return within(v.Len(), limit, maxText, name, "bytes")
	case reflect.Pointer:
		if !v.IsNil() {
			return bounded(v.Elem(), name, limit)
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return within(v.Len(), limit, MaxWindow, name, "bytes")
		}
		for i := range v.Len() {
			if err := bounded(v.Index(i), name, 0); err != nil {
				return err
			}
		}
		return within(v.Len(), limit, MaxEntries, name, "entries")
	case reflect.Map:
		for of := v.MapRange(); of.Next(); {
			for _, part := range []reflect.Value{of.Key(), of.Value()} {
				if err := bounded(part, name, MaxCommand); err != nil {
					return err
				}
			}
		}
		return within(v.Len(), limit, MaxEntries, name, "entries")
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			return nil
		}
		for i := range v.NumField() {
			f := v.Type().Field(i)
			own, _ := strconv.Atoi(f.Tag.Get("max")) // 0 means the default bound
			if err := bounded(v.Field(i), f.Name, own); err != nil {
				return err
			}
		}
	}
	return nil
}

func within(n, limit, otherwise int, name, of string) error {
	if limit == 0 {
		limit = otherwise
	}
	if n > limit {
		return fmt.Errorf("the answer has %d %s of %s, at most %d are possible: %w", n, of, name, limit, ErrTooLarge)
	}
	return nil
}
