package agent

import (
	"encoding/json"
	"slices"
	"unicode/utf8"

	"soulbox.dev/soulbox/internal/names"
)

// JSON cannot carry bytes that are not text. So file names cross the pipe in the notation of package names, and are plain bytes on both
// sides of it (PROTOCOL.md, section 2).

// marshalNames encodes v, which contains the names in. It changes them, so v must be the caller's copy.
func marshalNames(v any, in ...*string) ([]byte, error) {
	for _, name := range in {
		*name = names.Text(*name)
	}
	return json.Marshal(v)
}

// unmarshalNames decodes what marshalNames wrote. Names that are too long are refused later.
func unmarshalNames(body []byte, v any, in ...*string) error {
	err := json.Unmarshal(body, v)
	for _, name := range in {
		*name = names.Parse(*name)
	}
	return err
}

// MarshalJSON implements json.Marshaler.
func (v Header) MarshalJSON() ([]byte, error) {
	type plain Header
	c := plain(v)
	return marshalNames(&c, &c.Path)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *Header) UnmarshalJSON(body []byte) error {
	type plain Header
	return unmarshalNames(body, (*plain)(v), &v.Path)
}

// MarshalJSON implements json.Marshaler.
func (v StartRequest) MarshalJSON() ([]byte, error) {
	type plain StartRequest
	c := plain(v)
	if c.Shown = v.hasBytes(); c.Shown {
		c.Args = slices.Clone(c.Args)
		for i, arg := range c.Args {
			c.Args[i] = names.Show(arg)
		}
	}
	return marshalNames(&c, &c.Cwd)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *StartRequest) UnmarshalJSON(body []byte) error {
	type plain StartRequest
	err := unmarshalNames(body, (*plain)(v), &v.Cwd)
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

// MarshalJSON implements json.Marshaler.
func (v Process) MarshalJSON() ([]byte, error) {
	type plain Process
	c := plain(v)
	return marshalNames(&c, &c.Cwd, &c.ShellCwd, &c.GoneCwd)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *Process) UnmarshalJSON(body []byte) error {
	type plain Process
	return unmarshalNames(body, (*plain)(v), &v.Cwd, &v.ShellCwd, &v.GoneCwd)
}

// MarshalJSON implements json.Marshaler.
func (v Config) MarshalJSON() ([]byte, error) {
	type plain Config
	c := plain(v)
	return marshalNames(&c, &c.Cwd)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *Config) UnmarshalJSON(body []byte) error {
	type plain Config
	return unmarshalNames(body, (*plain)(v), &v.Cwd)
}

// MarshalJSON implements json.Marshaler.
func (v User) MarshalJSON() ([]byte, error) {
	type plain User
	c := plain(v)
	return marshalNames(&c, &c.Home, &c.Cwd)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *User) UnmarshalJSON(body []byte) error {
	type plain User
	return unmarshalNames(body, (*plain)(v), &v.Home, &v.Cwd)
}

// MarshalJSON implements json.Marshaler.
func (v FileInfo) MarshalJSON() ([]byte, error) {
	type plain FileInfo
	c := plain(v)
	return marshalNames(&c, &c.Path, &c.Target)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *FileInfo) UnmarshalJSON(body []byte) error {
	type plain FileInfo
	return unmarshalNames(body, (*plain)(v), &v.Path, &v.Target)
}

// MarshalJSON implements json.Marshaler.
func (v Link) MarshalJSON() ([]byte, error) {
	type plain Link
	c := plain(v)
	return marshalNames(&c, &c.Target, &c.Real)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *Link) UnmarshalJSON(body []byte) error {
	type plain Link
	return unmarshalNames(body, (*plain)(v), &v.Target, &v.Real)
}

// MarshalJSON implements json.Marshaler.
func (v DirRequest) MarshalJSON() ([]byte, error) {
	type plain DirRequest
	c := plain(v)
	return marshalNames(&c, &c.Path, &c.After)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *DirRequest) UnmarshalJSON(body []byte) error {
	type plain DirRequest
	return unmarshalNames(body, (*plain)(v), &v.Path, &v.After)
}

// MarshalJSON implements json.Marshaler.
func (v PathRequest) MarshalJSON() ([]byte, error) {
	type plain PathRequest
	c := plain(v)
	return marshalNames(&c, &c.Path)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *PathRequest) UnmarshalJSON(body []byte) error {
	type plain PathRequest
	return unmarshalNames(body, (*plain)(v), &v.Path)
}

// MarshalJSON implements json.Marshaler.
func (v MoveRequest) MarshalJSON() ([]byte, error) {
	type plain MoveRequest
	c := plain(v)
	return marshalNames(&c, &c.From, &c.To)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *MoveRequest) UnmarshalJSON(body []byte) error {
	type plain MoveRequest
	return unmarshalNames(body, (*plain)(v), &v.From, &v.To)
}

// MarshalJSON implements json.Marshaler.
func (v EditRequest) MarshalJSON() ([]byte, error) {
	type plain EditRequest
	c := plain(v)
	return marshalNames(&c, &c.Path)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *EditRequest) UnmarshalJSON(body []byte) error {
	type plain EditRequest
	return unmarshalNames(body, (*plain)(v), &v.Path)
}

// MarshalJSON implements json.Marshaler.
func (v SearchRequest) MarshalJSON() ([]byte, error) {
	type plain SearchRequest
	c := plain(v)
	return marshalNames(&c, &c.Path)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *SearchRequest) UnmarshalJSON(body []byte) error {
	type plain SearchRequest
	return unmarshalNames(body, (*plain)(v), &v.Path)
}

// MarshalJSON implements json.Marshaler.
func (v Match) MarshalJSON() ([]byte, error) {
	type plain Match
	c := plain(v)
	return marshalNames(&c, &c.Path)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *Match) UnmarshalJSON(body []byte) error {
	type plain Match
	return unmarshalNames(body, (*plain)(v), &v.Path)
}

// MarshalJSON implements json.Marshaler.
func (v TreeRequest) MarshalJSON() ([]byte, error) {
	type plain TreeRequest
	c := plain(v)
	return marshalNames(&c, &c.Path)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *TreeRequest) UnmarshalJSON(body []byte) error {
	type plain TreeRequest
	return unmarshalNames(body, (*plain)(v), &v.Path)
}

// MarshalJSON implements json.Marshaler.
func (v TreeEvent) MarshalJSON() ([]byte, error) {
	type plain TreeEvent
	c := plain(v)
	return marshalNames(&c, &c.Path, &c.From)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *TreeEvent) UnmarshalJSON(body []byte) error {
	type plain TreeEvent
	return unmarshalNames(body, (*plain)(v), &v.Path, &v.From)
}

// MarshalJSON implements json.Marshaler.
func (v WatchEvent) MarshalJSON() ([]byte, error) {
	type plain WatchEvent
	c := plain(v)
	return marshalNames(&c, &c.Path)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *WatchEvent) UnmarshalJSON(body []byte) error {
	type plain WatchEvent
	return unmarshalNames(body, (*plain)(v), &v.Path)
}

// MarshalJSON implements json.Marshaler.
func (v ShellInfo) MarshalJSON() ([]byte, error) {
	type plain ShellInfo
	c := plain(v)
	return marshalNames(&c, &c.Cwd)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *ShellInfo) UnmarshalJSON(body []byte) error {
	type plain ShellInfo
	return unmarshalNames(body, (*plain)(v), &v.Cwd)
}

// MarshalJSON implements json.Marshaler.
func (v Error) MarshalJSON() ([]byte, error) {
	type plain Error
	c := plain(v)
	return marshalNames(&c, &c.Path)
}

// UnmarshalJSON implements json.Unmarshaler.
func (v *Error) UnmarshalJSON(body []byte) error {
	type plain Error
	return unmarshalNames(body, (*plain)(v), &v.Path)
}
